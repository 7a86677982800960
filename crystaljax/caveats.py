"""Caveats: what a reader must know of a number that is right for its protocol.

They are codes beside a value, never a change of it. Most follow from the crystal, the settings and the facts that a
calculation leaves (:func:`derive`), so results that were stored before there were caveats have them too.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import spglib

PRESSURE_BOUND = 5.0
"""GPa. A cell under more is strained. Pressure moves gaps of common semiconductors by some 0.01 to 0.1 eV/GPa, and the
experimental cell of a stiff crystal is under up to 5 GPa in PBE, whose lattice constants are about 1 % too large."""
PULAY_MARGIN = 0.4
"""Share by which a Pulay pressure may be wrong, see :mod:`crystaljax.dft_bridge.planewave.properties`."""
MAGNETIC_ELEMENTS = frozenset({*range(23, 29), *range(58, 71), *range(92, 97)})
"""Atomic numbers of V to Ni, Ce to Yb and U to Cm, whose open d and f shells carry moments in most compounds. Others
may in some, such as Cu(II) and Ti(III), which elements alone do not tell."""
NONE = "none"
"""How no caveats are written, where the field cannot be left out."""
_SYMPREC = 0.01  # Å, that of crystaljax.symmetry, which worker processes do not import as it needs JAX


class Caveat(enum.Enum):
    """A code, and what it means in one sentence. Stored by name: never rename."""

    CLAMPED_IONS = "The cell was scaled with its ions, which symmetry lets move: a relaxed modulus is smaller."
    EXTRAPOLATED = "The minimum of the energy lies beyond the calculated volumes, so the modulus is extrapolated."
    NOT_RELAXED = "The relaxation used up its steps before forces and stress were small."
    STRAINED = f"The cell is under a pressure, or a tension, of more than {PRESSURE_BOUND:g} GPa."
    MAGNETIC = "Calculated without spin, with elements that are mostly magnetic."
    FEW_KPOINTS = "The k-points miss special points of the lattice, where band edges often are: the gap may be smaller."
    CHANGED_BONDS = "The relaxed crystal has another structure than the prototype."


def names(caveats: Iterable[Caveat]) -> list[str]:
    """Their codes, in the order of the class."""
    found = set(caveats)
    return [caveat.name for caveat in Caveat if caveat in found]


def text(caveats: Iterable[Caveat]) -> str:
    """Their codes with spaces between, or :data:`NONE`; :func:`parse` reads it."""
    return " ".join(names(caveats)) or NONE


def parse(codes: str | Sequence[str]) -> tuple[Caveat, ...]:
    """The caveats of a text or of a list of codes; raises ``ValueError`` for one that this version does not know."""
    if isinstance(codes, str):
        codes = [] if codes == NONE else codes.split()
    unknown = [code for code in codes if code not in Caveat.__members__]
    if unknown:
        known = ", ".join(Caveat.__members__)
        raise ValueError(f"unknown caveats {' '.join(map(str, unknown))}; known are {known}: update crystaljax")
    return tuple(caveat for caveat in Caveat if caveat.name in codes)


def derive(
    lattice: np.ndarray,
    frac_coords: np.ndarray,
    numbers: np.ndarray,
    property_name: str,
    details: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> tuple[Caveat, ...]:
    """The caveats of a value, but for those of its k-points.

    Args:
        lattice, frac_coords, numbers: [3, 3] Å, [N, 3] and [N], the crystal that was given.
        property_name: what was calculated.
        details: facts of the calculation, as results and tables hold them; what they lack is not judged.
        settings: of the engine, as fingerprints hold them.
    """
    found = set()
    if settings.get("spin") is False and MAGNETIC_ELEMENTS.intersection(np.asarray(numbers).tolist()):
        found.add(Caveat.MAGNETIC)
    if property_name == "bulk_modulus":
        if sum(free_parameters(lattice, frac_coords, numbers)) > 1:
            found.add(Caveat.CLAMPED_IONS)
        if settings.get("modulus_at", "relaxed") == "relaxed" and _extrapolated(details, settings):
            found.add(Caveat.EXTRAPOLATED)
    if details.get("relaxed") is False:
        found.add(Caveat.NOT_RELAXED)
    if _strained(property_name, details, settings):
        found.add(Caveat.STRAINED)
    cell, coords = _array(details, "lattice", (3, 3)), _array(details, "frac_coords", np.shape(frac_coords))
    if "relaxed" in details and cell is not None and coords is not None and abs(np.linalg.det(cell)) > 0:
        if changed_bonds((lattice, frac_coords), (cell, coords), numbers):
            found.add(Caveat.CHANGED_BONDS)
    return tuple(caveat for caveat in Caveat if caveat in found)


def changed_bonds(
    given: tuple[np.ndarray, np.ndarray], relaxed: tuple[np.ndarray, np.ndarray], numbers: np.ndarray
) -> bool:
    """Whether a relaxed crystal is no longer the given one, volume aside, to pymatgen's ``StructureMatcher``.

    Args:
        given, relaxed: lattice [3, 3] Å and fractional coordinates [N, 3].
        numbers: [N], atomic numbers.
    """
    if _same_shape(given, relaxed):  # most crystals of few sites; it spares the import
        return False
    from pymatgen.analysis.structure_matcher import StructureMatcher
    from pymatgen.core import Structure

    species = np.asarray(numbers).tolist()
    first, second = (Structure(lattice, species, coords) for lattice, coords in (given, relaxed))
    return not StructureMatcher(attempt_supercell=False).fit(first, second)


def _same_shape(given: tuple[np.ndarray, np.ndarray], relaxed: tuple[np.ndarray, np.ndarray]) -> bool:
    """Whether only volume and orientation differ, to a thousandth."""
    (old, sites), (new, moved) = given, relaxed
    metrics = [cell @ cell.T / abs(np.linalg.det(cell)) ** (2 / 3) for cell in (np.asarray(old), np.asarray(new))]
    offsets = np.asarray(moved) - np.asarray(sites)
    offsets = offsets - offsets[:1]
    return bool(np.abs(metrics[0] - metrics[1]).max() < 1e-3 and np.abs(offsets - np.rint(offsets)).max() < 1e-3)


def free_parameters(lattice: np.ndarray, frac_coords: np.ndarray, numbers: np.ndarray) -> tuple[int, int]:
    """How many parameters of its cell and of its sites a crystal's symmetry leaves free.

    These are the symmetric strains (1 for a cubic crystal, 6 for a triclinic one) and the symmetric moves of the sites
    against each other, counted by the characters of both representations.

    Args:
        lattice: [3, 3] in Å, rows a, b, c.
        frac_coords: [N, 3].
        numbers: integer [N], atomic numbers.
    """
    crystal = np.asarray(lattice).tolist(), np.asarray(frac_coords).tolist(), np.asarray(numbers).tolist()
    found = spglib.get_symmetry(crystal, symprec=_SYMPREC)
    if found is None:
        return 6, 3 * len(frac_coords) - 3
    rotations = found["rotations"].astype(float)
    images = np.einsum("pij,nj->pni", rotations, frac_coords) + found["translations"][:, None]
    offsets = images - frac_coords
    kept = (np.linalg.norm((offsets - np.rint(offsets)) @ lattice, axis=2) < 2 * _SYMPREC).sum(axis=1)
    trace = np.trace(rotations, axis1=1, axis2=2)
    strains = (trace**2 + np.trace(rotations @ rotations, axis1=1, axis2=2)).mean() / 2
    return round(strains), round((trace * (kept - 1)).mean())


def _extrapolated(details: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether the minimum of E(V) lies beyond the planned volumes; where more may be added it never does."""
    ratio, planned = _array(details, "v0_over_v", ()), _array(settings, "eos_volumes", None)
    if ratio is None or planned is None or not planned.size or settings.get("eos_further"):
        return False
    return not planned.min() <= ratio <= planned.max()


