"""Recalculates a share of every shipped table with pw.x, on identical pseudopotentials, cut-offs and k-points.

    python -m benchmarks table-spot-check [NAME ...] [--share 0.02] [--seed 0] [--cache ~/.cache/crystaljax/pwx]

Needs pw.x (Debian package ``quantum-espresso``) unless its results are in the cache. Entries are drawn at random among
those with a value; of densities among the cells whose relaxation came to its end, as the others stop after a few steps
of a path that is the optimiser's own. Compared are: the gap, with its special points at no weight in the density; the
free energy of the same SCF; the modulus from the volumes that the engine's rule asks for, with the plane waves of the
given cell (at a volume ``s V`` this is a cut-off of ``s^(-2/3)`` times that of the cell); the density of the relaxed
cell.

Prints Markdown; the last line is one JSON object with the largest deviation of each table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from ase.units import GPa, Hartree

from benchmarks.dft_cases import bands
from benchmarks.pwx import PwxJob, PwxResult, electrons, oriented, run
from crystaljax import tables
from crystaljax.dft_bridge.engines.checks import density_of
from crystaljax.dft_bridge.engines.equation_of_state import fit_nearest, sample
from crystaljax.dft_bridge.kpoints import Sampling, find_symmetry, reduce_points
from crystaljax.status import Status
from crystaljax.tables import Entry, Table

UNITS = {"band_gap": "meV", "total_energy": "meV/atom", "bulk_modulus": "%", "density": "%"}
"""Of a deviation."""
METAL = 0.01
"""eV; below it a gap is taken for none."""


def job(table: Table, entry: Entry) -> PwxJob:
    """The SCF of an entry at the given cell, as its table and its details describe it."""
    settings, skeleton = table.origin["settings"], table.skeleton
    rule, calculated = settings.get("sampling", {}), table.origin["calculated_as"]
    sampling = Sampling(
        rule.get("rule", "cell"),
        settings[f"{calculated}_kppa"],
        rule.get("length", 0.0),
        shifted=settings["shifted"],
        special=settings.get("special_points", False),
    )
    numbers = np.array([atomic_numbers[symbol] for symbol in entry.elements])
    lattice = oriented(skeleton.lattice, skeleton.frac_coords, np.ones(skeleton.n_sites, dtype=int))
    # The engine's own points: a shifted mesh on a centred lattice lacks some symmetry, which the density gets back.
    symmetry = find_symmetry(skeleton.lattice, skeleton.frac_coords, numbers)
    kpoints, weights = reduce_points(sampling.points(skeleton.lattice, skeleton.n_sites), symmetry)
    if len(kpoints) != entry.details["irreducible_kpoints"]:
        raise RuntimeError(f"{len(kpoints)} k-points, but the entry had {entry.details['irreducible_kpoints']}")
    if sampling.special:
        special, _ = reduce_points(sampling.special_points(skeleton.lattice), symmetry)
        kpoints, weights = np.concatenate([kpoints, special]), np.concatenate([weights, np.zeros(len(special))])
    width = settings[f"{calculated}_width"]
    return PwxJob(
        lattice=lattice,
        frac_coords=skeleton.frac_coords,
        symbols=entry.elements,
        cutoff=entry.details["cutoff"],
        kpoints=kpoints,
        weights=weights,
        bands=bands(electrons(entry.elements)),
        occupations="gaussian" if width else "fixed",
        width=width,
        stress=False,
        derivatives=False,
    )


def recalculated(table: Table, entry: Entry, cache: Path | None) -> float:
    """What pw.x gives for an entry."""
    point = job(table, entry)
    if table.property == "bulk_modulus":
        settings, cell = table.origin["settings"], abs(np.linalg.det(point.lattice))

        def energy(s: float) -> float:
            scaled = {"lattice": point.lattice * s ** (1 / 3), "cutoff": point.cutoff * s ** (-2 / 3)}
            return _converged(dataclasses.replace(point, **scaled), cache).energy * Hartree

        planned, further = settings["eos_volumes"], settings.get("eos_further", 0)
        scales, energies = sample(energy, planned, further, settings["eos_range"])
        return fit_nearest(cell * np.array(scales), np.array(energies), len(planned)).b0 / GPa
    if table.property == "density":
        relaxed = _converged(dataclasses.replace(point, calculation="vc-relax", stress=True, derivatives=True), cache)
        return density_of(Atoms(entry.elements, cell=relaxed.lattice))
    result = _converged(point, cache)
    return max(0.0, result.gap) if table.property == "band_gap" else result.energy * Hartree


def _converged(point: PwxJob, cache: Path | None) -> PwxResult:
    result = run(point, cache)
    if result.status != "ok":
        raise RuntimeError(f"pw.x on {' '.join(point.symbols)}: {result.status}")
    return result


def deviation(table: Table, ours: float, theirs: float) -> float:
    """In :data:`UNITS`."""
    if table.property in ("bulk_modulus", "density"):
        return 100 * (ours / theirs - 1)
    return 1000 * (ours - theirs) / (table.skeleton.n_sites if table.property == "total_energy" else 1)


def drawn(table: Table, share: float, seed: int) -> list[Entry]:
    """A share of the entries, rounded up; of gaps half among the crystals that have one, as most are metals."""
    fit = [entry for entry in table.entries if entry.status == Status.OK and entry.details.get("relaxed", True)]
    count, rng = min(len(fit), math.ceil(share * len(table.entries))), np.random.default_rng(seed)
    order = rng.permutation(len(fit)).tolist()
    if table.property == "band_gap":
        semiconductors = [i for i in order if fit[i].value > METAL]
        order = list(dict.fromkeys(semiconductors[: -(-count // 2)] + order))
    return [fit[i] for i in sorted(order[:count])]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="tables (default: all that are shipped)")
    parser.add_argument("--share", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="folder of pw.x results")
    options = parser.parse_args()
    largest = {}
    print("| table | crystal | table's value | pw.x | deviation |\n|---|---|---|---|---|")
    for name in options.names or tables.shipped():
        table, found = tables.load(name), []
        for entry in drawn(table, options.share, options.seed):
            theirs = recalculated(table, entry, options.cache)
            found.append(deviation(table, entry.value, theirs))
            row = f"{entry.value:.5f} {tables.UNITS[table.property]} | {theirs:.5f} | {found[-1]:.4f}"
            print(f"| {name} | {' '.join(entry.elements)} | {row} {UNITS[table.property]} |", flush=True)
        largest[name] = {"entries": len(found), f"max {UNITS[table.property]}": float(np.abs(found).max())}
    print(json.dumps(largest))


if __name__ == "__main__":
    main()
