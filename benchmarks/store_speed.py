"""Speed of the results store.

    python -m benchmarks store-speed [--results 100000] [--keys 10000] [--store FILE|URL]

Fills an empty store with made-up results of real crystals (perovskites, 50 elements) under the fingerprint of a real
engine, then measures opening it (a new ``Store``, checked and written to), the lookup of many keys at once (median of
several, keys in random order, another tenth of them unknown), durable writes, making keys, and what the commands
``stats`` and ``verify`` do. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from crystaljax import library
from crystaljax.dft_bridge.engines.base import Result
from crystaljax.dft_bridge.engines.registry import make_engine
from crystaljax.dft_bridge.keys import Keys, Request
from crystaljax.dft_bridge.store import Record, Store
from crystaljax.dft_bridge.store.query import tally
from crystaljax.dft_bridge.store.verify import verify
from crystaljax.elements import LARGE
from crystaljax.status import Status

PROPERTY = "band_gap"
REPETITIONS = 9
MAX_LOOKUP_MS = 100.0
MAX_OPEN_SECONDS = 5.0


def records(count: int) -> Iterator[Record]:
    """Made-up results of distinct crystals."""
    skeleton = library.perovskite()
    fingerprint = make_engine("planewave").fingerprint(PROPERTY)
    keys = Keys(skeleton, PROPERTY, fingerprint)
    numbers = LARGE.numbers[:-1].tolist()
    details = {"kpoints": [4, 4, 4], "iterations": 11, "energy": -1234.56789, "metal": False}
    for a, b, x, y in itertools.islice(itertools.product(numbers, numbers, numbers, numbers), count):
        request = Request.of(skeleton, (a, b, x, x, y), PROPERTY)
        key = keys.key(request.numbers)
        result = Result(float((a * b + x * y) % 97) / 10, Status.OK, 12.5, "", details)
        yield Record(key, request.crystal, PROPERTY, result, "planewave 1, fast", fingerprint)


def seconds(action) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(where: Path | str, results: int, keys: int) -> dict[str, float]:
    store = Store(where)
    made = records(results)
    known: list[str] = []
    filling = 0.0
    while chunk := list(itertools.islice(made, 1000)):
        filling += seconds(lambda chunk=chunk: store.write(chunk))
        known += [record.key for record in chunk]
    held = len(store)
    print(f"{held} results written in {filling:.1f} s, 1,000 at a time")

    opening = statistics.median(seconds(lambda: Store(where).open()) for _ in range(REPETITIONS))
    print(f"open: {opening:.4f} s")

    rng = np.random.default_rng(0)
    walls, cpus = [], []
    for _ in range(REPETITIONS):
        some = [known[i] for i in rng.choice(len(known), keys, replace=False)] + [f"cj{i}" for i in range(keys // 10)]
        cpu = time.process_time()
        walls.append(1e3 * seconds(lambda some=some: store.read(some)))
        cpus.append(1e3 * (time.process_time() - cpu))
    lookup, cpu = statistics.median(walls), statistics.median(cpus)
    print(f"lookup of {keys} keys: {lookup:.1f} ms ({min(walls):.1f} to {max(walls):.1f}), CPU {cpu:.1f} ms")

    # Keys that are not there yet; one durable transaction each, or all in one.
    new = list(itertools.islice(records(10**9), results, results + 150))
    single = statistics.median(1e3 * seconds(lambda r=r: store.write([r])) for r in new[:50])
    batch = 1e3 * seconds(lambda: store.write(new[50:]))
    print(f"durable write: {single:.2f} ms for one result, {batch:.1f} ms for 100")

    making = seconds(lambda: sum(1 for _ in records(2000))) / 2000
    counting, checking = seconds(lambda: tally(store.rows(data=False))), seconds(lambda: verify(store))
    print(f"key and request: {1e6 * making:.0f} us; stats {counting:.1f} s, verify {checking:.1f} s")
    return {
        "results": held,
        "open_seconds": round(opening, 4),
        "lookup_keys": keys,
        "lookup_ms": round(lookup, 1),
        "lookup_cpu_ms": round(cpu, 1),
        "write_one_ms": round(single, 2),
        "write_hundred_ms": round(batch, 1),
        "stats_seconds": round(counting, 2),
        "verify_seconds": round(checking, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=int, default=100_000)
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument("--store", help="an empty store (default: a temporary file)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        where = arguments.store or Path(scratch) / "results.db"
        measured = measure(where, arguments.results, arguments.keys)
    met = measured["lookup_ms"] < MAX_LOOKUP_MS and measured["open_seconds"] < MAX_OPEN_SECONDS
    print(json.dumps(measured | {"met": met}))


if __name__ == "__main__":
    main()
