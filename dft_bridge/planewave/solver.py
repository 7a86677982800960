"""Batches of crystals through the SCF: lanes of one compiled program, refilled as crystals are done.

All crystals of a :class:`Solver` share plane waves and k-points; elements, lattice and coordinates differ. One crystal
that fails leaves its lane like any other. Hartree units.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from crystaljax.dft_bridge.planewave import fields, scf
from crystaljax.dft_bridge.planewave.basis import Basis
from crystaljax.dft_bridge.planewave.eigensolver import Bands
from crystaljax.dft_bridge.planewave.potentials import SpeciesTables
from crystaljax.dft_bridge.planewave.scf import Effort, Energy, Guess, Prepared, Problem, ScfSettings, ScfState

_BAND_SWEEPS = 20
_REFILL_SHARE = 4


@struct.dataclass
class Solution:
    """What came out for one crystal, or for several with a leading axis.

    Attributes:
        converged: the SCF has converged.
        iterations: SCF steps.
        error: Ha, electrostatic energy of the last residual of the density.
        minus_ts, fermi_level: Ha.
        eigenvalues: [K, bands] Ha.
        numbers: [K, bands] occupations.
        extra: what the caller's ``finish`` added.
        guess: what another cell can start from, where it was asked for.
        besides: what the caller's ``besides`` added.
    """

    converged: Any
    iterations: Any
    error: Any
    minus_ts: Any
    fermi_level: Any
    eigenvalues: Any
    numbers: Any
    extra: Any
    guess: Guess | None = None
    besides: Any = None

    def guess_of(self, i: int) -> Guess:
        """What another cell of the ``i``-th crystal can start from."""
        return _take(self.guess, i)


@dataclasses.dataclass(frozen=True, eq=False)
class Solver:
    """The programs of one kind of crystal.

    Attributes:
        basis, tables: what all crystals share.
        settings: static.
        lanes: how many crystals are calculated at once.
    """

    basis: Basis
    tables: SpeciesTables
    settings: ScfSettings
    lanes: int = 1

    def solve(
        self,
        problems: Problem,
        finish: Finish | None = None,
        extra: Any = None,
        progress: Progress | None = None,
        effort: Effort | None = None,
        guesses: Sequence[Guess] | None = None,
        keep: bool = False,
        besides: Finish | None = None,
    ) -> Solution:
        """The solutions of all problems, in their order, as NumPy arrays.

        Args:
            problems: leading axis n on every array.
            finish: what to work out from a converged crystal (:func:`energies`, :func:`derivatives`, :func:`bands_at`
                ...).
            extra: an argument for ``finish`` (a pytree).
            progress: called after every step with the number of crystals done and the number of lanes at work.
            effort: of SCFs that are tried again; without it the program is that of the settings alone.
            guesses: what each crystal starts from; the superposition of its atoms without them.
            keep: whether solutions have a ``guess``.
            besides: another ``finish``, without an argument, as a program of its own, so that the rest is bit for bit
                what it would be without.
        """
        count = len(problems.species)
        lanes = min(self.lanes, 1 << (count - 1).bit_length())  # few shapes, so few programs
        width = max(1, lanes // _REFILL_SHARE)
        problems = jax.tree.map(np.asarray, problems)
        noise = scf.random_waves(self.basis, self.settings)
        occupant = np.full(lanes, -1)
        batch = _empty(self.basis, self.tables, self.settings, _take(problems, np.zeros(lanes, int)))
        solutions: dict[int, Solution] = {}
        waiting = list(range(count))[::-1]
        while True:
            done = np.asarray(batch.state.done)
            ready = np.flatnonzero(done & (occupant >= 0))
            idle = np.flatnonzero(done)
            last = len(idle) == lanes or not waiting
            if len(ready) >= width or (last and len(ready)):
                for rows in _chunks(ready, width):
                    padded = _padded(rows, width)
                    found = _finish(self.basis, self.tables, self.settings, finish, batch, padded, extra)
                    if keep:
                        found = found.replace(guess=_kept(batch, padded))
                    if besides is not None:
                        more = _apply(self.basis, self.tables, self.settings, besides, batch, padded)
                        found = found.replace(besides=more)
                    found = jax.device_get(found)
                    for i, lane in enumerate(rows):
                        solutions[int(occupant[lane])] = _take(found, i)
                        occupant[lane] = -1
            free = np.flatnonzero(done & (occupant < 0))
            if waiting and len(free) >= min(width, len(waiting)):
                for rows in _chunks(free[: len(waiting)], width):
                    for lane in rows:
                        occupant[lane] = waiting.pop()
                    rows = _padded(rows, width)
                    chosen = _take(problems, occupant[rows])
                    if guesses is None:
                        guess = _guess(self.basis, self.tables, self.settings, chosen, noise)
                    else:
                        guess = jax.tree.map(lambda *parts: np.stack(parts), *(guesses[i] for i in occupant[rows]))
                    batch = _fill(self.basis, self.tables, self.settings, batch, rows, chosen, guess)
            if progress is not None:
                progress(len(solutions), int((occupant >= 0).sum()))
            if (occupant < 0).all():
                break
            batch = _step(self.basis, self.tables, self.settings, batch, effort)
        return jax.tree.map(lambda *rows: np.stack(rows), *(solutions[i] for i in range(count)))


Finish = Callable[[Basis, SpeciesTables, ScfSettings, "Lane", Any], Any]
"""``finish(basis, tables, settings, lane, extra)`` for one crystal: any pytree of arrays."""
Progress = Callable[[int, int], None]


@struct.dataclass
class Lane:
    """A crystal at work: its problem, potentials and state."""

    problem: Problem
    prepared: Prepared
    state: ScfState


def energies(basis: Basis, tables: SpeciesTables, settings: ScfSettings, lane: Lane, extra: None) -> Energy:
    """The parts of the total energy (a ``finish``)."""
    del extra
    state = lane.state
    waves = scf.final_waves(state.waves)
    return scf.total_energy(basis, tables, settings, lane.problem, waves, state.numbers, state.minus_ts)


@struct.dataclass
class Derivatives:
    """Free energy (Ha), forces [N, 3] (Ha/bohr) and stress [3, 3] (Ha/bohr^3, negative under compression)."""

    free: jax.Array
    forces: jax.Array
    stress: jax.Array


def derivatives(basis: Basis, tables: SpeciesTables, settings: ScfSettings, lane: Lane, extra: None) -> Derivatives:
    """Energy, forces and stress of a converged crystal, by automatic differentiation (a ``finish``).

    With k-points reduced by symmetry they still must be symmetrised: see :func:`.relaxation.symmetrise`.
    """
    del extra
    problem, state = lane.problem, lane.state
    waves = scf.final_waves(state.waves)

    def energy(strain: jax.Array, frac_coords: jax.Array) -> jax.Array:
        lattice = problem.lattice @ (jnp.eye(3) + 0.5 * (strain + strain.T))
        moved = Problem(lattice, frac_coords, problem.species)
        return scf.total_energy(basis, tables, settings, moved, waves, state.numbers, state.minus_ts).free

    free, (by_strain, by_coords) = jax.value_and_grad(energy, argnums=(0, 1))(jnp.zeros((3, 3)), problem.frac_coords)
    volume = jnp.abs(jnp.linalg.det(problem.lattice))
    return Derivatives(free, -by_coords @ jnp.linalg.inv(problem.lattice).T, by_strain / volume)


@struct.dataclass
class Compression:
    """What the pressure of a crystal follows from.

    Attributes:
        slope: Ha, derivative of the free energy by the logarithm of the volume, plane waves held.
        shells: [2] Ha, kinetic energy in plane waves of 0.8 to 0.9 and of 0.9 to 1 times the cut-off.
    """

    slope: jax.Array
    shells: jax.Array


SHELLS = (0.8, 0.9, 1.0)
"""Bounds of :attr:`Compression.shells`, in units of the cut-off."""


def compression(
    basis: Basis, tables: SpeciesTables, settings: ScfSettings, lane: Lane, extra: None = None
) -> Compression:
    """How the energy of a converged crystal answers to its volume and to its cut-off (a ``finish``)."""
    del extra
    problem, state = lane.problem, lane.state
    waves = scf.final_waves(state.waves)

    slope = scf.volume_slope(basis, tables, settings, problem, lane.prepared.density, waves, state.numbers)
    kinetic = lane.prepared.waves.kinetic
    density = jnp.einsum("k,kb,kbp->kp", basis.weights, state.numbers, waves.real**2 + waves.imag**2) * kinetic
    reach = kinetic / basis.cutoff
    inside = [(reach > low) & (reach <= high) for low, high in zip(SHELLS, (*SHELLS[1:-1], jnp.inf), strict=False)]
    return Compression(slope, jnp.stack([jnp.sum(jnp.where(shell, density, 0.0)) for shell in inside]))


@struct.dataclass
class ExtraPoints:
    """K-points outside the mesh, and where their plane waves are in the mesh: :func:`.basis.nearest_waves`.

    Points without any plane wave are only there for the shape of the arrays.
    """

    basis: Basis
    nearest: jax.Array
    waves: jax.Array

    @property
    def used(self) -> np.ndarray:
        """bool [K'], the points that are calculated."""
        return np.asarray(self.basis.valid).any(axis=1)


@struct.dataclass
class ExtraBands:
    """Eigenvalues [K', bands] (Ha) at k-points outside the mesh, 0 at points without plane waves; the largest residual
    (Ha) of those that matter; and the free energy (Ha) of the crystal, if it was asked for.
    """

    eigenvalues: jax.Array
    residual: jax.Array
    free: jax.Array | None = None


def bands_at(basis: Basis, tables: SpeciesTables, settings: ScfSettings, lane: Lane, extra: ExtraPoints) -> ExtraBands:
    """Bands in the converged density at other k-points, from the waves at the nearest point of the mesh."""
    points = extra.basis
    density = lane.prepared.density
    potential = fields.effective_potential(points, settings.functional, density, lane.state.density)
    prepared = scf.prepare(points, tables, settings, lane.problem).replace(density=density)
    # The first empty band must be right too, and those above it keep it from being missed.
    wanted = jnp.arange(settings.bands) <= jnp.round(density.electrons / 2)

    def worst(bands: Bands) -> jax.Array:
        return jnp.max(jnp.where(wanted, bands.residuals, 0.0))

    def converge(improve: Callable[[jax.Array], Bands], waves: jax.Array) -> Bands:
        # A point without plane waves has nothing to converge.
        unknown = jnp.where(jnp.any(waves != 0), jnp.full(waves.shape[:1], jnp.inf, settings.real_type), 0.0)
        return jax.lax.while_loop(
            lambda carry: (carry[0] < _BAND_SWEEPS) & (worst(carry[1]) > settings.band_tolerance),
            lambda carry: (carry[0] + 1, improve(carry[1].waves)),
            (0, Bands(unknown, waves, unknown)),
        )[1]

    start = jax.vmap(lambda k, columns: jnp.pad(lane.state.waves[k], ((0, 0), (0, 1)))[:, columns])
    waves = start(extra.nearest, extra.waves) * prepared.waves.mask[:, None].astype(settings.real_type)
    bands = scf.solve_bands(points, tables, settings, prepared, potential, waves, converge)
    return ExtraBands(bands.eigenvalues.astype(density.volume.dtype), worst(bands).astype(density.volume.dtype))


def bands_and_energy(
    basis: Basis, tables: SpeciesTables, settings: ScfSettings, lane: Lane, extra: ExtraPoints
) -> ExtraBands:
    """:func:`bands_at` and the free energy of the same SCF; takes a second longer to compile."""
    free = energies(basis, tables, settings, lane, None).free
    return bands_at(basis, tables, settings, lane, extra).replace(free=free)


class Program:
    """A function that JAX compiles, for a CPU with :func:`quick_options`.

    Args:
        function: pure.
        settings: of :func:`jax.jit`.
    """

    def __init__(self, function: Callable[..., Any], **settings: Any):
        functools.update_wrapper(self, function)
        self._settings = settings

    @functools.cached_property
    def jitted(self) -> Any:
        """The function under :func:`jax.jit`; made when it is needed, since it asks for the device."""
        return jax.jit(self.__wrapped__, compiler_options=quick_options(), **self._settings)

    def __call__(self, *arguments: Any) -> Any:
        return self.jitted(*arguments)


@functools.cache
def quick_options() -> dict[str, bool] | None:
    """XLA's options for a CPU: its older emitters compile our programs in 0.6 of the time, and they run as fast.

    ``None`` for other devices, and for a version of XLA that does not have them.
    """
    if jax.default_backend() != "cpu":
        return None
    options = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(jnp.negative, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options


@functools.partial(Program, static_argnums=2)
def _empty(basis: Basis, tables: SpeciesTables, settings: ScfSettings, problems: Problem) -> Lane:
    """Lanes with nothing to do."""

    def lane(problem: Problem) -> Lane:
        waves = jnp.zeros((basis.n_kpoints, settings.bands, basis.n_waves), settings.complex_type)
        deformation = jnp.zeros(basis.n_density, jnp.complex128)
        return _lane(basis, tables, settings, problem, Guess(waves, deformation, jnp.zeros((), int), jnp.ones(())))

    shapes = jax.eval_shape(jax.vmap(lane), problems)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return zeros.replace(state=zeros.state.replace(failed=jnp.ones_like(zeros.state.failed)))


@functools.partial(Program, static_argnums=2)
def _guess(basis: Basis, tables: SpeciesTables, settings: ScfSettings, problems: Problem, noise: jax.Array) -> Guess:
    return jax.vmap(lambda problem: scf.atomic_guess(basis, tables, settings, problem, noise))(problems)


@functools.partial(Program, static_argnums=2, donate_argnums=3)
def _fill(
    basis: Basis,
    tables: SpeciesTables,
    settings: ScfSettings,
    batch: Lane,
    rows: jax.Array,
    problems: Problem,
    guesses: Guess,
) -> Lane:
    """The batch with new problems in the lanes ``rows``."""
    new = jax.vmap(lambda *one: _lane(basis, tables, settings, *one))(problems, guesses)
    return jax.tree.map(lambda old, new: old.at[rows].set(new), batch, new)


def _lane(basis: Basis, tables: SpeciesTables, settings: ScfSettings, problem: Problem, guess: Guess) -> Lane:
    prepared = scf.prepare(basis, tables, settings, problem)
    return Lane(problem, prepared, scf.start(basis, settings, prepared, guess))


@functools.partial(Program, static_argnums=2, donate_argnums=3)
def _step(basis: Basis, tables: SpeciesTables, settings: ScfSettings, batch: Lane, effort: Effort | None) -> Lane:
    def lane(prepared: Prepared, state: ScfState) -> ScfState:
        return scf.step(basis, tables, settings, prepared, state, effort)

    return batch.replace(state=jax.vmap(lane)(batch.prepared, batch.state))


@functools.partial(Program, static_argnums=(2, 3))
def _finish(
    basis: Basis,
    tables: SpeciesTables,
    settings: ScfSettings,
    finish: Finish | None,
    batch: Lane,
    rows: jax.Array,
    extra: Any,
) -> Solution:
    def one(lane: Lane) -> Solution:
        state = lane.state
        return Solution(
            converged=state.converged,
            iterations=state.iteration,
            error=state.error,
            minus_ts=state.minus_ts,
            fermi_level=state.fermi_level,
            eigenvalues=state.eigenvalues,
            numbers=state.numbers,
            extra=None if finish is None else finish(basis, tables, settings, lane, extra),
        )

    return jax.vmap(one)(jax.tree.map(lambda x: x[rows], batch))


@Program
def _kept(batch: Lane, rows: jax.Array) -> Guess:
    return jax.vmap(lambda lane: scf.kept(lane.prepared, lane.state))(jax.tree.map(lambda x: x[rows], batch))


@functools.partial(Program, static_argnums=(2, 3))
def _apply(
    basis: Basis, tables: SpeciesTables, settings: ScfSettings, finish: Finish, batch: Lane, rows: jax.Array
) -> Any:
    lanes = jax.tree.map(lambda x: x[rows], batch)
    return jax.vmap(lambda lane: finish(basis, tables, settings, lane, None))(lanes)


def _take(tree: Any, rows: Any) -> Any:
    return jax.tree.map(lambda x: x[rows], tree)


def _chunks(rows: np.ndarray, width: int) -> Iterable[np.ndarray]:
    return (rows[i : i + width] for i in range(0, len(rows), width))


def _padded(rows: np.ndarray, width: int) -> np.ndarray:
    """``rows`` made up to ``width`` by repeating the last."""
    return np.concatenate([rows, np.repeat(rows[-1:], width - len(rows))])
