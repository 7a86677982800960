"""What the k-points of the preset ``fast`` cost in accuracy, by class of lattice: planewave against converged pw.x.

    python -m benchmarks dft-sampling [--names graphite quartz ...] [--pwx] [--store FILE] [--fresh] [--cache FOLDER]

The crystals are not cubic, or have many sites. Each is calculated by the planewave engine with ``fast``, and by pw.x
with the same pseudopotential files, cut-off and smearing, on a Gamma-centred mesh that stands for a supercell of 18 Å,
with the special points of the lattice besides. So the deviation is that of the k-points, and of the engine: which is
below 1 meV at equal k-points (``python -m benchmarks dft-accuracy``). A gap is that of whole bands, two electrons each:
the lowest level of the first empty band above the highest of the last full one, over all k-points, or 0.

With ``--pwx`` the k-points of ``fast`` are calculated by pw.x as well: the deviation is then that of the k-points
alone, and a crystal costs some seconds where the engine compiles a program for half a minute.

The results of pw.x are kept in ``results/dft_sampling_references.json`` beside this file, by the hash of its input;
``--fresh`` calculates them again, for which pw.x must be there (Debian package ``quantum-espresso``). Results of the
engine are kept in the store, so that an interrupted run goes on. Prints Markdown; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.spacegroup import crystal as spacegroup_crystal
from ase.units import Hartree

from benchmarks.dft_cases import bands
from benchmarks.pwx import PwxJob, electrons, key_of, oriented, run
from crystaljax.dft_bridge import Request, Store, open_bridge
from crystaljax.dft_bridge.engines.base import Result
from crystaljax.dft_bridge.engines.planewave import PlanewaveEngine
from crystaljax.dft_bridge.kpoints import (
    Sampling,
    find_symmetry,
    reduce_points,
    shortest_cell,
)
from crystaljax.skeleton import Skeleton
from crystaljax.status import Status

REFERENCES = Path(__file__).parent / "results" / "dft_sampling_references.json"
LENGTH = 18.0
"""Å, of the supercell that a reference's mesh stands for."""


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A crystal, and the class that it is counted in."""

    name: str
    kind: str
    atoms: Atoms


def _of(symbols: str, sites: list, group: int, *cell: float) -> Atoms:
    """The primitive cell of a crystal by its space group; lengths in Å, angles in degrees."""
    parameters = [*cell, 90.0, 90.0, 90.0][:6] if len(cell) == 3 else list(cell)
    return spacegroup_crystal(symbols.split(), sites, spacegroup=group, cellpar=parameters, primitive_cell=True)


def _hexagonal(symbols: str, sites: list, group: int, a: float, c: float) -> Atoms:
    return _of(symbols, sites, group, a, a, c, 90.0, 90.0, 120.0)


def _sheared(atoms: Atoms, strain: list[list[float]]) -> Atoms:
    """The crystal under a strain [3, 3] that leaves it no symmetry but, if it has one, its inversion."""
    moved = atoms.copy()
    moved.set_cell(atoms.cell.array @ (np.eye(3) + np.array(strain)), scale_atoms=True)
    return moved


_STRAIN = [[0.02, 0.03, 0.01], [0.0, -0.03, 0.02], [0.0, 0.0, 0.01]]
_THIRD = 1 / 3


def cases() -> tuple[Case, ...]:
    """The crystals, at lattice constants near those measured."""
    boron_nitride = _hexagonal("B N", [(_THIRD, 2 / 3, 0.25), (2 / 3, _THIRD, 0.25)], 194, 2.504, 6.661)
    carbide = _of("Si C", [(0, 0, 0), (0.25, 0.25, 0.25)], 216, 4.36, 4.36, 4.36)
    return (
        Case("graphite", "hexagonal", _hexagonal("C C", [(0, 0, 0.25), (_THIRD, 2 / 3, 0.25)], 194, 2.464, 6.711)),
        Case("graphene", "hexagonal", _hexagonal("C", [(_THIRD, 2 / 3, 0.5)], 191, 2.467, 10.0)),
        Case("BN (hexagonal)", "hexagonal", boron_nitride),
        Case("Be", "hexagonal", _hexagonal("Be", [(_THIRD, 2 / 3, 0.25)], 194, 2.286, 3.584)),
        Case("BeO", "hexagonal", _hexagonal("Be O", [(_THIRD, 2 / 3, 0), (_THIRD, 2 / 3, 0.378)], 186, 2.698, 4.377)),
        Case("AlN", "hexagonal", _hexagonal("Al N", [(_THIRD, 2 / 3, 0), (_THIRD, 2 / 3, 0.382)], 186, 3.11, 4.98)),
        Case("Se", "trigonal", _hexagonal("Se", [(0.2254, 0, _THIRD)], 152, 4.366, 4.954)),
        Case(
            "quartz",
            "trigonal",
            _hexagonal("Si O", [(0.4697, 0, _THIRD), (0.4135, 0.2669, 0.4524)], 152, 4.913, 5.405),
        ),
        Case("As", "rhombohedral", _hexagonal("As", [(0, 0, 0.2271)], 166, 3.76, 10.55)),
        Case("MgCl2", "rhombohedral", _hexagonal("Mg Cl", [(0, 0, 0), (0, 0, 0.2578)], 166, 3.64, 17.67)),
        Case("corundum", "rhombohedral", _hexagonal("Al O", [(0, 0, 0.3522), (0.3063, 0, 0.25)], 167, 4.759, 12.991)),
        Case("MgF2 (rutile)", "tetragonal", _of("Mg F", [(0, 0, 0), (0.303, 0.303, 0)], 136, 4.621, 4.621, 3.052)),
        Case("TiO2 (rutile)", "tetragonal", _of("Ti O", [(0, 0, 0), (0.305, 0.305, 0)], 136, 4.594, 4.594, 2.959)),
        Case("SnO", "tetragonal", _of("O Sn", [(0, 0, 0), (0, 0.5, 0.238)], 129, 3.80, 3.80, 4.84)),
        Case("P (black)", "orthorhombic", _of("P", [(0, 0.1017, 0.0806)], 64, 3.3136, 10.478, 4.3763)),
        Case(
            "CaTiO3",
            "orthorhombic",
            # The axes of Pnma: c, a, b of the usual Pbnm.
            _of(
                "Ca Ti O O",
                [(0.0356, 0.25, 0.9933), (0.5, 0, 0), (0.4838, 0.25, 0.0714), (0.2888, 0.0371, 0.7108)],
                62,
                5.44,
                7.64,
                5.38,
            ),
        ),
        Case(
            "NaN3",
            "monoclinic",
            _of("Na N N", [(0, 0, 0), (0, 0.5, 0.5), (0.1016, 0.5, 0.7258)], 12, 6.165, 3.635, 5.263, 90, 107.54, 90),
        ),
        Case("SiC (sheared)", "triclinic", _sheared(carbide, _STRAIN)),
        Case("BN (sheared)", "triclinic", _sheared(boron_nitride, _STRAIN)),
        Case("Si (8 sites)", "cubic", bulk("Si", a=5.43, cubic=True)),
    )


def skeleton(case: Case) -> Skeleton:
    """The crystal as the engine gets it, in the cell that the space group's table gives."""
    atoms = case.atoms
    return Skeleton(case.name, atoms.cell.array, atoms.get_scaled_positions(), tuple(atoms.get_chemical_symbols()))


