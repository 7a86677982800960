"""The crystal that a CIF file describes, as the CIF dictionary means it.

A file from somebody else is data: what it leaves open (a space group without its setting, two atoms on one place, a
site at half occupancy) is refused with what to do, never guessed, and the work is bounded by the file's size.
The format: S. R. Hall, F. H. Allen and I. D. Brown, Acta Cryst. A 47, 655 (1991); the names of
the core dictionary (version 2.4 and 3), and of magCIF for the operators of magnetic structures.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from ase.data import atomic_numbers
from scipy.spatial import KDTree

from crystaljax import spacegroups
from crystaljax.errors import CrystalJAXError
from crystaljax.spacegroups import Operators

SAME_SITE = 0.1
"""Å; an image of a site this near is the site itself, on a special position that its digits do not give exactly."""
MOVED = 0.02
"""Å; a site that is moved further than this to its special position is reported."""
MIN_DISTANCE = 0.5
"""Å; two sites closer than this overlap (the shortest bond in nature, H-H, is 0.74 Å)."""
FORMULA_TOLERANCE = 0.02
"""Atoms, and fraction of the atoms of an element, by which the sites may differ from the formula."""
LOOSE = (0.01, 0.1)
"""Å; distances within which a crystal's own space group is compared with the one that its file names."""

ISOTOPES = {"D": "H", "T": "H"}


class Unreadable(CrystalJAXError, ValueError):
    """Text that describes no crystal, or not one alone; the message says what to change."""


class Crystal(NamedTuple):
    """What a file says.

    Attributes:
        lattice: float64 [3, 3] in Å, rows a, b, c.
        species: chemical symbols, length N.
        coords: float64 [N, 3], fractional.
        labels: the file's own names of the sites, length N.
        notes: what the reader should know and what was dropped.
        sort: whether sites are to be ordered by electronegativity.
    """

    lattice: np.ndarray
    species: tuple[str, ...]
    coords: np.ndarray
    labels: tuple[str, ...]
    notes: tuple[str, ...] = ()
    sort: bool = False


class _Site(NamedTuple):
    label: str
    symbol: str
    coords: np.ndarray
    multiplicity: int | None


Block = dict[str, list[str]]


def read(text: str, max_sites: int) -> Crystal:
    """The one crystal of a CIF.

    Args:
        text: the file.
        max_sites: refuse larger cells, before they are made.

    Raises:
        Unreadable: if there is none, more than one, or one that is not told completely.
    """
    found = [(name, block) for name, block in _blocks(text) if any(tag in block for tag in _SITES)]
    if not found:
        raise Unreadable("not a readable CIF: no data block has atom sites (_atom_site_fract_x, _y, _z)")
    if len(found) > 1:
        names = ", ".join(name[:40] for name, _ in found[:5])
        raise Unreadable(f"holds {len(found)} structures ({names}); give a file with one")
    return _crystal(found[0][1], max_sites)


def element(text: str) -> str:
    """The symbol of an element, of an ion (``Fe3+``, ``O2-``) or an isotope (``D``).

    Raises:
        Unreadable: for anything else.
    """
    match = re.fullmatch(r"([A-Za-z]{1,2})(?:[\d.]*[+-]?|[+-][\d.]*)", text.strip())
    symbol = match[1].capitalize() if match else ""
    symbol = ISOTOPES.get(symbol, symbol)
    if atomic_numbers.get(symbol, 0) == 0:
        raise Unreadable(f"{text[:40]!r} is no element; write its symbol")
    return symbol


