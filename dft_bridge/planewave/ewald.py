"""Electrostatic energy of point ions in a neutralising background (Ewald's sum). Hartree units."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

_REAL_RANGE, _RECIPROCAL_RANGE = 7.0, 14.0
"""Reach of the two sums in units of the splitting: erfc(7) and exp(-49) are far below 1e-16."""


@struct.dataclass
class EwaldSums:
    """Splitting (1/bohr) and terms of both sums: translations [T, 3] and Miller indices [M, 3], as floats."""

    splitting: jax.Array
    cells: jax.Array
    millers: jax.Array


def ewald_sums(lattice: np.ndarray) -> EwaldSums:
    """What to sum for cells near ``lattice`` ([3, 3] bohr)."""
    reciprocal = 2 * np.pi * np.linalg.inv(lattice).T
    splitting = math.sqrt(math.pi) / abs(np.linalg.det(lattice)) ** (1 / 3)
    radius, cutoff = _REAL_RANGE / splitting, _RECIPROCAL_RANGE * splitting
    cells = _box(np.ceil(radius * np.linalg.norm(reciprocal, axis=1) / (2 * np.pi)).astype(int) + 1)
    millers = _box(np.ceil(cutoff * np.linalg.norm(lattice, axis=1) / (2 * np.pi)).astype(int))
    lengths = np.linalg.norm(millers @ reciprocal, axis=1)
    millers = millers[(lengths > 0) & (lengths < cutoff)]
    return EwaldSums(jnp.asarray(splitting), jnp.asarray(cells.astype(float)), jnp.asarray(millers.astype(float)))


def ewald_matrix(sums: EwaldSums, lattice: jax.Array, frac_coords: jax.Array) -> jax.Array:
    """The matrix M [N, N] with energy Z^T M Z / 2 (Ha) for charges Z; ``lattice`` [3, 3] bohr."""
    volume, reciprocal = reciprocal_cell(lattice)
    splitting, cells = sums.splitting, sums.cells
    n = frac_coords.shape[0]
    offsets = frac_coords[:, None] - frac_coords[None]
    r2 = jnp.sum(((offsets[:, :, None] + cells) @ lattice) ** 2, axis=-1)
    # An ion does not see itself; whether it is itself is known from the indices, not from the (traced) distance.
    itself = jnp.eye(n, dtype=bool)[:, :, None] & jnp.all(cells == 0, axis=1)
    r = jnp.sqrt(jnp.where(itself, 1.0, r2))
    near = jnp.where(itself, 0.0, jax.scipy.special.erfc(splitting * r) / r).sum(axis=-1)
    g2 = jnp.sum((sums.millers @ reciprocal) ** 2, axis=-1)
    waves = jnp.cos(2 * math.pi * jnp.einsum("ijx,gx->ijg", offsets, sums.millers))
    far = 4 * math.pi / volume * (waves @ (jnp.exp(-g2 / (4 * splitting**2)) / g2))
    background = math.pi / (splitting**2 * volume)
    return near + far - background - 2 * splitting / math.sqrt(math.pi) * jnp.eye(n)


def reciprocal_cell(lattice: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Volume (bohr^3) and reciprocal lattice vectors ([3, 3] rows, 1/bohr) of ``lattice`` ([3, 3] bohr).

    Written out: a factorisation of three rows takes longer to compile than all that uses it.
    """
    (a, b, c), (d, e, f), (g, h, i) = lattice
    minors = [[e * i - f * h, f * g - d * i, d * h - e * g], [h * c - i * b, i * a - g * c, g * b - h * a]]
    minors += [[b * f - c * e, c * d - a * f, a * e - b * d]]
    volume = a * minors[0][0] + b * minors[0][1] + c * minors[0][2]
    return jnp.abs(volume), jnp.stack([jnp.stack(row) for row in minors]) * (2 * math.pi / volume)


def _box(reach: np.ndarray) -> np.ndarray:
    """All integer triples within ``reach`` of the origin, [n, 3]."""
    axes = [np.arange(-n, n + 1) for n in reach]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
