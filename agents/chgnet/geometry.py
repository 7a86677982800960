"""Neighbours of a crystal as CHGNet sees them, in a dense layout: lists on the host, distances and angles in JAX.

Each site has a row of M neighbours within 6 Å, nearest first, so that the K within 3 Å, between which angles are
taken, are the first K columns. Rows and columns that are padding, or too long after a change of the cell, have weight
zero in the network, so a list may hold more than the neighbours but never less.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from crystaljax.skeleton import Skeleton

ATOM_CUTOFF = 6.0
"""Å; pairs of atoms within it are neighbours."""
BOND_CUTOFF = 3.0
"""Å; angles are taken between bonds shorter than this."""
FAR = 2 * ATOM_CUTOFF
"""Å; where padding stands."""


@struct.dataclass
class Neighbours:
    """Who is whose neighbour. N sites, M neighbours, of which K near ones.

    Attributes:
        site_mask: bool [N], false on padding.
        frac_coords: float32 [N, 3].
        lattice: float32 [3, 3], rows a, b, c, Å.
        sites: int32 [N, M], the neighbour's site.
        images: float32 [N, M, 3], its lattice translation.
        mask: bool [N, M], false on padding.
        reverse: int32 [N, K], position in the flattened [N, K] of the same bond seen from its other end; a bond that
            has none there, which is longer than 3 Å or padding, is its own.
    """

    site_mask: jax.Array
    frac_coords: jax.Array
    lattice: jax.Array
    sites: jax.Array
    images: jax.Array
    mask: jax.Array
    reverse: jax.Array

    def row(self, index: jax.Array) -> Neighbours:
        """The cell at ``index`` of a stack, as JAX arrays. Free of gathers when there is only one."""
        single = self.sites.shape[0] == 1
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[0 if single else index], self)


@struct.dataclass
class Geometry:
    """What the network needs to know of the positions.

    Attributes:
        distances: float32 [N, M], Å; beyond the cut-off on padding.
        cosines: float32 [N, K, K], of the angle between two near bonds of a site.
        angle_mask: bool [N, K, K], false where the two bonds are the same.
        sites, reverse, site_mask: as in :class:`Neighbours`.
    """

    distances: jax.Array
    cosines: jax.Array
    angle_mask: jax.Array
    sites: jax.Array
    reverse: jax.Array
    site_mask: jax.Array


def find_neighbours(lattice: np.ndarray, frac_coords: np.ndarray, shrink: float = 1.0) -> Neighbours:
    """The neighbours of every site of a cell, leaves without padding sites.

    Args:
        lattice: [3, 3], rows a, b, c, Å.
        frac_coords: [N, 3].
        shrink: the list stays complete when all lengths are multiplied by this or anything larger.

    Raises:
        ValueError: for a site that has no neighbour, for which CHGNet is undefined.
    """
    from pymatgen.core import Structure

    n = len(frac_coords)
    structure = Structure(lattice, ["H"] * n, frac_coords)
    centre, other, image, distance = structure.get_neighbor_list(ATOM_CUTOFF / shrink)
    order = np.lexsort((distance.round(6), centre))
    centre, other, image, distance = centre[order], other[order], image[order].astype(int), distance[order]
    counts = np.bincount(centre, minlength=n)
    if not counts.all():
        raise ValueError(f"site {int(counts.argmin())} has no neighbour within {ATOM_CUTOFF / shrink:g} Å")
    column = np.concatenate([np.arange(count) for count in counts])
    near = max(int(np.bincount(centre[distance < BOND_CUTOFF / shrink], minlength=n).max()), 1)
    wide = int(counts.max())
    sites, mask = np.zeros((n, wide), np.int32), np.zeros((n, wide), bool)
    images, reverse = np.zeros((n, wide, 3), np.float32), np.arange(n * near, dtype=np.int32).reshape(n, near)
    sites[centre, column], mask[centre, column], images[centre, column] = other, True, image
    position = {(i, j, *t): (i, k) for i, j, t, k in zip(centre, other, image.tolist(), column, strict=True)}
    for (i, j, *t), (_, k) in position.items():
        _, back = position[(j, i, *(-x for x in t))]
        if k < near and back < near:
            reverse[i, k] = j * near + back
    return Neighbours(np.ones(n, bool), np.float32(frac_coords), np.float32(lattice), sites, images, mask, reverse)


def stack_neighbours(cells: Sequence[Neighbours]) -> Neighbours:
    """Several cells, padded to common shapes; every leaf gains a first axis and stays a NumPy array."""
    n, wide = np.max([cell.sites.shape for cell in cells], axis=0)
    near = max(cell.reverse.shape[1] for cell in cells)

    def padded(cell: Neighbours) -> Neighbours:
        sites, columns = cell.sites.shape
        rows, more = (0, n - sites), (0, wide - columns)
        own, old = np.arange(n * near, dtype=np.int32).reshape(n, near), cell.reverse.shape[1]
        own[:sites, :old] = cell.reverse // old * near + cell.reverse % old
        return Neighbours(
            site_mask=np.pad(cell.site_mask, rows),
            frac_coords=np.pad(cell.frac_coords, (rows, (0, 0))),
            lattice=cell.lattice,
            sites=np.pad(cell.sites, (rows, more)),
            images=np.pad(cell.images, (rows, more, (0, 0))),
            mask=np.pad(cell.mask, (rows, more)),
            reverse=own,
        )

    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(padded, cells))


@functools.lru_cache(maxsize=16)
def cells_of(skeletons: tuple[Skeleton, ...], shrink: float = 1.0) -> Neighbours:
    """The neighbours of skeletons, stacked; ``shrink`` as in :func:`find_neighbours`."""
    return stack_neighbours([find_neighbours(s.lattice, s.frac_coords, shrink) for s in skeletons])


def measure(cell: Neighbours, positions: jax.Array, lattice: jax.Array) -> Geometry:
    """Distances and angles for Cartesian positions [N, 3] and a lattice [3, 3], Å; differentiable in both."""
    near = cell.reverse.shape[1]
    vectors = positions[:, None] - positions[cell.sites] - cell.images @ lattice
    # Padding gets a safe vector: neither its length nor its direction may have a gradient that is not a number.
    vectors = jnp.where(cell.mask[..., None], vectors, jnp.array([FAR, 0.0, 0.0]))
    distances = jnp.linalg.norm(vectors, axis=-1)
    units = (vectors / distances[..., None])[:, :near]
    return Geometry(
        distances=distances,
        cosines=jnp.einsum("iac,ibc->iab", units, units, precision="highest"),
        angle_mask=jnp.broadcast_to(~jnp.eye(near, dtype=bool), (len(positions), near, near)),
        sites=cell.sites,
        reverse=cell.reverse,
        site_mask=cell.site_mask,
    )


def at_scale(cell: Neighbours, scale: float | jax.Array = 1.0) -> Geometry:
    """The cell with all its lengths multiplied by ``scale``."""
    lattice = cell.lattice * scale
    return measure(cell, jnp.matmul(cell.frac_coords, lattice, precision="highest"), lattice)
