"""The registered tasks: every property times every set of crystals, by id."""

from __future__ import annotations

import dataclasses
from typing import Any

from crystaljax import library, rewards
from crystaljax.env import CrystalEnv, EnvParams
from crystaljax.evaluators import Evaluator
from crystaljax.structures import StructureLike

_SITE_CRYSTALS = (*library.BENCHMARK_ROWS, "Mixed", "Five")
_ORBIT_CRYSTALS = ("PerovskiteABX3", "RocksaltAB")


@dataclasses.dataclass(frozen=True)
class Task:
    """A named design problem.

    Attributes:
        id: such as ``BandGap-C1-v0``.
        objective: property, target and reward.
        crystals: name of the skeletons, see :func:`crystaljax.library.crystals`.
        mode: default mode of the environment.
    """

    id: str
    objective: rewards.Objective
    crystals: str
    mode: str


_TASKS = {
    f"{objective.prefix}-{crystals}-v0": Task(f"{objective.prefix}-{crystals}-v0", objective, crystals, mode)
    for objective in rewards.OBJECTIVES.values()
    for group, mode in ((_SITE_CRYSTALS, "site"), (_ORBIT_CRYSTALS, "orbit"))
    for crystals in group
}


def registered_tasks() -> list[str]:
    """All task ids."""
    return list(_TASKS)


def task(task_id: str) -> Task:
    """The task of that id; raises ``ValueError`` for an unknown one, with the nearest ids."""
    if task_id not in _TASKS:
        import difflib

        near = difflib.get_close_matches(task_id, _TASKS, n=3, cutoff=0.0)
        raise ValueError(f"unknown task {task_id!r}; did you mean {', '.join(near)}? See registered_tasks()")
    return _TASKS[task_id]


def make_env(task_id: str, evaluator: str | Evaluator | None = None, **options: Any) -> CrystalEnv:
    """The environment of a registered task; arguments as :func:`make`."""
    chosen = task(task_id)
    options.setdefault("mode", chosen.mode)
    options.setdefault("skeletons", library.crystals(chosen.crystals))
    return CrystalEnv(chosen.objective, evaluator=evaluator, name=task_id, **options)


def make(
    task_id: str,
    evaluator: str | Evaluator | None = None,
    *,
    target: float | None = None,
    **options: Any,
) -> tuple[CrystalEnv, EnvParams]:
    """A registered task, ready to reset and step.

    Args:
        task_id: one of :func:`registered_tasks`.
        evaluator: what computes the property: a name (:func:`crystaljax.evaluators.available`), an object with
            ``bind(problem)``, or ``None`` for the default DFT engine.
        target: another target than the task's, in its unit.
        options: ``vocabulary`` (``small``, ``medium``, ``large`` or a ``Vocabulary``), ``mode`` (``site``, ``orbit``,
            ``substitution``), ``observation`` (``graph`` or ``flat``), ``in_phase``, and ``skeletons`` (structures of
            your own in place of the task's).

    Returns:
        The environment and its default parameters, as ``gymnax.make``.

    Raises:
        ValueError: for an unknown task or option value.
    """
    env = make_env(task_id, evaluator, **options)
    return env, env.default_params if target is None else env.with_target(target)


def make_custom(
    property_name: str,
    structures: StructureLike | list[StructureLike],
    evaluator: str | Evaluator | None = None,
    *,
    target: float | None = None,
    **options: Any,
) -> tuple[CrystalEnv, EnvParams]:
    """A task on structures of your own: CIF files, pymatgen, ASE, AFLOW prototype names, MP-20 rows.

    Args:
        property_name: ``band_gap``, ``bulk_modulus`` or ``density``.
        structures: one or several; see :func:`crystaljax.structures.skeleton` and
            :func:`crystaljax.structures.read_mp20`.
        evaluator, target, options: as :func:`make`.
    """
    objective = rewards.objective(property_name)
    name = f"{objective.prefix}-Custom"
    env = CrystalEnv(objective, structures, evaluator, name=name, **options)
    return env, env.default_params if target is None else env.with_target(target)

