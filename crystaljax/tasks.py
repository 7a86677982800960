"""The registered tasks: every property times every set of crystals, and the tasks with an exact table, by id."""

from __future__ import annotations

import builtins
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from crystaljax.properties import PROPERTIES

if TYPE_CHECKING:
    from crystaljax.env import CrystalEnv, EnvParams
    from crystaljax.evaluators import Evaluator
    from crystaljax.objectives import Objective, Term
    from crystaljax.structures import StructureLike

OPTIONS = ("vocabulary", "mode", "observation", "in_phase", "skeletons", "objective")
"""Options of :func:`make`, besides the target."""
SITE_CRYSTALS = ("C1", "C2", "C3", "C4", "C5", "C6", "C7", "Mixed", "Five")
ORBIT_CRYSTALS = ("PerovskiteABX3", "RocksaltAB")
MOST_SITES = {
    **{"C1": 5, "C2": 5, "C3": 8, "C4": 5, "C5": 4, "C6": 4, "C7": 5, "Mixed": 8, "Five": 5},
    **{"PerovskiteABX3": 5, "RocksaltAB": 2, "ZincblendeAB": 2, "CsClAB": 2, "FluoriteAX2": 3},
}
"""Sites of the largest of these crystals; here, so that registries can be filled without reading them."""
REWARD_THRESHOLDS = {"band_gap": 0.9394, "bulk_modulus": -0.0834, "density": 0.9793}
"""Least reward of a crystal that counts as a success: within 0.25 eV, 25 GPa or 0.25 g/cm3 of the task's target."""
TABLES = {
    "band_gap": ("RocksaltAB", "ZincblendeAB", "CsClAB", "FluoriteAX2", "PerovskiteABX3"),
    "bulk_modulus": ("RocksaltAB", "ZincblendeAB", "CsClAB", "FluoriteAX2"),
    "density": ("RocksaltAB", "ZincblendeAB", "CsClAB", "FluoriteAX2"),
}
"""Prototypes whose crystals are all known, by property: :mod:`crystaljax.tables` has their values."""
TABLE_NAMES = {
    "RocksaltAB": "Rocksalt",
    "ZincblendeAB": "Zincblende",
    "CsClAB": "CsCl",
    "FluoriteAX2": "Fluorite",
    "PerovskiteABX3": "Perovskite",
}
"""How the ids of tasks with a table call these prototypes."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A named design problem.

    Attributes:
        id: such as ``BandGap-C1-v0``.
        property: key of :data:`crystaljax.objectives.OBJECTIVES`, which holds target and reward.
        crystals: name of the skeletons, see :func:`crystaljax.library.crystals`.
        mode: default mode of the environment.
        evaluator: name of the default evaluator; ``None`` for the default DFT engine.
    """

    id: str
    property: str
    crystals: str
    mode: str
    evaluator: str | None = None

    @builtins.property  # "property" is a field here
    def max_episode_steps(self) -> int:
        """One more than the longest episode has in any mode, so that nothing is ever cut off."""
        return MOST_SITES[self.crystals] + 1

    @builtins.property  # "property" is a field here
    def reward_threshold(self) -> float:
        """Reward from which on the task counts as solved; :data:`REWARD_THRESHOLDS`."""
        return REWARD_THRESHOLDS[self.property]


_TASKS = {
    (task_id := f"{known.prefix}-{crystals}-v0"): Task(task_id, known.name, crystals, mode)
    for known in PROPERTIES.values()
    for group, mode in ((SITE_CRYSTALS, "site"), (ORBIT_CRYSTALS, "orbit"))
    for crystals in group
} | {
    (task_id := f"{PROPERTIES[property_name].prefix}-{TABLE_NAMES[crystals]}-Table-v0"): Task(
        task_id, property_name, crystals, "orbit", "table"
    )
    for property_name, prototypes in TABLES.items()
    for crystals in prototypes
}


def registered_tasks() -> list[str]:
    """All task ids."""
    return list(_TASKS)


def task(task_id: str) -> Task:
    """The task of that id; raises ``ValueError`` for an unknown one, with the nearest ids."""
    if task_id not in _TASKS:
        near = difflib.get_close_matches(task_id, _TASKS, n=3, cutoff=0.0)
        raise ValueError(f"unknown task {task_id!r}; did you mean {', '.join(near)}? See registered_tasks()")
    return _TASKS[task_id]


