"""The self-consistent field of one crystal as a pure step ``state -> state``; batches come from ``vmap``.

A step improves the bands at every k-point in the potential of the input density, fills them, and mixes the density
they make with the earlier ones. Wave functions and H are in single or double precision, density, potential, Fermi
level and energies always in double. Hartree units.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from crystaljax.dft_bridge.planewave import fields
from crystaljax.dft_bridge.planewave.basis import Basis
from crystaljax.dft_bridge.planewave.eigensolver import Bands, davidson, hueckel, orthonormalise
from crystaljax.dft_bridge.planewave.hamiltonian import Hamiltonian, band_density, hamiltonian
from crystaljax.dft_bridge.planewave.mixing import History, anderson
from crystaljax.dft_bridge.planewave.occupations import occupy
from crystaljax.dft_bridge.planewave.potentials import (
    DensityPotential,
    SpeciesTables,
    WavePotential,
    atomic_orbitals,
    density_potential,
    projector_energies,
    projector_functions,
    wave_potential,
)

_HOPELESS = 1e-3  # Ha per atom
_NOISE = 0.05  # as pw.x has it
_KEPT_SHARE = 0.1
_TIGHTEST = 1e-9
"""Ha per atom: such a residual is small enough whatever the SCF started from."""


@dataclasses.dataclass(frozen=True)
class ScfSettings:
    """What a program is compiled for, besides its basis.

    Attributes:
        bands: how many bands are calculated at each k-point.
        functional: ``PBE`` or ``LDA``.
        width: Ha, Gaussian smearing; 0 for fixed occupations.
        tolerance: Ha per atom, electrostatic energy of the density's residual below which the SCF has converged.
        band_tolerance: Ha, residual of the bands at special points; their error is about its square over the distance
            to the next band.
        max_iterations: SCF steps before a crystal is given up.
        mixing: share of the residual that is mixed in.
        history: how many densities are mixed.
        expansions: blocks by which the Davidson space grows in an SCF step.
        warm_up: first steps of an SCF that starts from random waves, in which the density stays that of the atoms.
        patience: steps after which an SCF struggles that is far from its end: from then on its smearing is annealed,
            see :func:`.occupations.annealed`, and ``damped`` takes the place of ``mixing``.
        damped: share of the residual that is mixed in by an SCF that struggles.
        double: wave functions in double precision.
        bands_per_fft: see :class:`Hamiltonian`.
    """

    bands: int
    functional: str = "PBE"
    width: float = 0.0
    tolerance: float = 1e-8
    band_tolerance: float = 1e-3
    max_iterations: int = 60
    mixing: float = 0.4
    history: int = 7
    expansions: int = 2
    warm_up: int = 3
    patience: int = 15
    damped: float = 0.15
    double: bool = False
    bands_per_fft: int = 1

    @property
    def complex_type(self) -> jnp.dtype:
        """Of wave functions."""
        return jnp.dtype("complex128" if self.double else "complex64")

    @property
    def real_type(self) -> jnp.dtype:
        """Of what acts on wave functions."""
        return jnp.dtype("float64" if self.double else "float32")


@struct.dataclass
class Effort:
    """How hard an SCF is tried again that did not converge; traced, so that all efforts share a program.

    Attributes:
        mixing: share of the residual that is mixed in, in place of ``mixing`` and ``damped`` of the settings.
        max_iterations: int, in place of that of the settings.
        sweeps: int, Davidson calls at each k-point in an SCF step.
    """

    mixing: jax.Array
    max_iterations: jax.Array
    sweeps: jax.Array


@struct.dataclass
class Problem:
    """One crystal, or a batch with a leading axis.

    Attributes:
        lattice: [3, 3] bohr.
        frac_coords: [N, 3].
        species: int [N], rows of the species tables.
    """

    lattice: jax.Array
    frac_coords: jax.Array
    species: jax.Array


@struct.dataclass
class Prepared:
    """A problem's potentials: on the density, and on the waves of all k-points in the precision of H."""

    density: DensityPotential
    waves: WavePotential


