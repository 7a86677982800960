"""Densities and potentials: between plane-wave coefficients and points in space, symmetry, and their energies.

A real field is held as the coefficients of half a sphere of G vectors (complex [G]) or on the points of a box
(float [n1, n2, n3]). Hartree units.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from crystaljax.dft_bridge.planewave import xc
from crystaljax.dft_bridge.planewave.basis import Basis
from crystaljax.dft_bridge.planewave.potentials import DensityPotential


def to_points(basis: Basis, coefficients: jax.Array) -> jax.Array:
    """The field on the points of :attr:`Basis.box`."""
    return _inverse(coefficients, basis.to_density_box, basis.box)


def to_wave_points(basis: Basis, coefficients: jax.Array) -> jax.Array:
    """The field on the points of the smaller :attr:`Basis.wave_box`, without what does not fit."""
    return _inverse(coefficients, basis.to_density_wave_box, basis.wave_box)


def to_coefficients(basis: Basis, points: jax.Array) -> jax.Array:
    """The inverse of :func:`to_points`; what lies outside the sphere is dropped."""
    return jnp.fft.rfftn(points).reshape(-1)[basis.from_density_box] / math.prod(basis.box)


def symmetrise(basis: Basis, coefficients: jax.Array) -> jax.Array:
    """The average of a field over the symmetry operations of the basis."""
    operations = basis.images.shape[0]

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        moved = coefficients[basis.images[i]]
        # conj of the moved coefficient where its opposite vector is the one that is stored
        moved = jax.lax.complex(moved.real, moved.imag * basis.image_signs[i].astype(moved.real.dtype))
        return total + moved * basis.image_phases[i].astype(moved.dtype)

    if operations == 1:
        return coefficients
    total, _ = jax.lax.scan(lambda t, i: (add(i, t), None), jnp.zeros_like(coefficients), jnp.arange(operations))
    return total / operations


def hartree_norm(basis: Basis, potential: DensityPotential) -> jax.Array:
    """Weights [G] so that their sum with |n(G)|^2 is the electrostatic energy (Ha) of a density n."""
    return 0.5 * potential.volume * basis.density_weights * potential.coulomb


def xc_energy(basis: Basis, functional: str, vectors: jax.Array, volume: jax.Array, density: jax.Array) -> jax.Array:
    """Exchange-correlation energy (Ha) of a density on the points of the box (cores included)."""
    if functional == "LDA":
        per_electron = xc.energy_lda(density)
    else:
        coefficients = to_coefficients(basis, density)
        slopes = [to_points(basis, 1j * vectors[:, i] * coefficients) for i in range(3)]
        per_electron = xc.energy_pbe(density, slopes[0] ** 2 + slopes[1] ** 2 + slopes[2] ** 2)
    return jnp.sum(per_electron * jnp.maximum(density, xc.DENSITY_FLOOR)) * volume / math.prod(basis.box)


def effective_potential(basis: Basis, functional: str, potential: DensityPotential, density: jax.Array) -> jax.Array:
    """Local + Hartree + exchange-correlation potential (Ha) on the points of the wave box, for a density [G]."""
    total = to_points(basis, density + potential.core)
    xc_gradient = jax.grad(lambda n: xc_energy(basis, functional, potential.vectors, potential.volume, n))(total)
    xc_potential = to_coefficients(basis, xc_gradient) * (math.prod(basis.box) / potential.volume)
    return to_wave_points(basis, potential.local + potential.coulomb * density + xc_potential)


def density_energy(basis: Basis, functional: str, potential: DensityPotential, density: jax.Array) -> jax.Array:
    """Everything in the total energy (Ha) that depends on the density [G] and the ions alone."""
    weights = potential.volume * basis.density_weights
    local = jnp.sum(weights * (density.conj() * potential.local).real)
    hartree = jnp.sum(hartree_norm(basis, potential) * (density.real**2 + density.imag**2))
    total = to_points(basis, density + potential.core)
    return local + hartree + xc_energy(basis, functional, potential.vectors, potential.volume, total) + potential.ewald


def density_slope(
    basis: Basis,
    functional: str,
    potential: DensityPotential,
    density: jax.Array,
    local_change: jax.Array,
    core_change: jax.Array,
) -> jax.Array:
    """Derivative (Ha) of :func:`density_energy` by the logarithm of the volume, the electrons at each G held.

    Args:
        local_change, core_change: complex [G], derivatives of the ``local`` and ``core`` of the potential.
    """
    weights = potential.volume * basis.density_weights
    local = jnp.sum(weights * (density.conj() * local_change).real)
    hartree = jnp.sum(hartree_norm(basis, potential) * (density.real**2 + density.imag**2))

    def xc_of(strain: jax.Array, points: jax.Array) -> jax.Array:
        shrunk, grown = jnp.exp(-strain / 3), jnp.exp(strain)
        return xc_energy(basis, functional, potential.vectors * shrunk, potential.volume * grown, points)

    zero = jnp.zeros((), potential.volume.dtype)
    points = to_points(basis, density + potential.core), to_points(basis, core_change - density)
    xc_change = jax.jvp(xc_of, (zero, points[0]), (jnp.ones_like(zero), points[1]))[1]
    return local - (hartree + potential.ewald) / 3 + xc_change


def _inverse(coefficients: jax.Array, gather_map: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    padded = jnp.concatenate([coefficients, jnp.zeros(1, coefficients.dtype)])
    half = padded[gather_map].reshape(*shape[:2], shape[2] // 2 + 1)
    return jnp.fft.irfftn(half, s=shape) * math.prod(shape)
