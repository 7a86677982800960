"""Occupation numbers: two electrons in each of the lowest bands, or Gaussian smearing. Hartree units."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

_BISECTIONS = 60
_WIDEST = 0.02  # Ha
_WIDTH_PER_ERROR = 30.0


class Occupations(NamedTuple):
    """Attributes:
    numbers: [K, bands], 0 to 2.
    fermi_level: Ha; with fixed occupations the middle of the gap.
    minus_ts: Ha, the smearing's contribution -T S to the free energy; 0 with fixed occupations.
    """

    numbers: jax.Array
    fermi_level: jax.Array
    minus_ts: jax.Array


def fixed(eigenvalues: jax.Array, electrons: jax.Array) -> Occupations:
    """Two electrons in each of the lowest ``electrons / 2`` bands at every k-point."""
    occupied = jnp.arange(eigenvalues.shape[1]) < jnp.round(electrons / 2)
    homo = jnp.max(jnp.where(occupied, eigenvalues, -jnp.inf))
    lumo = jnp.min(jnp.where(occupied, jnp.inf, eigenvalues))
    numbers = jnp.broadcast_to(jnp.where(occupied, 2.0, 0.0), eigenvalues.shape)
    return Occupations(numbers, 0.5 * (homo + lumo), jnp.zeros((), eigenvalues.dtype))


def gaussian(eigenvalues: jax.Array, weights: jax.Array, electrons: jax.Array, width: float | jax.Array) -> Occupations:
    """Gaussian smearing of ``width`` Ha, the Fermi level found by bisection.

    Fu and Ho, Phys. Rev. B 28, 5480 (1983). Args: eigenvalues [K, bands] Ha, weights [K] that add up to 1.
    """

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        too_few = jnp.sum(weights[:, None] * jax.scipy.special.erfc((eigenvalues - middle) / width)) < electrons
        return jnp.where(too_few, middle, low), jnp.where(too_few, high, middle)

    bounds = (jnp.min(eigenvalues) - 1.0, jnp.max(eigenvalues) + 1.0)
    low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, bounds)
    level = 0.5 * (low + high)
    x = (eigenvalues - level) / width
    minus_ts = -jnp.sum(weights[:, None] * width / math.sqrt(math.pi) * jnp.exp(-x * x))
    return Occupations(jax.scipy.special.erfc(x), level, minus_ts)


def annealed(width: float, error: jax.Array) -> jax.Array:
    """``width`` Ha, or more while the density is far from self-consistent (``error`` in Ha per atom).

    Levels that cross a sharp Fermi level from step to step would keep the SCF from converging.
    """
    return jnp.clip(_WIDTH_PER_ERROR * error, width, max(width, _WIDEST))


def occupy(
    eigenvalues: jax.Array, weights: jax.Array, electrons: jax.Array, width: float, error: jax.Array | float = 0.0
) -> Occupations:
    """:func:`gaussian` smearing of :func:`annealed` width, :func:`fixed` for a ``width`` of 0, which is static."""
    if width > 0:
        return gaussian(eigenvalues, weights, electrons, annealed(width, error))
    return fixed(eigenvalues, electrons)
