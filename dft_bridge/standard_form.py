"""The standard form of a skeleton: the same whatever axes, origin, cell vectors and site order describe it.

Every frame whose axes are shortest lattice vectors and whose origin is a site is tried, of both hands; the frame with
the smallest numbers wins, and all frames that tie with it are symmetries of the skeleton. Mirror images thus have one
form: the properties are scalars, which a mirror leaves alone. A cell and its supercell have two: an engine treats them
with different meshes, and a supercell has more labelings.

Numbers are counted in bins (:data:`LENGTH_BIN`, :data:`RATIO_BIN`), so that noise does not matter. Any rounding has
edges, and a number within the noise of an edge may fall on either side. So lengths are taken relative to the first,
which makes equal lengths, right angles, hexagonal and cubic centred cells and special positions multiples of
1/24; these lie in the middle of a bin, as do their copies on other sites. And edges are put where no number of up to
six decimals lies. What remains are free parameters with arbitrary digits: noise of 1e-7 Å moves one of them over an
edge with a chance of 2 x 1e-7 / 1e-4, so 0.2 %. Then a crystal is calculated twice; a wrong number is never returned.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from ase.geometry import minkowski_reduce

LENGTH_BIN = 1e-4
"""Å: shortest lattice vectors that differ by more are never the same."""
RATIO_BIN = 1 / 24_000
"""The same for fractional coordinates, cosines, and lengths over the shortest; at most 0.0002 Å in a cell of 5 Å."""

_PER_CELL = round(1 / RATIO_BIN)
_EDGE_SHIFT = 0.002  # of a bin; numbers of six decimals are multiples of 0.01 length bins and of 0.008 ratio bins
_SLACK = 1e-3  # relative, many bins: a vector longer than the shortest by less is tried as well
_COMBINATIONS = np.array([c for c in itertools.product(range(-2, 3), repeat=3) if any(c)])


@dataclasses.dataclass(frozen=True, eq=False)
class StandardForm:
    """What two descriptions of one skeleton have in common, and how the sites map.

    Attributes:
        geometry: int64 [6 + N], bins: shortest length; two lengths over it and three cosines; the sites, packed.
        order: int64 [N], the site of the skeleton at each place of the form; determined up to a symmetry of the
            skeleton with all sites alike.
    """

    geometry: np.ndarray
    order: np.ndarray


def standard_form(lattice: np.ndarray, frac_coords: np.ndarray) -> StandardForm:
    """The standard form of a skeleton.

    Args:
        lattice: float64 [3, 3], rows a, b, c in Å, linearly independent; need not be reduced.
        frac_coords: float64 [N, 3].
    """
    reduced, operation = minkowski_reduce(lattice)
    frames = _frames(reduced)
    shapes = _shapes(frames @ reduced)
    best = _smallest(shapes)
    within = frac_coords @ _inverse(operation)
    sites = np.concatenate([_packed(within @ inverse) for inverse in _inverse(frames[best])])  # [frame, origin] x site
    orders = sites.argsort(axis=1)
    sites = np.take_along_axis(sites, orders, axis=1)
    first = _smallest(sites)[0]
    return StandardForm(np.concatenate([shapes[best[0]], sites[first]]), orders[first])


def _packed(coords: np.ndarray) -> np.ndarray:
    """int64 [N, N]: where the sites [N, 3] are, as seen from each of them."""
    bins = _bins(coords[None, :] - coords[:, None], RATIO_BIN) % _PER_CELL
    return (bins[..., 0] * _PER_CELL + bins[..., 1]) * _PER_CELL + bins[..., 2]


def _frames(reduced: np.ndarray) -> np.ndarray:
    """int64 [F, 3, 3]: the cells of shortest vectors, as combinations of the rows of a Minkowski-reduced cell.

    In three dimensions, linearly independent lattice vectors as short as possible span the lattice once some choice
    of them has determinant 1; the others are left out.
    """
    lengths = np.linalg.norm(_COMBINATIONS @ reduced, axis=1)
    limits = np.sort(np.linalg.norm(reduced, axis=1)) * (1 + _SLACK)
    first, second, third = (_COMBINATIONS[lengths <= limit] for limit in limits)
    shape = len(first), len(second), len(third), 3
    parts = first[:, None, None], second[None, :, None], third[None, None, :]
    frames = np.stack([np.broadcast_to(part, shape) for part in parts], axis=-2).reshape(-1, 3, 3)
    return frames[np.abs(np.rint(np.linalg.det(frames))) == 1]


def _shapes(cells: np.ndarray) -> np.ndarray:
    """int64 [F, 6]: the cells [F, 3, 3] in Å as bins."""
    lengths = np.linalg.norm(cells, axis=2)
    units = cells / lengths[..., None]
    cosines = np.einsum("fix,fix->fi", units[:, [1, 0, 0]], units[:, [2, 2, 1]])
    ratios = np.concatenate([lengths[:, 1:] / lengths[:, :1], cosines], axis=1)
    return np.concatenate([_bins(lengths[:, :1], LENGTH_BIN), _bins(ratios, RATIO_BIN)], axis=1)


def _bins(values: np.ndarray, width: float) -> np.ndarray:
    return np.floor(values / width + 0.5 + _EDGE_SHIFT).astype(np.int64)


def _smallest(rows: np.ndarray) -> np.ndarray:
    """Indices of the rows that are lexicographically smallest."""
    smallest = rows[np.lexsort(rows.T[::-1])[0]]
    return np.flatnonzero((rows == smallest).all(axis=1))


def _inverse(unimodular: np.ndarray) -> np.ndarray:
    return np.rint(np.linalg.inv(unimodular))
