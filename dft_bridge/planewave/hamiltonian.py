"""The Kohn-Sham Hamiltonian at one k-point, and the density that its wave functions make. Hartree units."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from crystaljax.dft_bridge.planewave.basis import Basis
from crystaljax.dft_bridge.planewave.potentials import WavePotential, projector_functions


@struct.dataclass
class Hamiltonian:
    """H of one k-point, in the precision of its wave functions.

    Attributes:
        kinetic: [P] Ha.
        mask: [P], 1 for plane waves below the cut-off.
        projectors: complex [J, P].
        strengths: [J] Ha.
        potential: [wave box] Ha.
        to_box: int32 [points], from_box: int32 [P], see :class:`Basis`.
        bands_per_fft: how many bands are transformed at a time: one keeps the box in a CPU's cache, an accelerator
            wants them all.
    """

    kinetic: jax.Array
    mask: jax.Array
    projectors: jax.Array
    strengths: jax.Array
    potential: jax.Array
    to_box: jax.Array
    from_box: jax.Array
    bands_per_fft: int = struct.field(pytree_node=False)

    def __call__(self, waves: jax.Array) -> jax.Array:
        """H applied to wave functions, complex [bands, P]."""
        local = map_bands(self._local, waves, self.bands_per_fft)
        nonlocal_part = ((waves @ self.projectors.conj().T) * self.strengths) @ self.projectors
        return self.kinetic * waves + local + nonlocal_part

    def _local(self, wave: jax.Array) -> jax.Array:
        points = jnp.fft.ifftn(_into_box(wave, self.to_box, self.potential.shape)) * self.potential
        return jnp.fft.fftn(points).reshape(-1)[self.from_box] * self.mask


def hamiltonian(
    basis: Basis,
    waves: WavePotential,
    channels: tuple[int, ...],
    strengths: jax.Array,
    potential: jax.Array,
    to_box: jax.Array,
    from_box: jax.Array,
    bands_per_fft: int,
) -> Hamiltonian:
    """Assemble H of one k-point; ``to_box`` and ``from_box`` are its rows of the maps of the basis."""
    dtype = waves.kinetic.dtype
    return Hamiltonian(
        kinetic=waves.kinetic,
        mask=waves.mask,
        projectors=projector_functions(waves, channels),
        strengths=strengths.astype(dtype),
        potential=potential.astype(dtype).reshape(basis.wave_box),
        to_box=to_box,
        from_box=from_box,
        bands_per_fft=bands_per_fft,
    )


def band_density(
    basis: Basis, to_box: jax.Array, waves: jax.Array, numbers: jax.Array, bands_per_fft: int
) -> jax.Array:
    """Density (float64 [box], times the volume) of the bands [bands, P] of one k-point with their occupations."""
    size = math.prod(basis.box)

    def add(total: jax.Array, band: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        wave, number = band
        points = jnp.fft.ifftn(_into_box(wave, to_box, basis.box)) * size
        return total + number * (points.real**2 + points.imag**2).astype(total.dtype), None

    zeros = jnp.zeros(basis.box, numbers.dtype)
    if bands_per_fft == 1:
        return jax.lax.scan(add, zeros, (waves, numbers))[0]
    return jnp.sum(jax.vmap(lambda wave, number: add(zeros, (wave, number))[0])(waves, numbers), axis=0)


def map_bands(function: Callable[[jax.Array], jax.Array], waves: jax.Array, bands_per_fft: int) -> jax.Array:
    """``function`` on every band, ``bands_per_fft`` at a time."""
    if bands_per_fft >= waves.shape[0]:
        return jax.vmap(function)(waves)
    return jax.lax.map(function, waves, batch_size=None if bands_per_fft == 1 else bands_per_fft)


def _into_box(wave: jax.Array, to_box: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.concatenate([wave, jnp.zeros(1, wave.dtype)])[to_box].reshape(shape)
