"""Convergence of the ``gpaw`` engine: the measurements behind its presets' cut-offs.

    python -m benchmarks gpaw-convergence --out benchmarks/results/gpaw_convergence.md

Three tables: gap and bulk modulus against the cut-off, the energy of single elements against the cut-off (which of
them are hard), and the presets ``fast`` against ``standard`` on perovskites. One process, one core; the last line
printed is one JSON object with every number.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers, covalent_radii

from crystaljax.dft_bridge.engines.base import Crystal, Result
from crystaljax.dft_bridge.engines.gpaw import GpawEngine

CUTOFFS = (400.0, 600.0, 800.0, 1000.0)
HARD_CUTOFFS = (1200.0, 1500.0)
"""Further cut-offs, for fluorides."""
ELEMENT_CUTOFFS = (400.0, 600.0, 800.0, 1000.0, 1200.0, 1500.0)
REFERENCE_CUTOFF = 1800.0
ELEMENTS = ("N", "O", "F", "Fe")
KPPA = 40.0
"""A coarse mesh: how the plane waves converge hardly depends on the k-points."""
MODULUS_SITES = 2
"""Largest cell whose bulk modulus is measured; what matters is the element, not the number of sites."""

PEROVSKITE = np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
ORDERED = {
    "KMgF3": 3.99,
    "RbCaF3": 4.46,
    "NaMgF3": 3.95,
    "RbCaH3": 4.55,
    "SrTiO3": 3.94,
    "LiBeF3": 3.60,
}
"""Cubic perovskites ABX3 and lattice constants in Å, near their equilibrium; the exact value does not matter here."""


def perovskite(formula: str) -> Crystal:
    """A cubic perovskite of :data:`ORDERED`."""
    symbols = Atoms(formula).get_chemical_symbols()
    numbers = np.array([atomic_numbers[s] for s in symbols])
    return Crystal(np.eye(3) * ORDERED[formula], PEROVSKITE, numbers)


def simple(name: str, structure: str, a: float) -> Crystal:
    """A crystal from ``ase.build.bulk``, primitive cell, lattice constant in Å."""
    atoms = bulk(name, structure, a=a)
    return Crystal(atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers)


def crystals() -> dict[str, Crystal]:
    """The crystals of the first table: salts, an oxide, a semiconductor, a perovskite, a metal."""
    return {
        "NaCl": simple("NaCl", "rocksalt", 5.70),
        "MgO": simple("MgO", "rocksalt", 4.26),
        "LiF": simple("LiF", "rocksalt", 4.07),
        "Si": simple("Si", "diamond", 5.47),
        "KMgF3": perovskite("KMgF3"),
        "Al": simple("Al", "fcc", 4.04),
    }


def cutoff_rows(names: Iterable[str]) -> list[dict]:
    """Gap (eV) and bulk modulus (GPa) of each crystal at each cut-off.

    The modulus is the one at the given cell (``modulus_at_cell``): the one at V0 is that of another volume per cut-off.
    """
    rows = []
    for name in names:
        crystal = crystals()[name]
        for cutoff in CUTOFFS + (HARD_CUTOFFS if name == "LiF" else ()):
            engine = GpawEngine.preset(
                "standard",
                band_gap_cutoff=cutoff,
                band_gap_kppa=KPPA,
                bulk_modulus_cutoff=cutoff,
                bulk_modulus_kppa=KPPA,
                hard_elements=(),
                eos_range=(0.5, 2.0),
            )
            modulus = engine.compute(crystal, "bulk_modulus") if len(crystal.numbers) <= MODULUS_SITES else None
            gap = engine.compute(crystal, "band_gap") if sum(crystal.numbers) % 2 == 0 else None
            rows.append(_cutoff_row(name, cutoff, gap, modulus))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _cutoff_row(name: str, cutoff: float, gap: Result | None, modulus: Result | None) -> dict:
    fit = {} if modulus is None else modulus.details
    return {
        "crystal": name,
        "cutoff": cutoff,
        "gap": None if gap is None else gap.details.get("raw_gap"),
        "gap_seconds": None if gap is None else gap.seconds,
        "modulus_at_cell": fit.get("modulus_at_cell"),
        "b0": fit.get("b0"),
        "v0_over_v": fit.get("v0_over_v"),
        "modulus_seconds": None if modulus is None else modulus.seconds,
    }


def element_rows(symbols: Iterable[str]) -> list[dict]:
    """Energy (eV/atom) above that of 1,800 eV, of fcc elements with bonds of twice the covalent radius."""
    from gpaw import GPAW, PW

    def energy(symbol: str, cutoff: float) -> float:
        atoms = bulk(symbol, "fcc", a=2 * math.sqrt(2) * covalent_radii[atomic_numbers[symbol]])
        atoms.calc = GPAW(
            mode=PW(cutoff),
            xc="PBE",
            kpts={"size": (2, 2, 2), "gamma": True},
            occupations={"name": "fermi-dirac", "width": 0.1},
            convergence={"energy": 1e-4, "density": 1e-4, "eigenstates": 1e-6},
            txt=None,
        )
        return atoms.get_potential_energy()

    rows = []
    for symbol in symbols:
        reference = energy(symbol, REFERENCE_CUTOFF)
        rows.append({"element": symbol} | {f"{c:.0f}": energy(symbol, c) - reference for c in ELEMENT_CUTOFFS})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def preset_rows(formulas: Iterable[str]) -> list[dict]:
    """Gap of ``fast`` and ``standard``, and what each costs."""
    rows = []
    for formula in formulas:
        fast, standard = (GpawEngine.preset(p).compute(perovskite(formula), "band_gap") for p in ("fast", "standard"))
        rows.append(
            {
                "crystal": formula,
                "fast": fast.value,
                "standard": standard.value,
                "error": fast.value - standard.value,
                "fast_seconds": fast.seconds,
                "standard_seconds": standard.seconds,
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[c]) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(results: dict) -> str:
    """The whole results file."""
    import ase
    import gpaw
    from gpaw_data import __version__ as data_version

    errors = [abs(row["error"]) for row in results["presets"]]
    meshes = {p: GpawEngine.preset(p).sampling_of("band_gap").mesh(np.eye(3) * 4.0, 5)[0] for p in _PRESETS}
    return f"""# Convergence of the gpaw engine

