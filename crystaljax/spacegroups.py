"""Which tabulated setting of a space group a symbol means, and the operators of that setting.

A Hermann-Mauguin symbol names a group; the coordinates of a file need its *setting*: unique axis, cell choice, origin,
hexagonal or rhombohedral axes. The 530 settings of International Tables and their operators are spglib's (S. R. Hall,
Acta Cryst. A 37, 517 (1981)); here are the ways in which files write their names.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import spglib

SETTINGS = 530
METRIC_TOLERANCE = 0.01
"""Relative; how far an operator may change the lengths and angles of the cell before the two contradict each other."""
GRID = 24
"""Translations of tabulated operators are multiples of 1/24."""
GRID_TOLERANCE = 0.005
"""A translation written with few digits (0.33) stands for the multiple of 1/24 this near."""
MAX_OPERATORS = 192
"""Operators of F m -3 m in its conventional cell; no other group has more."""


class Setting(NamedTuple):
    """One tabulated setting.

    Attributes:
        hall_number: 1-530, spglib's.
        number: 1-230, of International Tables.
        symbol: Hermann-Mauguin, of this setting.
        choice: such as ``b1``, ``cab``, ``2``, ``H``; empty for a group with one setting, or its standard one.
        hall: Hall symbol.
        schoenflies: such as ``Oh^5``.
    """

    hall_number: int
    number: int
    symbol: str
    choice: str
    hall: str
    schoenflies: str

    def __str__(self) -> str:
        return f"{self.symbol} :{self.choice}" if self.choice[:1] in ("1", "2", "H", "R") else self.symbol


class Operators(NamedTuple):
    """Symmetry operators of a cell: x -> W x + w in fractional coordinates.

    Attributes:
        rotations: int [P, 3, 3], W.
        translations: float64 [P, 3], w, in [0, 1).
    """

    rotations: np.ndarray
    translations: np.ndarray


IDENTITY = Operators(np.eye(3, dtype=int)[None], np.zeros((1, 3)))

_GLIDE = {"": "a", "ba-c": "b", "cab": "b", "-cba": "c", "bca": "c", "a-cb": "a"}
_OLD_GLIDES = {
    **{number: _GLIDE for number in (64, 67, 68)},
    **{number: dict(zip(_GLIDE, "bacbac", strict=True)) for number in (39, 41)},
}
"""Before 1992 a plane that glides both ways, today's e, had the letter of one of them; by number and choice."""
_BARRED = (*range(200, 207), *range(221, 231))
"""m-3 and m-3m: before 1935, and in many files since, written without the bar (F m 3 m)."""
_AGAIN = {"1": ("s", "o1"), "2": ("z", "o2"), "H": ("h",), "R": ("r",)}
"""How databases write the choice at the end of a symbol, without a colon (ICSD: S and Z; Pauling File: O1 and O2)."""
_STANDARD = re.compile(r"(-?b\d?)?")
"""Choices that a symbol without further words means by convention: the only one, or unique axis b."""


def _type(hall_number: int) -> spglib.SpaceGroupType:
    found = spglib.get_spacegroup_type(hall_number)
    if found is None:
        raise ValueError(f"there is no Hall number {hall_number}; give one from 1 to {SETTINGS}")
    return found


@functools.cache
def setting(hall_number: int) -> Setting:
    """The setting of that Hall number, 1-530."""
    found = _type(hall_number)
    symbol = " ".join(found.international.split("=")[1 if "=" in found.international else 0].replace("_", "").split())
    hall = " ".join(found.hall_symbol.split())
    return Setting(hall_number, found.number, symbol, found.choice, hall, found.schoenflies)


def operators(hall_number: int) -> Operators:
    """The operators of a setting, by Hall number."""
    found = spglib.get_symmetry_from_database(hall_number)
    if found is None:
        raise ValueError(f"there is no Hall number {hall_number}; give one from 1 to {SETTINGS}")
    return Operators(np.array(found["rotations"], dtype=int), np.array(found["translations"], dtype=np.float64))


def find(symbol: str) -> frozenset[int]:
    """Hall numbers of the settings that a Hermann-Mauguin symbol may mean; empty for an unknown one.

    Spaces, underscores and case do not matter. Old, short and full symbols are known, and origin or axes after a
    colon, or as databases write them (``F d -3 m Z``, ``R -3 m H``).
    """
    key = _key(re.sub(r"\W*origin[^12]*([12]).*", r":\1", symbol, flags=re.IGNORECASE))
    base, _, choice = key.partition(":")
    known, choice = _symbols().get(base, frozenset()), choice.lstrip(":")
    if not choice:
        return known
    # ":2" of a setting with other axes is its "2cab"; ":1" of a group with one origin is that one.
    return frozenset(
        hall
        for hall in known
        if choice in (setting(hall).choice.lower(), setting(hall).choice[:1])
        or (choice == "1" and not setting(hall).choice)
    )


