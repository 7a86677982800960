"""From elements on sites to the potentials of a crystal: radial tables interpolated at its plane waves.

All functions are pure and differentiable in lattice and coordinates, so forces and stress follow from them.
Hartree units.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from crystaljax.dft_bridge.planewave.basis import Basis
from crystaljax.dft_bridge.planewave.ewald import ewald_matrix, reciprocal_cell
from crystaljax.dft_bridge.planewave.pseudopotentials import Q_STEP, PseudoSet

_STENCIL = 6
_MIDDLE = (_STENCIL - 1) / 2
_LAGRANGE = np.linalg.inv(np.vander(np.arange(_STENCIL) - _MIDDLE, increasing=True)).T
"""Of each point's polynomial, the coefficients [points, powers] of powers of the distance from the middle."""
_SLACK = 1 + 1e-9


@struct.dataclass
class SpeciesTables:
    """Radial tables of E species on the grid q = 0, Q_STEP, 2 Q_STEP ... (1/bohr), float64.

    Attributes:
        channels: angular momentum of each of the R radial projectors; species with fewer have zeros.
        orbital_channels: the same of the R' radial orbitals.
        local: [E, Q] short-range part of the local potential, Ha bohr^3.
        core: [E, Q] electrons of the core density.
        density: [E, Q] electrons of the atomic valence density.
        projectors: [E, R, Q'].
        energies: [E, R] Ha.
        valence: [E] electrons.
        orbitals: float32 [E, R', Q'] of the free atoms; zeros where a species has none.
        orbital_energies: [E, R'] Ha; 0 where a species has none.
    """

    channels: tuple[int, ...] = struct.field(pytree_node=False)
    orbital_channels: tuple[int, ...] = struct.field(pytree_node=False)
    local: jax.Array
    core: jax.Array
    density: jax.Array
    projectors: jax.Array
    energies: jax.Array
    valence: jax.Array
    orbitals: jax.Array
    orbital_energies: jax.Array


def species_tables(pseudopotentials: PseudoSet, symbols: Sequence[str], channels: Sequence[int]) -> SpeciesTables:
    """The tables of some elements; ``channels`` as :func:`channels_for` gives them, or more."""
    tables = [pseudopotentials[symbol] for symbol in symbols]
    momenta, orbital_momenta = [t.angular_momenta for t in tables], [t.orbital_momenta for t in tables]
    orbital_channels = _fewest(orbital_momenta)
    return SpeciesTables(
        channels=tuple(int(c) for c in channels),
        orbital_channels=orbital_channels,
        local=jnp.asarray(np.stack([t.local for t in tables])),
        core=jnp.asarray(np.stack([t.core for t in tables])),
        density=jnp.asarray(np.stack([t.density for t in tables])),
        projectors=jnp.asarray(_slotted(channels, momenta, [t.projectors for t in tables])),
        energies=jnp.asarray(_slotted(channels, momenta, [t.energies for t in tables])),
        valence=jnp.asarray([float(t.valence) for t in tables]),
        orbitals=jnp.asarray(_slotted(orbital_channels, orbital_momenta, [t.orbitals for t in tables]), jnp.float32),
        orbital_energies=jnp.asarray(_slotted(orbital_channels, orbital_momenta, [t.orbital_energies for t in tables])),
    )


def channels_for(pseudopotentials: PseudoSet, symbols: Sequence[str]) -> tuple[int, ...]:
    """The fewest radial projectors, as sorted angular momenta, that hold those of every element."""
    return _fewest([pseudopotentials[s].angular_momenta for s in symbols])


def _fewest(momenta: Sequence[np.ndarray]) -> tuple[int, ...]:
    """The fewest channels, sorted, that hold the angular momenta of every element."""
    most = np.max([np.bincount(m, minlength=4) for m in momenta], axis=0)
    return tuple(int(momentum) for momentum in np.repeat(np.arange(4), most))


def _slotted(channels: Sequence[int], momenta: Sequence[np.ndarray], rows: Sequence[np.ndarray]) -> np.ndarray:
    """float64 [E, R, ...]: the rows of each element at the first free channel of their angular momentum, else 0."""
    result = np.zeros((len(rows), len(channels), *rows[0].shape[1:]))
    for e, (own_momenta, own_rows) in enumerate(zip(momenta, rows, strict=True)):
        free = list(enumerate(channels))
        for momentum, row in zip(own_momenta, own_rows, strict=True):
            slot = next(item for item in free if item[1] == momentum)
            free.remove(slot)
            result[e, slot[0]] = row
    return result


@struct.dataclass
class WavePotential:
    """What acts on the wave functions of one k-point, or of all with a leading axis [K].

    Attributes:
        kinetic: [P] Ha, 0 where masked.
        mask: [P], 1 for plane waves below the cut-off.
        radial: [N, R, P] radial projectors times 4 pi / sqrt(volume).
        harmonics: [(lmax + 1)^2, P] real spherical harmonics.
        phases: complex [N, P], exp(-i G.r).
    """

    kinetic: jax.Array
    mask: jax.Array
    radial: jax.Array
    harmonics: jax.Array
    phases: jax.Array


