"""SCFs with a recovery ladder: those that do not converge are solved again, the others keep their results.

The first attempt is that of a solver without a ladder, program and batch included, so where it converges the ladder
costs nothing and changes no bit. Every further attempt starts afresh, from the superposition of the atoms.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crystaljax.dft_bridge.ladder import PARTLY_FILLED, Climb, same_as_fixed
from crystaljax.dft_bridge.planewave.rungs import FOOT, ScfRung
from crystaljax.dft_bridge.planewave.scf import Effort, Guess, Problem
from crystaljax.dft_bridge.planewave.solver import Finish, Progress, Solution, Solver
from crystaljax.status import Status


def solve(
    solver: Solver,
    problems: Problem,
    climbs: Sequence[Climb[ScfRung]],
    property_name: str,
    finish: Finish | None = None,
    extra: Any = None,
    progress: Progress | None = None,
    guesses: Sequence[Guess] | None = None,
    keep: bool = False,
    besides: Finish | None = None,
) -> Solution:
    """As :meth:`.Solver.solve`, with more attempts for SCFs that do not converge.

    Args:
        climbs: of the crystal of each problem; the problems of a crystal share one.
        property_name: decides where smearing may stand for fixed occupations.
        guesses: what the first attempts start from. One that fails is repeated from the atoms before it climbs.
    """
    solutions: dict[int, Solution] = {}
    waiting = list(range(len(climbs)))
    while waiting:
        groups: dict[ScfRung, list[int]] = {}
        for i in waiting:
            groups.setdefault(climbs[i].rung, []).append(i)
        failures: dict[int, list[tuple[int, str]]] = {}
        for rung, members in groups.items():
            chosen = None if guesses is None or rung != FOOT else [guesses[i] for i in members]
            taken = _take(problems, members)
            found = _attempt(solver, rung, taken, finish, extra, progress, chosen, keep, besides)
            for row, i in enumerate(members):
                solutions[i] = _take(found, row)
                reason = _problem(solver, rung, solutions[i], property_name)
                if reason:
                    solutions[i] = solutions[i].replace(converged=np.False_)
                    failures.setdefault(id(climbs[i]), []).append((i, reason))
        waiting = []
        for failed in failures.values():
            first, reason = failed[0]
            if climbs[first].fail(Status.NOT_CONVERGED, reason):
                waiting += [i for i, _ in failed]
        waiting.sort()
    return jax.tree.map(lambda *rows: np.stack(rows), *(solutions[i] for i in range(len(climbs))))


def _attempt(
    solver: Solver,
    rung: ScfRung,
    problems: Problem,
    finish: Finish | None,
    extra: Any,
    progress: Progress | None,
    guesses: Sequence[Guess] | None,
    keep: bool,
    besides: Finish | None,
) -> Solution:
    if rung == FOOT:
        found = solver.solve(problems, finish, extra, progress, guesses=guesses, keep=keep, besides=besides)
        failed = np.flatnonzero(~found.converged)
        if guesses is None or not len(failed):
            return found
        again = solver.solve(_take(problems, failed), finish, extra, progress, keep=keep, besides=besides)
        return jax.tree.map(functools.partial(_replaced, failed), found, again)
    old = solver.settings
    settings = dataclasses.replace(old, double=old.double or rung.double, width=old.width or rung.width)
    # Wave functions in double precision take twice the memory.
    lanes = solver.lanes if settings.double == old.double else max(1, solver.lanes // 2)
    effort = Effort(
        mixing=jnp.asarray(rung.mixing, float),
        max_iterations=jnp.asarray(rung.steps * old.max_iterations, jnp.int32),
        sweeps=jnp.asarray(rung.sweeps, jnp.int32),
    )
    changed = dataclasses.replace(solver, settings=settings, lanes=lanes)
    found = changed.solve(problems, finish, extra, progress, effort, keep=keep, besides=besides)
    if not keep:
        return found
    return found.replace(guess=found.guess.replace(waves=found.guess.waves.astype(old.complex_type)))


def _problem(solver: Solver, rung: ScfRung, solution: Solution, property_name: str) -> str:
    """Why the solution of one crystal does not stand; empty if it does."""
    if not solution.converged:
        return f"no self-consistency within {int(solution.iterations)} iterations"
    if not rung.width:
        return ""
    occupations = solution.numbers / 2
    occupied = round(float(np.asarray(solver.basis.weights) @ occupations.sum(axis=1)))
    same = same_as_fixed(solution.eigenvalues, occupations, occupied, property_name)
    return "" if same else PARTLY_FILLED


def _replaced(rows: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """``old`` with ``new`` at ``rows``."""
    result = old.copy()
    result[rows] = new
    return result


def _take(tree: Any, rows: Any) -> Any:
    return jax.tree.map(lambda x: x[rows], tree)
