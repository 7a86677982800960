"""k-points, for all engines: meshes, the special points where band edges sit, and their reduction by symmetry.

There are two rules (:data:`RULES`). ``cell`` is CrystalGym's: a mesh from the lengths of the given cell vectors.
``lattice`` belongs to the crystal and not to the vectors that describe it:

* cells of vectors that are not the shortest are exchanged for one that is (:func:`shortest_cell`);
* the mesh has the symmetry of the lattice (:func:`mesh_of_lattice`, :func:`rule_points`);
* band edges are looked for at the special points of the lattice (:func:`special_points`), not only at those with
  coordinates 0 and 1/2, among which there is no K = (1/3, 1/3) of a hexagonal lattice.

Host side, NumPy. Reciprocal coordinates are fractional rows, a point k of one cell is k @ inverse(U).T in the cell
U @ lattice.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import spglib
from ase.geometry import minkowski_reduce
from scipy.sparse.csgraph import connected_components
from scipy.spatial import Voronoi

SYMMETRY_TOLERANCE = 1e-3
"""Å; sites closer than this to their image under an operation count as symmetric."""
RULES = ("cell", "lattice")
"""Names of the rules for k-points, see above."""
_KPPA_CUBE_FACTOR = 1.01
_LENGTH_SLACK = 1e-3  # subdivisions; a length that meets its bound but for rounding does meet it
_SHORTER = 1e-4  # relative; vectors that could be shorter by less are the shortest
_DECAY = 2.0  # Å, of what a mesh cannot tell apart: the scale on which meshes of equal cost are compared
_SHELLS = np.array([m for m in itertools.product(range(-3, 4), repeat=3) if any(m)])
_NEIGHBOURS = np.array(list(itertools.product(range(-2, 3), repeat=3)))
_MERGED = 0.05  # of the shortest reciprocal vector; corners of the zone that are closer are one


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
    found = spglib.get_symmetry((lattice.tolist(), frac_coords.tolist(), list(colours)), symprec=SYMMETRY_TOLERANCE)
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


def half_points() -> np.ndarray:
    """The eight points with coordinates 0 and 1/2."""
    return np.array(list(itertools.product((0.0, 0.5), repeat=3)))


@functools.lru_cache(512)
def _shortest(lattice: bytes) -> np.ndarray:
    cell = np.frombuffer(lattice).reshape(3, 3)
    reduced, operation = minkowski_reduce(cell)
    lengths, shortest = (np.sort(np.linalg.norm(vectors, axis=1)) for vectors in (cell, reduced))
    return np.eye(3, dtype=int) if (lengths <= shortest * (1 + _SHORTER)).all() else np.rint(operation).astype(int)


def shortest_cell(lattice: np.ndarray) -> np.ndarray:
    """Integers U [3, 3] so that U @ lattice are shortest vectors that span the lattice; 1 if the given ones are."""
    return _shortest(np.ascontiguousarray(lattice, float).tobytes())


@functools.lru_cache(512)
def _holohedry(lattice: bytes) -> np.ndarray:
    return np.unique(find_symmetry(np.frombuffer(lattice).reshape(3, 3), np.zeros((1, 3)), [1]).rotations, axis=0)


def holohedry(lattice: np.ndarray) -> np.ndarray:
    """Rotations [S, 3, 3] of the lattice (of positions, as in :class:`Symmetry`), that of one atom on it."""
    return _holohedry(np.ascontiguousarray(lattice, float).tobytes())


def mesh_of_lattice(
    lattice: np.ndarray, sites: int, kppa: float, length: float = 0.0, shifted: bool = False, even: bool = False
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Subdivisions and shift of a mesh by the rule ``lattice``, for a cell of shortest vectors.

    A mesh of n subdivisions stands for a supercell: what it cannot tell apart are functions of that period. So along
    each vector ``n |a|`` is at least ``length``, and there are at least ``kppa`` points per reciprocal atom, as
    :func:`kppa_mesh` counts them, but never one less by rounding. Vectors that the lattice's symmetry links have the
    same number. A shifted mesh may have one subdivision more where it is odd; of all those, and of all shifts by half
    steps, that one is taken whose points have the fewest stars under the lattice's symmetry, which is its cost, and
    among equals the one with the smallest error for a function that decays with a length of 2 Å. In cubic lattices
    this is Monkhorst and Pack's mesh (Phys. Rev. B 13, 5188 (1976)); in the planes of a hexagonal one mostly a mesh
    around Gamma. A shifted mesh of 1 is not left at Gamma.

    Args:
        lattice: [3, 3] Å, rows are shortest vectors.
        sites: atoms in the cell.
        kppa: k-points per reciprocal atom, at least.
        length: Å.
        shifted: choose a shift; else the mesh holds Gamma.
        even: round subdivisions up to even numbers, so that the mesh holds the points with coordinates 1/2.

    Returns:
        subdivisions, and shifts in half steps.
    """
    given = np.ascontiguousarray(lattice, float).tobytes()
    return _mesh_of_lattice(given, sites, float(kppa), float(length), shifted, even)


