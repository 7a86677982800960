"""Block Davidson with a fixed number of expansions, so that it compiles to one program and batches with vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

_SHIFT = {jnp.dtype("complex64"): 2e-6, jnp.dtype("complex128"): 1e-13}
"""Added to the diagonal of the overlap before its Cholesky factorisation: above rounding, below what matters."""

_HOFFMANN = 1.75
_MISSING = 100.0  # Ha, above all that matters
_CLOSE = 1e-3
"""Added to the diagonal of the overlap of atomic orbitals: they may be as good as linearly dependent."""


class Bands(NamedTuple):
    """Attributes:
    eigenvalues: [bands] Ha.
    waves: complex [bands, P], orthonormal rows.
    residuals: [bands], norms of (H - e) psi, Ha.
    """

    eigenvalues: jax.Array
    waves: jax.Array
    residuals: jax.Array


def davidson(apply: Callable[[jax.Array], jax.Array], kinetic: jax.Array, waves: jax.Array, expansions: int) -> Bands:
    """Improve the lowest bands of a Hermitian operator.

    The space is [X, W1, ... Wn]: the given waves and ``expansions`` blocks of preconditioned residuals; H is applied
    ``expansions + 1`` times to a block. Where a factorisation breaks down the best waves before it are kept.

    Args:
        apply: H on rows of coefficients, complex [bands, P].
        kinetic: [P] Ha, for the preconditioner.
        waves: [bands, P], linearly independent, 0 where masked.
        expansions: at least 1.
    """
    bands = waves.shape[0]
    applied = apply(waves)
    start = _rayleigh_ritz(waves, applied, bands)
    eigenvalues, rotation = start
    best, best_applied = rotation.T @ waves, rotation.T @ applied
    origin = space = best
    space_applied = best_applied
    for _ in range(expansions):
        residual = best_applied - eigenvalues[:, None] * best
        correction = residual * _preconditioner(kinetic, best)
        correction = correction - (correction @ origin.conj().T) @ origin
        correction = correction / jnp.linalg.norm(correction, axis=1, keepdims=True).clip(1e-30)
        space = jnp.concatenate([space, correction])
        space_applied = jnp.concatenate([space_applied, apply(correction)])
        new_eigenvalues, rotation = _rayleigh_ritz(space, space_applied, bands)
        sound = jnp.all(jnp.isfinite(new_eigenvalues)) & jnp.all(jnp.isfinite(rotation))
        eigenvalues = jnp.where(sound, new_eigenvalues, eigenvalues)
        best = jnp.where(sound, rotation.T @ space, best)
        best_applied = jnp.where(sound, rotation.T @ space_applied, best_applied)
    residuals = jnp.linalg.norm(best_applied - eigenvalues[:, None] * best, axis=1)
    return Bands(eigenvalues, best, residuals)


def hueckel(orbitals: jax.Array, energies: jax.Array) -> jax.Array:
    """Combinations [n, n] (rows) of atomic orbitals [n, P], lowest first, by the extended Hueckel method.

    H has the atoms' ``energies`` [n] (Ha) on its diagonal, and off it 1.75 times their mean times the overlap;
    Hoffmann, J. Chem. Phys. 39, 1397 (1963). Orbitals that are missing (zero, with energy 0) come last.
    """
    missing = energies == 0
    overlap = _hermitian(orbitals.conj() @ orbitals.T) + jnp.diag(missing.astype(orbitals.dtype))
    diagonal = jnp.eye(len(energies), dtype=bool)
    levels = jnp.where(missing, _MISSING, energies)
    means = jnp.where(diagonal, 1.0, _HOFFMANN) * (levels[:, None] + levels) / 2
    factor = _cholesky(overlap + _CLOSE * jnp.eye(len(energies), dtype=overlap.dtype))
    inverse = jax.lax.linalg.triangular_solve(factor, diagonal.astype(overlap.dtype), left_side=True, lower=True)
    vectors = _eigh(inverse @ (means * overlap) @ inverse.conj().T)[1]
    return (inverse.conj().T @ vectors).T


def orthonormalise(waves: jax.Array) -> jax.Array:
    """Rows [bands, P] made orthonormal in double precision (complex128)."""
    waves = waves.astype(jnp.complex128)
    factor = _cholesky(_hermitian(waves.conj() @ waves.T))
    return jax.lax.linalg.triangular_solve(factor.conj(), waves, left_side=True, lower=True)


def _rayleigh_ritz(space: jax.Array, applied: jax.Array, bands: int) -> tuple[jax.Array, jax.Array]:
    """Lowest eigenvalues [bands] in a space of rows, and the combinations [rows, bands] that have them."""
    overlap = _hermitian(space.conj() @ space.T)
    matrix = _hermitian(space.conj() @ applied.T)
    one = jnp.eye(len(overlap), dtype=overlap.dtype)
    factor = _cholesky(overlap + _SHIFT[overlap.dtype] * one)
    inverse = jax.lax.linalg.triangular_solve(factor, one, left_side=True, lower=True)
    eigenvalues, vectors = _eigh(inverse @ matrix @ inverse.conj().T)
    return eigenvalues[:bands], inverse.conj().T @ vectors[:, :bands]


def _preconditioner(kinetic: jax.Array, waves: jax.Array) -> jax.Array:
    """Near 1 for slow plane waves, 1 / kinetic for fast ones; Teter, Payne and Allan, PRB 40, 12255 (1989)."""
    energy = jnp.sum(kinetic * (waves.real**2 + waves.imag**2), axis=1)
    x = kinetic / (1.5 * energy[:, None] + 1e-6)
    polynomial = 27 + x * (18 + x * (12 + 8 * x))
    return polynomial / (polynomial + 16 * x**4)


def _hermitian(matrix: jax.Array) -> jax.Array:
    return 0.5 * (matrix + matrix.conj().T)


def _cholesky(matrix: jax.Array) -> jax.Array:
    """Lower factor of a matrix that is Hermitian to the last bit."""
    return jax.lax.linalg.cholesky(matrix, symmetrize_input=False)


def _eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, ascending, and eigenvectors (columns) of a matrix that is Hermitian but for rounding."""
    vectors, eigenvalues = jax.lax.linalg.eigh(_hermitian(matrix), symmetrize_input=False)
    return eigenvalues, vectors
