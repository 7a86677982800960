"""k-points: meshes, their reduction by symmetry, and the special points where band edges sit. Host side, NumPy."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import spglib

SYMMETRY_TOLERANCE = 1e-3
"""Å; sites closer than this to their image under an operation count as symmetric."""
_KPPA_CUBE_FACTOR = 1.01


@dataclasses.dataclass(frozen=True, eq=False)
class Symmetry:
    """Operations x -> W x + w on fractional coordinates that map a crystal onto itself.

    Attributes:
        rotations: int [S, 3, 3], W.
        translations: float [S, 3], w.
    """

    rotations: np.ndarray
    translations: np.ndarray

    def __len__(self) -> int:
        return len(self.rotations)


IDENTITY = Symmetry(np.eye(3, dtype=int)[None], np.zeros((1, 3)))


def find_symmetry(lattice: np.ndarray, frac_coords: np.ndarray, colours: Sequence[int]) -> Symmetry:
    """The space group of a crystal, pure translations within the cell included; sites of one colour are alike.

    Args:
        lattice: [3, 3], any unit of about an Å.
        frac_coords: [N, 3].
        colours: [N] integers, atomic numbers say. All different gives the group that every assignment of elements has.
    """
    found = spglib.get_symmetry((lattice, frac_coords, list(colours)), symprec=SYMMETRY_TOLERANCE)
    if found is None:
        return IDENTITY
    return Symmetry(found["rotations"].astype(int), found["translations"])


def kppa_mesh(lattice: np.ndarray, sites: int, kppa: float) -> tuple[int, int, int]:
    """Subdivisions for ``kppa`` k-points per reciprocal atom: pymatgen's ``Kpoints.automatic_density``."""
    if abs(math.floor(kppa ** (1 / 3) + 0.5) ** 3 - kppa) < 1:
        kppa *= _KPPA_CUBE_FACTOR  # pymatgen's rule for perfect cubes
    lengths = np.linalg.norm(lattice, axis=1)
    multiple = (kppa / sites * lengths.prod()) ** (1 / 3)
    a, b, c = (math.floor(max(multiple / length, 1.0)) for length in lengths)
    return a, b, c


def mesh_points(mesh: Sequence[int], shift: Sequence[int] = (0, 0, 0)) -> np.ndarray:
    """All points (fractional, [n, 3]) of a mesh; a shift of 1 moves it by half a step along that axis."""
    axes = [(np.arange(n) + 0.5 * s) / n for n, s in zip(mesh, shift, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


def special_points() -> np.ndarray:
    """Gamma and the centres of zone faces, edges and corners: the eight points with coordinates 0 and 1/2."""
    return np.array(list(itertools.product((0.0, 0.5), repeat=3)))


def reduce_points(points: np.ndarray, symmetry: Symmetry) -> tuple[np.ndarray, np.ndarray]:
    """One point of each star, and the share of the points in it.

    Points are equivalent if the crystal's rotations, time reversal and reciprocal lattice vectors turn them into each
    other.

    Returns:
        points [K, 3] with coordinates in (-1/2, 1/2], weights [K] that add up to 1.
    """

    def name(point: np.ndarray) -> tuple[float, ...]:
        return tuple(np.round((point + 1e-9) % 1.0, 6) % 1.0)

    index = {name(point): i for i, point in enumerate(points)}
    rotations = np.concatenate([symmetry.rotations, -symmetry.rotations])
    star = np.full(len(points), -1)
    representatives = []
    for i, point in enumerate(points):
        if star[i] >= 0:
            continue
        images = {index.get(name(point @ rotation)) for rotation in rotations} - {None}
        star[list(images | {i})] = len(representatives)
        representatives.append(i)
    weights = np.bincount(star, minlength=len(representatives)) / len(points)
    return (points[representatives] + 0.5 - 1e-9) % 1.0 - 0.5 + 1e-9, weights