@functools.lru_cache(512)
def _mesh_of_lattice(
    given: bytes, sites: int, kppa: float, length: float, shifted: bool, even: bool
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    lattice = np.frombuffer(given).reshape(3, 3)
    lengths, rotations = np.linalg.norm(lattice, axis=1), holohedry(lattice)
    multiple = (_KPPA_CUBE_FACTOR * kppa / sites * lengths.prod()) ** (1 / 3)
    wanted = np.maximum(np.floor(multiple / lengths), np.ceil(length / lengths - _LENGTH_SLACK))
    size = np.maximum(wanted, 1).astype(int)
    size = _symmetric_size(size + size % 2 if even else size, rotations)
    if not shifted:
        return _triple(size), (0, 0, 0)
    sizes = {_triple(_symmetric_size(size + more * (size % 2), rotations)) for more in half_points().astype(bool)}
    choices = [(_cost(lattice, rotations, n, s), n, s) for n in sizes for s in itertools.product((1, 0), repeat=3)]
    _, size, shift = min(choices, key=lambda choice: (choice[0], choice[1], [-s for s in choice[2]]))
    return size, _triple(shift)


def rule_points(rule: str, lattice: np.ndarray, size: Sequence[int], shift: Sequence[int]) -> np.ndarray:
    """The points [n, 3] of a mesh by a rule; by ``lattice`` with all that its symmetry makes of them, the mesh first.

    So a shifted mesh on a centred lattice, which on its own lacks some of the symmetry, has all of it.
    """
    points = mesh_points(size, shift)
    if rule == "cell":
        return points
    images = (points @ holohedry(lattice)).reshape(-1, 3)
    every = np.concatenate([points, images])
    _, first = np.unique(_names(every), axis=0, return_index=True)
    return every[np.sort(first)]


def special_points(lattice: np.ndarray) -> np.ndarray:
    """The special points [n, 3] of a lattice: where band edges and crossings sit that symmetry holds in place.

    They are the points with coordinates 0 and 1/2 (Gamma, and centres of faces of the first Brillouin zone), the
    zone's corners and the middles of its edges; together they hold the special points of the tables by Setyawan and
    Curtarolo (Comput. Mater. Sci. 49, 299 (2010)). Being geometry they need no classification of the lattice: they
    follow a distortion without a jump, and do not depend on the vectors that describe the lattice.
    """
    operation = shortest_cell(lattice)
    reciprocal = np.linalg.inv(operation @ lattice).T
    zone = Voronoi(_NEIGHBOURS @ reciprocal)
    middle = len(_NEIGHBOURS) // 2
    merged = _MERGED * np.linalg.norm(reciprocal, axis=1).min()
    found = [half_points() @ reciprocal]
    for pair, ridge in zip(zone.ridge_points, zone.ridge_vertices, strict=True):
        if middle in pair:
            corners = zone.vertices[ridge]
            following = np.roll(corners, -1, axis=0)
            long = np.linalg.norm(following - corners, axis=1) > merged
            found += [corners, (corners + following)[long] / 2]
    points = np.concatenate(found) @ np.linalg.inv(reciprocal)
    apart = points[:, None] - points
    close = np.linalg.norm((apart - np.rint(apart)) @ reciprocal, axis=2) < merged
    count, group = connected_components(close)
    chosen = []
    for members in (np.flatnonzero(group == i) for i in range(count)):
        first = points[members[0]]  # one with coordinates 0 and 1/2 if there is any
        shifts = points[members] - first
        mean = first + (shifts - np.rint(shifts)).mean(axis=0)
        chosen.append(first if members[0] < len(found[0]) else mean)
    given = np.array(chosen) @ np.linalg.inv(operation).T
    wrapped = np.round(given % 1.0, 12) % 1.0
    return wrapped[np.lexsort(np.round(wrapped, 6).T[::-1])]


def covers(points: np.ndarray, wanted: np.ndarray, symmetry: Symmetry = IDENTITY) -> bool:
    """Whether all ``wanted`` k-points [m, 3] are among the images of points [n, 3] under symmetry and k -> -k.

    Args:
        points, wanted: fractional, in the same cell.
        symmetry: of the crystal.
    """
    rotations = np.concatenate([symmetry.rotations, -symmetry.rotations])
    images = {tuple(name) for name in _names((points @ rotations).reshape(-1, 3))}
    return all(tuple(name) in images for name in _names(wanted))


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Which k-points a calculation gets.

    Attributes:
        rule: one of :data:`RULES`.
        kppa, length, shifted, even: see :func:`mesh_of_lattice`; ``length`` counts for the rule ``lattice`` only.
        special: look for band edges at special points too.
    """

    rule: str
    kppa: float
    length: float = 0.0
    shifted: bool = False
    even: bool = False
    special: bool = False

    def mesh(self, lattice: np.ndarray, sites: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Subdivisions, and shifts in half steps, for a cell with so many sites."""
        if self.rule == "lattice":
            return mesh_of_lattice(lattice, sites, self.kppa, self.length, self.shifted, self.even)
        size = kppa_mesh(lattice, sites, self.kppa)
        size = _triple([n + n % 2 for n in size]) if self.even else size
        return size, _triple([int(self.shifted and n > 1) for n in size])

    def points(self, lattice: np.ndarray, sites: int) -> np.ndarray:
        """The points [n, 3] of the mesh."""
        return rule_points(self.rule, lattice, *self.mesh(lattice, sites))

    def special_points(self, lattice: np.ndarray) -> np.ndarray:
        """The special points [n, 3] that are looked at, without regard to the mesh; none if ``special`` is not set."""
        if not self.special:
            return np.zeros((0, 3))
        return special_points(lattice) if self.rule == "lattice" else half_points()

    def points_beyond_mesh(self, lattice: np.ndarray, frac_coords: np.ndarray, colours: Sequence[int]) -> np.ndarray:
        """Those special points [n, 3] that the mesh lacks, one of each star under the crystal's symmetry.

        Args:
            lattice: [3, 3] Å.
            frac_coords: [N, 3].
            colours: [N], see :func:`find_symmetry`.
        """
        symmetry, special = find_symmetry(lattice, frac_coords, colours), self.special_points(lattice)
        if not len(special):
            return special
        return reduce_points(_beyond(special, self.points(lattice, len(frac_coords))), symmetry)[0]

    def same_points(self, other: Sampling, lattice: np.ndarray, frac_coords: np.ndarray) -> bool:
        """Whether this sampling and another come to the same stars of k-points, whatever elements the crystal has.

        Args:
            other: the rule ``cell``; it is tried on all cells of shortest vectors.
            lattice: [3, 3] Å, shortest vectors.
            frac_coords: [N, 3].
        """
        sites = len(frac_coords)
        if sorted(self.mesh(lattice, sites)[0]) != sorted(other.mesh(lattice, sites)[0]):
            return False
        rotations = find_symmetry(lattice, frac_coords, range(sites)).rotations
        mesh, special = self.points(lattice, sites), self.special_points(lattice)
        for cell in _frames(lattice):
            inverse = np.linalg.inv(cell).T
            if _alike(mesh, other.points(cell @ lattice, sites) @ inverse, rotations):
                there = other.special_points(cell @ lattice) @ inverse
                return _alike(_beyond(special, mesh), _beyond(there, mesh), rotations)
        return False


def reduce_points(points: np.ndarray, symmetry: Symmetry) -> tuple[np.ndarray, np.ndarray]:
    """One point of each star, and the share of the points in it.

    Points are equivalent if the crystal's rotations, time reversal and reciprocal lattice vectors turn them into each
    other.

    Returns:
        points [K, 3] with coordinates in (-1/2, 1/2], weights [K] that add up to 1.
    """

    index = {name.tobytes(): i for i, name in enumerate(_names(points))}
    rotations = np.concatenate([symmetry.rotations, -symmetry.rotations])
    images = _names((points @ rotations).reshape(-1, 3)).reshape(len(rotations), -1, 3)
    star = np.full(len(points), -1)
    representatives = []
    for i in range(len(points)):
        if star[i] >= 0:
            continue
        found = {index[name.tobytes()] for name in images[:, i] if name.tobytes() in index}
        star[list(found | {i})] = len(representatives)
        representatives.append(i)
    weights = np.bincount(star, minlength=len(representatives)) / len(points)
    return (points[representatives] + 0.5 - 1e-9) % 1.0 - 0.5 + 1e-9, weights


def _triple(values: Sequence[int] | np.ndarray) -> tuple[int, int, int]:
    a, b, c = (int(value) for value in values)
    return a, b, c


def _names(points: np.ndarray) -> np.ndarray:
    """Points [n, 3] as integers [n, 3], whatever reciprocal lattice vector is added, but for rounding."""
    return np.rint((points + 1e-9) % 1.0 * 1e6).astype(np.int64) % 1_000_000


def _stars(points: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """Of each point [n, 3] the smallest name among its images: int [n, 3], the same for all points of a star."""
    both = np.concatenate([rotations, -rotations])
    names = _names((points @ both).reshape(-1, 3)).reshape(len(both), -1, 3)
    order = (names @ np.array([10**12, 10**6, 1])).argmin(axis=0)
    return names[order, np.arange(len(points))]


def _beyond(points: np.ndarray, mesh: np.ndarray) -> np.ndarray:
    """Those points [n, 3] that a mesh [m, 3] with the symmetry of the lattice lacks."""
    held = {name.tobytes() for name in _names(mesh)}
    return points[[name.tobytes() not in held for name in _names(points)]]


def _alike(one: np.ndarray, other: np.ndarray, rotations: np.ndarray) -> bool:
    """Whether points [n, 3] and points [m, 3] are of the same stars, with the same shares."""
    if len(one) == len(other) and np.array_equal(np.unique(_names(one), axis=0), np.unique(_names(other), axis=0)):
        return True
    if not len(one) or not len(other):
        return False
    stars = [np.unique(_stars(points, rotations), axis=0, return_counts=True) for points in (one, other)]
    (names, counts), (other_names, other_counts) = stars
    return np.array_equal(names, other_names) and np.array_equal(counts * len(other), other_counts * len(one))


def _symmetric_size(size: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """Subdivisions [3] that are equal for linked vectors if otherwise the mesh would lack the symmetry."""
    images = rotations * size[None, None, :]  # [S, i, j]: what n_j a_j turns into
    if not (images % size[None, :, None]).any():
        return size
    _, group = connected_components((rotations != 0).any(axis=0))
    return np.array([size[group == of].max() for of in group])


def _cost(lattice: np.ndarray, rotations: np.ndarray, size: Sequence[int], shift: Sequence[int]) -> tuple[int, float]:
    """How many stars a mesh has under the symmetry of the lattice, and its error for a decaying function."""
    stars = len(np.unique(_stars(mesh_points(size, shift), rotations), axis=0))
    images = 0.5 * np.array(shift) / size @ rotations  # [S, 3]
    periods = _SHELLS * size
    phases = np.cos(2 * np.pi * images @ periods.T).mean(axis=0)
    error = abs((phases * np.exp(-np.linalg.norm(periods @ lattice, axis=1) / _DECAY)).sum())
    return stars, float(f"{error:.5e}")


def _frames(lattice: np.ndarray) -> list[np.ndarray]:
    """Every choice [3, 3] of shortest vectors that span the lattice, but for their order and signs."""
    lines = np.array([m for m in _NEIGHBOURS.tolist() if tuple(m) > (0, 0, 0)])
    limits = np.sort(np.linalg.norm(lattice, axis=1)) * (1 + _SHORTER)
    lengths = np.linalg.norm(lines @ lattice, axis=1)
    short = [lines[i] for i in np.argsort(lengths, kind="stable") if lengths[i] <= limits[-1]]
    frames = [np.array(rows) for rows in itertools.combinations(short, 3)]
    fitting = [f for f in frames if (np.sort(np.linalg.norm(f @ lattice, axis=1)) <= limits).all()]
    return [f for f in fitting if abs(round(np.linalg.det(f))) == 1]
