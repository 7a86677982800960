"""Ten thousand malformed inputs: CIFs, structures, settings, pseudopotentials, outputs of pw.x.

Each must be refused with a clear error or give a right result; no other exception may come out, and no file may be left
behind. What is tried, and what counts as clear, is in ``benchmarks/fuzzing.py``. Inputs follow from the seed.

    python -m benchmarks fuzz [--inputs 10000] [--seed 0] [--doors cif ...]

The last line of the output is one JSON object. An input that fails is printed, in its smallest form, and the exit
status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
import traceback
from collections import Counter

from benchmarks import fuzzing

PART = 250
"""Inputs of one search; each part has a seed of its own."""
LONGEST = 300.0
"""Seconds after which an input counts as one that hangs."""


def parts(count: int) -> list[int]:
    """``count`` as a sum of parts."""
    whole, rest = divmod(count, PART)
    return [PART] * whole + [rest] * (rest > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="over all doors (default: 10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--doors", nargs="+", choices=fuzzing.TARGETS, default=list(fuzzing.TARGETS))
    given = parser.parse_args()
    total, failed, start = Counter(), [], time.monotonic()
    share = sum(fuzzing.TARGETS[name].share for name in given.doors)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        tempfile.tempdir = folder
        for name in given.doors:
            count, begin = round(given.inputs * fuzzing.TARGETS[name].share / share), time.process_time()
            tally = Counter[str]()
            try:
                for part, size in enumerate(parts(count)):
                    tally += fuzzing.fuzz(name, size, given.seed + part, LONGEST)
            except Exception:  # what the search is for
                traceback.print_exc()
                failed.append(name)
            total += tally
            spent = time.process_time() - begin
            print(f"{name}: {tally['refused']} refused, {tally['accepted']} accepted, {spent:.0f} CPU s", flush=True)
    result = {"inputs": total.total(), **total, "failed_doors": failed, "seconds": round(time.monotonic() - start, 1)}
    result["cpu_seconds"] = round(time.process_time(), 1)
    print(json.dumps(result))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