DENSE = Sampling("lattice", 1.0, LENGTH, even=True, special=True)
"""Of the references."""


def job(case: Case, sampling: Sampling = DENSE) -> PwxJob:
    """The calculation of a crystal by pw.x: a mesh, and the special points at no weight in the density."""
    engine, atoms = PlanewaveEngine.preset("fast"), case.atoms
    operation = shortest_cell(atoms.cell.array)
    alone = np.zeros((1, 3)), [1]
    lattice = oriented(operation @ atoms.cell.array, *alone)
    coords = atoms.get_scaled_positions() @ np.linalg.inv(operation)
    symbols = tuple(atoms.get_chemical_symbols())
    # pw.x wants points that are irreducible under the group of the lattice.
    of_lattice = find_symmetry(lattice, *alone)
    points, weights = reduce_points(sampling.points(lattice, len(symbols)), of_lattice)
    special, _ = reduce_points(sampling.special_points(lattice), of_lattice)
    return PwxJob(
        lattice=lattice,
        frac_coords=coords,
        symbols=symbols,
        cutoff=engine.cutoff(symbols, "band_gap"),
        kpoints=np.concatenate([points, special]),
        weights=np.concatenate([weights, np.zeros(len(special))]),
        bands=bands(electrons(symbols)),
        occupations="gaussian",
        width=engine.band_gap_width,
        stress=False,
        convergence=1e-8,
        derivatives=False,
    )


def by_pwx(wanted: PwxJob, case: Case, known: dict[str, dict], fresh: bool, cache: Path | None) -> dict:
    """Gap in eV and energy in eV per atom by pw.x; what is calculated here is added to ``known``."""
    key = key_of(wanted)
    if fresh or key not in known:
        with tempfile.TemporaryDirectory() as scratch:
            found = run(wanted, Path(scratch) if fresh else cache)
        if found.status != "ok":
            raise RuntimeError(f"pw.x on {case.name}: {found.status}")
        known[key] = {
            "name": case.name,
            "gap": max(0.0, found.gap),
            "energy": found.energy * Hartree / len(wanted.symbols),
            "kpoints": len(found.kpoints),
            "cpu_seconds": found.cpu_seconds,
            "version": found.version,
        }
    return known[key]