@struct.dataclass
class DensityPotential:
    """What acts on the density; the arrays over G belong to :attr:`Basis.density_millers`.

    Attributes:
        volume: bohr^3.
        electrons: number of valence electrons.
        ewald: Ha, energy of the ions.
        vectors: [G, 3] 1/bohr.
        mask: [G], 1 for vectors of the density's sphere.
        coulomb: [G] 4 pi / G^2, 0 at G = 0.
        local: complex [G] Ha.
        core: complex [G] bohr^-3, density of the cores.
        start: complex [G] bohr^-3, sum of atomic densities.
        energies: [N, R] Ha, strength of each projector.
    """

    volume: jax.Array
    electrons: jax.Array
    ewald: jax.Array
    vectors: jax.Array
    mask: jax.Array
    coulomb: jax.Array
    local: jax.Array
    core: jax.Array
    start: jax.Array
    energies: jax.Array


def density_potential(
    basis: Basis, tables: SpeciesTables, lattice: jax.Array, frac_coords: jax.Array, species: jax.Array
) -> DensityPotential:
    """Local potentials, core and atomic densities of a crystal.

    Args:
        lattice: [3, 3] bohr.
        frac_coords: [N, 3].
        species: int [N], rows of ``tables``.
    """
    volume, reciprocal = reciprocal_cell(lattice)
    vectors = basis.density_millers @ reciprocal
    g2 = jnp.sum(vectors**2, axis=-1)
    origin = np.arange(basis.n_density) == 0  # the slowest comes first
    safe_g2 = jnp.where(origin, 1.0, g2)
    q = jnp.where(origin, 0.0, jnp.sqrt(safe_g2))
    mask = _below(basis, g2, 4 * basis.cutoff)
    valence = tables.valence[species]
    # The long-range part is that of a Gaussian charge; its finite rest at G = 0 is pi Z.
    tail = jnp.where(origin, math.pi, -4 * math.pi * jnp.exp(-safe_g2 / 4) / safe_g2)
    structure = jnp.exp(-2j * math.pi * (frac_coords @ basis.density_millers.T)) * (mask / volume)
    start = jnp.sum(interpolate(tables.density[species], q) * structure, axis=0)
    electrons = jnp.sum(valence)
    charges = ewald_matrix(basis.ewald, lattice, frac_coords)
    return DensityPotential(
        volume=volume,
        electrons=electrons,
        ewald=0.5 * valence @ charges @ valence,
        vectors=vectors,
        mask=mask,
        coulomb=jnp.where(origin, 0.0, 4 * math.pi / safe_g2) * mask,
        local=jnp.sum((interpolate(tables.local[species], q) + valence[:, None] * tail) * structure, axis=0),
        core=jnp.sum(interpolate(tables.core[species], q) * structure, axis=0),
        start=start * (electrons / volume / start[0].real),
        energies=tables.energies[species],
    )


