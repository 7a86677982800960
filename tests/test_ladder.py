"""The recovery ladder: which rungs are tried, what is recorded, what a rung may stand for; on made-up calculations."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from crystaljax.dft_bridge import ladder
from crystaljax.dft_bridge.engines.registry import ENGINES
from crystaljax.dft_bridge.ladder import AS_SET, Climb, Rung, ScfFailure
from crystaljax.dft_bridge.planewave import recovery
from crystaljax.dft_bridge.planewave.rungs import FOOT, RUNGS
from crystaljax.dft_bridge.planewave.scf import Problem, ScfSettings
from crystaljax.dft_bridge.planewave.solver import Solution
from crystaljax.status import Status

LADDER = (Rung(AS_SET), Rung("lower"), Rung("upper"))
METAL, INSULATOR = np.array([[1.0, 0.4], [0.6, 0.0]]), np.array([[1.0, 0.0], [1.0, 0.0]])
APART, OVERLAPPING = np.array([[0.0, 0.5], [0.2, 0.6]]), np.array([[0.0, 0.1], [0.2, 0.6]])


def failing_below(name: str, status: Status = Status.NOT_CONVERGED):
    """An attempt that fails on every rung but this one."""

    def attempt(rung: Rung) -> str:
        if rung.name != name:
            raise ScfFailure(status, f"no luck {rung.name}")
        return rung.name

    return attempt


def test_an_attempt_that_succeeds_is_the_only_one():
    climb = Climb(LADDER)
    assert climb.run(failing_below(AS_SET)) == AS_SET == climb.rung.name
    assert climb.facts == {}


def test_later_attempts_begin_where_the_last_succeeded():
    climb = Climb(LADDER)
    assert climb.run(failing_below("lower")) == "lower"
    assert climb.run(lambda rung: rung.name) == "lower"
    assert climb.facts == {
        "failed_attempts": [{"rung": AS_SET, "status": "NOT_CONVERGED", "message": f"no luck {AS_SET}"}]
    }


def test_the_top_is_the_end():
    climb = Climb(LADDER)
    with pytest.raises(ScfFailure, match="no luck upper"):
        climb.run(failing_below("nowhere"))
    assert [tried["rung"] for tried in climb.failed_attempts] == [AS_SET, "lower", "upper"]


def test_only_what_does_not_converge_is_tried_again():
    climb = Climb(LADDER)
    with pytest.raises(ScfFailure):
        climb.run(failing_below("upper", Status.ENGINE_ERROR))
    assert [tried["status"] for tried in climb.failed_attempts] == ["ENGINE_ERROR"]


@pytest.mark.parametrize(
    ("eigenvalues", "occupations", "property_name", "same"),
    [
        (APART, INSULATOR, "bulk_modulus", True),
        (APART, METAL, "band_gap", False),
        (OVERLAPPING, METAL, "band_gap", True),
        (OVERLAPPING, METAL, "density", False),
    ],
)
def test_smearing_stands_for_fixed_occupations_where_it_says_the_same(eigenvalues, occupations, property_name, same):
    assert ladder.same_as_fixed(eigenvalues, occupations, 1, property_name) == same


@pytest.mark.parametrize("engine", ["planewave", "espresso", "gpaw"])
def test_engines_refuse_unknown_rungs_and_name_theirs(engine):
    with pytest.raises(ValueError, match="no rung prayer; choose from smaller mixing, .*more steps"):
        ENGINES[engine].preset("fast", ladder=("prayer",))


@pytest.mark.parametrize("engine", ["planewave", "espresso", "gpaw"])
def test_fast_presets_try_once_more_and_benchmarks_do_not(engine):
    presets = ENGINES[engine].presets
    assert presets["fast"]["ladder"] == ("smaller mixing",)
    assert presets.get("crystalgym", {}).get("ladder", ()) == ()


# The plane-wave code: problems of many crystals, on a solver that does as it is told


@dataclasses.dataclass(frozen=True)
class MadeUpSolver:
    """Converges a problem with as much effort as its number asks for; what it was asked is kept in ``calls``."""

    calls: list
    settings: ScfSettings
    occupations: np.ndarray = dataclasses.field(default_factory=lambda: INSULATOR)
    lanes: int = 4
    basis: SimpleNamespace = dataclasses.field(default_factory=lambda: SimpleNamespace(weights=np.array([0.5, 0.5])))

    def solve(
        self, problems, finish=None, extra=None, progress=None, effort=None, guesses=None, keep=False, besides=None
    ):
        steps = self.settings.max_iterations if effort is None else int(effort.max_iterations)
        self.calls.append((problems.species[:, 0].tolist(), steps, self.settings, self.lanes))
        needed = problems.species[:, 0]
        n = len(needed)
        repeated = (np.repeat(x[None], n, 0) for x in (APART, 2 * self.occupations))
        return Solution(needed <= steps, np.minimum(needed, steps), *np.zeros((3, n)), *repeated, None)


def climb_of_problems(solver: MadeUpSolver, needed: list[int], climbs: list[Climb], property_name: str = "density"):
    problems = Problem(np.zeros((len(needed), 3, 3)), np.zeros((len(needed), 1, 3)), np.array(needed)[:, None])
    return recovery.solve(solver, problems, climbs, property_name)


def rung(name: str):
    return next(rung for rung in RUNGS if rung.name == name)


def test_only_the_problems_that_fail_are_solved_again():
    solver = MadeUpSolver([], ScfSettings(8, width=0.01, max_iterations=10))
    climbs = [Climb([FOOT, rung("smaller mixing"), rung("more steps")]) for _ in range(3)]
    shared = [climbs[0], climbs[0], climbs[1], climbs[2]]
    found = climb_of_problems(solver, [5, 25, 7, 99], shared)
    assert [(members, steps) for members, steps, *_ in solver.calls] == [
        ([5, 25, 7, 99], 10),
        ([25, 99], 10),
        ([25, 99], 30),
    ]
    assert all(settings == solver.settings for _, _, settings, _ in solver.calls)  # no other program
    assert found.converged.tolist() == [True, True, True, False]
    assert found.iterations.tolist() == [5, 25, 7, 30]
    assert [climb.rung.name for climb in climbs] == ["more steps", AS_SET, "more steps"]
    assert [len(climb.failed_attempts) for climb in climbs] == [2, 0, 3]
    assert climbs[2].failed_attempts[-1]["message"] == "no self-consistency within 30 iterations"
    # The next SCFs of these crystals begin where the last ended.
    solver.calls.clear()
    climb_of_problems(solver, [5, 6], climbs[:2])
    assert [(members, steps) for members, steps, *_ in solver.calls] == [([5], 30), ([6], 10)]


def test_double_precision_and_smearing_change_the_settings_they_name():
    solver = MadeUpSolver([], ScfSettings(8, max_iterations=1))
    climb_of_problems(solver, [99], [Climb([FOOT, rung("double precision"), rung("smearing")])])
    (_, _, plain, lanes), (_, _, double, fewer), (_, _, smeared, _) = solver.calls
    assert plain == solver.settings and lanes == 4
    assert double == dataclasses.replace(plain, double=True) and fewer == 2
    assert smeared == dataclasses.replace(plain, width=rung("smearing").width)


@pytest.mark.parametrize(("occupations", "stands"), [(INSULATOR, True), (METAL, False)])
def test_smeared_problems_stand_for_fixed_occupations_or_fail(occupations, stands):
    """Both converge; the bands are apart, so that those of the metal are filled in part by the width alone."""
    solver = MadeUpSolver([], ScfSettings(8, max_iterations=10), occupations)
    climb = Climb([FOOT, dataclasses.replace(rung("smearing"), steps=10)])
    found = climb_of_problems(solver, [50], [climb], "band_gap")
    assert found.converged.tolist() == [stands]
    assert len(climb.failed_attempts) == (1 if stands else 2)
    if not stands:
        assert climb.failed_attempts[-1]["message"] == ladder.PARTLY_FILLED
