"""The plane waves of a skeleton: which there are, and where they lie in the boxes of the fast Fourier transforms.

Everything here is integers, computed once on the host. Lengths enter only through a reference lattice; programs take
the lattice itself as an argument and mask the plane waves above the cut-off, so one basis serves all cells near the
reference.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from crystaljax.dft_bridge.kpoints import IDENTITY, Symmetry
from crystaljax.dft_bridge.planewave.ewald import EwaldSums, ewald_sums

WAVE_BOX_SHARE = 0.75
"""Edge of the box in which H acts on a wave function, relative to the box that holds the density exactly.

The products of potential and wave functions that are folded back in the smaller box change energies by some 1e-8 Ha;
density and exchange-correlation always use the full box.
"""
_SLACK = 1 + 1e-9
_LARGEST_GROUP = 48


@struct.dataclass
class Basis:
    """Plane waves of the wave functions at K k-points (at most P each) and of the density (G, half a sphere).

    Attributes:
        cutoff: Ha.
        box: FFT box of the density.
        wave_box: FFT box of the wave functions.
        fixed: whether all its plane waves are used whatever the cell (energies are then smooth in it), or only those
            below the cut-off in the cell at hand.
        kpoints: [K, 3] fractional.
        weights: [K], add up to 1.
        millers: int32 [K, P, 3] of the wave functions' plane waves.
        valid: bool [K, P], False for padding.
        to_wave_box: int32 [K, points of wave_box], the plane wave at each point of the box, P for none.
        from_wave_box: int32 [K, P], the point of the box of each plane wave.
        to_box: int32 [K, points of box].
        density_millers: int32 [G, 3], third index not negative.
        density_weights: [G], 2 where the opposite vector is left out, else 1.
        to_density_box: int32 [points of the half box], G for none.
        from_density_box: int32 [G].
        to_density_wave_box: int32 [points of the half wave box], G for none.
        images: int32 [S, G], the vector that operation s turns into this one, up to its sign.
        image_signs: int8 [S, G], +1, or -1 if it is the opposite one.
        image_phases: complex128 [S, G].
        ewald: splitting and ranges of the sums over ions.
        start_damping: [K, P], how much of each plane wave random starting waves have.
    """

    cutoff: float = struct.field(pytree_node=False)
    box: tuple[int, int, int] = struct.field(pytree_node=False)
    wave_box: tuple[int, int, int] = struct.field(pytree_node=False)
    fixed: bool = struct.field(pytree_node=False)
    kpoints: jax.Array
    weights: jax.Array
    millers: jax.Array
    valid: jax.Array
    to_wave_box: jax.Array
    from_wave_box: jax.Array
    to_box: jax.Array
    density_millers: jax.Array
    density_weights: jax.Array
    to_density_box: jax.Array
    from_density_box: jax.Array
    to_density_wave_box: jax.Array
    images: jax.Array
    image_signs: jax.Array
    image_phases: jax.Array
    ewald: EwaldSums
    start_damping: jax.Array

    @property
    def n_kpoints(self) -> int:
        """K."""
        return self.millers.shape[0]

    @property
    def n_waves(self) -> int:
        """P."""
        return self.millers.shape[1]

    @property
    def n_density(self) -> int:
        """G."""
        return self.density_millers.shape[0]


def make_basis(
    lattice: np.ndarray,
    cutoff: float,
    kpoints: np.ndarray,
    weights: np.ndarray,
    symmetry: Symmetry = IDENTITY,
    stretch: float = 1.0,
) -> Basis:
    """The basis of a lattice.

    Args:
        lattice: [3, 3] bohr, rows a, b, c.
        cutoff: kinetic energy of the fastest plane wave, Ha.
        kpoints: [K, 3] fractional.
        weights: [K].
        symmetry: operations that leave the density alone, those that reduced the k-points.
        stretch: the longest cell that will be calculated, relative to ``lattice``: above 1 the basis holds the waves
            of that cell, and programs mask those above the cut-off; at 1 it is :attr:`Basis.fixed`.
    """
    lattice = np.asarray(lattice, dtype=float)
    reciprocal = 2 * np.pi * np.linalg.inv(_symmetric(lattice, symmetry) * stretch).T
    waves = [_sphere(reciprocal, cutoff * _SLACK, k) for k in kpoints]
    vectors = _sphere(reciprocal, 4 * cutoff * _SLACK, np.zeros(3))
    exact = 2 * np.abs(vectors).max(axis=0) + 1
    box = tuple(fft_size(n) for n in exact)
    # No smaller than the waves' own extent, or two of them would share a point of the box.
    extent = 2 * np.max([np.abs(wave).max(axis=0) for wave in waves], axis=0) + 1
    wave_box = tuple(fft_size(max(math.ceil(WAVE_BOX_SHARE * n), m)) for n, m in zip(exact, extent, strict=True))

    count = max(len(wave) for wave in waves)
    millers = np.zeros((len(waves), count, 3), np.int32)
    vectors_of_k = [(wave + k) @ reciprocal for wave, k in zip(waves, kpoints, strict=True)]
    damping = np.zeros((len(waves), count))
    valid = np.zeros((len(waves), count), bool)
    for i, wave in enumerate(waves):
        millers[i, : len(wave)], valid[i, : len(wave)] = wave, True
        damping[i, : len(wave)] = 1 / (1 + np.square((vectors_of_k[i] ** 2).sum(axis=1)))
    from_wave_box = np.where(valid, _positions(millers, wave_box), 0).astype(np.int32)

    half = vectors[vectors[:, 2] >= 0]
    half_box, half_wave_box = (shape[:2] + (shape[2] // 2 + 1,) for shape in (box, wave_box))
    inside = np.all(2 * np.abs(half) < np.array(wave_box), axis=1)
    images, signs, phases = _images(half, symmetry)
    arrays = {
        "kpoints": np.asarray(kpoints, float),
        "weights": np.asarray(weights, float),
        "millers": millers,
        "valid": valid,
        "to_wave_box": np.stack([_gather_map(wave, wave_box, count) for wave in waves]),
        "from_wave_box": from_wave_box,
        "to_box": np.stack([_gather_map(wave, box, count) for wave in waves]),
        "density_millers": half.astype(np.int32),
        "density_weights": np.where(half[:, 2] == 0, 1.0, 2.0),
        "to_density_box": _gather_map(half, half_box, len(half)),
        "from_density_box": _positions(half, half_box).astype(np.int32),
        "to_density_wave_box": _gather_map(half, half_wave_box, len(half), inside),
        "images": images,
        "image_signs": signs,
        "image_phases": phases,
        "start_damping": damping,
    }
    on_device = {name: jnp.asarray(array) for name, array in arrays.items()}
    return Basis(float(cutoff), box, wave_box, stretch == 1.0, **on_device, ewald=ewald_sums(lattice))


def fft_size(n: int) -> int:
    """The smallest number from ``n`` on without prime factors above 5."""
    while True:
        rest = n = int(n)
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return n
        n += 1


def _symmetric(lattice: np.ndarray, symmetry: Symmetry) -> np.ndarray:
    """A lattice with the lengths and angles of the given one, made exactly symmetric; its orientation is another.

    Structures from files are symmetric to some 1e-6 only, and a shell of vectors must not be cut in two by that.
    """
    metric = lattice @ lattice.T
    return np.linalg.cholesky(np.mean([w.T @ metric @ w for w in symmetry.rotations], axis=0))


def _sphere(reciprocal: np.ndarray, cutoff: float, k: np.ndarray) -> np.ndarray:
    """Miller indices [n, 3] of |k + G|^2 / 2 <= cutoff, the slowest first."""
    direct = np.linalg.inv(reciprocal).T
    reach = np.ceil(math.sqrt(2 * cutoff) * np.linalg.norm(direct, axis=1) + np.abs(k)).astype(int)
    axes = [np.arange(-n, n + 1) for n in reach]
    millers = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    energies = 0.5 * np.sum(((millers + k) @ reciprocal) ** 2, axis=1)
    order = np.argsort(energies, kind="stable")
    return millers[order[energies[order] <= cutoff]]


def nearest_waves(mesh: Basis, points: Basis) -> tuple[np.ndarray, np.ndarray]:
    """Where the waves of ``points`` are found in ``mesh``, each k-point's among those of the nearest one there.

    Returns:
        int32 [K'] k-points of ``mesh``, and int32 [K', P'] plane waves there: with the same wave vector but for the
        distance between the k-points; ``mesh.n_waves`` for none.
    """
    distances = np.asarray(points.kpoints)[:, None] - np.asarray(mesh.kpoints)
    umklapp = np.rint(distances).astype(int)
    nearest = np.linalg.norm(distances - umklapp, axis=-1).argmin(axis=1)
    millers, valid = np.asarray(mesh.millers), np.asarray(mesh.valid)
    sought = np.asarray(points.millers) + umklapp[np.arange(len(nearest)), nearest][:, None]
    shape = tuple(2 * np.maximum(np.abs(sought).max(axis=(0, 1)), np.abs(millers).max(axis=(0, 1))) + 1)
    found = []
    for k, wanted in zip(nearest, sought, strict=True):
        table = _gather_map(millers[k], shape, mesh.n_waves, valid[k])
        found.append(table[_positions(wanted, shape)])
    return nearest.astype(np.int32), np.array(found, np.int32)


def _positions(millers: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Row-major position in an FFT box of each triple [..., 3]."""
    wrapped = np.mod(millers[..., :2], shape[:2])
    third = np.mod(millers[..., 2], shape[2])
    return (wrapped[..., 0] * shape[1] + wrapped[..., 1]) * shape[2] + third


def _gather_map(
    millers: np.ndarray, shape: tuple[int, ...], nothing: int, inside: np.ndarray | None = None
) -> np.ndarray:
    """int32 [points of the box]: which of the triples lies there, ``nothing`` if none does."""
    chosen = np.arange(len(millers)) if inside is None else np.flatnonzero(inside)
    result = np.full(math.prod(shape), nothing, np.int32)
    result[_positions(millers[chosen], shape)] = chosen
    return result


def _images(half: np.ndarray, symmetry: Symmetry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each operation and each G' of the half sphere the G with W^T G = G', as (index, sign, phase), each [S, G].

    A density that the operation leaves alone has coefficients c(G') = c(G) exp(2 pi i G.w).
    """
    reach = np.abs(half).max(axis=0)
    shape = tuple(2 * reach + 1)
    table = np.full(math.prod(shape), -1, np.int64)
    table[_positions(half, shape)] = np.arange(len(half))
    images, signs, phases = [], [], []
    for rotation, translation in zip(symmetry.rotations, symmetry.translations, strict=True):
        sources = half @ np.rint(np.linalg.inv(rotation)).astype(int)
        direct = table[_positions(sources, shape)]
        sign = np.where(direct >= 0, 1, -1)
        images.append(np.where(direct >= 0, direct, table[_positions(-sources, shape)]))
        signs.append(sign)
        phases.append(np.exp(2j * np.pi * (sources @ translation)))
    result = np.array(images, np.int32)
    if (result < 0).any():
        raise ValueError("the symmetry operations do not fit the lattice; is it distorted beyond the tolerance?")
    # Written as often as makes up the largest group: an average does not change, and neither does a program's shape.
    repeats = _LARGEST_GROUP // len(symmetry) if len(symmetry) > 1 and _LARGEST_GROUP % len(symmetry) == 0 else 1
    return tuple(np.tile(array, (repeats, 1)) for array in (result, np.array(signs, np.int8), np.array(phases)))