Written by `python -m benchmarks gpaw-convergence --out benchmarks/results/gpaw_convergence.md` in
{results["cpu_seconds"]:.0f} CPU seconds, one core of {platform.machine()}, Python {platform.python_version()},
GPAW {gpaw.__version__}, gpaw-data {data_version}, ASE {ase.__version__}, NumPy {np.__version__}.

## Gap and bulk modulus against the cut-off

Cut-off in eV, gap (LUMO - HOMO, negative in a metal) in eV, moduli in GPa, CPU seconds; {KPPA:.0f} k-points per
reciprocal atom. `modulus_at_cell` is the fit's modulus at the given volume, `b0` the one at its own minimum, which
lies at `v0_over_v`. Each volume has the same plane waves (the cut-off scales as V^(-2/3)).

{table(results["cutoffs"])}

## Which elements are hard

Energy in eV/atom above that at {REFERENCE_CUTOFF:.0f} eV, fcc elements with bonds of twice the covalent radius,
2x2x2 k-points.

{table(results["elements"])}

## `fast` against `standard`

Gaps in eV of cubic perovskites; meshes for a 4 Å cell of five atoms: {meshes}.

{table(results["presets"])}

Mean absolute error of `fast`: {np.mean(errors):.3f} eV, largest: {np.max(errors):.3f} eV.
"""


_PRESETS = ("fast", "standard")


def main() -> None:
    """Run every table, write the results file if asked, print the tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--crystals", nargs="*", default=list(crystals()), help="rows of the first table")
    parser.add_argument("--elements", nargs="*", default=list(ELEMENTS), help="rows of the second table")
    parser.add_argument("--perovskites", nargs="*", default=list(ORDERED), help="rows of the third table")
    options = parser.parse_args()
    start = time.process_time()
    results: dict = {
        "cutoffs": cutoff_rows(options.crystals),
        "elements": element_rows(options.elements),
        "presets": preset_rows(options.perovskites),
    }
    results["cpu_seconds"] = time.process_time() - start
    text = report(results)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
    print(text)
    print(json.dumps(results))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