def by_engine(result: Result, case: Case) -> dict:
    """The same of a result of the engine."""
    if result.status != Status.OK:
        raise RuntimeError(f"{case.name}: {result.status.name}, {result.message}")
    energy = result.details["energy"] / len(case.atoms)
    return {"gap": result.value, "energy": energy, "cpu_seconds": result.seconds}


def row(case: Case, ours: dict, theirs: dict) -> dict:
    """One line of the table: eV, meV/atom, CPU seconds, of the engine with compilation."""
    atoms = case.atoms
    lattice = shortest_cell(atoms.cell.array) @ atoms.cell.array
    size, shift = PlanewaveEngine.preset("fast").sampling_of("band_gap").mesh(lattice, len(atoms))
    return {
        "crystal": case.name,
        "lattice": case.kind,
        "sites": len(atoms),
        "mesh": "x".join(map(str, size)) + (f", shift {' '.join(map(str, shift))}" if any(shift) else ""),
        "gap": ours["gap"],
        "reference": theirs["gap"],
        "deviation": ours["gap"] - theirs["gap"],
        "meV/atom": 1000 * (ours["energy"] - theirs["energy"]),
        "CPU s": round(ours["cpu_seconds"], 1),
        "reference CPU s": round(theirs["cpu_seconds"], 1),
    }


def summary(rows: list[dict]) -> dict:
    """Mean and largest deviation of each class of lattice, and of all."""
    kinds = [*dict.fromkeys(row["lattice"] for row in rows), "all"]
    found = {}
    for kind in kinds:
        chosen = [row for row in rows if kind in (row["lattice"], "all")]
        gaps = np.abs([row["deviation"] for row in chosen])
        energies = np.abs([row["meV/atom"] for row in chosen])
        found[kind] = {
            "crystals": len(chosen),
            "mean_gap_ev": round(float(gaps.mean()), 4),
            "max_gap_ev": round(float(gaps.max()), 4),
            "mean_energy_mev_per_atom": round(float(energies.mean()), 2),
            "max_energy_mev_per_atom": round(float(energies.max()), 2),
        }
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="*", help="only these crystals")
    parser.add_argument("--pwx", action="store_true", help="the k-points of fast by pw.x, not by the engine")
    parser.add_argument("--store", type=Path, help="file of the engine's results (default: a temporary one)")
    parser.add_argument("--cache", type=Path, help="folder of pw.x results")
    parser.add_argument("--fresh", action="store_true", help="run pw.x for all, whatever is known")
    options = parser.parse_args()
    known = json.loads(REFERENCES.read_text(encoding="utf-8")) if REFERENCES.exists() else {}
    rows = []
    engine = PlanewaveEngine.preset("fast")
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(options.store or Path(scratch) / "results.db")
        with open_bridge("planewave", "fast", store, 1, total_energy=True) as bridge:
            for case in cases():
                if options.names and case.name not in options.names:
                    continue
                if options.pwx:
                    wanted = job(case, engine.sampling_of("band_gap"))
                    ours = by_pwx(wanted, case, known, options.fresh, options.cache)
                else:
                    request = Request.of(skeleton(case), case.atoms.numbers, "band_gap")
                    ours = by_engine(bridge.evaluate([request])[0], case)
                rows.append(row(case, ours, by_pwx(job(case), case, known, options.fresh, options.cache)))
                if len(rows) == 1:
                    print(f"## Each crystal\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
                cells = (f"{v:.3f}" if isinstance(v, float) and "CPU" not in k else str(v) for k, v in rows[-1].items())
                print("| " + " | ".join(cells) + " |", flush=True)
                REFERENCES.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    by_class = summary(rows)
    print("\n## By class of lattice\n")
    print("| lattice | crystals | gap: mean, largest (eV) | energy: mean, largest (meV/atom) |\n|---|---|---|---|")
    for kind, found in by_class.items():
        gaps = f"{found['mean_gap_ev']:.3f}, {found['max_gap_ev']:.3f}"
        energies = f"{found['mean_energy_mev_per_atom']:.1f}, {found['max_energy_mev_per_atom']:.1f}"
        print(f"| {kind} | {found['crystals']} | {gaps} | {energies} |")
    print(f"\n{json.dumps(by_class)}")


if __name__ == "__main__":
    main()
