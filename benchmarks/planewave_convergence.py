"""Plane-wave cut-off of every element of the shipped pseudopotentials, measured; writes the table the presets use.

    python -m benchmarks planewave-convergence [--elements Na Cl ...] [--write]

Each element is put on one face-centred cubic lattice (a = 4.2 Å, 18.5 Å^3 per atom, smeared occupations), so that all
elements share their plane waves. Convergence with the cut-off is a matter of the atoms: the errors of a crystal are
about the averages of those of its elements. Two errors against 55 Ha are taken at every cut-off:

* of the curvature V d^2E/dV^2 (a bulk modulus) from three volumes 0.98, 1.0, 1.02 with the same plane waves: the
  smallest cut-off from which on it stays below 3 GPa goes into the column ``tight``;
* of band energies between 10 eV below and 5 eV above the Fermi level, relative to their mean: the smallest cut-off from
  which on no band is off by more than 50 meV goes into ``loose``.

``--write`` puts the table where the engine reads it. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re

import jax
import numpy as np
from ase.units import GPa, Hartree

from crystaljax.dft_bridge.engines.planewave import CUTOFF_FILE
from crystaljax.dft_bridge.planewave.kinds import Kind, Workbench
from crystaljax.dft_bridge.planewave.pseudopotentials import shipped
from crystaljax.dft_bridge.planewave.scf import ScfSettings
from crystaljax.dft_bridge.planewave.solver import energies

LATTICE = 4.2  # Å
SCALES = (0.98, 1.0, 1.02)
CUTOFFS = (20.0, 25.0, 30.0, 35.0, 40.0, 45.0)  # Ha
REFERENCE = 55.0  # Ha
MODULUS_BOUND = 3.0  # GPa
BAND_BOUND = 0.05  # eV
WINDOW = (-10.0, 5.0)  # eV around the Fermi level
SETTINGS = ScfSettings(bands=16, width=0.005, tolerance=1e-9, max_iterations=60)


def kind(cutoff: float) -> Kind:
    """One atom, face-centred cubic, a Gamma-centred 2x2x2 mesh."""
    cell = (np.ones((3, 3)) - np.eye(3)) * LATTICE / 2
    return Kind(
        lattice=tuple(map(tuple, cell.tolist())),
        frac_coords=((0.0, 0.0, 0.0),),
        colours=(0,),
        cutoff=cutoff,
        mesh=(2, 2, 2),
        shift=(0, 0, 0),
        stretch=1.0,
        light=False,
        settings=SETTINGS,
    )


def measure(bench: Workbench, symbols: list[str], cutoff: float) -> dict[str, tuple[float, np.ndarray]]:
    """By element: the curvature in GPa, and the bands [K, n] in eV relative to the Fermi level at the middle volume."""
    crystals = [[symbol] for symbol in symbols]
    found = bench.solver(kind(cutoff)).solve(bench.problems(kind(cutoff), crystals, SCALES), energies)
    volume = abs(np.linalg.det(np.array(kind(cutoff).lattice)))
    result = {}
    for i, symbol in enumerate(symbols):
        rows = slice(3 * i, 3 * i + 3)
        below, middle, above = np.where(found.converged[rows], found.extra.free[rows], np.nan) * Hartree
        step = SCALES[1] - SCALES[0]
        modulus = (below - 2 * middle + above) / step**2 / volume / GPa
        result[symbol] = modulus, (found.eigenvalues[3 * i + 1] - found.fermi_level[3 * i + 1]) * Hartree
    return result


def band_error(bands: np.ndarray, reference: np.ndarray) -> float:
    """eV, the largest deviation within the window from the mean one."""
    inside = (reference > WINDOW[0]) & (reference < WINDOW[1])
    difference = (bands - reference)[inside]
    return float(np.abs(difference - difference.mean()).max()) if inside.any() else 0.0


def first_good(errors: dict[float, float], bound: float) -> float:
    """The smallest cut-off from which on every error is within the bound; the reference if none is."""
    good = REFERENCE
    for cutoff in sorted(errors, reverse=True):
        if not abs(errors[cutoff]) <= bound:
            break
        good = cutoff
    return good


def main() -> None:
    """Measure, print the table, and write it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", nargs="*", default=list(shipped().symbols))
    parser.add_argument("--write", action="store_true", help=f"write {CUTOFF_FILE.name}")
    arguments = parser.parse_args()
    bench = Workbench(shipped())
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        reference = measure(bench, arguments.elements, REFERENCE)
        runs = {}
        for cutoff in CUTOFFS:
            runs[cutoff] = measure(bench, arguments.elements, cutoff)
            print(f"{cutoff:g} Ha done", flush=True)
    tables: dict[str, dict[str, float]] = {"tight": {}, "loose": {}}
    errors = {}
    print("element  modulus error, GPa, then band error, meV, at " + ", ".join(f"{c:g}" for c in CUTOFFS) + " Ha")
    for symbol in arguments.elements:
        modulus = {c: float(runs[c][symbol][0] - reference[symbol][0]) for c in CUTOFFS}
        bands = {c: band_error(runs[c][symbol][1], reference[symbol][1]) for c in CUTOFFS}
        tables["tight"][symbol] = first_good(modulus, MODULUS_BOUND)
        tables["loose"][symbol] = first_good(bands, BAND_BOUND)
        errors[symbol] = {
            "modulus_gpa": [round(modulus[c], 2) for c in CUTOFFS],
            "bands_mev": [round(1000 * bands[c]) for c in CUTOFFS],
        }
        print(f"{symbol:2} {errors[symbol]['modulus_gpa']} {errors[symbol]['bands_mev']}", flush=True)
    if arguments.write:
        about = "python -m benchmarks planewave-convergence --write"
        content = {"made_by": about, "measured_at_ha": list(CUTOFFS), "reference_ha": REFERENCE}
        text = json.dumps({**content, "cutoffs": tables, "errors": errors}, indent=1)
        on_one_line = re.sub(r"\[[^\[\]]*\]", lambda found: " ".join(found[0].split()), text)
        CUTOFF_FILE.write_text(on_one_line + "\n")
    print(json.dumps({"elements": len(arguments.elements), **{k: max(t.values()) for k, t in tables.items()}}))


if __name__ == "__main__":
    main()
