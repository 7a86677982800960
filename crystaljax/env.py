"""The environment: an agent puts elements on the sites of a crystal skeleton, a calculation gives the reward."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces

from crystaljax import evaluators, objectives
from crystaljax import observation as observations
from crystaljax.elements import Vocabulary, get_vocabulary
from crystaljax.moves import MODES
from crystaljax.skeleton import Skeleton, SkeletonTable, stack
from crystaljax.status import Status
from crystaljax.structures import StructureLike, to_skeletons

OBSERVATIONS = ("graph", "flat")


@struct.dataclass
class EnvState(environment.EnvState):
    """State of an episode.

    Attributes:
        time: int32 [], decisions made.
        elements: int32 [N], vocabulary index per site, the blank where undecided and on padding.
        skeleton: int32 [], index into the environment's skeletons.
        start: int32 [], site at which the breadth-first walk starts.
    """

    time: jax.Array
    elements: jax.Array
    skeleton: jax.Array
    start: jax.Array


@struct.dataclass
class EnvParams(environment.EnvParams):
    """Traced parameters; ``vmap`` over ``target`` trains a target-conditioned policy.

    Attributes:
        target: of the objective, in the unit of the property (eV, GPa, g/cm3); float32 [T] of several.
        max_steps_in_episode: strictly above the natural horizon, so that no episode is truncated.
    """

    target: float | jax.Array | np.ndarray = 0.0
    max_steps_in_episode: int = 2**30


class CrystalEnv(environment.Environment[EnvState, EnvParams]):
    """Designs crystals on fixed skeletons, as a gymnax environment.

    *Episode*: a skeleton (if there are several) and a start site are drawn at reset. Each step puts one element on
    the focus site, in breadth-first order over the bonds. When every site has its element the crystal is evaluated,
    the reward given, the episode ends. All other rewards are 0.

    *Modes*: ``site`` decides one site a step; ``orbit`` one symmetry orbit of the prototype a step (3 for a
    perovskite); ``substitution`` is ``site`` from random elements instead of blank sites.

    *Action*: int32 in [0, V), an index into the vocabulary. Every action is legal at every step. Inside compiled
    code, where nothing can be raised, integers outside the range are clipped to it; other dtypes raise ``TypeError``.

    *Observation*: :class:`crystaljax.observation.GraphObservation`, or float32
    [N (V + 1) + N + 6 + T] for T targets (:func:`crystaljax.observation.flat`).

    *Reward*: float32 [], see :mod:`crystaljax.objectives`. *Info*: ``values`` (by name of each property of a finished
    crystal, float32 []; 0, and meaningless, before the end and where ``status`` is not ``OK``), ``value`` (the same, if
    there is one property), ``status`` (int32 [], :class:`crystaljax.status.Status`, ``OK`` before the end),
    ``elements`` (int32 [N], before auto-reset), ``skeleton`` (int32 []) and ``discount``. Where the evaluator knows all
    outcomes (an exact table) also ``regret`` (float32 [], how much more the best crystal earns, 0 before the end).

    Environments made alike (the same task, options and evaluator) are equal, and share what JAX compiles for one of
    them. Whoever changes an attribute has an environment that is equal to itself only. Copies share the evaluator.
    With a pickle goes the evaluator as it was given: by name, or an object, which must be picklable.
    """

    def __init__(
        self,
        objective: str | objectives.Objective | objectives.Term | Sequence[str | objectives.Term],
        skeletons: StructureLike | list[StructureLike] | tuple[StructureLike, ...],
        evaluator: str | evaluators.Evaluator | None = None,
        *,
        vocabulary: str | Vocabulary = "small",
        mode: str = "site",
        observation: str = "graph",
        in_phase: bool = False,
        target: float | Sequence[float] | None = None,
        name: str = "CrystalEnv",
    ):
        """Sets up an environment; all host work happens here.

        Args:
            objective: name of a property, for the objective of its tasks; one in words, such as
                ``"band_gap=1.34+-0.2"``, several such words, or an ``Objective``; see :mod:`crystaljax.objectives`.
            skeletons: one structure or several (anything :func:`crystaljax.structures.to_skeleton` takes).
            evaluator: what computes the property: a name (see :func:`crystaljax.evaluators.available`), an object
                with ``bind(problem)``, or ``None`` for the default DFT engine.
            vocabulary: ``small`` (18 elements), ``medium`` (30), ``large`` (50) or a ``Vocabulary``.
            mode: ``site``, ``orbit`` or ``substitution``.
            observation: ``graph`` or ``flat``.
            in_phase: pad every episode to the longest horizon, so that lanes that start together finish together
                and share host calls. Actions after the last site change nothing.
            target: of ``default_params``, in the unit of the property, or all T targets; by default the objective's.
            name: what ``env.name`` says.

        Raises:
            ValueError: for an unknown option, with the known ones, or a target that makes no sense.
            TypeError: for something that is no evaluator.
            StructureError: for an unusable structure.
        """
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}: use one of {MODES}")
        if observation not in OBSERVATIONS:
            raise ValueError(f"unknown observation type {observation!r}: use one of {OBSERVATIONS}")
        self.objective = objectives.objective(objective)
        if target is not None:
            self.objective.refuse_target(target)
        self.skeletons: tuple[Skeleton, ...] = to_skeletons(skeletons)
        self.vocabulary = get_vocabulary(vocabulary)
        self.mode = mode
        self.observation_type = observation
        by_orbit = mode == "orbit"
        self.table: SkeletonTable = stack(self.skeletons, by_orbit)
        self.horizons = self.table.n_decisions
        self.in_phase = in_phase
        self._target = self.objective.target if target is None else _as_given(target)
        self._name = name
        self._given = evaluator
        chosen = self._bind()
        # A subclass may depend on anything, so it is equal to itself only.
        if type(self) is CrystalEnv:
            self._identify(chosen)

    def _bind(self) -> evaluators.Evaluator:
        """Binds the evaluator that was given, and returns it."""
        chosen = evaluators.evaluator(self._given)
        by_orbit = self.mode == "orbit"
        problem = evaluators.Problem(self.skeletons, self.objective.names, self.vocabulary, by_orbit)
        self.evaluator = chosen.bind(problem)
        self._query = self.evaluator.query
        return chosen

    def _identify(self, evaluator: evaluators.Evaluator) -> None:
        """What JAX looks compiled programs up by: all that they depend on."""
        options = self.mode, self.observation_type, bool(self.in_phase), self._target, self._name
        self.__dict__["_identity"] = _Identity.of(
            self.objective, self.skeletons, self.vocabulary, *options, _hashable(evaluator)
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self.__dict__["_identity"] = None

    def __eq__(self, other: object) -> bool:
        mine = vars(self).get("_identity")
        return self is other or (mine is not None and mine == getattr(other, "_identity", None))

    def __hash__(self) -> int:
        mine = vars(self).get("_identity")
        return object.__hash__(self) if mine is None else hash(mine)

    def __copy__(self) -> CrystalEnv:
        twin = object.__new__(type(self))
        twin.__dict__.update(vars(self))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> CrystalEnv:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        shared = ("evaluator", "_query", "_given", "_identity")
        twin.__dict__.update({k: v if k in shared else copy.deepcopy(v, memo) for k, v in vars(self).items()})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        if self.evaluator.query is not self._query:
            raise TypeError(
                "the evaluator of this environment was replaced after it was made, so it cannot be pickled; "
                "make one with evaluator=..."
            )
        state = {name: value for name, value in vars(self).items() if name not in ("evaluator", "_query")}
        return state | {"_identity": vars(self)["_identity"] is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        chosen = self._bind()
        if state["_identity"]:
            self._identify(chosen)

    @property
    def name(self) -> str:
        return self._name

    @property
    def num_actions(self) -> int:
        return len(self.vocabulary)

    @property
    def max_sites(self) -> int:
        """N, the padded number of sites."""
        return self.table.site_mask.shape[1]

    @property
    def horizon(self) -> int:
        """Steps of the longest episode."""
        return int(self.horizons.max())

    @property
    def default_params(self) -> EnvParams:
        return self._params(self._target)

    def _params(self, target: float | tuple[float, ...]) -> EnvParams:
        aims = np.array(target, np.float32) if isinstance(target, tuple) else target
        return EnvParams(target=aims, max_steps_in_episode=self.horizon + 1)

    def with_target(self, target: float | Sequence[float]) -> EnvParams:
        """Parameters with another target, or T others; raises ``ValueError`` for one that makes no sense."""
        self.objective.refuse_target(target)
        return self._params(_as_given(target))

    @partial(jax.jit, static_argnames=("self",))
    def step(
        self, key: jax.Array, state: EnvState, action: int | jax.Array, params: EnvParams | None = None
    ) -> tuple[Any, EnvState, jax.Array, jax.Array, jax.Array, dict[str, Any]]:
        """One decision with auto-reset, as gymnax' ``step``; the same values, one observation less to compute.

        Returns:
            observation, state, reward, terminated, truncated, info; where an episode ended, observation and state are
            those of a fresh one, and ``info["final_observation"]`` is the last of the old one.
        """
        params = self.default_params if params is None else params
        key_step, key_reset = jax.random.split(key)
        last, stepped, reward, terminated, info = self.step_env(key_step, state, action, params)
        truncated = self.is_truncated(stepped, params)
        done = terminated | truncated
        _, fresh = self.reset_env(key_reset, params)
        state = jax.tree.map(lambda new, old: jnp.where(done, new, old), fresh, stepped)
        # Observing the chosen state costs half of observing both and choosing.
        observed = self._observe(state, self.table.row(state.skeleton), params)
        info = {**info, "terminated": terminated, "truncated": truncated, "final_observation": last}
        return observed, state, reward, terminated, truncated, info

    def reset_env(self, key: jax.Array, params: EnvParams) -> tuple[Any, EnvState]:
        """A fresh episode: skeleton and start site drawn, sites blank (random in substitution mode)."""
        count = len(self.skeletons)
        # One draw of 32 bits serves both choices; the bias is below 2^-20 for a thousand outcomes.
        bits = jax.random.bits(key, (), jnp.uint32)
        skeleton = (bits % count).astype(jnp.int32)
        row = self.table.row(skeleton)
        start = ((bits // count) % row.n_sites.astype(jnp.uint32)).astype(jnp.int32)
        elements = jnp.full(self.max_sites, self.vocabulary.blank, jnp.int32)
        if self.mode == "substitution":
            drawn = jax.random.randint(jax.random.fold_in(key, 1), elements.shape, 0, self.num_actions, jnp.int32)
            elements = jnp.where(row.site_mask, drawn, elements)
        state = EnvState(time=jnp.int32(0), elements=elements, skeleton=skeleton, start=start)
        return self._observe(state, row, params), state

    def step_env(
        self, key: jax.Array, state: EnvState, action: int | jax.Array, params: EnvParams
    ) -> tuple[Any, EnvState, jax.Array, jax.Array, dict[str, jax.Array]]:
        """One decision; see the class for what comes back. ``key`` is unused: transitions are deterministic."""
        del key
        state = self.decide(state, action)
        elements = state.elements
        finished = self.is_terminated(state, params)
        numbers = jnp.asarray(self.vocabulary.numbers)[elements]
        values, status = self.evaluator.query(numbers, state.skeleton, finished)
        values = jnp.reshape(values, len(self.objective.names))
        reward = self.objective.reward(values, status, jnp.asarray(params.target, jnp.float32))
        # Never NaN: it trips jax_debug_nans, and equals nothing where infos are compared.
        values = jnp.where(finished & (status == Status.OK), values, 0.0)
        info = {
            "values": {name: values[place] for place, name in enumerate(self.objective.names)},
            **({"value": values[0]} if len(self.objective.names) == 1 else {}),
            "status": jnp.where(finished, status, Status.OK).astype(jnp.int32),
            "elements": elements,
            "skeleton": state.skeleton,
            "discount": 1.0 - finished.astype(jnp.float32),
        }
        if self.evaluator.landscape is not None:
            info["regret"] = jnp.where(finished, self.best_reward(params) - reward, 0.0)
        reward = jnp.where(finished, reward, 0.0)
        return self._observe(state, self.table.row(state.skeleton), params), state, reward, finished, info

    def decide(self, state: EnvState, action: int | jax.Array) -> EnvState:
        """The state after a decision, before any reset; nothing is evaluated."""
        decided = self._decides(state, self.table.row(state.skeleton))
        elements = jnp.where(decided, self._legal(action), state.elements)
        return dataclasses.replace(state, time=state.time + 1, elements=elements)

    def best_reward(self, params: EnvParams) -> jax.Array:
        """float32 [], what the best crystal earns; raises ``ValueError`` unless the evaluator knows all outcomes."""
        if self.evaluator.landscape is None:
            raise ValueError(f"{self.evaluator.label} does not know the best crystal; an exact table does")
        target = jnp.asarray(params.target, jnp.float32)
        return self.objective.reward(*self.evaluator.landscape, target).max()

    def observe(self, key: jax.Array | None, state: EnvState, action: Any, params: EnvParams) -> Any:
        """The observation of a state."""
        del key, action
        return self._observe(state, self.table.row(state.skeleton), params)

    def is_terminated(self, state: EnvState, params: EnvParams) -> jax.Array:
        """True once every site has its element (in phase: once the longest episode would have)."""
        del params
        if self.in_phase or len(self.skeletons) == 1:
            return state.time >= self.horizon
        return state.time >= self.table.row(state.skeleton).n_decisions

    def action_space(self, params: EnvParams | None = None) -> spaces.Discrete:
        return spaces.Discrete(self.num_actions)

    def observation_space(self, params: EnvParams | None = None) -> spaces.Space:
        """A ``Box`` with scalar bounds (flat), or a ``Dict`` over the fields of the graph observation."""
        if self.observation_type == "flat":
            size = observations.flat_size(self.max_sites, self.num_actions, len(self.objective.targets))
            smallest = min(np.ravel(self.objective.scale))
            low, high = (bound / smallest for bound in self.objective.target_range)
            return spaces.Box(min(low, 0.0), max(high, objectives.MAX_TARGET_RATIO), (size,), jnp.float32)
        sites, edges = self.max_sites, self.table.senders.shape[1]
        longest = 10.0 * observations.LENGTH_SCALE
        lowest, highest = self.objective.target_range
        return spaces.Dict(
            {
                "elements": spaces.Box(0, self.vocabulary.blank, (sites,), jnp.int32),
                "site_mask": spaces.Box(0, 1, (sites,), jnp.bool_),
                "focus": spaces.Box(0, sites - 1, (), jnp.int32),
                "focus_mask": spaces.Box(0, 1, (sites,), jnp.bool_),
                "senders": spaces.Box(0, sites - 1, (edges,), jnp.int32),
                "receivers": spaces.Box(0, sites - 1, (edges,), jnp.int32),
                "distances": spaces.Box(0.0, longest, (edges,), jnp.float32),
                "edge_mask": spaces.Box(0, 1, (edges,), jnp.bool_),
                "lattice": spaces.Box(0.0, observations.ANGLE_SCALE, (6,), jnp.float32),
                "target": spaces.Box(lowest, highest, np.shape(self.objective.target), jnp.float32),
                "skeleton": spaces.Box(0, len(self.skeletons) - 1, (), jnp.int32),
            }
        )

    def state_space(self, params: EnvParams | None = None) -> spaces.Dict:
        """A ``Dict`` over the fields of :class:`EnvState`."""
        return spaces.Dict(
            {
                "time": spaces.Discrete(self.horizon + 1),
                "elements": spaces.Box(0, self.vocabulary.blank, (self.max_sites,), jnp.int32),
                "skeleton": spaces.Discrete(len(self.skeletons)),
                "start": spaces.Discrete(self.max_sites),
            }
        )

    def _decides(self, state: EnvState, row: SkeletonTable) -> jax.Array:
        """bool [N]: the sites that the next action decides; none when nothing is left."""
        time = jnp.minimum(state.time, self.max_sites - 1)
        group = jnp.where(state.time < row.n_decisions, row.order[state.start, time], -1)
        return (row.group == group) & row.site_mask

    def _legal(self, action: int | jax.Array) -> jax.Array:
        action = jnp.asarray(action)
        if not jnp.issubdtype(action.dtype, jnp.integer) or action.shape != ():
            raise TypeError(
                f"an action is an integer scalar in [0, {self.num_actions}), got {action.dtype}{list(action.shape)}; "
                "use jax.vmap for batches"
            )
        return jnp.clip(action, 0, self.num_actions - 1).astype(jnp.int32)

    def _observe(self, state: EnvState, row: SkeletonTable, params: EnvParams) -> Any:
        time = jnp.minimum(state.time, self.max_sites - 1)
        focus = row.focus[state.start, time]
        decided = self._decides(state, row)
        seen = observations.graph(state.elements, focus, decided, row, params.target, state.skeleton)
        if self.observation_type == "graph":
            return seen
        return observations.flat(seen, self.num_actions, self.objective.scale)


def _as_given(target: float | Sequence[float]) -> float | tuple[float, ...]:
    """As :attr:`crystaljax.objectives.Objective.target` has it."""
    return objectives.one_or_all(tuple(np.ravel(np.asarray(target, float)).tolist()))


class _Identity:
    """Settings that make environments equal, with their hash worked out once: JAX asks for it at every call."""

    def __init__(self, settings: tuple[Any, ...]):
        self._settings, self._hash = settings, hash(settings)

    @classmethod
    def of(cls, *settings: Any) -> _Identity | None:
        """``None`` for settings that have no hash (an objective with a formula of one's own may have none)."""
        try:
            return cls(settings)
        except TypeError:
            return None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self._hash == other._hash and self._settings == other._settings

    def __hash__(self) -> int:
        return self._hash


def _hashable(evaluator: evaluators.Evaluator) -> Any:
    """The evaluator, or what stands for this very object if it has no hash; the environment keeps it alive."""
    try:
        hash(evaluator)
    except TypeError:
        return id(evaluator)
    return evaluator
