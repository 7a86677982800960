"""How close the bridge comes to what its workers could do, what it adds to a calculation, and whether it grows.

1. 4,096 requests, a quarter of them distinct, for an engine that sleeps, on eight worker processes. *Ideal* is the time
   that the sleeps alone take on eight workers that are up already.
2. As many distinct crystals for an engine that answers at once, in a thread of this process: all the wall time is the
   bridge's own, from the request to the durable record.
3. 100,000 requests in batches, a quarter of them distinct, for the same engine: the growth of the resident memory from
   the tenth part of them to the end.

    python -m benchmarks bridge-throughput [--requests 4096] [--workers 8] [--sleep 0.25] [--many 100000]

The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from crystaljax import library
from crystaljax.dft_bridge import Bridge, Request
from crystaljax.dft_bridge.testing import FakeEngine

C1 = library.benchmark("C1")
ELEMENTS = 90
REPEATS = 4
"""Requests for each distinct crystal."""
BATCH = 1024


def distinct(count: int, first: int = 0) -> list[Request]:
    """Requests for distinct crystals, numbered from ``first``; of C1's symmetry none makes two of them one."""
    numbers = np.arange(first, first + count)
    a, b, c = numbers % ELEMENTS + 1, numbers // ELEMENTS % ELEMENTS + 1, numbers // ELEMENTS**2 + 1
    return [Request(C1, (int(x), int(y), int(z), int(z), int(z)), "band_gap") for x, y, z in zip(a, b, c, strict=True)]


def shuffled(requests: list[Request], seed: int) -> list[Request]:
    """Each request several times, in random order."""
    order = np.random.default_rng(seed).permutation(REPEATS * len(requests))
    return [requests[i % len(requests)] for i in order]


def ratio_to_ideal(folder: Path, requests: int, workers: int, sleep: float) -> float:
    """Wall time over ideal."""
    asked = distinct(requests // REPEATS)
    with Bridge(FakeEngine(sleep=sleep), folder / "sleeping.db", workers) as bridge:
        bridge.evaluate(distinct(2 * workers, first=len(asked)))  # starts the workers
        start = time.perf_counter()
        bridge.evaluate(shuffled(asked, seed=0))
        wall = time.perf_counter() - start
        calls = bridge.stats().calls - 2 * workers
    ideal = -(-len(asked) // workers) * sleep
    print(f"{requests} requests, {calls} calculations of {sleep} s: {wall:.2f} s, ideal {ideal:.2f} s", flush=True)
    return wall / ideal


def inline(folder: Path) -> Bridge:
    return Bridge(FakeEngine(), folder / "instant.db", executor=ThreadPoolExecutor(1))


def overhead(folder: Path, count: int) -> float:
    """Milliseconds per distinct crystal."""
    with inline(folder) as bridge:
        bridge.evaluate(distinct(10))
        asked = shuffled(distinct(count, first=10), seed=1)
        start = time.perf_counter()
        bridge.evaluate(asked)
        wall = time.perf_counter() - start
        phases = {phase: round(1e3 * spent / count, 3) for phase, spent in bridge.stats().phases.items()}
    print(f"{count} distinct crystals without calculation: {wall:.2f} s; ms of each in {phases}", flush=True)
    return 1e3 * wall / count


def growth(folder: Path, many: int) -> float:
    """MiB of resident memory gained between a tenth of the requests and the end."""
    process = psutil.Process(os.getpid())
    per_batch = BATCH // REPEATS
    with inline(folder) as bridge:
        for batch in range(many // BATCH):
            if batch == many // BATCH // 10:
                gc.collect()
                before = process.memory_info().rss
            bridge.evaluate(shuffled(distinct(per_batch, first=batch * per_batch), seed=batch))
        gc.collect()
        after = process.memory_info().rss
        stats = bridge.stats()
    print(f"{stats.requests} requests: {before / 2**20:.1f} to {after / 2**20:.1f} MiB; {stats.calls} calculations")
    return (after - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--sleep", type=float, default=0.25, help="seconds of a calculation (default: 0.25)")
    parser.add_argument("--many", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = {
            "ratio_to_ideal": round(ratio_to_ideal(folder, options.requests, options.workers, options.sleep), 4),
            "overhead_ms_per_distinct": round(overhead(folder, options.requests), 3),
        }
        for file in folder.glob("instant.db*"):  # and its journal
            file.unlink()
        result["mib_growth"] = round(growth(folder, options.many), 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
