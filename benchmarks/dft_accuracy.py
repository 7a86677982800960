"""How far the planewave engine is from pw.x on identical pseudopotential files, cut-offs and k-points.

    python -m benchmarks dft-accuracy [--cache ~/.cache/crystaljax/pwx] [--names NaCl MgO ...] [--short]

Needs pw.x (Debian package ``quantum-espresso``) unless its results are in the cache. The crystals are those of
``dft_cases.py``: energy, gap and stress of all of them, bulk moduli and relaxed volumes of some. The pseudopotentials
are those that the engine ships and the UPF files they were made from. ``--double`` uses double precision throughout.

Equations of state use one cut-off for all volumes, as pw.x does, so both codes see the same steps in the number of
plane waves. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import jax
import numpy as np
from ase.units import Bohr, GPa, Hartree

from benchmarks.dft_cases import COMPRESSION, RELAXATIONS, STATE_EQUATIONS, VOLUMES, Case, cases
from benchmarks.pwx import run
from crystaljax.dft_bridge.engines.equation_of_state import fit_murnaghan
from crystaljax.dft_bridge.planewave.kinds import Kind, Workbench
from crystaljax.dft_bridge.planewave.properties import PRESSURE_UNIT, energies_of_volumes, relax
from crystaljax.dft_bridge.planewave.pseudopotentials import shipped
from crystaljax.dft_bridge.planewave.relaxation import symmetrise
from crystaljax.dft_bridge.planewave.scf import ScfSettings
from crystaljax.dft_bridge.planewave.solver import derivatives

SHORT = ("Si", "NaCl", "MgO", "Al", "C1-KMgF3", "C1-MnSiFHC")
"""What a quick run compares; equation of state and relaxation of Si only."""
_TOLERANCE = 1e-10  # Ha per atom
_FORCE, _STRESS = 2e-3, 0.01  # eV/Å and GPa, at which a cell counts as relaxed


def kind(case: Case, scale: float = 1.0, stretch: float = 1.0, double: bool = False) -> Kind:
    """The case as the engine sees it, its volume scaled."""
    settings = ScfSettings(
        bands=case.bands(),
        width=0.0 if case.kind == "insulator" else case.width,
        tolerance=_TOLERANCE,
        max_iterations=100,
        double=double,
    )
    return Kind(
        lattice=tuple(map(tuple, (case.lattice * scale ** (1 / 3)).tolist())),
        frac_coords=tuple(map(tuple, np.asarray(case.frac_coords, float).tolist())),
        colours=tuple(sorted(set(case.symbols)).index(s) for s in case.symbols),
        cutoff=case.cutoff,
        mesh=case.mesh,
        shift=case.shift,
        stretch=stretch,
        light=False,
        settings=settings,
    )


def compare_point(bench: Workbench, case: Case, cache: Path | None, double: bool) -> dict:
    """Energy, gap and stress at the given cell."""
    reference = run(case.job(), cache)
    ours = kind(case, double=double)
    begin = time.process_time()
    found = bench.solver(ours).solve(bench.problems(ours, [case.symbols]), derivatives)
    seconds = time.process_time() - begin
    symmetry = ours.symmetry
    _, stress = symmetrise(
        symmetry.rotations,
        symmetry.translations,
        case.lattice / Bohr,
        np.asarray(case.frac_coords),
        found.extra.forces[0],
        found.extra.stress[0],
    )
    row = {
        "name": case.name,
        "kind": case.kind,
        "converged": bool(found.converged[0]),
        "iterations": int(found.iterations[0]),
        "mev_per_atom": 1000 * (float(found.extra.free[0]) - reference.energy) * Hartree / len(case.symbols),
        # pw.x counts a stress positive that makes the cell expand
        "stress_gpa": float(np.abs(-stress * PRESSURE_UNIT - np.asarray(reference.stress)).max()),
        "cpu_with_compilation": round(seconds, 1),
        "cpu_pwx": round(reference.cpu_seconds, 1),
    }
    if case.kind == "insulator":
        occupied = case.electrons() // 2
        bands = found.eigenvalues[0] * Hartree
        row["gap_ev"] = float(bands[:, occupied].min() - bands[:, occupied - 1].max() - reference.gap)
    return row


def compare_modulus(bench: Workbench, case: Case, cache: Path | None, double: bool) -> dict:
    """Bulk moduli of Murnaghan fits to the same five volumes, in GPa."""
    theirs = [run(case.job(scale=scale), cache).energy * Hartree for scale in VOLUMES]
    ours = kind(case, stretch=VOLUMES[-1] ** (1 / 3), double=double)
    (sample,) = energies_of_volumes(bench, ours, [case.symbols], VOLUMES)
    b0, reference = (fit_murnaghan(sample.volumes, np.array(e)).b0 / GPa for e in (sample.energies, theirs))
    return {"name": case.name, "b0": b0, "b0_pwx": reference, "percent": 100 * (b0 / reference - 1)}


def compare_density(bench: Workbench, case: Case, cache: Path | None, double: bool) -> dict:
    """Relaxed densities from the same compressed cell and its plane waves, relative to each other."""
    reference = run(case.job(scale=COMPRESSION, calculation="vc-relax"), cache)
    ours = kind(case, scale=COMPRESSION, double=double)
    (cell,) = relax(bench, ours, [case.symbols], 30, _FORCE, _STRESS)
    volume = abs(np.linalg.det(cell.lattice))
    return {
        "name": case.name,
        "relaxed": cell.relaxed,
        "steps": cell.steps,
        "volume": volume,
        "volume_pwx": reference.volume,
        "percent": 100 * (reference.volume / volume - 1),
    }


def show(rows: list[dict]) -> None:
    """Each row on a line, numbers short."""
    for row in rows:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def summary(points: list[dict], moduli: list[dict], densities: list[dict]) -> dict:
    """The largest deviations, and the medians of the energies."""

    def energies(kind: str) -> list[float]:
        return [abs(row["mev_per_atom"]) for row in points if row["kind"] == kind]

    def largest(values: list[float]) -> float | None:
        return max(map(abs, values)) if values else None

    def median(values: list[float]) -> float | None:
        return float(np.median(values)) if values else None

    return {
        "crystals": len(points),
        "converged": sum(row["converged"] for row in points),
        "max_insulator_mev_per_atom": largest(energies("insulator")),
        "max_metal_mev_per_atom": largest(energies("metal")),
        "median_insulator_mev_per_atom": median(energies("insulator")),
        "median_metal_mev_per_atom": median(energies("metal")),
        "max_gap_ev": largest([row["gap_ev"] for row in points if "gap_ev" in row]),
        "max_bulk_modulus_percent": largest([row["percent"] for row in moduli]),
        "max_stress_gpa": largest([row["stress_gpa"] for row in points]),
        "max_density_percent": largest([row["percent"] for row in densities]),
    }


def compare(names: list[str], cache: Path | None, double: bool = False, few: bool = False) -> dict:
    """Compare the named cases, print rows as they come, and return the summary; ``few``: one modulus, one cell."""
    bench = Workbench(shipped())
    chosen = [case for case in cases() if case.name in names]
    points, moduli, densities = [], [], []
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        for case in chosen:
            points.append(compare_point(bench, case, cache, double))
            show(points[-1:])
        for listed, rows, compare_one in (
            (STATE_EQUATIONS, moduli, compare_modulus),
            (RELAXATIONS, densities, compare_density),
        ):
            for case in [case for case in chosen if case.name in listed][: 1 if few else None]:
                rows.append(compare_one(bench, case, cache, double))
                show(rows[-1:])
    return summary(points, moduli, densities)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="folder of pw.x results")
    parser.add_argument("--names", nargs="*", default=[case.name for case in cases()])
    parser.add_argument("--short", action="store_true", help=f"only {', '.join(SHORT)}")
    parser.add_argument("--double", action="store_true", help="double precision throughout")
    arguments = parser.parse_args()
    names = list(SHORT) if arguments.short else arguments.names
    result = compare(names, arguments.cache, arguments.double, arguments.short)
    print(json.dumps({k: round(v, 6) if isinstance(v, float) and math.isfinite(v) else v for k, v in result.items()}))


if __name__ == "__main__":
    main()
