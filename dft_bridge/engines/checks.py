"""What every engine asks of a crystal before a calculation and of a number after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols, covalent_radii
from ase.neighborlist import neighbor_list
from ase.units import GPa

from crystaljax.dft_bridge.engines.base import Crystal, Result
from crystaljax.dft_bridge.engines.equation_of_state import fit_nearest
from crystaljax.properties import PROPERTIES
from crystaljax.status import Status

AMU_PER_A3 = 1.66053906660
"""g/cm3 per atomic mass unit in a cubic Å."""

_MAX_STEP = 0.05  # Å per ionic step; with the cell's weight below, 7 % strain for five atoms


def to_atoms(crystal: Crystal) -> Atoms:
    """The crystal as ASE atoms, periodic in all directions."""
    return Atoms(numbers=crystal.numbers, cell=crystal.lattice, scaled_positions=crystal.frac_coords, pbc=True)


def symbols_of(crystal: Crystal) -> list[str]:
    """The element of each site."""
    return [chemical_symbols[int(z)] for z in crystal.numbers]


def closest_pair(crystal: Crystal, min_distance: float, factor: float) -> tuple[int, int, float] | None:
    """The closest pair (i, j, distance in Å) below its limit, periodic images included, or ``None``."""
    radii = covalent_radii[np.asarray(crystal.numbers)]
    cutoff = max(min_distance, 2 * factor * radii.max())
    first, second, distances = neighbor_list("ijd", to_atoms(crystal), cutoff)
    limits = np.maximum(min_distance, factor * (radii[first] + radii[second]))
    too_close = np.flatnonzero(distances < limits)
    if not len(too_close):
        return None
    worst = too_close[np.argmin(distances[too_close])]
    return int(first[worst]), int(second[worst]), float(distances[worst])


def too_close(crystal: Crystal, min_distance: float, factor: float) -> Result | None:
    """The refusal of a crystal with a pair below its limit (see :func:`closest_pair`), or ``None``."""
    pair = closest_pair(crystal, min_distance, factor)
    if pair is None:
        return None
    first, second = (symbols_of(crystal)[site] for site in pair[:2])
    message = f"{first} and {second} are {pair[2]:.2f} Å apart"
    return Result.failure(Status.ATOMS_TOO_CLOSE, message, distance=pair[2])


def odd_electrons(electrons: int) -> Result | None:
    """The refusal of an odd number of valence electrons, or ``None``."""
    if electrons % 2 == 0:
        return None
    message = f"{electrons} valence electrons do not fill whole bands without spin polarisation"
    return Result.failure(Status.ODD_ELECTRONS, message, valence_electrons=electrons)


def bulk_modulus(
    scales: Sequence[float],
    energies: Sequence[float] | np.ndarray,
    volume: float,
    allowed: tuple[float, float],
    modulus_at: str,
    details: dict[str, Any],
    *,
    planned: int,
    bracketed: bool,
) -> Result:
    """Bulk modulus in GPa of a Murnaghan fit to E(V) around the given cell.

    Args:
        scales: float [n], volumes in units of that of the given cell.
        energies: float [n], eV.
        volume: of the given cell, Å^3.
        allowed: where the minimum must lie, in units of ``volume``.
        modulus_at: ``relaxed`` for the modulus at the fitted minimum, ``cell`` for that at the given cell.
        details: facts for the result, which get those of the fit.
        planned: to how many volumes, those nearest to the minimum, the fit is made.
        bracketed: refuse a minimum beyond the calculated volumes; otherwise the modulus there is extrapolated.
    """
    volumes = volume * np.asarray(scales)
    fit = fit_nearest(volumes, np.asarray(energies), planned)
    facts = {"volumes": volumes.tolist(), "energies": np.asarray(energies).tolist(), **fit.details(volume)}
    problem = fit.problem(volume, allowed)
    if not problem and bracketed and not fit.bracketed(volumes):
        reach = f"{min(scales):.3f}-{max(scales):.3f}"
        problem = f"V0 is {fit.v0 / volume:.3f} of the given volume, beyond the {len(scales)} calculated ones, {reach}"
    if problem:
        return Result.failure(Status.FIT_MEANINGLESS, problem, **details, **facts)
    modulus = fit.b0 if modulus_at == "relaxed" else fit.modulus(volume)
    return Result(modulus / GPa, Status.OK, details={**details, **facts})


def density_of(atoms: Atoms) -> float:
    """g/cm3."""
    return float(atoms.get_masses().sum() / atoms.get_volume() * AMU_PER_A3)


def relax(atoms: Atoms, nstep: int, fmax: float) -> dict[str, Any]:
    """Move atoms and cell by BFGS with the forces and stress of their calculator; returns facts for ``details``.

    Args:
        atoms: changed in place.
        nstep: ionic steps, at most.
        fmax: eV/Å, forces and generalised stress below which it stops.
    """
    from ase.filters import FrechetCellFilter
    from ase.optimize import BFGS

    # ASE's default weighs the cell so heavily that BFGS's first guess of its stiffness is some 30 times too hard;
    # with this factor a crystal of 100 GPa and 13 Å^3 per atom has about the stiffness (70 eV/Å^2) BFGS assumes.
    cell = FrechetCellFilter(atoms, exp_cell_factor=math.sqrt(len(atoms)) / 3)
    optimizer = BFGS(cell, logfile=None, maxstep=_MAX_STEP)
    relaxed = bool(optimizer.run(fmax=fmax, steps=nstep))
    return {
        "relaxed": relaxed,
        "ionic_steps": int(optimizer.nsteps),
        "lattice": atoms.cell.array.tolist(),
        "frac_coords": atoms.get_scaled_positions(wrap=False).tolist(),
        "pressure": float(-atoms.get_stress()[:3].mean() / GPa),
    }


def plain(value: Any) -> Any:
    """Tuples as lists, so that a fingerprint equals its JSON copy."""
    return [plain(v) for v in value] if isinstance(value, tuple) else value


def check_choice(setting: str, value: str, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` for a setting that is none of these."""
    if value not in choices:
        raise ValueError(f"{setting} is {value!r}; choose {' or '.join(choices)}")


def check_property(property_name: str) -> None:
    """Raise ``ValueError`` for a property no engine knows."""
    if property_name not in PROPERTIES:
        raise ValueError(f"no property {property_name!r}; choose one of {', '.join(PROPERTIES)}")


def checked(result: Result, property_name: str) -> Result:
    """The result, or ``INVALID_RESULT`` if its number is not one a crystal can have."""
    lowest, highest = PROPERTIES[property_name].bounds
    if result.status != Status.OK or lowest <= result.value <= highest:
        return result
    message = f"{property_name} of {result.value} is outside {lowest:g}-{highest:g}"
    return Result.failure(Status.INVALID_RESULT, message, **result.details)