def cell(lengths: Sequence[float] | np.ndarray, angles: Sequence[float] | np.ndarray) -> np.ndarray:
    """float64 [3, 3], rows a, b, c in Å: c along z, a in the plane of x and z, as pymatgen has it.

    Args:
        lengths: a, b, c in Å.
        angles: alpha, beta, gamma in degrees.

    Raises:
        Unreadable: if there is no such cell.
    """
    values = [*lengths, *angles]
    if not all(math.isfinite(value) and value > 0 for value in values) or max(angles) >= 180:
        raise Unreadable(f"there is no cell with lengths and angles {', '.join(f'{v:g}' for v in values)}; correct it")
    cosines = np.cos(np.radians(angles))
    if 1 - (cosines**2).sum() + 2 * cosines.prod() <= 0:  # the squared volume of the unit vectors
        raise Unreadable(f"angles of {', '.join(f'{a:g}' for a in angles)} degrees do not make a cell; correct them")
    from pymatgen.core import Lattice

    # Its orientation too, as the choice among equal Niggli cells hangs on the last digit.
    return np.array(Lattice.from_parameters(*lengths, *angles).matrix, dtype=np.float64)


# The file


_QUOTED = re.compile(r"""(['"])(.*?)\1(?=\s|$)""")
_WORD = re.compile(r"\S+")
_UNQUOTED = ""


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    """Pairs of the kind of quote (empty for none) and the value. Linear in the length of the text."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(";"):
            field = [line[1:]]
            for line in lines:
                if line.startswith(";"):
                    break
                field.append(line)
            yield ";", "\n".join(field).strip()
            line = line[1:] if line.startswith(";") else ""
        position = 0
        while match := _WORD.search(line, position):
            position = match.start()
            if match[0].startswith("#"):
                break
            if match[0][0] in "'\"":
                quoted = _QUOTED.match(line, position)
                if quoted is None:  # the quote is never closed: the value is the rest of the line
                    yield match[0][0], line[position + 1 :].strip()
                    break
                yield quoted[1], quoted[2]
                position = quoted.end()
            else:
                yield _UNQUOTED, match[0]
                position = match.end()


def _blocks(text: str) -> list[tuple[str, Block]]:
    """Name and items of each data block; names of items in small letters, with underscores only."""
    blocks: list[tuple[str, Block]] = [("", {})]
    loop: list[str] | None = None
    values: list[str] = []
    tag = ""

    def close() -> None:
        if loop:
            _add_loop(blocks[-1][1], loop, values)

    for quote, token in _tokens(text):
        word = token.lower() if quote == _UNQUOTED else ""
        if word.startswith(("data_", "save_", "global_")):
            close()
            loop, tag = None, ""
            blocks.append((token.partition("_")[2] or f"block {len(blocks)}", {}))
        elif word in ("loop_", "stop_"):
            close()
            loop, values, tag = [] if word == "loop_" else None, [], ""
        elif word.startswith("_"):
            name = word.replace(".", "_").rstrip("_")
            if loop is not None and not values:
                loop.append(name)
            else:
                close()
                loop, tag = None, name
        elif loop is not None:
            values.append(token)
        elif tag:
            _add(blocks[-1][1], tag, [token])
            tag = ""
        # Anything else is a word without a name, as in a broken text of a publication: it says nothing of the crystal.
    close()
    return blocks


_OURS = ("_atom_site", "_cell_", "_symmetry_", "_space_group_", "_chemical_formula_")


def _add_loop(block: Block, loop: list[str], values: list[str]) -> None:
    rows, rest = divmod(len(values), len(loop))
    if rest:
        if any(name.startswith(_OURS) for name in loop):
            raise Unreadable(
                f"the loop of {loop[0]} has {len(loop)} columns and {len(values)} values; give each row all columns"
            )
        return
    for column, name in enumerate(loop):
        _add(block, name, values[column :: len(loop)] if rows else [])


def _add(block: Block, name: str, values: list[str]) -> None:
    if block.get(name, values) != values and name.startswith(_OURS):
        raise Unreadable(f"gives {name} twice, with different values; keep one")
    block[name] = values


# The crystal


_SITES = ("_atom_site_fract_x", "_atom_site_fract_y", "_atom_site_fract_z", "_atom_site_label", "_atom_site_cartn_x")
_NOTHING = ("", ".", "?")


def _crystal(block: Block, max_sites: int) -> Crystal:
    if any(tag.startswith(("_cell_wave_vector", "_space_group_ssg_")) for tag in block) or any(
        value not in (*_NOTHING, "0") for value in block.get("_cell_modulation_dimension", ())
    ):
        raise Unreadable("is a modulated structure; give a commensurate one, in a supercell")
    lattice = _lattice(block)
    sites = _sites(block, max_sites)
    formula, units = _formula(block)
    given = _given_operators(block)
    if given is None:
        crystal = _by_symbol(block, lattice, sites, max_sites, formula, units)
    else:
        if not spacegroups.fit_cell(given.rotations, lattice):
            raise Unreadable(f"its symmetry operators do not fit its cell ({_parameters(block)}); correct one of them")
        crystal = _expand(lattice, sites, given, max_sites, "the symmetry operators")
        crystal = _compare_with_symbol(block, crystal, given, formula, units)
    notes = [*crystal.notes]
    if formula and not _agrees(crystal, formula, units):
        notes.append(
            f"the sites are {_written(Counter(crystal.species))}, but the formula of the file is {_written(formula)}"
            + (f" with Z = {units:g}" if units else "")
            + "; atoms may be missing"
        )
    if any(tag.startswith(("_atom_site_moment", "_space_group_magn", "_space_group_symop_magn")) for tag in block):
        notes.append("magnetic moments and time reversal are dropped")
    return crystal._replace(notes=tuple(notes))


def _lattice(block: Block) -> np.ndarray:
    tags = [f"_cell_length_{axis}" for axis in "abc"] + [f"_cell_angle_{axis}" for axis in ("alpha", "beta", "gamma")]
    values = [_number(block, tag) for tag in tags]
    return cell(values[:3], values[3:])


def _parameters(block: Block) -> str:
    tags = [f"_cell_length_{axis}" for axis in "abc"] + [f"_cell_angle_{axis}" for axis in ("alpha", "beta", "gamma")]
    return ", ".join(block[tag][0] for tag in tags)


def _number(block: Block, tag: str) -> float:
    values = block.get(tag, [])
    if len(values) != 1 or values[0] in _NOTHING:
        raise Unreadable(f"not a readable CIF: {tag} is missing; give it")
    return _float(values[0], tag)


def _float(text: str, what: str) -> float:
    """A number, without its standard uncertainty in parentheses."""
    plain = re.sub(r"\(\d*\)$", "", text)
    try:
        # float() takes "1_0", "nan" and "infinity" too.
        value = float(plain) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", plain) else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise Unreadable(f"{what} is {text[:40]!r}, not a finite number; correct it")
    return value


def _sites(block: Block, max_sites: int) -> list[_Site]:
    columns = {axis: block.get(f"_atom_site_fract_{axis}", []) for axis in "xyz"}
    if not all(columns.values()):
        raise Unreadable("holds no sites with fractional coordinates (_atom_site_fract_x, _y, _z); give them")
    count = len(columns["x"])
    if count > max_sites:
        raise Unreadable(
            f"{count} sites, more than the limit of {max_sites}; reduce it to its primitive cell or raise max_sites"
        )
    names = block.get("_atom_site_label", block.get("_atom_site_type_symbol", []))
    other = {
        tag: block.get(f"_atom_site_{tag}", [])
        for tag in ("type_symbol", "occupancy", "attached_hydrogens", "calc_flag")
    }
    multiplicities = block.get("_atom_site_site_symmetry_multiplicity", block.get("_atom_site_symmetry_multiplicity"))
    lengths = {len(column) for column in (*columns.values(), names, *other.values()) if column}
    if lengths != {count} or not names:
        raise Unreadable("the columns of its atom sites have different lengths; give each site all of them")
    known = _formula(block)[0]
    sites = []
    for index in range(count):
        label = names[index]
        where = f"site {index} ({label})"
        kind = other["type_symbol"][index] if other["type_symbol"] else "."
        try:
            symbol = _element_of_label(label, known) if kind in _NOTHING else element(kind)
        except Unreadable as error:
            raise Unreadable(f"{where}: {error}") from error
        occupancy = other["occupancy"][index] if other["occupancy"] else "."
        if occupancy not in _NOTHING and _float(occupancy, f"the occupancy of {where}") != 1:
            number = _float(occupancy, "")
            if number <= 0:
                raise Unreadable(f"{where} has an occupancy of {occupancy}: remove the site, or correct the number")
            raise Unreadable(
                f"site {index} is disordered ({label}: {symbol} at an occupancy of {occupancy}); "
                "give each site one element at full occupancy"
            )
        if other["attached_hydrogens"] and other["attached_hydrogens"][index] not in (*_NOTHING, "0"):
            raise Unreadable(f"{where} has hydrogen attached that has no place; give each atom a site")
        if other["calc_flag"] and other["calc_flag"][index].lower() in ("dum", "dummy"):
            raise Unreadable(f"{where} is a dummy site; remove it")
        texts = [columns[axis][index] for axis in "xyz"]
        coords = np.array([_coordinate(text, f"a coordinate of {where}") for text in texts])
        sites.append(_Site(label, symbol, coords, _multiplicity(multiplicities, index)))
    return sites


def _coordinate(text: str, what: str) -> float:
    """A fractional coordinate; a sixth or twelfth that was rounded to three digits or more is made exact."""
    value = _float(text, what)
    digits = len(re.sub(r"\(\d*\)$", "", text).partition(".")[2])
    exact = round(value * 12) / 12
    return exact if 3 <= digits <= 12 and abs(round(exact, digits) - value) < 10.0 ** -(digits + 2) else value


def _multiplicity(column: list[str] | None, index: int) -> int | None:
    if column is None or len(column) <= index or not re.fullmatch(r"\d{1,4}", column[index]):
        return None
    return int(column[index])


def _element_of_label(label: str, formula: Counter[str]) -> str:
    """The element of a site without a type symbol, from its label (``Na1``, ``O1A``, ``MgM1``).

    ``CA1`` may be calcium or a carbon: the formula of the file decides, if it has one of the two.
    """
    match = re.match(r"[A-Za-z]+", label)
    letters = match[0] if match else ""
    one, two = (ISOTOPES.get(s, s) for s in (letters[:1].upper(), letters[:2].capitalize()))
    possible = [s for s in dict.fromkeys((two, one)) if len(letters) >= 1 and atomic_numbers.get(s, 0)]
    several = re.match(r"O[-_]?[Hh]|[Ww]at|[OH][Ww]", label)
    if several or not possible:
        raise Unreadable("its label names no element; add a column _atom_site_type_symbol")
    if len(possible) == 1 or letters[1:2].islower():
        return possible[0]
    likely = [s for s in possible if s in formula] if formula else possible
    if len(likely) != 1:
        raise Unreadable(f"its label may mean {' or '.join(possible)}; add a column _atom_site_type_symbol")
    return likely[0]


# Symmetry


_OPERATORS = ("_space_group_symop_operation_xyz", "_symmetry_equiv_pos_as_xyz")
_MAGNETIC = ("_space_group_symop_magn_operation_xyz", "_space_group_symop_magn_centering_xyz")
_HERMANN_MAUGUIN = re.compile(r"_(symmetry_)?space_group_name_h[-_]m(_alt|_full)?")
_HALL = re.compile(r"_(symmetry_)?space_group_name_hall")
_NUMBER = re.compile(r"_symmetry_int_tables_number|_space_group_it_number")
_SCHOENFLIES = re.compile(r"_(symmetry_)?space_group_name_schoenflies")


def _given_operators(block: Block) -> Operators | None:
    try:
        if magnetic := block.get(_MAGNETIC[0]):
            found = spacegroups.parse_operators(magnetic)
            centring = block.get(_MAGNETIC[1])
            if not centring:
                return found
            shifts = spacegroups.parse_operators(centring).translations
            count = len(shifts)
            return spacegroups.group(
                np.repeat(found.rotations, count, axis=0),
                (found.translations[:, None] + shifts[None]).reshape(-1, 3),
            )
        for tag in _OPERATORS:
            if texts := [text for text in block.get(tag, []) if text not in _NOTHING]:
                return spacegroups.parse_operators(texts)
    except Unreadable:
        raise
    except ValueError as error:
        raise Unreadable(str(error)) from error
    return None


class _Name(NamedTuple):
    text: str
    settings: frozenset[int]
    is_number: bool


def _group_names(block: Block) -> list[_Name]:
    """Every name of the space group in the file, with the settings that it may mean."""
    names = []
    for tag, values in block.items():
        for text in (value for value in values if value not in _NOTHING):
            if _HERMANN_MAUGUIN.fullmatch(tag):
                names.append(_Name(text, spacegroups.find(text), False))
            elif _HALL.fullmatch(tag):
                names.append(_Name(text, spacegroups.find_hall(text), False))
            elif _NUMBER.fullmatch(tag):
                number = int(text) if re.fullmatch(r"\d{1,3}", text) else 0
                names.append(_Name(f"number {text}", spacegroups.find_number(number), True))
            elif _SCHOENFLIES.fullmatch(tag):
                names.append(_Name(text, spacegroups.find_schoenflies(text), True))
    return names


def _by_symbol(
    block: Block, lattice: np.ndarray, sites: list[_Site], max_sites: int, formula: Counter[str], units: float | None
) -> Crystal:
    """The crystal of a file without operators: its group is expanded in the one setting that it can mean."""
    names = _group_names(block)
    if not names:
        magnetic = [tag for tag in block if tag.startswith("_space_group_magn")]
        if magnetic:
            raise Unreadable("names a magnetic space group without its operators; add them")
        return _expand(lattice, sites, spacegroups.IDENTITY, max_sites, "the cell")
    title = " = ".join(dict.fromkeys(name.text[:60] for name in names))
    for name in names:
        if not name.settings:
            raise Unreadable(f"the space group {name.text[:60]!r} is not known, and it has no operators; add them")
    possible = frozenset.intersection(*(name.settings for name in names))
    if not possible:
        raise Unreadable(
            f"its space group has names that contradict each other ({title}); correct them or add operators"
        )
    fitting = [
        hall
        for hall in spacegroups.same_operators(possible)
        if spacegroups.fit_cell(spacegroups.operators(hall).rotations, lattice)
    ]
    if not fitting:
        raise Unreadable(
            f"its cell ({_parameters(block)}) is not one of its space group ({title}); correct one of them"
        )
    made, failed = {}, []
    under = f"the space group {title}"
    # A setting that makes many sites may still be the one that is meant.
    most = max_sites if len(fitting) == 1 else spacegroups.MAX_OPERATORS * len(sites)
    for hall in fitting:
        try:
            made[hall] = _expand(lattice, sites, spacegroups.operators(hall), most, under)
        except Unreadable as error:
            failed.append(error)
    if not made:
        raise failed[0]
    for evidence in (lambda c: _has_multiplicities(c, sites), lambda c: not formula or _agrees(c, formula, units)):
        made = {hall: crystal for hall, crystal in made.items() if evidence(crystal)} or made
    if len(made) > 1 and not all(name.is_number for name in names):
        usual = spacegroups.standard(made)
        made = {hall: made[hall] for hall in usual} if len(usual) == 1 else made
    if len(made) > 1:
        ways = [
            f"{spacegroups.setting(hall)} makes {_written(Counter(c.species))}" for hall, c in list(made.items())[:6]
        ]
        raise Unreadable(
            f"its space group ({title}) has {len(made)} settings that fit: {'; '.join(ways)}; "
            "write the symbol of the one that is meant, or add operators"
        )
    (crystal,) = made.values()
    if len(crystal.species) > max_sites:
        raise Unreadable(_too_many(len(crystal.species), under, max_sites))
    return crystal


def _has_multiplicities(crystal: Crystal, sites: list[_Site]) -> bool:
    counts = Counter(crystal.labels)
    labels = [site.label for site in sites]
    return len(set(labels)) == len(labels) and all(site.multiplicity in (None, counts[site.label]) for site in sites)


def _compare_with_symbol(
    block: Block, crystal: Crystal, given: Operators, formula: Counter[str], units: float | None
) -> Crystal:
    """Refuse operators that make another group than the file names, unless the crystal is complete all the same."""
    names = [name for name in _group_names(block) if name.settings]
    named = {spacegroups.setting(hall).number: name.text for name in names for hall in name.settings}
    made = spacegroups.group_number(given, crystal.lattice)
    if made is None or set(named) <= {made}:
        return crystal
    own = spacegroups.crystal_numbers(crystal.lattice, crystal.coords, crystal.species, LOOSE)
    if set(named) <= own | {made}:
        return crystal  # all atoms are listed, under fewer operators than the crystal has
    told = ", ".join(f"{text[:60]} ({number})" for number, text in named.items())
    usual = spacegroups.setting(min(spacegroups.find_number(made))).symbol
    if formula and units and _agrees(crystal, formula, units):
        return crystal._replace(
            notes=(*crystal.notes, f"its operators make {usual} ({made}), not {told}; the operators are used")
        )
    raise Unreadable(
        f"its space group is {told}, but its operators make {usual} ({made}), and the sites do not have the "
        "symmetry of the name; correct the name or the operators"
    )


def _expand(lattice: np.ndarray, sites: list[_Site], operators: Operators, max_sites: int, under: str) -> Crystal:
    """All sites of the cell. A site near a special position is put on it."""
    coords: list[np.ndarray] = []
    owners: list[int] = []
    notes = []
    for index, site in enumerate(sites):
        place, images = _orbit(site, operators, lattice)
        moved = float(np.linalg.norm((place - site.coords) @ lattice))
        if moved > MOVED:
            notes.append(f"{site.label} is moved by {moved:.3f} Å to its special position; give more digits")
        coords.append(images)
        owners += [index] * len(images)
        if len(owners) > max_sites:
            # The better reason, if there is one: all atoms are listed, and images of each other.
            _refuse_same_place(
                sites, np.concatenate(coords), np.array(owners), lattice, len(operators.rotations), under
            )
            raise Unreadable(_too_many(len(owners), under, max_sites))
    _refuse_same_place(sites, np.concatenate(coords), np.array(owners), lattice, len(operators.rotations), under)
    return Crystal(
        lattice,
        tuple(sites[owner].symbol for owner in owners),
        np.concatenate(coords),
        tuple(sites[owner].label for owner in owners),
        tuple(notes),
        sort=True,
    )


def _too_many(count: int, under: str, max_sites: int) -> str:
    return (
        f"{count} sites or more under {under}, more than the limit of {max_sites}; "
        "reduce it to its primitive cell or raise max_sites"
    )


def _refuse_same_place(
    sites: list[_Site], coords: np.ndarray, owners: np.ndarray, lattice: np.ndarray, order: int, under: str
) -> None:
    """Refuse two listed sites on one place, or on images of each other; coords [N, 3] in [0, 1)."""
    firsts = coords[np.flatnonzero(np.diff(owners, prepend=-1))]
    # A sphere in space fits into this one in fractional coordinates.
    reach = min(0.49, SAME_SITE * np.linalg.norm(np.linalg.inv(lattice), 2))
    for index, hits in enumerate(KDTree(coords, boxsize=1.0).query_ball_point(firsts, reach)):
        for hit in (hit for hit in hits if owners[hit] < index):
            offset = coords[hit] - firsts[index]
            if np.linalg.norm((offset - np.round(offset)) @ lattice) < SAME_SITE:
                raise Unreadable(_on_one_place(sites[index], sites[owners[hit]], order, under))


def _on_one_place(site: _Site, other: _Site, order: int, under: str) -> str:
    if order == 1 or site.symbol != other.symbol:
        return (
            f"Occupancy 2.0 of one site: {other.label} and {site.label} overlap; keep one, or correct their coordinates"
        )
    return (
        f"{other.label} and {site.label} overlap: they are images of each other under {under}; "
        "keep one of them, or remove the symmetry if all atoms are listed"
    )


def _orbit(site: _Site, operators: Operators, lattice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The place [3] of a site, on the special position that it is near to, and its images [M, 3] in the cell."""
    place = site.coords
    if np.abs(place).max() > 1e6:
        raise Unreadable(f"{site.label} is {np.abs(place).max():.3g} cells away; give fractional coordinates")
    for _ in range(4):
        images = operators.rotations @ place + operators.translations
        offsets = images - place
        offsets -= np.round(offsets)
        distances = np.asarray(np.linalg.norm(offsets @ lattice, axis=1))
        staying = distances < SAME_SITE
        if distances[staying].max() < 1e-9:
            break
        place = place + offsets[staying].mean(axis=0)
    order, group = int(staying.sum()), len(operators.rotations)
    images = np.asarray(images % 1.0 % 1.0)
    apart = images[:, None] - images[None]
    apart -= np.round(apart)
    same = np.linalg.norm(apart @ lattice, axis=-1) < SAME_SITE / 10
    first = np.flatnonzero(same.argmax(axis=1) == np.arange(group))
    if distances[staying].max() > 1e-6 or len(first) * order != group:
        raise Unreadable(f"{site.label} overlaps with its own images but lies on no special position; give more digits")
    near = np.where(staying, np.inf, distances)
    if near.min() < MIN_DISTANCE:
        raise Unreadable(f"{site.label} overlaps with its own image, {near.min():.3f} Å away; correct its coordinates")
    return place, images[first]