def find_hall(symbol: str) -> frozenset[int]:
    """Hall numbers of the settings with that Hall symbol; empty for one that is not tabulated."""
    return _halls().get(_hall_key(symbol), frozenset())


def find_number(number: int) -> frozenset[int]:
    """Hall numbers of all settings of the group with that number of International Tables."""
    return _numbers().get(number, frozenset())


def find_schoenflies(symbol: str) -> frozenset[int]:
    """Hall numbers of all settings of the group with that Schoenflies symbol, such as ``Oh^5``."""
    plain = re.sub(r"[\s_{}]", "", symbol).lower()
    return frozenset(hall for hall in range(1, SETTINGS + 1) if setting(hall).schoenflies.lower() == plain)


def standard(hall_numbers: Iterable[int]) -> frozenset[int]:
    """Those of the settings that a symbol without further words means by convention (unique axis b)."""
    return frozenset(hall for hall in hall_numbers if _STANDARD.fullmatch(setting(hall).choice))


def same_operators(hall_numbers: Iterable[int]) -> list[int]:
    """One Hall number for each different set of operators; a few settings are in the table twice."""
    return sorted({setting(hall).hall: hall for hall in sorted(hall_numbers, reverse=True)}.values())


def fit_cell(rotations: np.ndarray, lattice: np.ndarray) -> bool:
    """Whether the rotations leave the cell as it is, within 1 % of its lengths.

    Args:
        rotations: int [P, 3, 3].
        lattice: [3, 3] in Å, rows a, b, c.
    """
    metric = lattice @ lattice.T
    lengths = np.sqrt(np.diag(metric))
    turned = np.einsum("pji,jk,pkl->pil", rotations, metric, rotations)
    return bool((np.abs(turned - metric) <= 2 * METRIC_TOLERANCE * np.outer(lengths, lengths)).all())


def parse_operators(texts: Iterable[str]) -> Operators:
    """Operators from texts such as ``-x, y+1/2, z``; a fourth part (time reversal) is left out, and repetitions.

    Raises:
        ValueError: for a text that is no operator, or if they are not all operators of a group.
    """
    texts = list(texts)
    # Some files list an operator for each of several domains; 10,000 of them is no space group.
    if len(texts) > 4 * MAX_OPERATORS:
        raise ValueError(f"{len(texts)} symmetry operators; no space group has more than {MAX_OPERATORS}")
    found = [_parse_operator(text) for text in texts]
    return group(np.array([w for w, _ in found], dtype=int), np.array([t for _, t in found]))


def group(rotations: np.ndarray, translations: np.ndarray) -> Operators:
    """Operators with translations in [0, 1), each once.

    Raises:
        ValueError: if they are too many, or if the product of two is not among them.
    """
    on_grid = np.round(translations * GRID) / GRID
    translations = np.where(np.abs(translations - on_grid) < GRID_TOLERANCE, on_grid, translations) % 1.0
    keys = _operator_keys(rotations, translations)
    first = np.sort(np.unique(keys, axis=0, return_index=True)[1])
    rotations, translations, keys = rotations[first], translations[first], keys[first]
    if len(first) > MAX_OPERATORS:
        raise ValueError(f"{len(first)} symmetry operators; no space group has more than {MAX_OPERATORS}")
    products = np.einsum("pij,qjk->pqik", rotations, rotations).reshape(-1, 3, 3)
    moved = (np.einsum("pij,qj->pqi", rotations, translations) + translations[:, None]).reshape(-1, 3)
    if len(np.unique(_operator_keys(products, moved), axis=0)) != len(keys) or not (keys == _IDENTITY_KEY).all(1).any():
        raise ValueError(
            f"the {len(keys)} symmetry operators do not make a group: the product of two is not among them; "
            "list them all, or name the group and list none"
        )
    return Operators(rotations, translations)


def group_number(found: Operators, lattice: np.ndarray) -> int | None:
    """The number, 1-230, of the group that operators make; ``None`` if spglib does not see it.

    Args:
        found: operators of a cell.
        lattice: [3, 3] in Å, rows a, b, c.
    """
    kind = spglib.get_spacegroup_type_from_symmetry(found.rotations, found.translations, lattice=lattice, symprec=1e-2)
    return None if kind is None else int(kind.number)


def crystal_numbers(
    lattice: np.ndarray, frac_coords: np.ndarray, species: Iterable[str], tolerances: Iterable[float]
) -> set[int]:
    """The numbers, 1-230, of the groups that a crystal has within these distances in Å."""
    kinds = np.unique(list(species), return_inverse=True)[1] + 1
    crystal = lattice.tolist(), frac_coords.tolist(), kinds.tolist()
    found = (spglib.get_symmetry_dataset(crystal, symprec=symprec) for symprec in tolerances)
    return {int(dataset.number) for dataset in found if dataset is not None}


