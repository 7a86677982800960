"""The registered tasks: every property times every set of crystals, and the tasks with an exact table, by id."""

from __future__ import annotations

import builtins
import dataclasses
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crystaljax.env import CrystalEnv, EnvParams
    from crystaljax.evaluators import Evaluator
    from crystaljax.structures import StructureLike

PREFIXES = {"band_gap": "BandGap", "bulk_modulus": "BulkModulus", "density": "Density"}
"""How the ids of a property's tasks begin."""
OPTIONS = ("vocabulary", "mode", "observation", "in_phase", "skeletons")
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
        property: key of :data:`crystaljax.rewards.OBJECTIVES`, which holds target and reward.
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
    f"{prefix}-{crystals}-v0": Task(f"{prefix}-{crystals}-v0", property_name, crystals, mode)
    for property_name, prefix in PREFIXES.items()
    for group, mode in ((SITE_CRYSTALS, "site"), (ORBIT_CRYSTALS, "orbit"))
    for crystals in group
} | {
    (task_id := f"{PREFIXES[property_name]}-{TABLE_NAMES[crystals]}-Table-v0"): Task(
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
    task_id: str, evaluator: str | Evaluator | None = None, *, target: float | None = None, **options: Any
) -> CrystalEnv:
    """The environment of a registered task; arguments as :func:`make`, but ``target`` is that of ``default_params``."""
    from crystaljax import library
    from crystaljax.env import CrystalEnv

    chosen = task(task_id)
    _refuse_unknown(options)
    options.setdefault("mode", chosen.mode)
    options.setdefault("skeletons", library.crystals(chosen.crystals))
    evaluator = chosen.evaluator if evaluator is None else evaluator
    return CrystalEnv(chosen.property, evaluator=evaluator, target=target, name=task_id, **options)


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
            ``bind(problem)``, or ``None`` for the task's own: its table, or else the default DFT engine.
        target: another target than the task's, in its unit.
        options: ``vocabulary`` (``small``, ``medium``, ``large`` or a ``Vocabulary``), ``mode`` (``site``, ``orbit``,
            ``substitution``), ``observation`` (``graph`` or ``flat``), ``in_phase``, and ``skeletons`` (structures of
            your own in place of the task's).

    Returns:
        The environment and its default parameters, as ``gymnax.make``.

    Raises:
        ValueError: for an unknown task or option value.
        TypeError: for an unknown option, or something that is no evaluator.
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
        structures: one or several; see :func:`crystaljax.structures.to_skeleton` and
            :func:`crystaljax.structures.read_mp20`.
        evaluator, target, options: as :func:`make`.
    """
    from crystaljax.env import CrystalEnv

    _refuse_unknown(options, without=("skeletons",))
    name = f"{PREFIXES.get(property_name, property_name)}-Custom"
    env = CrystalEnv(property_name, structures, evaluator, name=name, **options)
    return env, env.default_params if target is None else env.with_target(target)


def _refuse_unknown(options: Mapping[str, Any], without: tuple[str, ...] = ()) -> None:
    """Raise ``TypeError`` for an option that environments do not have, with the nearest of those that they have."""
    known = [name for name in OPTIONS if name not in without]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            near = [option for option in known if option.startswith(name)] or near
            raise TypeError(f"no option {name!r}; did you mean {near[0]!r}? There are {', '.join(known)}, and target")
