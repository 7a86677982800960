"""The crystal skeleton: a lattice and sites without elements, with its bonds, symmetry and decision orders.

All of it is worked out once, on the host. :class:`SkeletonTable` stacks the arrays of several skeletons, padded to
common shapes, so that an environment's reset is a gather.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from crystaljax import symmetry

GEOMETRY_DIGITS = 4
"""Decimals of Å and of fractional coordinates that tell two skeletons apart."""


@dataclasses.dataclass(frozen=True)
class Bonds:
    """Bonds of a skeleton, each in both directions.

    Attributes:
        senders, receivers: int32 [E], sites.
        images: int32 [E, 3], lattice translation of the receiver.
        distances: float64 [E], Å.
    """

    senders: np.ndarray
    receivers: np.ndarray
    images: np.ndarray
    distances: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Skeleton:
    """Sites of a crystal whose elements are to be chosen. Equal if all that is given is equal, bit for bit.

    Attributes:
        name: for people, such as ``C1`` or a file name.
        lattice: float64 [3, 3], rows a, b, c, Å; Niggli-reduced.
        frac_coords: float64 [N, 3], in [0, 1).
        species: chemical symbols of the prototype, length N; they colour the orbits, nothing else.
        source: where the numbers come from, such as ``mp-556424``.
    """

    name: str
    lattice: np.ndarray
    frac_coords: np.ndarray
    species: tuple[str, ...]
    source: str = ""

    @functools.cached_property
    def _identity(self) -> tuple[object, ...]:
        arrays = (np.asarray(array, float) for array in (self.lattice, self.frac_coords))
        return self.name, self.source, tuple(self.species), *(array.tobytes() for array in arrays)

    def __eq__(self, other: object) -> bool:
        return self._identity == other._identity if isinstance(other, Skeleton) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def n_sites(self) -> int:
        return len(self.frac_coords)

    @property
    def volume(self) -> float:
        """Cell volume in Å^3."""
        return float(abs(np.linalg.det(self.lattice)))

    @functools.cached_property
    def parameters(self) -> np.ndarray:
        """float64 [6]: lengths a, b, c in Å, then angles alpha, beta, gamma in degrees."""
        lengths = np.linalg.norm(self.lattice, axis=1)
        cosines = [self.lattice[i] @ self.lattice[j] / (lengths[i] * lengths[j]) for i, j in ((1, 2), (0, 2), (0, 1))]
        return np.concatenate([lengths, np.degrees(np.arccos(np.clip(cosines, -1.0, 1.0)))])

    @functools.cached_property
    def digest(self) -> str:
        """Hex digest of the geometry (metric of the cell and sites to 4 decimals): what makes two skeletons equal."""
        metric = np.round(self.lattice @ self.lattice.T, GEOMETRY_DIGITS) + 0.0
        sites = np.round(self.frac_coords, GEOMETRY_DIGITS) % 1.0 + 0.0
        payload = metric.astype("<f8").tobytes() + sites.astype("<f8").tobytes()
        return hashlib.sha256(payload).hexdigest()[:16]

    @functools.cached_property
    def permutations(self) -> np.ndarray:
        """int32 [P, N]: site-permutation group with all sites alike."""
        return symmetry.site_permutations(self.lattice, self.frac_coords)

    @functools.cached_property
    def orbits(self) -> np.ndarray:
        """int32 [N]: symmetry orbit of each site as the prototype's species colour it."""
        return symmetry.orbits(self.lattice, self.frac_coords, self.species)

    @functools.cached_property
    def bonds(self) -> Bonds:
        """Bonds by pymatgen's CrystalNN (no distance cut-offs, electronegativity and porosity ignored)."""
        return _crystal_nn(self)

    @functools.cached_property
    def site_orders(self) -> np.ndarray:
        """int32 [N, N]: breadth-first order of the sites from every start site.

        Neighbours are visited nearest first, then by index. Sites that no bond reaches follow in index order.
        """
        return np.stack([_breadth_first(self.bonds, self.n_sites, start) for start in range(self.n_sites)])


def _crystal_nn(skeleton: Skeleton) -> Bonds:
    from pymatgen.analysis.local_env import CrystalNN
    from pymatgen.core import Structure

    structure = Structure(skeleton.lattice, list(skeleton.species), skeleton.frac_coords)
    finder = CrystalNN(distance_cutoffs=None, x_diff_weight=-1, porous_adjustment=False)
    edges: set[tuple[int, int, tuple[int, int, int]]] = set()
    with warnings.catch_warnings():
        # CrystalNN warns that it guesses no oxidation states; it uses none here.
        warnings.simplefilter("ignore", UserWarning)
        for site in range(len(structure)):
            for neighbour in finder.get_nn_info(structure, site):
                a, b, c = (int(i) for i in neighbour["image"])
                other = int(neighbour["site_index"])
                edges.add((site, other, (a, b, c)))
                edges.add((other, site, (-a, -b, -c)))
    ordered = sorted(edges)
    senders = np.array([e[0] for e in ordered], dtype=np.int32)
    receivers = np.array([e[1] for e in ordered], dtype=np.int32)
    images = np.array([e[2] for e in ordered], dtype=np.int32).reshape(-1, 3)
    offsets = skeleton.frac_coords[receivers] + images - skeleton.frac_coords[senders]
    return Bonds(senders, receivers, images, np.linalg.norm(offsets @ skeleton.lattice, axis=1))


