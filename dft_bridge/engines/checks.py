"""What every engine asks of a crystal before a calculation and of a number after it."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.neighborlist import neighbor_list

from crystaljax.status import Status
from dft_bridge.engines.base import PROPERTIES, Crystal, Result

BOUNDS = {"band_gap": 30.0, "bulk_modulus": 1000.0, "density": 60.0}
"""Largest believable value per property (eV, GPa, g/cm3): above it a number is a failed calculation, not physics."""

AMU_PER_A3 = 1.66053906660
"""g/cm3 per atomic mass unit in a cubic Å."""


def to_atoms(crystal: Crystal) -> Atoms:
    """The crystal as ASE atoms, periodic in all directions."""
    return Atoms(numbers=crystal.numbers, cell=crystal.lattice, scaled_positions=crystal.frac_coords, pbc=True)


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


def plain(value: Any) -> Any:
    """Tuples as lists, so that a fingerprint equals its JSON copy."""
    return [plain(v) for v in value] if isinstance(value, tuple) else value


def check_property(property_name: str) -> None:
    """Raise ``ValueError`` for a property no engine knows."""
    if property_name not in PROPERTIES:
        raise ValueError(f"no property {property_name!r}; choose one of {', '.join(PROPERTIES)}")


def checked(result: Result, property_name: str) -> Result:
    """The result, or ``INVALID_RESULT`` if its number is not one a crystal can have."""
    if result.status != Status.OK or 0.0 <= result.value <= BOUNDS[property_name]:
        return result
    message = f"{property_name} of {result.value} is outside 0-{BOUNDS[property_name]}"
    return Result.failure(Status.INVALID_RESULT, message, **result.details)