@struct.dataclass
class ScfState:
    """Where the SCF of a crystal stands.

    Attributes:
        iteration: SCF steps done, those of the warm-up counted.
        warm_up: first steps, in which the density stays as it is.
        tolerance: Ha per atom, for the error.
        density: complex [G] bohr^-3, the next input.
        history: of mixing.
        waves: complex [K, bands, P].
        eigenvalues: [K, bands] Ha.
        residuals: [K, bands] Ha.
        numbers: [K, bands], occupations.
        fermi_level, minus_ts: Ha.
        error: Ha, electrostatic energy of the last residual.
        best_error: Ha, the smallest since the SCF was found to struggle; infinite before.
        converged: the error is below the tolerance.
        failed: a number is not finite, or the steps are used up.
    """

    iteration: jax.Array
    warm_up: jax.Array
    tolerance: jax.Array
    density: jax.Array
    history: History
    waves: jax.Array
    eigenvalues: jax.Array
    residuals: jax.Array
    numbers: jax.Array
    fermi_level: jax.Array
    minus_ts: jax.Array
    error: jax.Array
    best_error: jax.Array
    converged: jax.Array
    failed: jax.Array

    @property
    def done(self) -> jax.Array:
        """Nothing more will change."""
        return self.converged | self.failed


@struct.dataclass
class Guess:
    """What an SCF starts from.

    Attributes:
        waves: complex [K, bands, P], linearly independent.
        deformation: complex [G] electrons, the density without that of the atoms, times the volume.
        warm_up: int, first steps, in which the density stays as it is.
        share: of the tolerance of the settings, below which the SCF has converged.
    """

    waves: jax.Array
    deformation: jax.Array
    warm_up: jax.Array
    share: jax.Array


class Energy(NamedTuple):
    """Attributes:
    free: Ha, total energy E - T S: what pw.x prints.
    minus_ts: Ha.
    kinetic, nonlocal_part, density_part: Ha, the parts of E.
    """

    free: jax.Array
    minus_ts: jax.Array
    kinetic: jax.Array
    nonlocal_part: jax.Array
    density_part: jax.Array


def prepare(basis: Basis, tables: SpeciesTables, settings: ScfSettings, problem: Problem) -> Prepared:
    """The potentials of a crystal, interpolated in double precision."""

    def at(kpoint: tuple[jax.Array, jax.Array, jax.Array]) -> WavePotential:
        waves = wave_potential(basis, tables, problem.lattice, problem.frac_coords, problem.species, *kpoint)
        return _cast(waves, settings)

    return Prepared(
        density_potential(basis, tables, problem.lattice, problem.frac_coords, problem.species),
        jax.lax.map(at, (basis.kpoints, basis.millers, basis.valid)),
    )


def random_waves(basis: Basis, settings: ScfSettings, seed: int = 0) -> jax.Array:
    """Smooth random waves to start from, complex [K, bands, P], the same for the same basis and seed."""
    rng = np.random.default_rng(seed)
    shape = (basis.n_kpoints, settings.bands, basis.n_waves)
    waves = (rng.normal(size=shape) + 1j * rng.normal(size=shape)) * np.asarray(basis.start_damping)[:, None]
    waves /= np.linalg.norm(waves, axis=-1, keepdims=True)
    return jnp.asarray(waves, settings.complex_type)


def atomic_guess(
    basis: Basis, tables: SpeciesTables, settings: ScfSettings, problem: Problem, noise: jax.Array
) -> Guess:
    """The superposition of atoms: their density, and their orbitals as far as there are bands, then random waves.

    Args:
        noise: complex [K, bands, P], of :func:`random_waves`. A little of it goes to each orbital: else bands of a
            symmetry that no orbital has would be missed, and orbitals of atoms that are close linearly dependent.
    """
    members = 2 * np.array(tables.orbital_channels, int) + 1
    holds = 2 * (tables.orbital_energies < 0) @ members  # [E] electrons
    energies = jnp.repeat(tables.orbital_energies[problem.species], members, axis=1, total_repeat_length=members.sum())
    energies = energies.reshape(-1).astype(settings.real_type)
    more = max(settings.bands - len(energies), 0)
    share = jnp.where(jnp.arange(settings.bands) < jnp.sum(energies < 0), _NOISE, 1.0).astype(settings.real_type)

    def at(kpoint: tuple[jax.Array, ...]) -> jax.Array:
        here, millers, valid, random = kpoint
        atoms = problem.lattice, problem.frac_coords, problem.species
        orbitals = atomic_orbitals(basis, tables, *atoms, here, millers, valid).astype(settings.complex_type)
        combined = hueckel(orbitals, energies)[: settings.bands] @ orbitals
        return jnp.pad(combined, ((0, more), (0, 0))) + share[:, None] * random

    waves = jax.lax.map(at, (basis.kpoints, basis.millers, basis.valid, noise))
    nothing = jnp.zeros(basis.n_density, jnp.complex128)
    warm_up = jnp.where(jnp.all((holds >= tables.valence)[problem.species]), 0, settings.warm_up)
    return Guess(waves, nothing, warm_up, jnp.ones(()))