def _breadth_first(bonds: Bonds, n_sites: int, start: int) -> np.ndarray:
    order = [start]
    queue = deque(order)
    while queue:
        site = queue.popleft()
        mine = np.flatnonzero(bonds.senders == site)
        for edge in sorted(mine, key=lambda e: (round(bonds.distances[e], GEOMETRY_DIGITS), bonds.receivers[e])):
            neighbour = int(bonds.receivers[edge])
            if neighbour not in order:
                order.append(neighbour)
                queue.append(neighbour)
    order += [site for site in range(n_sites) if site not in order]
    return np.array(order, dtype=np.int32)


@struct.dataclass
class SkeletonTable:
    """Arrays of K skeletons, padded to N sites, E bonds and P permutations; NumPy's, until a row is taken.

    So a table is made without a device: in a process that JAX has not been started in, and must not be (a fork).

    Attributes:
        n_sites: int32 [K].
        site_mask: bool [K, N].
        n_decisions: int32 [K], decisions until every site has an element.
        group: int32 [K, N], decision group of each site; -1 on padding. A group is one site, or one orbit.
        order: int32 [K, N, N], group decided at each time, by start site; -1 once nothing is left to decide.
        focus: int32 [K, N, N], the site shown as focus at each time, by start site.
        permutations: int32 [K, P, N]; padding sites stay put, padding rows repeat the identity.
        senders, receivers: int32 [K, E].
        distances: float32 [K, E], Å; 0 on padding.
        edge_mask: bool [K, E].
        lattice: float32 [K, 6], lengths in Å and angles in degrees.
        volume: float32 [K], Å^3.
    """

    n_sites: jax.Array
    site_mask: jax.Array
    n_decisions: jax.Array
    group: jax.Array
    order: jax.Array
    focus: jax.Array
    permutations: jax.Array
    senders: jax.Array
    receivers: jax.Array
    distances: jax.Array
    edge_mask: jax.Array
    lattice: jax.Array
    volume: jax.Array

    def row(self, index: jax.Array) -> SkeletonTable:
        """The skeleton at ``index`` (every leaf loses its first axis). Free of gathers when there is only one."""
        single = self.n_sites.shape[0] == 1
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[0 if single else index], self)


def stack(skeletons: Sequence[Skeleton], by_orbit: bool = False) -> SkeletonTable:
    """The table of ``skeletons``, with one decision per site or, ``by_orbit``, one per symmetry orbit."""
    if not skeletons:
        raise ValueError("no skeletons given; pass at least one")
    sites = max(s.n_sites for s in skeletons)
    edges = max(len(s.bonds.senders) for s in skeletons)
    perms = max(len(s.permutations) for s in skeletons)
    rows = [_padded_row(s, sites, edges, perms, by_orbit) for s in skeletons]
    leaves: dict[str, Any] = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return SkeletonTable(**leaves)


def _padded_row(skeleton: Skeleton, sites: int, edges: int, perms: int, by_orbit: bool) -> dict[str, Any]:
    """The leaves of a :class:`SkeletonTable` without their first axis."""
    n, bonds = skeleton.n_sites, skeleton.bonds
    group = skeleton.orbits if by_orbit else np.arange(n, dtype=np.int32)
    order = np.full((sites, sites), -1, dtype=np.int32)
    focus = np.zeros((sites, sites), dtype=np.int32)
    for start in range(n):
        site_order = skeleton.site_orders[start]
        # A group is decided when the breadth-first walk first meets one of its sites.
        first = np.sort(np.unique(group[site_order], return_index=True)[1])
        decided = site_order[first]
        order[start, : len(decided)] = group[decided]
        focus[start, : len(decided)] = decided
        focus[start, len(decided) :] = decided[-1]
    permutations = np.tile(np.arange(sites, dtype=np.int32), (perms, 1))
    permutations[: len(skeleton.permutations), :n] = skeleton.permutations

    def pad(values: np.ndarray, length: int, fill: float, dtype: type) -> np.ndarray:
        return np.concatenate([values, np.full(length - len(values), fill)]).astype(dtype)

    return dict(
        n_sites=np.int32(n),
        site_mask=np.arange(sites) < n,
        n_decisions=np.int32(group.max() + 1),
        group=pad(group, sites, -1, np.int32),
        order=order,
        focus=focus,
        permutations=permutations,
        senders=pad(bonds.senders, edges, 0, np.int32),
        receivers=pad(bonds.receivers, edges, 0, np.int32),
        distances=pad(bonds.distances, edges, 0.0, np.float32),
        edge_mask=np.arange(edges) < len(bonds.senders),
        lattice=skeleton.parameters.astype(np.float32),
        volume=np.float32(skeleton.volume),
    )
