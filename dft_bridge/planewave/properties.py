"""Band gaps, equations of state and relaxed cells of crystals of one kind; eV, Å, GPa at this face."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ase.units import Bohr, GPa, Hartree

from crystaljax.dft_bridge.ladder import Climb
from crystaljax.dft_bridge.planewave import recovery
from crystaljax.dft_bridge.planewave.kinds import Kind, Workbench
from crystaljax.dft_bridge.planewave.relaxation import Relaxation, symmetrise
from crystaljax.dft_bridge.planewave.rungs import FOOT, ScfRung
from crystaljax.dft_bridge.planewave.scf import Guess
from crystaljax.dft_bridge.planewave.solver import (
    SHELLS,
    Progress,
    Solution,
    bands_and_energy,
    bands_at,
    compression,
    derivatives,
    energies,
)

PRESSURE_UNIT = Hartree / Bohr**3 / GPa
"""GPa per Ha/bohr^3."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What every calculation tells.

    Attributes:
        converged: whether the numbers mean anything.
        iterations: SCF steps, of all SCFs together; those of failed attempts are not counted.
        energy: eV per cell (of the last SCF), free energy E - T S; NaN where it was not asked for.
        fermi_level: eV.
        climb: on which rung the numbers stand, and the attempts that failed before.
    """

    converged: bool
    iterations: int
    energy: float
    fermi_level: float
    climb: Climb[ScfRung]

    @staticmethod
    def facts(solution: Solution, i: int, climb: Climb[ScfRung], energies: np.ndarray | None = None) -> dict[str, Any]:
        """The fields of this class for the ``i``-th crystal; ``energies`` [n] in Ha."""
        return {
            "climb": climb,
            "converged": bool(solution.converged[i]),
            "iterations": int(solution.iterations[i]),
            "energy": math.nan if energies is None else float(energies[i]) * Hartree,
            "fermi_level": float(solution.fermi_level[i]) * Hartree,
        }


@dataclasses.dataclass(frozen=True)
class BandEdges(Outcome):
    """Attributes:
    homo, lumo: eV, bands counted from the valence electrons.
    direct: eV, the smallest gap at one k-point.
    residual: eV, the largest residual of the bands at the special points; 0 without them.
    pressure: GPa, at a constant cut-off; positive where the cell wants to expand.
    pulay_pressure: GPa, the part of it that plane waves add which come in as the cell grows.
    """

    homo: float
    lumo: float
    direct: float
    residual: float
    pressure: float
    pulay_pressure: float


@dataclasses.dataclass(frozen=True)
class Volumes(Outcome):
    """Attributes:
    volume: Å^3, of the given cell.
    scales: [V], the volumes, in that unit.
    energies: [V] eV per cell.
    """

    volume: float
    scales: list[float]
    energies: np.ndarray

    @property
    def volumes(self) -> np.ndarray:
        """[V] Å^3."""
        return self.volume * np.array(self.scales)


@dataclasses.dataclass(frozen=True)
class RelaxedCell(Outcome):
    """Attributes:
    lattice: [3, 3] Å.
    frac_coords: [N, 3].
    pressure: GPa, of the last cell that was calculated.
    steps: ionic steps taken.
    relaxed: forces and stress are below their bounds.
    """

    lattice: np.ndarray
    frac_coords: np.ndarray
    pressure: float
    steps: int
    relaxed: bool


def band_edges(
    bench: Workbench,
    kind: Kind,
    symbols: Sequence[Sequence[str]],
    special: bool,
    energy: bool = False,
    progress: Progress | None = None,
    rungs: Sequence[ScfRung] = (FOOT,),
) -> list[BandEdges]:
    """Band edges over the mesh and, with ``special``, the special points: Gamma and the zone boundary.

    The energy of the same SCF costs programs that take longer to compile, so it must be asked for.
    """
    solver = bench.solver(kind)
    problems = bench.problems(kind, symbols)
    finish, extra = energies if energy else None, None
    if special:
        finish, extra = bands_and_energy if energy else bands_at, bench.special(kind)
    climbs = [Climb(rungs) for _ in symbols]
    found = recovery.solve(solver, problems, climbs, "band_gap", finish, extra, progress, besides=compression)
    edges = []
    for i, crystal in enumerate(symbols):
        bands, residual = found.eigenvalues[i], 0.0
        if special:
            bands = np.concatenate([bands, found.extra.eigenvalues[i][extra.used]])
            residual = float(found.extra.residual[i]) * Hartree
        occupied = sum(bench.pseudopotentials.valence(s) for s in crystal) // 2
        below, above = bands[:, occupied - 1] * Hartree, bands[:, occupied] * Hartree
        edges.append(
            BandEdges(
                **Outcome.facts(found, i, climbs[i], found.extra.free if energy else None),
                homo=float(below.max()),
                lumo=float(above.min()),
                direct=float((above - below).min()),
                residual=residual,
                **_pressures(kind, found.besides.slope[i], found.besides.shells[i]),
            )
        )
    return edges


def _pressures(kind: Kind, slope: float, shells: np.ndarray) -> dict[str, float]:
    """Pressure and Pulay pressure in GPa, from a :class:`.solver.Compression`.

    With the plane waves held, a growing cell loses cut-off as V^(-2/3), so its pressure lacks 2/3 E_cut / V times
    -dE/dE_cut (Francis and Payne, J. Phys.: Condens. Matter 2, 4395 (1990)). A plane wave that comes in at the cut-off
    with a small coefficient c lowers the energy by its kinetic energy times c^2, by perturbation theory; so
    -dE/dE_cut is the kinetic energy per energy interval at the cut-off. It falls off exponentially or faster: two
    shells below give its value, 9 to 29 % too large for MgO (30 Ha, 51 GPa), GaAs (35 Ha, 11 GPa) and silicon (7 Ha,
    4 GPa; 10 Ha, 0.5 GPa).
    """
    volume = abs(np.linalg.det(np.array(kind.lattice))) / Bohr**3
    inner, outer = (float(shell) / (high - low) for shell, low, high in zip(shells, SHELLS, SHELLS[1:], strict=False))
    gain = outer * math.sqrt(outer / inner) if inner > 0 else 0.0  # Ha, by the logarithm of the cut-off
    pulay = 2 / 3 * gain / volume * PRESSURE_UNIT
    return {"pressure": -float(slope) / volume * PRESSURE_UNIT + pulay, "pulay_pressure": pulay}


def energies_of_volumes(
    bench: Workbench,
    kind: Kind,
    symbols: Sequence[Sequence[str]],
    scales: Sequence[float],
    progress: Progress | None = None,
    rungs: Sequence[ScfRung] = (FOOT,),
) -> list[Volumes]:
    """Energies at volumes ``scales`` relative to the kind's.

    SCFs at the middle one start from the atoms, those at the others from its waves and density.
    ``kind.stretch`` must reach the largest: the cut-off is the same at every volume, the number of plane waves not.
    """
    count, middle = len(scales), len(scales) // 2
    climbs = [Climb(rungs) for _ in symbols]
    solver = bench.solver(kind)
    # The same number of lanes, so the same programs, for the few and the many.
    solver = dataclasses.replace(solver, lanes=min(solver.lanes, 1 << (len(symbols) - 1).bit_length()))
    problems = bench.problems(kind, symbols, [scales[middle]])
    base = recovery.solve(solver, problems, climbs, "bulk_modulus", energies, progress=progress, keep=True)
    free = np.full((len(symbols), count), np.nan)
    free[:, middle] = base.extra.free
    converged, iterations = base.converged.copy(), base.iterations.copy()
    others, sound = np.delete(np.arange(count), middle), np.flatnonzero(converged)
    if len(others) and len(sound):
        problems = bench.problems(kind, [symbols[i] for i in sound], [scales[j] for j in others])
        shared = [climbs[i] for i in sound for _ in others]
        guesses = [guess for i in sound for guess in [base.guess_of(i)] * len(others)]
        found = recovery.solve(solver, problems, shared, "bulk_modulus", energies, None, progress, guesses)
        free[np.ix_(sound, others)] = found.extra.free.reshape(len(sound), -1)
        converged[sound] = found.converged.reshape(len(sound), -1).all(axis=1)
        iterations[sound] += found.iterations.reshape(len(sound), -1).sum(axis=1)
    volume = abs(np.linalg.det(np.array(kind.lattice)))
    return [
        Volumes(
            converged=bool(converged[i]),
            iterations=int(iterations[i]),
            energy=float(free[i].min()) * Hartree,
            fermi_level=float(base.fermi_level[i]) * Hartree,
            climb=climbs[i],
            volume=volume,
            scales=list(scales),
            energies=free[i] * Hartree,
        )
        for i in range(len(symbols))
    ]


def sample_further(
    bench: Workbench,
    kind: Kind,
    symbols: Sequence[Sequence[str]],
    samples: Sequence[Volumes],
    wanted: Callable[[Volumes], float | None],
    progress: Progress | None = None,
) -> list[Volumes]:
    """Calculate more volumes, one for each crystal at a time, all crystals in one batch.

    Args:
        kind: of the samples; its ``stretch`` must reach the largest volume.
        samples: of :func:`energies_of_volumes`.
        wanted: which volume a crystal needs next, in units of that of the given cell; ``None`` for no more.

    Returns:
        The samples with their further volumes.
    """
    samples = list(samples)
    while True:
        asked = {i: wanted(known) for i, known in enumerate(samples) if known.converged}
        scales = {i: scale for i, scale in asked.items() if scale is not None}
        if not scales:
            return samples
        each = [bench.problems(kind, [symbols[i]], [scale]) for i, scale in scales.items()]
        problems = jax.tree.map(lambda *leaves: np.concatenate(leaves), *each)
        climbs = [samples[i].climb for i in scales]
        found = recovery.solve(bench.solver(kind), problems, climbs, "bulk_modulus", energies, progress=progress)
        for row, (i, scale) in enumerate(scales.items()):
            known, free = samples[i], float(found.extra.free[row]) * Hartree
            samples[i] = dataclasses.replace(
                known,
                converged=bool(found.converged[row]),
                iterations=known.iterations + int(found.iterations[row]),
                energy=min(known.energy, free),
                scales=[*known.scales, scale],
                energies=np.append(known.energies, free),
            )


def relax(
    bench: Workbench,
    kind: Kind,
    symbols: Sequence[Sequence[str]],
    steps: int,
    largest_force: float,
    largest_stress: float,
    progress: Progress | None = None,
    rungs: Sequence[ScfRung] = (FOOT,),
) -> list[RelaxedCell]:
    """Relax cells and atoms for at most ``steps`` ionic steps, the plane waves those of the first cell.

    Each SCF but the first starts from the waves and the density of the last.

    Args:
        largest_force: eV/Å, and
        largest_stress: GPa: below both a crystal is relaxed.
    """
    solver, symmetry = bench.solver(kind), kind.symmetry
    problems = bench.problems(kind, symbols)
    paths = [Relaxation(problems.lattice[i], problems.frac_coords[i]) for i in range(len(symbols))]
    results: dict[int, RelaxedCell] = {}
    iterations = [0] * len(symbols)
    climbs = [Climb(rungs) for _ in symbols]
    guesses: dict[int, Guess] = {}
    for done_steps in range(steps + 1):
        active = [i for i in range(len(symbols)) if i not in results]
        if not active:
            break
        now = problems.replace(
            lattice=np.array([paths[i].lattice for i in active]),
            frac_coords=np.array([paths[i].frac_coords for i in active]),
            species=problems.species[active],
        )
        climbing = [climbs[i] for i in active]
        last = [guesses[i] for i in active] if guesses else None
        found = recovery.solve(solver, now, climbing, "density", derivatives, None, progress, last, keep=True)
        for row, i in enumerate(active):
            guesses[i] = found.guess_of(row)
            path = paths[i]
            iterations[i] += int(found.iterations[row])
            forces, stress = symmetrise(
                symmetry.rotations,
                symmetry.translations,
                path.lattice,
                path.frac_coords,
                found.extra.forces[row],
                found.extra.stress[row],
            )
            quiet = (
                np.abs(forces).max() * Hartree / Bohr < largest_force
                and np.abs(stress).max() * PRESSURE_UNIT < largest_stress
            )
            converged = bool(found.converged[row])
            if quiet or not converged or done_steps == steps:
                facts = Outcome.facts(found, row, climbs[i], found.extra.free) | {"iterations": iterations[i]}
                results[i] = RelaxedCell(
                    **facts,
                    lattice=path.lattice * Bohr,
                    frac_coords=path.frac_coords,
                    pressure=float(-np.trace(stress) / 3 * PRESSURE_UNIT),
                    steps=done_steps,
                    relaxed=bool(quiet),
                )
            else:
                path.step(forces, stress)
    return [results[i] for i in range(len(symbols))]