def kept(prepared: Prepared, state: ScfState) -> Guess:
    """What another cell of the crystal can start from.

    Steps are fewer then, and the waves less converged where the density is: the residual must become smaller.
    """
    deformation = (state.density - prepared.density.start) * prepared.density.volume
    return Guess(state.waves, deformation, jnp.zeros((), jnp.int32), jnp.asarray(_KEPT_SHARE))


def start(basis: Basis, settings: ScfSettings, prepared: Prepared, guess: Guess) -> ScfState:
    """The state before the first step."""
    bands = jnp.zeros((basis.n_kpoints, settings.bands))
    density = prepared.density.start + guess.deformation * (prepared.density.mask / prepared.density.volume)
    zero = jnp.zeros(())
    return ScfState(
        iteration=jnp.zeros((), jnp.int32),
        warm_up=jnp.asarray(guess.warm_up, jnp.int32),
        tolerance=jnp.maximum(settings.tolerance * guess.share, min(settings.tolerance, _TIGHTEST)),
        density=density,
        history=History.empty(settings.history, basis.n_density, density.dtype),
        waves=guess.waves * prepared.waves.mask[:, None].astype(settings.real_type),
        eigenvalues=bands,
        residuals=bands,
        numbers=bands,
        fermi_level=zero,
        minus_ts=zero,
        error=zero + jnp.inf,
        best_error=zero + jnp.inf,
        converged=jnp.zeros((), bool),
        failed=jnp.zeros((), bool),
    )


def step(
    basis: Basis,
    tables: SpeciesTables,
    settings: ScfSettings,
    prepared: Prepared,
    state: ScfState,
    effort: Effort | None = None,
) -> ScfState:
    """One SCF step, with more ``effort`` if it is given; a state that is done stays as it is."""
    potential = fields.effective_potential(basis, settings.functional, prepared.density, state.density)
    repeat = once if effort is None else functools.partial(_sweep, effort.sweeps)
    bands = solve_bands(basis, tables, settings, prepared, potential, state.waves, repeat)
    eigenvalues = bands.eigenvalues.astype(potential.dtype)
    atoms = prepared.density.energies.shape[0]
    electrons = prepared.density.electrons
    hopeless = (state.iteration >= settings.patience) & (state.error > _HOPELESS * atoms)
    struggling = hopeless | jnp.isfinite(state.best_error)
    width_error = jnp.where(struggling, state.best_error / atoms, 0.0)
    filled = occupy(eigenvalues, basis.weights, electrons, settings.width, width_error)
    output = density_of(basis, settings, prepared.density.volume, bands.waves, filled.numbers)
    output = output * (prepared.density.mask * electrons / prepared.density.volume / output[0].real)
    residual = output - state.density
    norm = fields.hartree_norm(basis, prepared.density)
    error = jnp.sum(norm * (residual.real**2 + residual.imag**2))
    share = jnp.where(struggling, settings.damped, settings.mixing) if effort is None else effort.mixing
    mixed, history = anderson(state.history, state.density, residual, norm, share)

    most = settings.max_iterations if effort is None else effort.max_iterations
    warming = state.iteration < state.warm_up
    iteration = state.iteration + 1
    sound = jnp.isfinite(error) & jnp.all(jnp.isfinite(eigenvalues))
    converged = ~warming & sound & (error < state.tolerance * atoms)
    new = ScfState(
        iteration=iteration,
        warm_up=state.warm_up,
        tolerance=state.tolerance,
        density=jnp.where(warming, state.density, mixed),
        history=jax.tree.map(lambda old, new: jnp.where(warming, old, new), state.history, history),
        waves=bands.waves,
        eigenvalues=eigenvalues,
        residuals=bands.residuals.astype(potential.dtype),
        numbers=filled.numbers,
        fermi_level=filled.fermi_level,
        minus_ts=filled.minus_ts,
        error=error,
        best_error=jnp.where(struggling, jnp.minimum(state.best_error, error), jnp.inf),
        converged=converged,
        failed=~sound | (~converged & (iteration >= most)),
    )
    return jax.tree.map(lambda old, new: jnp.where(state.done, old, new), state, new)


