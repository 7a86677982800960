"""The crystals on which plane-wave codes are compared, and their reference calculations with ``pw.x``.

    python -m benchmarks dft-cases --run-references --cache ~/.cache/crystaljax/pwx --out references.json

calculates energy, bands and stress of every crystal at its given cell, the energies of some at five volumes, and
relaxes a few, one ``pw.x`` process at a time. Finished calculations are cached, so a second run costs nothing. It
prints tables; the last line is one JSON object. Without ``--run-references`` it lists the crystals.

The settings are PBE with the PseudoDojo 0.4 scalar-relativistic standard pseudopotentials, no spin. Crystals use
one cut-off: the point is that two codes agree, not that the energies are converged. (NiAl has a higher one, for an
equation of state that is smooth at a fixed cut-off.)
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import spglib
from ase.data import atomic_numbers
from ase.units import GPa, Hartree

from benchmarks.pwx import SYMPREC, PwxError, PwxJob, PwxResult, electrons, oriented, run, upf_folder
from crystaljax import library
from crystaljax.dft_bridge.engines.equation_of_state import fit_murnaghan

CUTOFF = 40.0
"""Ha."""
WIDTH = 0.004
"""Ha, Gaussian smearing of the metals."""
VOLUMES = (0.98, 0.99, 1.0, 1.01, 1.02)
"""Of the equations of state, in units of the given cell's volume."""


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A crystal and how to calculate it.

    Attributes:
        name: for people; unique.
        lattice: float [3, 3], rows a, b, c, Å.
        frac_coords: float [N, 3].
        symbols: chemical symbols, length N.
        kind: ``insulator`` (fixed occupations; the number of electrons is even) or ``metal`` (Gaussian smearing; also
            for semiconductors without a safe gap in PBE).
        mesh: k-points along each reciprocal vector.
        shift: 0 or 1 along each, in half steps of the mesh.
        cutoff: Ha.
        width: smearing width of a metal, Ha.
    """

    name: str
    lattice: np.ndarray
    frac_coords: np.ndarray
    symbols: tuple[str, ...]
    kind: str
    mesh: tuple[int, int, int]
    shift: tuple[int, int, int] = (0, 0, 0)
    cutoff: float = CUTOFF
    width: float = WIDTH

    @property
    def numbers(self) -> np.ndarray:
        """int [N]: atomic numbers."""
        return np.array([atomic_numbers[s] for s in self.symbols])

    @property
    def volume(self) -> float:
        """Å^3 per cell."""
        return float(abs(np.linalg.det(self.lattice)))

    def electrons(self, upf: Path | None = None) -> int:
        """Valence electrons per cell."""
        return electrons(self.symbols, upf)

    def bands(self, upf: Path | None = None) -> int:
        """Occupied bands, and a fifth of that but at least four empty ones."""
        return bands(self.electrons(upf))

    def kpoints(self) -> tuple[np.ndarray, np.ndarray]:
        """Points and weights that are irreducible under the crystal's symmetry and time reversal."""
        return reduced_mesh(self.lattice, self.frac_coords, self.numbers, self.mesh, self.shift)

    def job(self, scale: float = 1.0, calculation: str = "scf", nosym: bool = False, upf: Path | None = None) -> PwxJob:
        """The ``pw.x`` calculation.

        Args:
            scale: volume in units of the given cell's; the fractional k-points stay.
            calculation: ``scf`` or ``vc-relax``.
            nosym: use all k-points (k and -k are one) and no symmetry.
            upf: folder of the pseudopotentials.
        """
        # pw.x wants points that are irreducible under the group of the lattice, which is that of a single atom on it.
        alone = np.zeros((1, 3)), np.ones(1, dtype=int)
        kpoints, weights = reduced_mesh(self.lattice, *alone, self.mesh, self.shift, crystal_symmetry=not nosym)
        return PwxJob(
            lattice=self.lattice * scale ** (1 / 3),
            frac_coords=self.frac_coords,
            symbols=self.symbols,
            cutoff=self.cutoff,
            kpoints=kpoints,
            weights=weights,
            bands=self.bands(upf),
            occupations="fixed" if self.kind == "insulator" else "gaussian",
            width=0.0 if self.kind == "insulator" else self.width,
            upf=upf,
            calculation=calculation,
            nosym=nosym,
        )