def _strained(property_name: str, details: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether the pressure of the cell that the value is for is known to be beyond the bound.

    The derivative of the energy with the plane waves held has an error of one sign: more waves lower the energy, so
    without the correction by Francis and Payne (J. Phys.: Condens. Matter 2, 4395 (1990)) it is too low. Tension is
    believed only of corrected pressures and at cut-offs that were measured to be tight, and the uncertainty of the
    correction must not decide.
    """
    if property_name == "bulk_modulus":
        pressure = _array(details, "pressure_at_cell", ()) if settings.get("modulus_at") == "cell" else None
    else:
        pressure = _array(details, "pressure", ())
    if pressure is None:
        return False
    correction = _array(details, "pulay_pressure", ())
    margin = 0.0 if correction is None else PULAY_MARGIN * correction
    corrected = correction is not None or settings.get(f"{property_name}_cutoff") == "tight"
    return bool(pressure - margin > PRESSURE_BOUND or (corrected and pressure + margin < -PRESSURE_BOUND))


def _array(facts: Mapping[str, Any], name: str, shape: tuple[int, ...] | None) -> np.ndarray | None:
    """A fact as finite numbers of a shape; ``None`` if it is missing or something else, as of a foreign engine."""
    try:
        found = np.array(facts.get(name), dtype=np.float64)
    except (TypeError, ValueError):
        return None
    fits = shape is None or found.shape == shape
    return found if fits and np.isfinite(found).all() else None