Repeat = Callable[[Callable[[jax.Array], Bands], jax.Array], Bands]
"""Given one Davidson call on waves [bands, P], and waves: calls it as often as is needed."""


def once(improve: Callable[[jax.Array], Bands], waves: jax.Array) -> Bands:
    """A single call (a :data:`Repeat`)."""
    return improve(waves)


def _sweep(sweeps: jax.Array, improve: Callable[[jax.Array], Bands], waves: jax.Array) -> Bands:
    """So many calls, each on the waves of the last (a :data:`Repeat`)."""
    unknown = jnp.zeros(waves.shape[:1], waves.real.dtype)
    return jax.lax.fori_loop(0, sweeps, lambda _, bands: improve(bands.waves), Bands(unknown, waves, unknown))


def solve_bands(
    basis: Basis,
    tables: SpeciesTables,
    settings: ScfSettings,
    prepared: Prepared,
    potential: jax.Array,
    waves: jax.Array,
    repeat: Repeat = once,
) -> Bands:
    """Bands at every k-point in a potential on the wave box; :class:`Bands` with a leading axis [K].

    Args:
        waves: complex [K, bands, P] to start from.
    """
    strengths = projector_energies(prepared.density.energies, tables.channels)

    def at(kpoint: tuple[WavePotential, jax.Array, jax.Array, jax.Array]) -> Bands:
        acting, to_box, from_box, old = kpoint
        h: Hamiltonian = hamiltonian(
            basis, acting, tables.channels, strengths, potential, to_box, from_box, settings.bands_per_fft
        )
        return repeat(lambda waves: davidson(h, h.kinetic, waves, settings.expansions), old)

    return jax.lax.map(at, (prepared.waves, basis.to_wave_box, basis.from_wave_box, waves))