def bands(count: int) -> int:
    """Number of bands for a number of electrons: the occupied ones and a fifth, but at least four, empty ones."""
    occupied = (count + 1) // 2
    return occupied + max(4, -(-occupied // 5))


def reduced_mesh(
    lattice: np.ndarray,
    frac_coords: np.ndarray,
    numbers: np.ndarray,
    mesh: tuple[int, int, int],
    shift: tuple[int, int, int] = (0, 0, 0),
    crystal_symmetry: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """The k-points of a mesh that are irreducible under the crystal's point group and time reversal.

    Args:
        lattice: [3, 3], rows a, b, c, Å.
        frac_coords: [N, 3].
        numbers: [N], atoms that differ have different numbers.
        mesh: points along each reciprocal vector, ``k = (i + shift / 2) / mesh``.
        shift: 0 or 1 along each.
        crystal_symmetry: use the point group; otherwise time reversal only.

    Returns:
        Points float [K, 3], fractional reciprocal coordinates in (-0.5, 0.5], and weights float [K], sum 1.

    Raises:
        ValueError: if the mesh lacks the symmetry of the crystal.
    """
    rotations = np.eye(3, dtype=int)[None]
    if crystal_symmetry:
        rotations = np.unique(
            spglib.get_symmetry((lattice, frac_coords, numbers), symprec=SYMPREC)["rotations"], axis=0
        )
    sizes = np.array(mesh)
    doubled = np.array(
        [2 * np.array(i) + shift for i in itertools.product(*map(range, mesh))]
    )  # k = doubled / (2 mesh)
    index = {tuple(point): i for i, point in enumerate(doubled)}
    # x -> R x on positions means k -> k R^-1 on the row vectors of reciprocal space; a group holds every inverse.
    smallest = np.arange(len(doubled))
    for rotation in itertools.chain(rotations, -rotations):
        images = doubled / (2 * sizes) @ rotation * (2 * sizes)
        integers = np.rint(images).astype(int)
        wrapped = [tuple(point) for point in integers % (2 * sizes)]
        if np.abs(images - integers).max() > 1e-6 or any(point not in index for point in wrapped):
            raise ValueError(f"mesh {mesh} with shift {shift} lacks the symmetry of the crystal; try another shift")
        smallest = np.minimum(smallest, [index[point] for point in wrapped])
    chosen, counts = np.unique(smallest, return_counts=True)
    points = doubled[chosen] / (2 * sizes)
    return points - np.ceil(points - 0.5), counts / len(doubled)


_FCC = np.array([[0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])
_STRUCTURES = {
    # name: lattice for a = 1, sites
    "fcc": (_FCC, [[0, 0, 0]]),
    "rocksalt": (_FCC, [[0, 0, 0], [0.5, 0.5, 0.5]]),
    "zincblende": (_FCC, [[0, 0, 0], [0.25, 0.25, 0.25]]),
    "fluorite": (_FCC, [[0, 0, 0], [0.25, 0.25, 0.25], [0.75, 0.75, 0.75]]),
    "cscl": (np.eye(3), [[0, 0, 0], [0.5, 0.5, 0.5]]),
}


def _simple(name: str, structure: str, a: float, symbols: str, kind: str, n: int = 4, cutoff: float = CUTOFF) -> Case:
    """A cubic textbook structure, lattice constant in Å, with an n x n x n mesh around Gamma, cut-off in Ha."""
    lattice, sites = _STRUCTURES[structure]
    return Case(name, a * lattice, np.array(sites, float), tuple(symbols.split()), kind, (n, n, n), cutoff=cutoff)


def _wurtzite(name: str, a: float, c: float, u: float, symbols: str, kind: str, mesh: tuple[int, int, int]) -> Case:
    """Wurtzite: lattice constants in Å, internal coordinate u; two cations, then two anions."""
    lattice = np.array([[a, 0, 0], [-a / 2, a * np.sqrt(3) / 2, 0], [0, 0, c]])
    sites = np.array([[1 / 3, 2 / 3, 0], [2 / 3, 1 / 3, 0.5], [1 / 3, 2 / 3, u], [2 / 3, 1 / 3, u + 0.5]])
    return Case(name, lattice, sites, tuple(symbols.split()), kind, mesh)


def _skeleton(benchmark: str, symbols: str, kind: str, n: int = 2, shift: int = 1) -> Case:
    """A benchmark skeleton at its own lattice, rotated to the cubic axes, with elements in the order of its sites."""
    skeleton, chosen = library.benchmark(benchmark), tuple(symbols.split())
    name = f"{benchmark}-{''.join(s + str(len(list(g))).replace('1', '') for s, g in itertools.groupby(chosen))}"
    lattice = oriented(skeleton.lattice, skeleton.frac_coords, np.ones(len(chosen), dtype=int))
    return Case(name, lattice, skeleton.frac_coords, chosen, kind, (n, n, n), (shift,) * 3)


def cases() -> tuple[Case, ...]:
    """All crystals; together they have each of the 30 elements of the medium vocabulary at least once."""
    return (
        # Lattice constants are experimental ones, but for the equations of state, which are around the minimum of PBE.
        _simple("C", "zincblende", 3.572, "C C", "insulator"),
        _simple("Si", "zincblende", 5.469, "Si Si", "insulator"),
        _simple("Ge", "zincblende", 5.658, "Ge Ge", "metal"),
        _simple("Sn", "zincblende", 6.489, "Sn Sn", "metal"),
        _simple("BN", "zincblende", 3.615, "B N", "insulator"),
        _simple("BP", "zincblende", 4.538, "B P", "insulator"),
        _simple("SiC", "zincblende", 4.360, "Si C", "insulator"),
        _simple("AlP", "zincblende", 5.463, "Al P", "insulator"),
        _simple("BeS", "zincblende", 4.870, "Be S", "insulator"),
        _simple("ZnS", "zincblende", 5.447, "Zn S", "insulator"),
        _simple("LiH", "rocksalt", 4.083, "Li H", "insulator"),
        _simple("LiF", "rocksalt", 4.065, "Li F", "insulator"),
        _simple("NaCl", "rocksalt", 5.700, "Na Cl", "insulator"),
        _simple("KBr", "rocksalt", 6.600, "K Br", "insulator", 3),
        _simple("MgO", "rocksalt", 4.259, "Mg O", "insulator"),
        _simple("CaO", "rocksalt", 4.811, "Ca O", "insulator"),
        _simple("SrS", "rocksalt", 6.024, "Sr S", "insulator", 3),
        _simple("SnSe", "rocksalt", 5.990, "Sn Se", "metal"),
        _simple("CrN", "rocksalt", 4.149, "Cr N", "metal"),
        _simple("MnO", "rocksalt", 4.445, "Mn O", "metal"),
        _simple("RbCl", "cscl", 3.790, "Rb Cl", "insulator", 3),
        _simple("NiAl", "cscl", 2.895, "Ni Al", "metal", cutoff=60.0),
        _simple("CoAl", "cscl", 2.862, "Co Al", "metal"),
        _simple("FeAl", "cscl", 2.909, "Fe Al", "metal"),
        _simple("Cu", "fcc", 3.615, "Cu", "metal", 6),
        _simple("Al", "fcc", 4.040, "Al", "metal", 6),
        _simple("CaF2", "fluorite", 5.463, "Ca F F", "insulator", 3),
        _simple("Li2O", "fluorite", 4.619, "O Li Li", "insulator"),
        _wurtzite("BeO", 2.698, 4.377, 0.378, "Be Be O O", "insulator", (4, 4, 2)),
        _skeleton("C1", "K Mg F F F", "insulator", 2, 0),
        _skeleton("C2", "Rb Ca H H H", "insulator", 2, 0),
        _skeleton("C3", "Al Al Al Al Al Al Si Ge", "metal"),
        _skeleton("C4", "Sn Br Br Br Br", "insulator"),
        _skeleton("C5", "Al Mn Cu Cu", "metal", 3, 0),
        _skeleton("C6", "Na Na Na P", "metal", 3, 0),
        _skeleton("C7", "Ca Ca Ca Sn O", "metal", 2, 0),
        # Five draws out of 30: numpy.random.default_rng(seed).choice(MEDIUM.symbols, 5), seeds 0, 5, 6, 9.
        _skeleton("C1", "Mn Si F H C", "metal"),
        _skeleton("C1", "Ge Ni Li Ni Se", "metal"),
        _skeleton("C1", "S Cl F N Sn", "metal"),
        _skeleton("C1", "P Al Sn H Rb", "metal", 2, 0),
    )


STATE_EQUATIONS = ("C", "Si", "MgO", "NaCl", "LiF", "ZnS", "NiAl", "Al")
"""Crystals whose energy is calculated at :data:`VOLUMES`."""
RELAXATIONS = ("Si", "MgO", "LiF", "NiAl", "BeO")
"""Crystals whose cell and atoms are relaxed."""
COMPRESSION = 0.96
"""Where relaxations start, in units of the given cell's volume."""
SYMMETRY_CHECKS = ("Si", "BeO", "C5-AlMnCu2", "C1-PAlSnHRb")
"""Crystals that are calculated without symmetry as well: two with fractional translations, one rotated skeleton, one
with less symmetry than its lattice."""


def scf_row(case: Case, result: PwxResult) -> dict:
    """One line of the first table: energies in Ha, gap in eV, pressure in GPa, CPU seconds."""
    rotations = spglib.get_symmetry((case.lattice, case.frac_coords, case.numbers), symprec=SYMPREC)["rotations"]
    return {
        "name": case.name,
        "sites": len(case.symbols),
        "kind": case.kind,
        "electrons": case.electrons(),
        "bands": result.eigenvalues.shape[1],
        "kpoints": len(result.kpoints),
        "expected_kpoints": len(case.kpoints()[0]),
        "symmetries": result.symmetries,
        "expected_symmetries": len(rotations),
        "dropped_symmetries": result.dropped_symmetries,
        "fft": "x".join(map(str, result.fft)),
        "energy": result.energy,
        "minus_ts": result.minus_ts,
        "gap": result.gap,
        "pressure": result.pressure,
        "cpu_seconds": result.cpu_seconds,
        "iterations": result.iterations,
        "status": result.status,
    }


def state_equation_row(case: Case, results: list[PwxResult]) -> dict:
    """Murnaghan fit of an equation of state (volumes in Å^3 per cell, GPa) and its energies in Ha."""
    volumes, energies = np.array([r.volume for r in results]), np.array([r.energy for r in results]) * Hartree
    fit = fit_murnaghan(volumes, energies)
    return {
        "name": case.name,
        "v0_over_v": fit.v0 / case.volume,
        "b0": fit.b0 / GPa,
        "b_prime": fit.b_prime,
        "energies": [r.energy for r in results],
        "cpu_seconds": sum(r.cpu_seconds for r in results),
        "status": next((r.status for r in results if r.status != "ok"), "ok"),
    }


def relaxation_row(case: Case, result: PwxResult) -> dict:
    """One relaxation: volumes in Å^3 per cell, pressures in GPa."""
    return {
        "name": case.name,
        "volume": result.volume,
        "v_over_given": result.volume / case.volume,
        "energy": result.energy,
        "pressure_before_scf": result.pressure_before_scf,
        "pressure": result.pressure,
        "ionic_steps": result.ionic_steps,
        "cpu_seconds": result.cpu_seconds,
        "status": result.status,
    }


def symmetry_row(case: Case, reduced: PwxResult, full: PwxResult) -> dict:
    """What symmetry changes: differences of energy (Ha) and stress (largest component, GPa), ideally none."""
    return {
        "name": case.name,
        "kpoints": len(reduced.kpoints),
        "all_kpoints": len(full.kpoints),
        "energy_difference": full.energy - reduced.energy,
        "stress_difference": float(np.abs(full.stress - reduced.stress).max()),
        "cpu_seconds": full.cpu_seconds,
        "status": next((r.status for r in (reduced, full) if r.status != "ok"), "ok"),
    }


def run_references(cache: Path | None = None, names: Iterable[str] | None = None) -> dict[str, list[dict]]:
    """Calculate (or read) every reference, one after the other; a failure is a row with the reason.

    Args:
        cache: folder of the results, see :func:`pwx.run`.
        names: only these crystals.
    """
    chosen = [case for case in cases() if names is None or case.name in set(names)]
    recipes = {
        "scf": lambda case: scf_row(case, run(case.job(), cache)),
        "symmetry": lambda case: symmetry_row(case, run(case.job(), cache), run(case.job(nosym=True), cache)),
        "state_equations": lambda case: state_equation_row(case, [run(case.job(s), cache) for s in VOLUMES]),
        "relaxations": lambda case: relaxation_row(case, run(case.job(COMPRESSION, "vc-relax"), cache)),
    }
    members = {"symmetry": SYMMETRY_CHECKS, "state_equations": STATE_EQUATIONS, "relaxations": RELAXATIONS}
    tables: dict[str, list[dict]] = {}
    for title, recipe in recipes.items():
        tables[title] = []
        for case in chosen:
            if case.name not in members.get(title, (case.name,)):
                continue
            try:
                row = recipe(case)
            except PwxError as error:
                row = {"name": case.name, "status": str(error)}
            tables[title].append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return tables


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table; columns that only some rows have are empty in the others."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(c)) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, list):
        return " ".join(_cell(v) for v in value)
    if isinstance(value, float):
        return f"{value:.9g}" if abs(value) >= 1 else f"{value:.5g}"
    return "-" if value is None else str(value)


def main() -> None:
    """List the crystals, or run the references."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-references", action="store_true", help="run pw.x where the cache has no result")
    parser.add_argument("--cache", type=Path, help="folder of the results (default: ~/.cache/crystaljax/pwx)")
    parser.add_argument("--names", nargs="*", help="only these crystals")
    parser.add_argument("--out", type=Path, help="JSON file to write the tables to")
    options = parser.parse_args()
    if not options.run_references:
        upf = upf_folder()
        for case in cases():
            print(f"{case.name:12} {case.kind:9} {case.electrons(upf):3} electrons, {len(case.kpoints()[0])} k-points")
        return
    tables = run_references(options.cache, options.names)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(tables, indent=1), encoding="utf-8")
    for title, rows in tables.items():
        print(f"\n{title}\n\n{table(rows)}" if rows else "")
    print(json.dumps(tables))


if __name__ == "__main__":
    main()