def make_env(
    task_id: str,
    evaluator: str | Evaluator | None = None,
    *,
    target: float | Sequence[float] | None = None,
    **options: Any,
) -> CrystalEnv:
    """The environment of a registered task; arguments as :func:`make`, but ``target`` is that of ``default_params``."""
    from crystaljax import library, objectives
    from crystaljax.env import CrystalEnv

    chosen = task(task_id)
    _refuse_unknown(options)
    options.setdefault("mode", chosen.mode)
    options.setdefault("skeletons", library.crystals(chosen.crystals))
    evaluator = chosen.evaluator if evaluator is None else evaluator
    name = task_id
    asked = objectives.objective(options.pop("objective", chosen.property))
    if asked != objectives.OBJECTIVES[chosen.property]:
        name = _name(asked, chosen.crystals)
    return CrystalEnv(asked, evaluator=evaluator, target=target, name=name, **options)


def make(
    task_id: str,
    evaluator: str | Evaluator | None = None,
    *,
    target: float | Sequence[float] | None = None,
    **options: Any,
) -> tuple[CrystalEnv, EnvParams]:
    """A registered task, ready to reset and step.

    Args:
        task_id: one of :func:`registered_tasks`.
        evaluator: what computes the property: a name (:func:`crystaljax.evaluators.available`), an object with
            ``bind(problem)``, or ``None`` for the task's own: its table, or else the default DFT engine.
        target: another target than the task's, in its unit; all of them where there are several.
        options: ``vocabulary`` (``small``, ``medium``, ``large`` or a ``Vocabulary``), ``mode`` (``site``, ``orbit``,
            ``substitution``), ``observation`` (``graph`` or ``flat``), ``in_phase``, ``skeletons`` (structures of
            your own in place of the task's), and ``objective`` (another than the task's, as :func:`make_custom`).

    Returns:
        The environment and its default parameters, as ``gymnax.make``.

    Raises:
        ValueError: for an unknown task or option value.
        TypeError: for an unknown option, or something that is no evaluator.
    """
    env = make_env(task_id, evaluator, **options)
    return env, env.default_params if target is None else env.with_target(target)


def make_custom(
    objective: str | Objective | Term | Sequence[str | Term],
    structures: StructureLike | list[StructureLike],
    evaluator: str | Evaluator | None = None,
    *,
    target: float | Sequence[float] | None = None,
    **options: Any,
) -> tuple[CrystalEnv, EnvParams]:
    """A task on structures of your own: CIF files, pymatgen, ASE, AFLOW prototype names, MP-20 rows.

    Args:
        objective: ``band_gap``, ``bulk_modulus`` or ``density``, for the objective of their tasks; or one of your own,
            such as ``["band_gap=1.34+-0.2", "density<=5"]``, see :func:`crystaljax.objectives.parse`.
        structures: one or several; see :func:`crystaljax.structures.to_skeleton` and
            :func:`crystaljax.structures.read_mp20`.
        evaluator, target, options: as :func:`make`.
    """
    from crystaljax import objectives
    from crystaljax.env import CrystalEnv

    _refuse_unknown(options, without=("skeletons", "objective"))
    asked = objectives.objective(objective)
    env = CrystalEnv(asked, structures, evaluator, name=_name(asked, "Custom"), **options)
    return env, env.default_params if target is None else env.with_target(target)


def _name(asked: Objective, crystals: str) -> str:
    """Of an environment that is no registered task, such as ``BandGap-Density-Custom``."""
    return "-".join([*(wanted.prefix for wanted in asked.properties), crystals])


def _refuse_unknown(options: Mapping[str, Any], without: tuple[str, ...] = ()) -> None:
    """Raise ``TypeError`` for an option that environments do not have, with the nearest of those that they have."""
    known = [name for name in OPTIONS if name not in without]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            near = [option for option in known if option.startswith(name)] or near
            raise TypeError(f"no option {name!r}; did you mean {near[0]!r}? There are {', '.join(known)}, and target")