def density_of(
    basis: Basis, settings: ScfSettings, volume: jax.Array, waves: jax.Array, numbers: jax.Array
) -> jax.Array:
    """Density [G] (bohr^-3) of waves [K, bands, P] with occupations [K, bands], symmetrised."""

    def add(total: jax.Array, kpoint: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        to_box, weight, bands, occupations = kpoint
        return total + weight * band_density(basis, to_box, bands, occupations, settings.bands_per_fft), None

    zeros = jnp.zeros(basis.box, numbers.dtype)
    points, _ = jax.lax.scan(jax.checkpoint(add), zeros, (basis.to_box, basis.weights, waves, numbers))
    return fields.symmetrise(basis, fields.to_coefficients(basis, points / volume))


def total_energy(
    basis: Basis,
    tables: SpeciesTables,
    settings: ScfSettings,
    problem: Problem,
    waves: jax.Array,
    numbers: jax.Array,
    minus_ts: jax.Array,
) -> Energy:
    """The Kohn-Sham energy of given waves and occupations, in double precision throughout.

    At self-consistency its derivatives with respect to lattice and coordinates, waves and occupations held fixed,
    are stress and forces (Hellmann and Feynman; Nielsen and Martin, Phys. Rev. B 32, 3780 (1985)).
    """
    acting = density_potential(basis, tables, problem.lattice, problem.frac_coords, problem.species)
    strengths = projector_energies(acting.energies, tables.channels)

    def add(total: tuple[jax.Array, jax.Array], kpoint: tuple[jax.Array, ...]) -> tuple[tuple, None]:
        at, millers, valid, weight, bands, occupations = kpoint
        here = wave_potential(basis, tables, problem.lattice, problem.frac_coords, problem.species, at, millers, valid)
        kinetic = jnp.sum(here.kinetic * (bands.real**2 + bands.imag**2), axis=1)
        overlaps = bands @ projector_functions(here, tables.channels).conj().T
        nonlocal_part = (overlaps.real**2 + overlaps.imag**2) @ strengths
        return (
            total[0] + weight * jnp.sum(occupations * kinetic),
            total[1] + weight * jnp.sum(occupations * nonlocal_part),
        ), None

    zero = jnp.zeros((), numbers.dtype)
    kpoints = (basis.kpoints, basis.millers, basis.valid, basis.weights, waves, numbers)
    (kinetic, nonlocal_part), _ = jax.lax.scan(jax.checkpoint(add), (zero, zero), kpoints)
    density = density_of(basis, settings, acting.volume, waves, numbers)
    density_part = fields.density_energy(basis, settings.functional, acting, density)
    return Energy(kinetic + nonlocal_part + density_part + minus_ts, minus_ts, kinetic, nonlocal_part, density_part)


def volume_slope(
    basis: Basis,
    tables: SpeciesTables,
    settings: ScfSettings,
    problem: Problem,
    acting: DensityPotential,
    waves: jax.Array,
    numbers: jax.Array,
) -> jax.Array:
    """Derivative (Ha) of :func:`total_energy` by the logarithm of the volume, for the same waves and occupations.

    What goes with a power of the volume is written down: densities with -1, kinetic energies with -2/3, energies of
    charges with -1/3. The rest is differentiated, so that the program is a small one. Nielsen and Martin (1985).

    Args:
        acting: of ``problem``.
    """

    def scaled(strain: jax.Array) -> Problem:
        return problem.replace(lattice=problem.lattice * jnp.exp(strain / 3))

    def slope_of(function: Callable[[jax.Array], Any]) -> tuple[Any, Any]:
        """A function of the strain and its derivative, where there is none; what is not used is not compiled."""
        return jax.jvp(function, (jnp.zeros(()),), (jnp.ones(()),))

    strengths = projector_energies(acting.energies, tables.channels)

    def add(total: jax.Array, kpoint: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        at, millers, valid, weight, bands, occupations = kpoint

        def potential(strain: jax.Array) -> WavePotential:
            return wave_potential(basis, tables, *_arrays(scaled(strain)), at, millers, valid)

        here, change = slope_of(potential)
        kinetic = -2 / 3 * jnp.sum(here.kinetic * (bands.real**2 + bands.imag**2), axis=1)
        overlaps = bands @ projector_functions(here, tables.channels).conj().T
        changes = bands @ projector_functions(here.replace(radial=change.radial), tables.channels).conj().T
        nonlocal_part = 2 * (overlaps.real * changes.real + overlaps.imag * changes.imag) @ strengths
        return total + weight * jnp.sum(occupations * (kinetic + nonlocal_part)), None

    kpoints = (basis.kpoints, basis.millers, basis.valid, basis.weights, waves, numbers)
    bands_part, _ = jax.lax.scan(add, jnp.zeros((), numbers.dtype), kpoints)
    density = density_of(basis, settings, acting.volume, waves, numbers)
    _, change = slope_of(lambda strain: density_potential(basis, tables, *_arrays(scaled(strain))))
    return bands_part + fields.density_slope(basis, settings.functional, acting, density, change.local, change.core)


def _arrays(problem: Problem) -> tuple[jax.Array, jax.Array, jax.Array]:
    return problem.lattice, problem.frac_coords, problem.species


def final_waves(waves: jax.Array) -> jax.Array:
    """Waves [K, bands, P] made orthonormal in double precision: energies are exact to second order in their error."""
    return jax.lax.map(orthonormalise, waves)


def _cast(waves: WavePotential, settings: ScfSettings) -> WavePotential:
    """In the precision of H."""
    kind = {"c": settings.complex_type, "f": settings.real_type}
    return jax.tree.map(lambda x: x.astype(kind[x.dtype.kind]), waves)
