"""What a chemist sees in a crystal before it is calculated: charge balance, and features that models learn from.

Charges are *common* oxidation states (pymatgen's), one for each element of a crystal: a formula is neutral if some
choice of them sums to zero. Rarer states let half of all formulas pass, and with them the screen means little.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from crystaljax.skeleton import Skeleton

NO_STATE = 10_000
"""Stands for an oxidation state that an element does not have."""
MOST_CHARGE = 9
"""Of an ion."""
PERIOD = 8
"""Electrons of a closed shell: the electron count matters modulo this."""
BLOCKS = ("balance", "composition", "sites", "elements")
"""Names of the blocks of features, each of which has a length scale of its own; see :class:`Features`."""


@functools.cache
def oxidation_states() -> tuple[np.ndarray, np.ndarray]:
    """int32 [119, S] each: common oxidation states above and below zero by atomic number, padded with NO_STATE."""
    from pymatgen.core import Element

    states = [()] + [Element.from_Z(number).common_oxidation_states for number in range(1, 119)]

    def padded(sign: int) -> np.ndarray:
        chosen = [[state for state in known if state * sign > 0] for known in states]
        most = max(map(len, chosen))
        return np.array([row + [NO_STATE] * (most - len(row)) for row in chosen], np.int32)

    return padded(1), padded(-1)


@functools.cache
def descriptors() -> np.ndarray:
    """float64 [119, 5]: Pauling electronegativity, atomic radius (Å), valence electrons, group, row; by atomic number.

    Pymatgen's numbers (radii of Slater 1964); what is unknown is that of the mean element.
    """
    from pymatgen.core import Element

    rows = [[np.nan] * 5]
    for number in range(1, 119):
        element = Element.from_Z(number)
        radius = element.data.get("Atomic radius")
        negativity = element.data.get("X")
        valence = element.group if element.group <= 12 else element.group - 10
        rows.append([negativity or np.nan, float(radius or np.nan), valence, element.group, element.row])
    table = np.array(rows, float)
    return np.where(np.isnan(table), np.nanmean(table, axis=0), table)


def charge_imbalance(numbers: Any, xp: ModuleType = np) -> Any:
    """Smallest absolute total charge that common oxidation states allow, int32 [M]; 0 is a neutral formula.

    An element has one state in a crystal, and every cation is less electronegative than every anion (Pauling's test),
    so there is one split of the elements for each place in the order of electronegativity.

    Args:
        numbers: atomic numbers int32 [M, N], 0 where there is no atom.
        xp: ``numpy``, or ``jax.numpy`` inside compiled code.
    """
    count, sites = numbers.shape
    cations, anions = (xp.asarray(table) for table in oxidation_states())
    negativity = xp.asarray(descriptors()[:, 0].astype(np.float32))[numbers]
    is_atom = numbers > 0
    is_element = numbers[:, :, None] == numbers[:, None, :]
    again = xp.tril(is_element, -1).any(axis=2)
    atoms = is_element.sum(axis=2, dtype=np.int32)
    bound = MOST_CHARGE * sites
    totals = xp.arange(-bound, bound + 1, dtype=np.int32)
    best = xp.full(count, bound)
    # What every crystal has had before need not be looked at again; inside compiled code that is not known.
    fresh = [site for site in range(sites) if xp is not np or not again[:, site].all()]
    for cut in fresh:
        is_cation = negativity <= negativity[:, cut, None]
        states = xp.where(is_cation[:, :, None], cations[numbers], anions[numbers]) * atoms[:, :, None]
        reachable = xp.broadcast_to(totals == 0, (count, len(totals)))
        for site in fresh:
            # NO_STATE leads out of the bounds: an element that cannot be such an ion lets nothing through.
            before = totals - states[:, site, :, None]  # [M, S, T]
            there = xp.take_along_axis(reachable[:, None], xp.clip(before, -bound, bound) + bound, axis=2)
            after = (there & (xp.abs(before) <= bound)).any(axis=1)
            reachable = xp.where((again | ~is_atom)[:, site, None], reachable, after)
        best = xp.minimum(best, xp.where(reachable, xp.abs(totals), bound).min(axis=1))
    return best


def is_neutral(numbers: Any, xp: ModuleType = np) -> Any:
    """bool [M]: the formula is neutral by common oxidation states and has an even number of electrons."""
    return (charge_imbalance(numbers, xp) == 0) & ~is_odd(numbers)


def is_odd(numbers: Any) -> Any:
    """bool [M]: an odd number of electrons, with atomic numbers [M, N]. Cores are closed shells, so valence too."""
    return numbers.sum(axis=1) % 2 == 1


class Features:
    """Features of crystals on several skeletons, equal for equal crystals whichever of their labelings is given.

    Four blocks, float64: *balance* [8 + 12] (electrons modulo 8, charge imbalance, statistics of electronegativity,
    radius and valence over atoms and bonds), *composition* [Z] (fraction of each element), *sites* [C x 8]
    (descriptors of the elements in each class of equivalent sites: mean, and spread of the first three) and *elements*
    [C x Z] (their shares). Columns have unit variance over the reference, and blocks unit size, so that length scales
    near 1 are sensible for all. Sites are equivalent if a symmetry of the uncoloured skeleton takes one to the other.
    """

    def __init__(self, skeletons: Sequence[Skeleton], reference: tuple[np.ndarray, np.ndarray]):
        """``reference``: crystals (skeleton index [R], atomic numbers [R, N]) whose columns get unit variance."""
        self.skeletons = tuple(skeletons)
        self._classes = [np.unique(s.permutations.min(axis=0), return_inverse=True)[1] for s in self.skeletons]
        self._most = max(int(classes.max()) + 1 for classes in self._classes)
        self._present = np.unique(reference[1][reference[1] > 0])
        table = descriptors()
        seen = table[self._present]
        self._table = (table - seen.mean(axis=0)) / np.maximum(seen.std(axis=0), 1e-9)
        blocks = self._raw(*reference)
        self._scales = []
        for block in blocks:
            spread = block.std(axis=0)
            self._scales.append(np.where(spread > 1e-9, spread, 1.0) * np.sqrt(max((spread > 1e-9).sum(), 1)))
        sizes = [block.shape[1] for block in blocks]
        ends = np.cumsum(sizes)
        self.slices = tuple(slice(int(end - size), int(end)) for end, size in zip(ends, sizes, strict=True))
        """Columns of each of :data:`BLOCKS`, then those that tell skeletons apart."""
        self.slices += (slice(int(ends[-1]), int(ends[-1]) + len(self.skeletons)),)

    def __call__(self, skeletons: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """float64 [M, F] of crystals: skeleton index [M], atomic numbers int32 [M, N] with 0 on padding."""
        blocks = [block / scale for block, scale in zip(self._raw(skeletons, numbers), self._scales, strict=True)]
        return np.concatenate([*blocks, np.eye(len(self.skeletons))[skeletons]], axis=1)

    def _raw(self, skeletons: np.ndarray, numbers: np.ndarray) -> list[np.ndarray]:
        sizes = (20, len(self._present), self._most * 8, self._most * len(self._present))
        blocks = [np.zeros((len(numbers), size)) for size in sizes]
        for index, skeleton in enumerate(self.skeletons):
            mine = np.flatnonzero(skeletons == index)
            if len(mine):
                for block, values in zip(
                    blocks, self._of(index, skeleton, numbers[mine, : skeleton.n_sites]), strict=True
                ):
                    block[mine, : values.shape[1]] = values
        return blocks

    def _of(self, index: int, skeleton: Skeleton, numbers: np.ndarray) -> list[np.ndarray]:
        known = self._table[numbers]  # [M, N, 5]
        is_element = numbers[:, :, None] == self._present  # [M, N, Z]
        electrons = descriptors()[numbers, 2].sum(axis=1).astype(int) % PERIOD
        imbalance = charge_imbalance(numbers)
        radii = descriptors()[numbers, 1]
        bonds = skeleton.bonds
        differences = np.abs(known[:, bonds.senders, 0] - known[:, bonds.receivers, 0])
        tightness = bonds.distances / (radii[:, bonds.senders] + radii[:, bonds.receivers])
        balance = np.column_stack(
            [
                np.eye(PERIOD)[electrons],
                imbalance == 0,
                np.minimum(imbalance, 4),
                known[:, :, 0].mean(axis=1),
                known[:, :, 0].std(axis=1),
                known[:, :, 0].max(axis=1),
                known[:, :, 0].min(axis=1),
                known[:, :, 2].mean(axis=1),
                known[:, :, 4].mean(axis=1),
                differences.mean(axis=1),
                differences.min(axis=1),
                tightness.mean(axis=1),
                tightness.min(axis=1),
            ]
        )
        classes = self._classes[index]
        sites, elements = [], []
        for one in range(int(classes.max()) + 1):
            group = classes == one
            sites += [known[:, group].mean(axis=1), known[:, group, :3].std(axis=1)]
            elements.append(is_element[:, group].mean(axis=1))
        return [balance, is_element.mean(axis=1), np.concatenate(sites, axis=1), np.concatenate(elements, axis=1)]
