"""Symmetry of a skeleton: which relabelings of its sites give the same crystal.

Two groups matter. The *site-permutation group* treats all sites alike, so it says which labelings are the same
crystal (a perovskite has 18^5 labelings over 18 elements, but 369,360 distinct crystals). The *orbits* respect the
prototype's own species, so a perovskite has three: A, B and X.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import spglib
from ase.geometry import minkowski_reduce
from scipy.spatial import KDTree

SYMPREC = 0.01
"""Distance in Å within which two sites count as equivalent (spglib's ``symprec``, pymatgen's usual choice)."""


def _mapped_sites(lattice: np.ndarray, frac_coords: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """int32 [P, N]: where each symmetry operation of the cell takes each site; ``kinds`` are told apart.

    A cell of many primitive ones has as many translations, so P grows with N. Sites are looked up for its translations
    and for one operation of each rotation, the other operations are products of these.
    """
    operations = spglib.get_symmetry((lattice.tolist(), frac_coords.tolist(), kinds.tolist()), symprec=SYMPREC)
    if operations is None:
        raise ValueError("spglib finds no symmetry for this cell; check the lattice and the coordinates")
    rotations, translations = operations["rotations"], operations["translations"]
    nearest = _nearest_sites(lattice, frac_coords)
    _, first = np.unique(rotations, axis=0, return_index=True)
    moves = translations[(rotations == np.eye(3, dtype=int)).all(axis=(1, 2))]
    moved = np.stack([nearest(frac_coords + move) for move in moves])
    turned = np.stack([nearest(frac_coords @ rotations[i].T + translations[i]) for i in first])
    return moved[:, turned].reshape(-1, len(frac_coords))


def _nearest_sites(lattice: np.ndarray, frac_coords: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function that gives the site, int32 [N], on which each fractional coordinate of [N, 3] lies."""
    # In a reduced cell what is near along its axes is near in space.
    reduced, operation = minkowski_reduce(lattice)
    inverse, lengths = np.linalg.inv(operation), np.linalg.norm(reduced, axis=1)

    def along_axes(coords: np.ndarray) -> np.ndarray:
        within = coords @ inverse
        within -= np.floor(within)
        return np.where(within < 1.0, within, 0.0) * lengths  # -1e-17 rounds to 1, the edge that is 0

    tree = KDTree(along_axes(frac_coords), boxsize=lengths)
    return lambda coords: np.asarray(tree.query(along_axes(coords))[1], np.int32)


def site_permutations(lattice: np.ndarray, frac_coords: np.ndarray) -> np.ndarray:
    """The site-permutation group of a skeleton, all sites alike.

    Args:
        lattice: [3, 3] in Å, rows a, b, c.
        frac_coords: [N, 3].

    Returns:
        int32 [P, N], sorted, the identity first. ``labels[permutations[p]]`` is the same crystal as ``labels``.
        Pure translations of a non-primitive cell are included.
    """
    permutations = np.unique(_mapped_sites(lattice, frac_coords, np.ones(len(frac_coords), dtype=int)), axis=0)
    if (np.sort(permutations, axis=1) != np.arange(len(frac_coords))).any():
        raise ValueError(f"two sites coincide within {SYMPREC} Å; remove the duplicate")
    return permutations


def orbits(lattice: np.ndarray, frac_coords: np.ndarray, species: tuple[str, ...]) -> np.ndarray:
    """The symmetry orbits of a prototype as its own species colour it.

    Returns:
        int32 [N]: orbit of each site, numbered 0, 1, ... in order of first appearance.
    """
    kinds = np.unique(species, return_inverse=True)[1] + 1
    first = _mapped_sites(lattice, frac_coords, kinds).min(axis=0)
    return np.unique(first, return_inverse=True)[1].astype(np.int32)


def canonical(labels: jax.Array, permutations: jax.Array) -> jax.Array:
    """The canonical form of a labeling: the lexicographically smallest of its equivalents.

    A pure function of arrays, made for ``jax.vmap``; every equivalent labeling has the same canonical form.

    Args:
        labels: integer [N].
        permutations: integer [P, N], a group (:func:`site_permutations`); rows may repeat (padding).

    Returns:
        Same shape and dtype as ``labels``.
    """
    images = labels[permutations]
    alive = jnp.bool_(True)
    smallest = []
    for site in range(images.shape[1]):
        column = jnp.where(alive, images[:, site], jnp.iinfo(images.dtype).max)
        smallest.append(column.min())
        alive &= column == smallest[-1]
    return jnp.stack(smallest)


def canonical_numbers(numbers: np.ndarray, permutations: np.ndarray) -> np.ndarray:
    """The lexicographically smallest of the equivalent labelings; :func:`canonical` in NumPy, for hosts.

    Args:
        numbers: integer [..., N], atomic numbers.
        permutations: integer [P, N], the skeleton's site-permutation group.

    Returns:
        Shape and dtype of ``numbers``.
    """
    numbers = np.asarray(numbers)
    images = numbers[..., permutations]
    alive = np.ones(images.shape[:-1], dtype=bool)
    smallest = np.empty_like(numbers)
    for site in range(images.shape[-1]):
        column = np.where(alive, images[..., site], np.iinfo(numbers.dtype).max)
        best = column.min(axis=-1, keepdims=True)
        alive &= column == best
        smallest[..., site] = best[..., 0]
    return smallest


def count_distinct(permutations: np.ndarray, colours: int) -> int:
    """Number of distinct crystals over ``colours`` elements, by Burnside's lemma."""
    total = sum(colours ** _cycles(p) for p in permutations)
    return total // len(permutations)


def _cycles(permutation: np.ndarray) -> int:
    seen: set[int] = set()
    cycles = 0
    for start in range(len(permutation)):
        cycles += start not in seen
        while start not in seen:
            seen.add(start)
            start = int(permutation[start])
    return cycles