def _key(symbol: str) -> str:
    return re.sub(r"<[^<>]*>|[\s_()'\"]", "", symbol).lower()


def _hall_key(symbol: str) -> str:
    return " ".join(symbol.replace("_", " ").lower().split())


@functools.cache
def _symbols() -> dict[str, frozenset[int]]:
    found: defaultdict[str, set[int]] = defaultdict(set)
    for hall in range(1, SETTINGS + 1):
        for name in _names(hall):
            found[_key(name)].add(hall)
    return {name: frozenset(halls) for name, halls in found.items()}


def _names(hall_number: int) -> set[str]:
    """How this setting is written; the first name that spglib has for a monoclinic one is that of the whole group."""
    known, plain = _type(hall_number), setting(hall_number)
    first, *others = known.international.split("=")
    names = {known.international_full, *(others or [first])}
    if 3 <= plain.number <= 15:
        names |= {" ".join(part for part in name.split() if part != "1") for name in names}
    if plain.number in _BARRED:
        names |= {name.replace("-3", "3") for name in names}
    if plain.number in _OLD_GLIDES:
        letter = _OLD_GLIDES[plain.number][plain.choice.lstrip("12")]
        names |= {name.replace("e", letter) for name in names}
    if plain.choice == "H":
        names |= {"H" + name.strip()[1:] for name in names}
    return names | {name + end for name in names for end in _AGAIN.get(plain.choice[:1], ())}


@functools.cache
def _halls() -> dict[str, frozenset[int]]:
    found: defaultdict[str, set[int]] = defaultdict(set)
    for hall in range(1, SETTINGS + 1):
        found[_hall_key(setting(hall).hall)].add(hall)
    return {symbol: frozenset(halls) for symbol, halls in found.items()}


@functools.cache
def _numbers() -> dict[int, frozenset[int]]:
    found: defaultdict[int, set[int]] = defaultdict(set)
    for hall in range(1, SETTINGS + 1):
        found[setting(hall).number].add(hall)
    return {number: frozenset(halls) for number, halls in found.items()}


_TERM = re.compile(r"([+-]?)(?:(\d+\.?\d*|\.\d+)(?:/(\d+))?\*?)?([xyz]?)")


def _parse_operator(text: str) -> tuple[np.ndarray, np.ndarray]:
    if len(text) > 200:
        raise ValueError(f"a symmetry operator of {len(text)} characters: {text[:40]!r}...; write it as '-x, y+1/2, z'")
    parts = re.sub(r"\s", "", text).lower().split(",")
    rotation, translation = np.zeros((3, 3)), np.zeros(3)
    # A fourth part is the time reversal of a magnetic operator.
    sound = len(parts) == 3 or (len(parts) == 4 and parts[3] in ("1", "+1", "-1"))
    for row, part in enumerate(parts[:3]):
        position = 0
        while sound and position < len(part):
            match = _TERM.match(part, position)
            assert match is not None, "every part of the pattern is optional"
            sign, number, divisor, axis = match.groups()
            sound = match.end() > position and bool(number or axis) and (divisor is None or int(divisor) != 0)
            sound = sound and (position == 0 or bool(sign))
            if sound:
                value = (-1.0 if sign == "-" else 1.0) * float(number or 1) / float(divisor or 1)
                if axis:
                    rotation[row, "xyz".index(axis)] += value
                else:
                    translation[row] += value
            position = match.end()
        sound = sound and bool(part)
    whole = np.round(rotation)
    if not sound or np.abs(rotation - whole).max() > 1e-6 or np.abs(whole).max() > 2:
        raise ValueError(f"{text!r} is no symmetry operator; write it as '-x, y+1/2, z'")
    if abs(round(np.linalg.det(whole))) != 1:
        raise ValueError(f"the symmetry operator {text!r} changes the volume of the cell; correct it")
    return whole.astype(int), translation


def _operator_keys(rotations: np.ndarray, translations: np.ndarray) -> np.ndarray:
    """int [P, 12], equal for operators that are the same up to lattice translations, to 1/1000 of the cell."""
    steps = np.round(translations * 1000).astype(int) % 1000
    # A third is 333.3 and two thirds 666.7 steps: sums of rounded thirds must not differ from thirds.
    thirds = np.round(translations * GRID) / GRID
    on_grid = np.abs(translations - thirds) < 1e-6
    exact = np.round(thirds * GRID).astype(int) % GRID
    steps = np.where(on_grid, exact, steps + GRID)
    return np.concatenate([rotations.reshape(-1, 9), steps], axis=1)


_IDENTITY_KEY = np.array([1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0])