# The formula


def _formula(block: Block) -> tuple[Counter[str], float | None]:
    """Atoms of the formula unit (empty if there is none that can be read) and Z."""
    text = " ".join(block.get("_chemical_formula_sum", [])[:1])
    parts = re.findall(r"([A-Z][a-z]?)(\d*\.?\d*)", text) if len(text) < 1000 else []
    found: Counter[str] = Counter()
    if "".join(symbol + count for symbol, count in parts) != re.sub(r"[\s,]", "", text):
        return found, None
    for symbol, count in parts:
        symbol = ISOTOPES.get(symbol, symbol)
        if symbol not in atomic_numbers or count == ".":
            return Counter(), None
        found[symbol] += float(count or 1)  # pyright: ignore[reportArgumentType]  # files count in fractions too
    units = block.get("_cell_formula_units_z", ["?"])[0]
    return found, float(units) if re.fullmatch(r"\d{1,4}(\.0*)?", units) and float(units) else None


def _agrees(crystal: Crystal, formula: Counter[str], units: float | None) -> bool:
    """Whether the sites are the formula times Z; without Z, times any number."""
    counts = Counter(crystal.species)
    if set(counts) != set(formula):
        return False
    factors = [units] if units else [sum(counts.values()) / sum(formula.values())]
    # pymatgen writes all atoms of the cell as the sum formula, with the number of its formula units beside it.
    whole = all(float(count).is_integer() for count in formula.values())
    if units and whole and math.gcd(*(int(count) for count in formula.values())) == units:
        factors.append(1.0)
    return any(
        all(abs(counts[s] - f * n) <= FORMULA_TOLERANCE * max(1.0, f * n) for s, n in formula.items()) for f in factors
    )


def _written(counts: Counter[str]) -> str:
    return " ".join(f"{symbol}{count:g}" for symbol, count in sorted(counts.items()))
