"""What the ``fast`` preset of the planewave engine costs in accuracy: its error against ``crystalgym``, per property.

    python -m benchmarks dft-presets [--properties band_gap ...] [--count 30] [--seed 0] [--vocabulary small]
        [--salts] [--special-points] [--store FILE] [--workers N]

The crystals are random: three elements of a vocabulary (the small one is what tasks use unless told otherwise) as A, B
and X of a cubic perovskite ABX3 at its own lattice parameter (3.795 Å), drawn until as many as asked for pass the
engine's check of the input. Most of them are metals; ``--salts`` draws from an alkali metal, an alkaline earth metal
and a halogen or hydrogen, most of which have a gap.

Values of both presets are compared where both succeed; gaps also among the crystals that are not metals.
``crystalgym`` gets 60 SCF steps here instead of 300: its fixed occupations converge slowly or never on metals. Its mesh
holds Gamma, but of odd subdivisions no zone boundary, where many band edges sit: ``--special-points`` adds those points
to it, as ``fast`` has them. Results are kept in the store, so an interrupted run goes on. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase.data import atomic_numbers

from crystaljax import library
from crystaljax.dft_bridge import Request, Store, open_bridge
from crystaljax.dft_bridge.engines.base import PROPERTIES
from crystaljax.dft_bridge.engines.checks import symbols_of
from crystaljax.dft_bridge.engines.planewave import PlanewaveEngine
from crystaljax.elements import VOCABULARIES
from crystaljax.status import Status

REFERENCE = "crystalgym"
SALTS = ("Li Na K Rb".split(), "Be Mg Ca Sr".split(), "H F Cl Br".split())
"""Elements of A, B and X."""


def draw(count: int, seed: int, elements: Sequence[Sequence[str]], property_name: str) -> list[Request]:
    """Random perovskites that the engine accepts for the property, of the ``elements`` for A, B and X."""
    rng, engine = np.random.default_rng(seed), PlanewaveEngine.preset(REFERENCE)
    requests: list[Request] = []
    while len(requests) < count:
        numbers = np.array([atomic_numbers[rng.choice(choice)] for choice in elements])[[0, 1, 2, 2, 2]]
        request = Request.of(library.perovskite(), numbers, property_name)
        if engine.refuse(request.crystal, property_name) is None and request not in requests:
            requests.append(request)
    return requests


def errors(values: np.ndarray, reference: np.ndarray, relative: bool) -> dict[str, float]:
    """Mean and largest deviation; in per cent if relative."""
    deviation = np.abs(values - reference)
    if relative:
        deviation = 100 * deviation / np.abs(reference)
    unit = "_percent" if relative else ""
    return {
        f"mean{unit}": round(float(deviation.mean()), 3),
        f"median{unit}": round(float(np.median(deviation)), 3),
        f"max{unit}": round(float(deviation.max()), 3),
    }


def compare(
    property_name: str, requests: list[Request], special_points: bool, store: Store, workers: int | None
) -> dict:
    """Both presets on the same crystals: a table, and the summary."""
    found = {}
    changes = {"max_scf_iterations": 60, "special_points": special_points}
    for preset, settings in ((REFERENCE, changes), ("fast", {})):
        with open_bridge("planewave", preset, store, workers, **settings) as bridge:
            found[preset] = bridge.evaluate(requests)
    for request, *results in zip(requests, found[REFERENCE], found["fast"], strict=True):
        shown = [f"{r.value:9.4f}" if r.status == Status.OK else r.status.name for r in results]
        print(f"{property_name} {' '.join(symbols_of(request.crystal)):16} {shown[0]}, fast {shown[1]}", flush=True)
    good = [r.status == f.status == Status.OK for r, f in zip(found[REFERENCE], found["fast"], strict=True)]
    reference, values = (np.array([r.value for r in found[preset]])[good] for preset in (REFERENCE, "fast"))
    seconds = {preset: round(float(np.mean([r.seconds for r in found[preset]])), 2) for preset in found}
    summary = {
        "crystals": len(requests),
        "both_ok": int(np.sum(good)),
        "same_status": sum(r.status == f.status for r, f in zip(found[REFERENCE], found["fast"], strict=True)),
        "cpu_seconds_each": seconds,
        **errors(values, reference, relative=property_name != "band_gap"),
    }
    if property_name == "band_gap":
        open_gap = (reference > 0) | (values > 0)
        summary["with_a_gap"] = {"crystals": int(open_gap.sum())}
        if open_gap.any():
            summary["with_a_gap"] |= errors(values[open_gap], reference[open_gap], relative=False)
    return summary


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--properties", nargs="*", choices=PROPERTIES, default=list(PROPERTIES))
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", choices=VOCABULARIES, default="small")
    parser.add_argument("--salts", action="store_true", help="crystals that are likely to have a gap")
    parser.add_argument("--special-points", action="store_true", help="add the zone boundary to the reference")
    parser.add_argument("--store", type=Path, help="file of the results (default: a temporary one)")
    parser.add_argument("--workers", type=int)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(arguments.store or Path(scratch) / "results.db")
        result = {}
        for name in arguments.properties:
            elements = SALTS if arguments.salts else [VOCABULARIES[arguments.vocabulary].symbols] * 3
            requests = draw(arguments.count, arguments.seed, elements, name)
            result[name] = compare(name, requests, arguments.special_points, store, arguments.workers)
            print(json.dumps(result[name]), flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
