"""Skeletons from what people have: CIF files, pymatgen, ASE, MP-20 rows, AFLOW prototypes.

Everything is checked at the door: a disordered structure, overlapping atoms, a missing cell, NaN or too many sites is
refused with an error that names the site and the fix.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np

from crystaljax.errors import CrystalJAXError
from crystaljax.skeleton import Skeleton

if TYPE_CHECKING:
    from ase import Atoms
    from pymatgen.core import Structure

MAX_SITES = 20
"""Default limit of sites in a cell; raise it by the ``max_sites`` argument."""
MIN_DISTANCE = 0.5
"""Å; two sites closer than this overlap (the shortest bond in nature, H-H, is 0.74 Å)."""
MIN_HEIGHT = 1.0
"""Å; a cell with a smaller distance between opposite faces is refused as flat."""
MAX_LENGTH = 100.0
"""Å; a cell with a longer vector is refused: its Niggli reduction would take hours."""
MAX_CELLS_AWAY = 1e6
"""A site further outside of the cell is refused: little of its place in the cell is left in its digits."""
SAME_SITE = 1e-4
"""Fraction of the cell; symmetry operators of a CIF that bring a site this close to itself make no new site."""
FIRST_CUBIC_SPACE_GROUP = 195

StructureLike = Union[Skeleton, "Structure", "Atoms", str, os.PathLike]


class StructureError(CrystalJAXError, ValueError):
    """A structure that cannot become a skeleton; the message names the site and the fix."""


def to_skeleton(structure: StructureLike, name: str | None = None, max_sites: int = MAX_SITES) -> Skeleton:
    """A skeleton from anything that describes a crystal.

    Args:
        structure: a ``Skeleton`` (returned as it is), pymatgen ``Structure``, ASE ``Atoms``, the path of a CIF file
            (or of anything else pymatgen reads), the text of a CIF, or the name of an AFLOW prototype such as
            ``AB_cF8_225_a_b`` (``rocksalt``'s) as pymatgen ships them.
        name: for people; by default the file name, prototype name or formula.
        max_sites: refuse larger cells.

    Raises:
        StructureError: if the structure is unusable; the message names the site and the fix.
        TypeError: for anything else than the types above.
    """
    if isinstance(structure, Skeleton):
        return structure
    if isinstance(structure, str) and "\n" in structure:
        return from_pymatgen(_parse_cif(structure, "the CIF text"), name, max_sites)
    if isinstance(structure, str | os.PathLike):
        path = Path(structure)
        if path.is_file():
            return from_pymatgen(_read_file(path), name or path.stem, max_sites, source=path.name)
        if path.suffix:
            raise StructureError(f"no such file: {path}; give the path of a CIF file or an AFLOW prototype name")
        return from_aflow(str(structure), name, max_sites)
    if hasattr(structure, "get_scaled_positions"):
        return from_ase(structure, name, max_sites)
    if hasattr(structure, "lattice") and hasattr(structure, "frac_coords"):
        return from_pymatgen(structure, name, max_sites)
    raise TypeError(
        f"cannot make a skeleton from {type(structure).__name__}: give a CIF path, a pymatgen Structure, ASE Atoms, "
        "or an AFLOW prototype name"
    )


def from_pymatgen(
    structure: Structure, name: str | None = None, max_sites: int = MAX_SITES, source: str = ""
) -> Skeleton:
    """A skeleton from a pymatgen ``Structure``; raises :class:`StructureError` if it is unusable."""
    label = name or (structure.composition.reduced_formula if len(structure) else "structure")
    _refuse_unusable(structure, label, max_sites)
    reduced = structure.get_reduced_structure(reduction_algo="niggli")
    # From its lengths and angles, so that the orientation does not depend on that of the source.
    lattice = type(reduced.lattice).from_parameters(*reduced.lattice.parameters)
    return Skeleton(
        name=label,
        lattice=np.array(lattice.matrix, dtype=np.float64),
        # Twice: -1e-17 % 1.0 is 1.0.
        frac_coords=np.array(reduced.frac_coords, dtype=np.float64) % 1.0 % 1.0,
        species=tuple(site.specie.symbol for site in reduced),
        source=source,
    )


def from_ase(atoms: Atoms, name: str | None = None, max_sites: int = MAX_SITES) -> Skeleton:
    """A skeleton from ASE ``Atoms`` that are periodic in three directions."""
    from pymatgen.core import Structure

    label = name or atoms.get_chemical_formula()
    cell = np.array(atoms.cell)
    if not np.isfinite(cell).all() or abs(np.linalg.det(cell)) < MIN_HEIGHT**3 or not all(atoms.pbc):
        raise StructureError(f"{label}: no periodic cell; set atoms.cell (three vectors, Å) and atoms.pbc = True")
    if not np.isfinite(atoms.positions).all():
        site = int(np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))[0])
        raise StructureError(f"{label}: site {site} has a position that is not finite; correct it")
    structure = Structure(cell, atoms.get_chemical_symbols(), atoms.get_scaled_positions())
    return from_pymatgen(structure, label, max_sites)


def from_aflow(prototype: str, name: str | None = None, max_sites: int = MAX_SITES) -> Skeleton:
    """A skeleton from pymatgen's AFLOW prototypes, by AFLOW name (``AB3C_cP5_221_a_c_b``).

    Raises:
        StructureError: for an unknown name; lists the nearest ones.
    """
    import difflib

    from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY

    known = {entry["tags"]["aflow"]: entry for entry in AFLOW_PROTOTYPE_LIBRARY}
    if prototype not in known:
        near = difflib.get_close_matches(prototype, known, n=3, cutoff=0.0)
        raise StructureError(f"no file and no AFLOW prototype called {prototype!r}; did you mean {', '.join(near)}?")
    structure = known[prototype]["snl"].structure
    return from_pymatgen(structure, name or prototype, max_sites, source=f"AFLOW {prototype}")


def from_mp20_row(row: dict[str, str], name: str | None = None, max_sites: int = MAX_SITES) -> Skeleton:
    """A skeleton from one row of an MP-20 CSV file (columns ``cif`` and, if there, ``material_id``)."""
    source = row.get("material_id", "")
    label = name or source or row.get("pretty_formula") or "MP-20 row"
    if not row.get("cif"):
        raise StructureError(f"{label}: the row has no 'cif' column; MP-20 files have one")
    return from_pymatgen(_parse_cif(row["cif"], label), label, max_sites, source)


def read_mp20(
    path: str | os.PathLike, rows: Iterable[int] | None = None, cubic_only: bool = True, max_sites: int = MAX_SITES
) -> list[Skeleton]:
    """Skeletons from an MP-20 CSV file.

    Args:
        path: the CSV file.
        rows: row numbers to take (the ``row`` column if there is one, else the position); ``None`` takes all.
        cubic_only: keep space groups 195-230 (column ``spacegroup.number``) only.
        max_sites: refuse larger cells.

    Raises:
        StructureError: if the file holds no such row or a row is unusable.
    """
    wanted = None if rows is None else set(rows)
    found: list[Skeleton] = []
    seen: set[int] = set()
    with open(path, newline="") as file:
        for position, row in enumerate(csv.DictReader(file)):
            number = int(row.get("row") or position)
            if wanted is not None and number not in wanted:
                continue
            seen.add(number)
            group = row.get("spacegroup.number") or "0"
            if cubic_only and float(group) < FIRST_CUBIC_SPACE_GROUP:
                continue
            found.append(from_mp20_row(row, max_sites=max_sites))
    if wanted is not None and wanted - seen:
        raise StructureError(f"{path} has no rows {sorted(wanted - seen)}")
    if not found:
        raise StructureError(f"{path} has no {'cubic ' if cubic_only else ''}rows; see cubic_only and rows")
    return found


def _read_file(path: Path) -> Structure:
    from pymatgen.core import Structure

    if path.suffix.lower() == ".cif":
        return _parse_cif(path.read_text(errors="replace"), str(path))
    try:
        return Structure.from_file(path)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise StructureError(f"{path}: not a structure file that pymatgen reads ({error})") from error


def _parse_cif(text: str, label: str) -> Structure:
    import warnings

    from pymatgen.io.cif import CifParser

    with warnings.catch_warnings():
        # The parser warns about rounded coordinates and site multiplicities; what matters is checked by us.
        warnings.simplefilter("ignore")
        try:
            # Symmetry brings a special position to itself, so sites are merged within a tolerance; two of the file on
            # one place add up to an occupancy above 1, which is refused instead of scaled down in silence.
            parser = CifParser.from_str(text, occupancy_tolerance=1.0, site_tolerance=SAME_SITE)
            structures = parser.parse_structures(primitive=False, on_error="raise")
        except (
            ValueError,
            KeyError,
            IndexError,
            TypeError,
            AttributeError,
            ZeroDivisionError,
            AssertionError,
        ) as error:
            raise StructureError(f"{label}: not a readable CIF ({error}); check it with another program") from error
    if len(structures) != 1:
        raise StructureError(f"{label}: holds {len(structures)} structures; give a file with one")
    return structures[0]


def _refuse_unusable(structure: Structure, label: str, max_sites: int) -> None:
    if not len(structure):
        raise StructureError(f"{label}: no sites; a skeleton needs at least one")
    if len(structure) > max_sites:
        raise StructureError(
            f"{label}: {len(structure)} sites, more than the limit of {max_sites}; "
            "reduce it to its primitive cell or raise max_sites"
        )
    lattice, coords = np.array(structure.lattice.matrix), np.array(structure.frac_coords)
    if not np.isfinite(lattice).all():
        raise StructureError(f"{label}: the cell has entries that are not finite; give three vectors in Å")
    volume = abs(np.linalg.det(lattice))
    areas = [np.linalg.norm(np.cross(lattice[(i + 1) % 3], lattice[(i + 2) % 3])) for i in range(3)]
    if min(areas) == 0 or volume / max(areas) < MIN_HEIGHT:
        raise StructureError(f"{label}: the cell is flat or missing (volume {volume:.3g} Å^3); give three vectors in Å")
    longest = np.linalg.norm(lattice, axis=1).max()
    if longest > MAX_LENGTH:
        raise StructureError(f"{label}: a cell vector is {longest:.4g} Å long, more than {MAX_LENGTH:g} Å; correct it")
    for index, site in enumerate(structure):
        if not np.isfinite(coords[index]).all():
            raise StructureError(f"{label}: site {index} has coordinates that are not finite; correct it")
        if np.abs(coords[index]).max() > MAX_CELLS_AWAY:
            raise StructureError(
                f"{label}: site {index} is {np.abs(coords[index]).max():.3g} cells away; give fractional coordinates"
            )
        if not site.is_ordered:
            raise StructureError(
                f"{label}: site {index} is disordered ({site.species_string}); "
                "give each site one element at full occupancy"
            )
    _refuse_overlaps(lattice, coords, label)


def _refuse_overlaps(lattice: np.ndarray, coords: np.ndarray, label: str) -> None:
    # Neighbouring images suffice: cells are at least MIN_HEIGHT high, twice the smallest distance.
    shifts = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    offsets = coords[:, None] - coords[None]
    offsets -= np.round(offsets)
    distances = np.linalg.norm((offsets[:, :, None] + shifts) @ lattice, axis=-1)
    zero_shift = int(np.flatnonzero((shifts == 0).all(axis=1))[0])
    distances[np.arange(len(coords)), np.arange(len(coords)), zero_shift] = np.inf
    nearest = distances.min(axis=-1)
    if nearest.min() < MIN_DISTANCE:
        first, second = np.unravel_index(nearest.argmin(), nearest.shape)
        raise StructureError(
            f"{label}: sites {first} and {second} overlap ({nearest.min():.3f} Å apart, at least {MIN_DISTANCE} Å "
            "needed); remove one"
        )


def to_skeletons(structures: StructureLike | Sequence[StructureLike]) -> tuple[Skeleton, ...]:
    """Skeletons from one structure or several (see :func:`to_skeleton`); an MP-20 CSV file gives its cubic rows."""
    if not isinstance(structures, list | tuple):
        structures = [structures]
    found: list[Skeleton] = []
    for structure in structures:
        if isinstance(structure, str | os.PathLike) and str(structure).endswith(".csv"):
            found += read_mp20(structure)
        else:
            found.append(to_skeleton(structure))
    return tuple(found)