def _plane_waves(
    basis: Basis, lattice: jax.Array, kpoint: jax.Array, millers: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Vectors k + G [P, 3] at one k-point, their squares [P], and the mask [P] of those below the cut-off."""
    vectors = (millers + kpoint) @ reciprocal_cell(lattice)[1]
    k2 = jnp.sum(vectors**2, axis=-1)
    return vectors, k2, jnp.where(valid, _below(basis, k2, basis.cutoff), 0.0)


def wave_potential(
    basis: Basis,
    tables: SpeciesTables,
    lattice: jax.Array,
    frac_coords: jax.Array,
    species: jax.Array,
    kpoint: jax.Array,
    millers: jax.Array,
    valid: jax.Array,
) -> WavePotential:
    """Kinetic energies and projectors at one k-point: ``kpoint`` [3], ``millers`` [P, 3], ``valid`` [P]."""
    vectors, k2, mask = _plane_waves(basis, lattice, kpoint, millers, valid)
    tiny = k2 < 1e-16
    q = jnp.where(tiny, 0.0, jnp.sqrt(jnp.where(tiny, 1.0, k2)))
    scale = 4 * math.pi / jnp.sqrt(reciprocal_cell(lattice)[0])
    return WavePotential(
        kinetic=0.5 * k2 * mask,
        mask=mask,
        radial=interpolate(tables.projectors[species], q) * (scale * mask),
        harmonics=real_harmonics(vectors, max(tables.channels, default=0)),
        phases=jnp.exp(-2j * math.pi * (frac_coords @ millers.T)),
    )


def atomic_orbitals(
    basis: Basis,
    tables: SpeciesTables,
    lattice: jax.Array,
    frac_coords: jax.Array,
    species: jax.Array,
    kpoint: jax.Array,
    millers: jax.Array,
    valid: jax.Array,
) -> jax.Array:
    """The orbitals <k + G | chi> of all atoms at one k-point, complex64 [N M', P], of norm 1, or 0 where there is none.

    Arguments are those of :func:`wave_potential`; M' counts all members of :attr:`SpeciesTables.orbital_channels`.
    """
    vectors, k2, mask = _plane_waves(basis, lattice, kpoint, millers, valid)
    radial_of, harmonic_of, power = _members(tables.orbital_channels)
    radial = interpolate(tables.orbitals[species], jnp.sqrt(k2).astype(jnp.float32))[:, radial_of]
    harmonics = real_harmonics(vectors, max(tables.orbital_channels, default=0))[harmonic_of] * mask
    phases = jnp.exp(-2j * math.pi * (frac_coords @ millers.T)).astype(jnp.complex64)
    angular = jnp.asarray(power, jnp.complex64)[:, None] * harmonics.astype(jnp.float32)
    functions = (phases[:, None] * (radial * angular)).reshape(-1, len(k2))
    return functions / jnp.linalg.norm(functions, axis=1, keepdims=True).clip(1e-6)


def projector_functions(waves: WavePotential, channels: tuple[int, ...]) -> jax.Array:
    """The projectors <k + G | beta>, complex [N M, P], M counting the 2 l + 1 members of each channel."""
    radial_of, harmonic_of, power = _members(channels)
    phases = jnp.asarray(power, waves.phases.dtype)[:, None] * waves.harmonics[harmonic_of]
    functions = waves.phases[:, None] * (waves.radial[:, radial_of] * phases)
    return functions.reshape(-1, functions.shape[-1])


def projector_energies(energies: jax.Array, channels: tuple[int, ...]) -> jax.Array:
    """Strengths [N M] of :func:`projector_functions` from those of the channels [N, R]."""
    return energies[:, _members(channels)[0]].reshape(-1)


def interpolate(table: jax.Array, q: jax.Array) -> jax.Array:
    """Six-point Lagrange interpolation of ``table`` [..., Q] on the uniform grid at ``q`` [n] (1/bohr): [..., n]."""
    t = q / Q_STEP
    first = jnp.clip(jnp.floor(t).astype(jnp.int32) - _STENCIL // 2 + 1, 0, table.shape[-1] - _STENCIL)
    offset = t - first - _MIDDLE
    powers = jnp.stack([jnp.ones_like(offset), *itertools.accumulate([offset] * (_STENCIL - 1), jnp.multiply)])
    weights = jnp.asarray(_LAGRANGE, powers.dtype) @ powers
    return sum(table[..., first + i] * weights[i] for i in range(_STENCIL))


def real_harmonics(vectors: jax.Array, lmax: int) -> jax.Array:
    """Orthonormal real spherical harmonics of l = 0 ... ``lmax`` <= 3 for ``vectors`` [n, 3], as [(lmax + 1)^2, n].

    At the origin those with l > 0 are 0.
    """
    r2 = jnp.sum(vectors**2, axis=-1)
    tiny = r2 < 1e-16
    unit = jnp.where(tiny[:, None], 0.0, vectors / jnp.sqrt(jnp.where(tiny, 1.0, r2))[:, None])
    x, y, z = unit.T
    away = jnp.where(tiny, 0.0, 1.0)
    rows = [jnp.full_like(x, math.sqrt(1 / (4 * math.pi)))]
    if lmax >= 1:
        c = math.sqrt(3 / (4 * math.pi))
        rows += [c * x, c * y, c * z]
    if lmax >= 2:
        c = math.sqrt(15 / (4 * math.pi))
        rows += [c * x * y, c * y * z, c * x * z, 0.5 * c * (x * x - y * y)]
        rows += [math.sqrt(5 / (16 * math.pi)) * (3 * z * z - away)]
    if lmax >= 3:
        c0, c1 = math.sqrt(7 / (16 * math.pi)), math.sqrt(21 / (32 * math.pi))
        c2, c3 = math.sqrt(105 / (16 * math.pi)), math.sqrt(35 / (32 * math.pi))
        rows += [c0 * z * (5 * z * z - 3 * away), c1 * x * (5 * z * z - away), c1 * y * (5 * z * z - away)]
        rows += [c2 * z * (x * x - y * y), 2 * c2 * x * y * z]
        rows += [c3 * x * (x * x - 3 * y * y), c3 * y * (3 * x * x - y * y)]
    return jnp.stack(rows)


def _below(basis: Basis, squares: jax.Array, cutoff: float) -> jax.Array:
    """1 where a vector of this squared length belongs to the basis, else 0."""
    if basis.fixed:
        return jnp.ones_like(squares)
    return jax.lax.stop_gradient(jnp.where(0.5 * squares <= cutoff * _SLACK, 1.0, 0.0))


def _members(channels: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each member (channel, m): its channel, its row among the harmonics, and (-i)^l."""
    members = [(r, k * k + m, (-1j) ** k) for r, k in enumerate(channels) for m in range(2 * k + 1)]
    if not members:
        return np.zeros(0, int), np.zeros(0, int), np.zeros(0, complex)
    radial_of, harmonic_of, power = zip(*members, strict=True)
    return np.array(radial_of), np.array(harmonic_of), np.array(power)
