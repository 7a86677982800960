"""Makes a table of results: every crystal of a prototype over the small vocabulary, by the planewave engine.

    python -m benchmarks make-tables rocksalt [zincblende cscl fluorite perovskite]
        [--properties band_gap total_energy density bulk_modulus] [--preset fast] [--store FILE] [--workers N]
        [--out FOLDER]

Results are kept in the store, so an interrupted run goes on where it was, and a finished one costs nothing. As soon as
a property of a prototype is complete its table is written; without ``--out`` it becomes part of the package. The total
energy is that of the SCF that gives the band gap, so one calculation makes both tables.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from crystaljax import library, tables
from crystaljax.caveats import Caveat
from crystaljax.dft_bridge import Bridge, Request, open_bridge
from crystaljax.dft_bridge.engines.base import Result
from crystaljax.elements import SMALL
from crystaljax.skeleton import Skeleton
from crystaljax.status import Status

PROTOTYPES = {
    "rocksalt": "RocksaltAB",
    "zincblende": "ZincblendeAB",
    "cscl": "CsClAB",
    "fluorite": "FluoriteAX2",
    "perovskite": "PerovskiteABX3",
}
CALCULATED_AS = {"total_energy": "band_gap"}
"""Properties that are a by-product of the calculation of another."""
OF_THE_MACHINE = (Status.CANCELLED, Status.TIMEOUT, Status.WORKER_DIED, Status.OUT_OF_MEMORY)
"""Failures that say nothing about a crystal, so that no table may hold them."""
PROGRESS_SECONDS = 20.0


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=PROTOTYPES, metavar="NAME", help=", ".join(PROTOTYPES))
    parser.add_argument("--properties", nargs="+", choices=tables.UNITS, default=list(tables.UNITS))
    parser.add_argument("--preset", default="fast", help="settings of the engine (default: fast)")
    parser.add_argument("--store", type=Path, help="file of the results (default: the user's)")
    parser.add_argument("--workers", type=int, help="processes that calculate (default: one per core or GPU)")
    parser.add_argument("--out", type=Path, default=tables.FOLDER, help="folder of the tables")
    options = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is for the workers
    with open_bridge("planewave", options.preset, options.store, options.workers, total_energy=True) as bridge:
        for property_name in options.properties:
            for name in options.names:
                skeleton = library.PROTOTYPES[PROTOTYPES[name]]()
                table = make(bridge, options.preset, skeleton, property_name)
                print(f"wrote {tables.write(table, options.out)}: {_summary(table)}", flush=True)


def make(bridge: Bridge, preset: str, skeleton: Skeleton, property_name: str) -> tables.Table:
    """The table of a property of a prototype; calculates what the bridge's store does not hold."""
    calculated = CALCULATED_AS.get(property_name, property_name)
    labelings, _ = tables.labelings(skeleton, SMALL)
    requests = [Request.of(skeleton, numbers, calculated) for numbers in labelings]
    results = evaluate(bridge, requests, f"{property_name} of {skeleton.name}")
    unfinished = sum(result.status in OF_THE_MACHINE for result in results)
    if unfinished:
        raise RuntimeError(f"{unfinished} calculations did not finish here; run the command again")
    entries = tuple(
        _entry(tables.symbols_of(numbers), result, property_name)
        for numbers, result in zip(labelings, results, strict=True)
    )
    return tables.Table(property_name, skeleton, SMALL, entries, origin(bridge, preset, calculated, skeleton))


def evaluate(bridge: Bridge, requests: list[Request], what: str) -> list[Result]:
    """The results of the requests, with a line of progress now and then."""
    tickets, begin, shown = bridge.submit(requests), time.monotonic(), 0.0
    found: dict[int, Result] = {}
    while len(found) < len(requests):
        found |= {answer.ticket: answer.result for answer in bridge.collect(PROGRESS_SECONDS)}
        if time.monotonic() - shown > PROGRESS_SECONDS or len(found) == len(requests):
            shown = time.monotonic()
            print(f"{what}: {len(found)} of {len(requests)}, {shown - begin:.0f} s", flush=True)
    return [found[ticket] for ticket in tickets]


def origin(bridge: Bridge, preset: str, calculated: str, skeleton: Skeleton) -> dict[str, Any]:
    """Where the numbers come from."""
    settings = bridge.engine.fingerprint_of(skeleton.lattice, skeleton.frac_coords, calculated)
    versions = {"crystaljax": metadata.version("crystaljax"), "jax": jax.__version__}
    return {"engine": bridge.engine.name, "preset": preset, "calculated_as": calculated} | {
        "versions": versions,
        "settings": settings,
    }


def _entry(symbols: tuple[str, ...], result: Result, property_name: str) -> tables.Entry:
    details = {name: fact for name, fact in result.details.items() if _worth_keeping(fact)}
    details["seconds"] = round(result.seconds, 2)
    if result.status != Status.OK:
        return tables.Entry(symbols, result.status, None, result.message, details)
    value = details["energy"] if property_name == "total_energy" else result.value
    of_gap = {Caveat.FEW_KPOINTS} if property_name == "total_energy" else set()
    told = tuple(caveat for caveat in result.caveats if caveat not in of_gap)
    return tables.Entry(symbols, result.status, float(value), "", details, told)


def _worth_keeping(fact: Any) -> bool:
    """Numbers, and lists of few: not the lattices and energies, which the store has."""
    if isinstance(fact, list):
        return len(fact) == 3 and all(isinstance(part, int) for part in fact)
    return isinstance(fact, bool | int) or (isinstance(fact, float) and math.isfinite(fact))


def _summary(table: tables.Table) -> str:
    counts = {status.name: int((table.statuses == status).sum()) for status in Status}
    seconds = sum(entry.details["seconds"] for entry in table.entries)
    outcomes = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{len(table.entries)} crystals: {outcomes}; {seconds:.0f} CPU seconds"


if __name__ == "__main__":
    main()
