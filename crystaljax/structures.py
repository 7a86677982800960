"""Skeletons from what people have: CIF files and others, pymatgen, ASE, MP-20 rows, AFLOW prototypes.

Everything is checked at the door: a disordered structure, overlapping atoms, a missing cell, NaN or too many sites is
refused with an error that names the site and the fix. What is dropped (moments, constraints), and what looks wrong
without being so for certain, is said in one :class:`StructureWarning`.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Union, cast

import numpy as np
import spglib

from crystaljax import cif, spacegroups, structure_files
from crystaljax.cif import MIN_DISTANCE, Crystal, Unreadable
from crystaljax.errors import CrystalJAXError
from crystaljax.skeleton import Skeleton
from crystaljax.symmetry import SYMPREC

if TYPE_CHECKING:
    from ase import Atoms
    from pymatgen.core import Structure

MAX_SITES = 20
"""Default limit of sites in a cell; raise it by the ``max_sites`` argument."""
MIN_HEIGHT = 1.0
"""Å; a cell with a smaller distance between opposite faces is refused as flat."""
MAX_LENGTH = 100.0
"""Å; a cell with a longer vector is refused: its Niggli reduction would take hours."""
MAX_CELLS_AWAY = 1e6
"""A site further outside of the cell is refused: little of its place in the cell is left in its digits."""
ROUNDED = 0.0051
"""Fraction of the cell; a coordinate this near to a twelfth may be one that was rounded to two digits or more."""
MAX_TEXT = 32 * 2**20
"""Characters of a CIF that is given as text."""
MAX_TABLE_BYTES = 256 * 2**20
"""Largest MP-20 CSV file that is read."""
FIRST_CUBIC_SPACE_GROUP = 195

StructureLike = Union[Skeleton, "Structure", "Atoms", str, os.PathLike]
_Read = TypeVar("_Read")


class StructureError(CrystalJAXError, ValueError):
    """A structure that cannot become a skeleton; the message names the site and the fix."""


class StructureWarning(UserWarning):
    """What was dropped of a structure, or what its reader should look at."""


def to_skeleton(structure: StructureLike, name: str | None = None, max_sites: int = MAX_SITES) -> Skeleton:
    """A skeleton from anything that describes a crystal.

    Args:
        structure: a ``Skeleton`` (returned as it is), pymatgen ``Structure``, ASE ``Atoms``, the path of a file (CIF,
            POSCAR, pymatgen's JSON, extended XYZ, AIRSS ``.res``, XSF, ``vasprun.xml``; also packed), the text of a
            CIF, or the name of an AFLOW prototype such as ``AB_cF8_225_a_b`` (``rocksalt``'s) as pymatgen ships them.
        name: for people; by default the file name, prototype name or formula.
        max_sites: refuse larger cells.

    Raises:
        StructureError: if the structure is unusable; the message names the site and the fix.
        TypeError: for anything else than the types above.

    Warns:
        StructureWarning: once, with all that was dropped (moments, constraints) or looks wrong (sites that are not the
            file's own formula, rounded coordinates).
    """
    if isinstance(structure, Skeleton):
        return structure
    if isinstance(structure, str) and "\n" in structure:
        return _from_crystal(_read_cif(structure, "the CIF text", max_sites), name, "the CIF text", max_sites)
    if isinstance(structure, str | os.PathLike):
        return _from_path(structure, name, max_sites)
    if hasattr(structure, "get_scaled_positions"):
        return from_ase(cast("Atoms", structure), name, max_sites)
    if hasattr(structure, "lattice") and hasattr(structure, "frac_coords"):
        return from_pymatgen(cast("Structure", structure), name, max_sites)
    raise TypeError(
        f"cannot make a skeleton from {type(structure).__name__}: give a CIF path, a pymatgen Structure, ASE Atoms, "
        "or an AFLOW prototype name"
    )


def from_pymatgen(
    structure: Structure, name: str | None = None, max_sites: int = MAX_SITES, source: str = ""
) -> Skeleton:
    """A skeleton from a pymatgen ``Structure``; raises :class:`StructureError` if it is unusable."""
    return _from_pymatgen(structure, name, max_sites, source, ())


def _from_pymatgen(
    structure: Structure, name: str | None, max_sites: int, source: str, notes: Sequence[str]
) -> Skeleton:
    label = name or (structure.composition.reduced_formula if len(structure) else "structure")
    _refuse_unusable(structure, label, max_sites)
    try:
        reduced = structure.get_reduced_structure(reduction_algo="niggli")
    except ValueError as error:
        raise StructureError(f"{label}: the cell cannot be reduced ({error}); give a less oblique one") from error
    # From its lengths and angles, so that the orientation does not depend on that of the source.
    lattice = type(reduced.lattice).from_parameters(*reduced.lattice.parameters)
    made = Skeleton(
        name=label,
        lattice=np.array(lattice.matrix, dtype=np.float64),
        # Twice: -1e-17 % 1.0 is 1.0.
        frac_coords=np.array(reduced.frac_coords, dtype=np.float64) % 1.0 % 1.0,
        species=tuple(cif.ISOTOPES.get(site.specie.symbol, site.specie.symbol) for site in reduced),
        source=source,
    )
    notes = [*notes, *_dropped(structure), *_lost_symmetry(structure)]
    if notes:
        warnings.warn(f"{label}: {'; '.join(notes)}", StructureWarning, stacklevel=2)
    return made


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
    # ASE keeps one element of each disordered site, and the rest here.
    occupancies = atoms.info.get("occupancy")
    for kind, elements in occupancies.items() if isinstance(occupancies, dict) else ():
        if isinstance(elements, dict) and (len(elements) > 1 or any(value != 1 for value in elements.values())):
            told = ", ".join(f"{element} at {value}" for element, value in elements.items())
            raise StructureError(
                f"{label}: sites of kind {kind} are disordered ({told}); give each site one element at full occupancy"
            )
    notes = []
    if len(atoms.constraints):
        notes.append(f"constraints of the Atoms are dropped ({len(atoms.constraints)})")
    if atoms.has("initial_magmoms") and atoms.get_initial_magnetic_moments().any():
        notes.append("magnetic moments of the Atoms are dropped")
    structure = Structure(cell, atoms.get_chemical_symbols(), atoms.get_scaled_positions())
    return _from_pymatgen(structure, label, max_sites, "", notes)


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
    source = row.get("material_id") or ""
    label = name or source or row.get("pretty_formula") or "MP-20 row"
    if not row.get("cif"):
        raise StructureError(f"{label}: the row has no 'cif' column; MP-20 files have one")
    return _from_crystal(_read_cif(row["cif"], label, max_sites), label, label, max_sites, source)


def read_mp20(
    path: str | os.PathLike, rows: Iterable[int] | None = None, cubic_only: bool = True, max_sites: int = MAX_SITES
) -> list[Skeleton]:
    """Skeletons from an MP-20 CSV file, in any of the encodings and separators that spreadsheets write.

    Args:
        path: the CSV file.
        rows: row numbers to take (the ``row`` column if there is one, else the position); ``None`` takes all.
        cubic_only: keep space groups 195-230 only, by the column ``spacegroup.number`` (or a symbol in
            ``spacegroup.symbol`` or ``spacegroup``), or else by the crystal itself.
        max_sites: refuse larger cells.

    Raises:
        StructureError: if the file holds no such row or a row is unusable.
    """
    wanted = None if rows is None else set(rows)
    found: list[Skeleton] = []
    seen: set[int] = set()
    for position, row in enumerate(_table(Path(path))):
        number = _row_number(row.get("row"), position, path)
        if wanted is not None and number not in wanted:
            continue
        seen.add(number)
        group = _space_group(row)
        if cubic_only and group is not None and group < FIRST_CUBIC_SPACE_GROUP:
            continue
        made = from_mp20_row(row, max_sites=max_sites)
        if cubic_only and group is None:
            own = spacegroups.crystal_numbers(made.lattice, made.frac_coords, made.species, [SYMPREC])
            if max(own, default=0) < FIRST_CUBIC_SPACE_GROUP:
                continue
        found.append(made)
    if wanted is not None and wanted - seen:
        raise StructureError(f"{path} has no rows {sorted(wanted - seen)}")
    if not found:
        raise StructureError(f"{path} has no {'cubic ' if cubic_only else ''}rows; see cubic_only and rows")
    return found


def _table(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV file; the separator is the one that its head has most of."""
    text = _refusing(str(path), lambda: structure_files.decode(structure_files.read_bytes(path, MAX_TABLE_BYTES)))
    head = text[:100_000].partition("\n")[0]
    try:
        yield from csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count))
    except csv.Error as error:
        raise StructureError(
            f"{path}: not a table of MP-20's kind ({error}); it needs a head with a column 'cif', and CIFs in quotes"
        ) from error


def _row_number(text: str | None, position: int, path: str | os.PathLike) -> int:
    """A row number as pandas may write it: ``17`` or ``17.0``."""
    if not text:
        return position
    value = _number(text)
    if not value.is_integer():
        raise StructureError(f"{path}: line {position + 1} has the row number {text[:40]!r}; give a whole number")
    return int(value)


def _space_group(row: dict[str, str]) -> int | None:
    """The space group of a row by its number or symbol; ``None`` if the row does not tell it."""
    for column in ("spacegroup.number", "spacegroup.symbol", "spacegroup"):
        text = row.get(column) or ""
        value = _number(text)
        if value.is_integer() and 1 <= value <= 230:
            return int(value)
        if numbers := {spacegroups.setting(hall).number for hall in spacegroups.find(text)}:
            return max(numbers)
    return None


def _number(text: str) -> float:
    """A number, with a decimal comma too; NaN for anything else."""
    plain = text.strip().replace(",", ".")
    return float(plain) if re.fullmatch(r"[+-]?\d{1,15}(\.\d*)?", plain) else math.nan


def _from_path(given: str | os.PathLike, name: str | None, max_sites: int) -> Skeleton:
    path = Path(given)
    try:
        is_file, is_other = path.is_file(), path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise StructureError(f"{str(path)[:60]}: cannot be opened ({error.strerror})") from error
    if is_file:
        crystal = _refusing(str(path), lambda: structure_files.read(path, max_sites))
        stem = path.with_suffix("") if path.suffix.lower() in (".gz", ".bz2", ".xz", ".lzma") else path
        return _from_crystal(crystal, name or stem.stem, str(path), max_sites, source=path.name)
    if is_other and str(given):
        raise StructureError(f"{path}: not a file; give the path of a CIF file")
    if path.suffix:
        raise StructureError(f"no such file: {path}; give the path of a CIF file or an AFLOW prototype name")
    return from_aflow(str(given), name, max_sites)


def _read_cif(text: str, label: str, max_sites: int) -> Crystal:
    if len(text) > MAX_TEXT:
        raise StructureError(f"{label}: {len(text)} characters, more than {MAX_TEXT}; give the structure alone")
    return _refusing(label, lambda: cif.read(text.removeprefix("\ufeff"), max_sites))


def _refusing(label: str, read: Callable[[], _Read]) -> _Read:
    """What ``read`` returns; what it refuses as a :class:`StructureError` with the name of the file."""
    try:
        return read()
    except Unreadable as error:
        raise StructureError(f"{label}: {error}") from error
    except OSError as error:
        raise StructureError(f"{label}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:  # json's, for one
        raise StructureError(
            f"{label}: not a readable structure file ({error}); check it with another program"
        ) from error


def _from_crystal(crystal: Crystal, name: str | None, label: str, max_sites: int, source: str = "") -> Skeleton:
    from pymatgen.core import Structure

    lattice = np.array(crystal.lattice)
    _refuse_bad_cell(lattice, name or label)
    structure = Structure(lattice, crystal.species, crystal.coords, labels=list(crystal.labels))
    # In the order of pymatgen's reader of CIFs, so that a crystal's sites keep their numbers.
    structure = structure.get_sorted_structure() if crystal.sort else structure
    return _from_pymatgen(structure, name, max_sites, source, crystal.notes)


def _dropped(structure: Structure) -> Iterator[str]:
    """What a skeleton does not keep of a pymatgen structure."""
    properties = structure.site_properties
    spins = [getattr(species, "spin", None) for site in structure for species in site.species]
    moments = [getattr(moment, "moment", moment) for moment in properties.get("magmom", ())]
    if any(spins) or any(moment is not None and np.any(moment) for moment in moments):
        yield "magnetic moments are dropped"
    flags = properties.get("selective_dynamics", ())
    if any(flag is not None and not np.all(flag) for flag in flags):
        yield "selective dynamics are dropped"


def _lost_symmetry(structure: Structure) -> Iterator[str]:
    """Says that rounded coordinates have lost symmetry, such as 0.33 for a third in a file that lists all sites."""
    coords = np.array(structure.frac_coords)
    twelfths = np.round(coords * 12) / 12
    exact = np.where(np.abs(coords - twelfths) < ROUNDED, twelfths, coords)
    if np.abs(exact - coords).max() < 1e-5:
        return
    kinds = np.unique([site.specie.symbol for site in structure], return_inverse=True)[1] + 1
    found, possible = (
        spglib.get_symmetry_dataset(
            (structure.lattice.matrix.tolist(), places.tolist(), kinds.tolist()), symprec=SYMPREC
        )
        for places in (coords, exact)
    )
    if found is not None and possible is not None and len(possible.rotations) > len(found.rotations):
        yield (
            f"symmetry is lost: {found.international} ({found.number}), and {possible.international} "
            f"({possible.number}) if coordinates such as {coords[exact != coords][0]:.4g} are rounded; "
            "give more digits (0.333333)"
        )


def _refuse_unusable(structure: Structure, label: str, max_sites: int) -> None:
    if not len(structure):
        raise StructureError(f"{label}: no sites; a skeleton needs at least one")
    if len(structure) > max_sites:
        raise StructureError(
            f"{label}: {len(structure)} sites, more than the limit of {max_sites}; "
            "reduce it to its primitive cell or raise max_sites"
        )
    lattice, coords = np.array(structure.lattice.matrix), np.array(structure.frac_coords)
    _refuse_bad_cell(lattice, label)
    if not all(structure.lattice.pbc):
        raise StructureError(f"{label}: periodic in {sum(structure.lattice.pbc)} directions; a crystal is in three")
    for index, site in enumerate(structure):
        if not np.isfinite(coords[index]).all():
            raise StructureError(f"{label}: site {index} has coordinates that are not finite; correct it")
        if np.abs(coords[index]).max() > MAX_CELLS_AWAY:
            raise StructureError(
                f"{label}: site {index} is {np.abs(coords[index]).max():.3g} cells away; give fractional coordinates"
            )
        if not site.is_ordered:
            told = ", ".join(f"{species} at {occupancy:.12g}" for species, occupancy in site.species.items())
            raise StructureError(
                f"{label}: site {index} is disordered ({told}); give each site one element at full occupancy"
            )
        if site.properties.get("implicit_hydrogens"):
            raise StructureError(f"{label}: site {index} has hydrogen without a place; give each atom a site")
    _refuse_overlaps(structure, lattice, coords, label)


def _refuse_bad_cell(lattice: np.ndarray, label: str) -> None:
    if not np.isfinite(lattice).all():
        raise StructureError(f"{label}: the cell has entries that are not finite; give three vectors in Å")
    volume = abs(np.linalg.det(lattice))
    areas = [np.linalg.norm(np.cross(lattice[(i + 1) % 3], lattice[(i + 2) % 3])) for i in range(3)]
    if min(areas) == 0 or volume / max(areas) < MIN_HEIGHT:
        raise StructureError(f"{label}: the cell is flat or missing (volume {volume:.3g} Å^3); give three vectors in Å")
    longest = np.linalg.norm(lattice, axis=1).max()
    if longest > MAX_LENGTH:
        raise StructureError(f"{label}: a cell vector is {longest:.4g} Å long, more than {MAX_LENGTH:g} Å; correct it")


def _refuse_overlaps(structure: Structure, lattice: np.ndarray, coords: np.ndarray, label: str) -> None:
    # The image that rounding finds is the nearest one, if that is less than half of every height of the cell away.
    for first, coord in enumerate(coords[:-1]):
        offsets = coords[first + 1 :] - coord
        offsets -= np.round(offsets)
        distances = np.linalg.norm(offsets @ lattice, axis=-1)
        if distances.min() < MIN_DISTANCE:
            second = first + 1 + int(distances.argmin())
            raise StructureError(
                f"{label}: sites {first} and {second} overlap ({structure[first].label} and {structure[second].label}, "
                f"{distances.min():.3f} Å apart, at least {MIN_DISTANCE} Å needed); remove one"
            )


def to_skeletons(structures: StructureLike | Sequence[StructureLike]) -> tuple[Skeleton, ...]:
    """Skeletons from one structure or several (see :func:`to_skeleton`); an MP-20 CSV file gives its cubic rows."""
    several: Sequence[Any] = structures if isinstance(structures, list | tuple) else [structures]
    found: list[Skeleton] = []
    for structure in several:
        if isinstance(structure, str | os.PathLike) and str(structure).lower().endswith(".csv"):
            found += read_mp20(structure)
        else:
            found.append(to_skeleton(structure))
    return tuple(found)
