"""Chemical elements: the vocabularies that agents choose from, and atomic masses.

The order of a vocabulary is the action index. The vocabularies of CrystalGym (arXiv 2509.23156) are nested: the
small one starts the medium one, which starts the large one.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from ase.data import atomic_masses, atomic_numbers

_SMALL = "Li Na K Rb Be Ca Mg Sr H C N O P S Se F Cl Br".split()
_MEDIUM = _SMALL + "B Si Ge Fe Cu Co Ni Mn Al Zn Sn Cr".split()
_LARGE = _MEDIUM + "In Sb V Mo Ga Ag Ti Ba Y Te I Pd Rh As Pt Cs Au Bi Zr La".split()


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """An ordered choice of elements; the action ``i`` puts ``symbols[i]`` on a site.

    Attributes:
        name: for people.
        symbols: chemical symbols, unique, in action order.
    """

    name: str
    symbols: tuple[str, ...]

    def __post_init__(self) -> None:
        unknown = [s for s in self.symbols if s not in atomic_numbers or s == "X"]
        if unknown:
            raise ValueError(f"not chemical elements: {unknown}; use symbols such as 'Na'")
        if not self.symbols or len(set(self.symbols)) != len(self.symbols):
            raise ValueError(f"a vocabulary needs distinct elements, at least one; got {self.symbols}")

    def __len__(self) -> int:
        return len(self.symbols)

    @property
    def blank(self) -> int:
        """The index that stands for a site without an element."""
        return len(self.symbols)

    @functools.cached_property
    def numbers(self) -> np.ndarray:
        """int32 [V + 1]: atomic number of each index; the blank has number 0."""
        return np.array([atomic_numbers[s] for s in self.symbols] + [0], dtype=np.int32)

    def indices(self, symbols: list[str]) -> np.ndarray:
        """int32 action indices of chemical symbols; raises ``ValueError`` for one outside the vocabulary."""
        outside = [s for s in symbols if s not in self.symbols]
        if outside:
            raise ValueError(f"{outside} not in the {self.name} vocabulary: {' '.join(self.symbols)}")
        return np.array([self.symbols.index(s) for s in symbols], dtype=np.int32)


SMALL = Vocabulary("small", tuple(_SMALL))
MEDIUM = Vocabulary("medium", tuple(_MEDIUM))
LARGE = Vocabulary("large", tuple(_LARGE))
VOCABULARIES = {v.name: v for v in (SMALL, MEDIUM, LARGE)}


def get_vocabulary(choice: str | Vocabulary) -> Vocabulary:
    """The vocabulary of that name (``small``, ``medium``, ``large``), or the one given.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(choice, Vocabulary):
        return choice
    if choice not in VOCABULARIES:
        raise ValueError(f"unknown vocabulary {choice!r}: use one of {sorted(VOCABULARIES)} or a Vocabulary")
    return VOCABULARIES[choice]


def masses() -> np.ndarray:
    """float32 [119]: standard atomic weight in g/mol by atomic number (ASE's table); 0 for number 0 (blank)."""
    table = np.array(atomic_masses, dtype=np.float32)
    table[0] = 0.0
    return table
