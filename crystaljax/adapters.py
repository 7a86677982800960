"""The environment for clients of other interfaces: Gymnasium (single and vector) and the older five-tuple step."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from gymnax.environments import spaces
from jax._src.xla_bridge import backends_are_initialized  # nothing public says whether JAX has been started

from crystaljax.env import CrystalEnv, EnvParams
from crystaljax.evaluators import Deferred
from crystaljax.observation import GraphObservation
from crystaljax.status import Status
from crystaljax.tasks import make, task

RENDER_MODES = ("ansi", "rgb_array")

_forked_from_jax = False
"""Whether this process is a fork of one in which JAX had been started: JAX's threads are missing here."""


def _after_fork() -> None:
    global _forked_from_jax
    _forked_from_jax = backends_are_initialized()  # here nothing has been, so it was in the process that forked


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _refuse_fork() -> None:
    """Raise ``RuntimeError`` where JAX would wait for ever."""
    if _forked_from_jax:
        raise RuntimeError(
            "this process is a fork of one in which JAX was at work, so that JAX would wait for ever in it. Start new "
            "processes: gymnasium.make_vec(..., vectorization_mode='async', vector_kwargs={'context': 'spawn'}); or "
            "leave out vectorization_mode, and one compiled program steps all environments"
        )


def to_gymnasium_space(space: spaces.Space) -> gymnasium.Space:
    """The Gymnasium space that holds the same values.

    Integers are categories (``Discrete``, ``MultiDiscrete``), masks are ``MultiBinary``, and a single real number is an
    array of one: what learners take as it is.
    """
    if isinstance(space, spaces.Discrete):
        return gymnasium.spaces.Discrete(space.n)
    if isinstance(space, spaces.Dict):
        return gymnasium.spaces.Dict({key: to_gymnasium_space(value) for key, value in space.spaces.items()})
    if not isinstance(space, spaces.Box):
        raise TypeError(f"there is no Gymnasium space for {type(space).__name__}; use Discrete, Dict or Box")
    dtype = np.dtype(space.dtype)
    if dtype == np.bool_:
        return gymnasium.spaces.MultiBinary(space.shape)
    if dtype.kind == "i" and space.low == 0:
        count = int(space.high) + 1
        return (
            gymnasium.spaces.MultiDiscrete(np.full(space.shape, count), dtype.type)
            if space.shape
            else (gymnasium.spaces.Discrete(count))
        )
    return gymnasium.spaces.Box(space.low, space.high, space.shape or (1,), dtype.type)


def _plain(observation: Any) -> Any:
    """An observation as :func:`to_gymnasium_space` has it, on the device; :func:`_to_host` does the rest."""
    if not isinstance(observation, GraphObservation):
        return observation

    def plain(value: jax.Array) -> jax.Array:
        if value.dtype == jnp.bool_:
            return value.astype(jnp.int8)
        return value[None] if value.shape == () and value.dtype == jnp.float32 else value

    return {name: plain(value) for name, value in vars(observation).items()}


def _to_host(observation: Any, space: gymnasium.Space) -> Any:
    """What :func:`_plain` made, of one lane or of all, as NumPy has it; ``space`` is that of one lane."""
    if isinstance(space, gymnasium.spaces.Dict):
        return {name: _to_host(observation[name], part) for name, part in space.items()}
    value = np.asarray(observation)
    return value.astype(np.int64)[()] if isinstance(space, gymnasium.spaces.Discrete) else value


def _seed(random: np.random.Generator) -> int:
    return int(random.integers(2**31))


# One program a step, and environments that are equal share it. Keys are plain data, which can be pickled. What a single
# environment hands to the host is packed into one array: to move twenty small ones takes longer than all the rest.


class _Reset(NamedTuple):
    """What a reset of one environment tells."""

    observation: Any
    shown: dict[str, jax.Array]


class _Step(NamedTuple):
    """What a step of one environment tells."""

    observation: Any
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    info: dict[str, jax.Array]


def _packed(tree: Any) -> jax.Array:
    """All leaves, of at most 32 bits, as words int32 [M]."""

    def words(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == jnp.float32:
            return jax.lax.bitcast_convert_type(leaf, jnp.int32).ravel()
        return leaf.astype(jnp.int32).ravel()

    return jnp.concatenate([words(leaf) for leaf in jax.tree.leaves(tree)])


def _unpacked(packed: jax.Array, like: Any) -> Any:
    """The tree of NumPy arrays that was packed; ``like`` has its shapes and dtypes."""
    words, leaves, start = np.array(packed), [], 0
    shapes, structure = jax.tree.flatten(like)
    for leaf in shapes:
        part = words[start : start + leaf.size].reshape(leaf.shape)
        leaves.append(part.view(np.float32) if leaf.dtype == np.float32 else part.astype(leaf.dtype))
        start += leaf.size
    return jax.tree.unflatten(structure, leaves)


@partial(jax.jit, static_argnames=("env",))
def _reset_one(env: CrystalEnv, key: jax.Array, params: EnvParams) -> tuple[jax.Array, Any, _Reset]:
    """The next key and the state of a fresh episode."""
    key, reset_key = jax.random.split(jax.random.wrap_key_data(key))
    observation, state = env.reset(reset_key, params)
    told = _Reset(_plain(observation), {"elements": state.elements, "skeleton": state.skeleton})
    return jax.random.key_data(key), state, told


@partial(jax.jit, static_argnames=("env",))
def _step_one(
    env: CrystalEnv, key: jax.Array, state: Any, action: jax.Array, params: EnvParams
) -> tuple[jax.Array, Any, _Step]:
    """The next key and state. Gymnasium resets by itself, so what is told ends with the last observation."""
    key, step_key = jax.random.split(jax.random.wrap_key_data(key))
    _, state, reward, terminated, truncated, info = env.step(step_key, state, action, params)
    last = _plain(info.pop("final_observation"))
    return jax.random.key_data(key), state, _Step(last, reward, terminated, truncated, info)


@partial(jax.jit, static_argnames=("function", "env"))
def _run(function: Any, env: CrystalEnv, *arguments: Any) -> tuple[jax.Array, Any, jax.Array]:
    """One of the two above, with what it tells packed."""
    key, state, told = function(env, *arguments)
    return key, state, _packed(told)


@functools.lru_cache(maxsize=64)
def _told(function: Any, env: CrystalEnv) -> Any:
    """Shapes and dtypes of what one of the two tells."""
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    state = jax.eval_shape(env.reset, jax.random.key(0), env.default_params)[1]
    arguments = (key, env.default_params) if function is _reset_one else (key, state, np.int32(0), env.default_params)
    return jax.eval_shape(partial(function, env), *arguments)[2]


@partial(jax.jit, static_argnames=("env",))
def _reset_lanes(
    env: CrystalEnv, keys: jax.Array, params: EnvParams, mask: jax.Array | None = None, state: Any = None
) -> tuple[Any, Any]:
    """Observations and state with fresh episodes in the lanes [L] of the mask, or in all of them."""
    observation, fresh = jax.vmap(env.reset, in_axes=(0, None))(jax.random.wrap_key_data(keys), params)
    if mask is not None:
        fresh = jax.tree.map(
            lambda new, old: jnp.where(mask.reshape(-1, *[1] * (new.ndim - 1)), new, old), fresh, state
        )
        observation = jax.vmap(lambda state: env.observe(None, state, None, params))(fresh)
    return jax.vmap(_plain)(observation), fresh


@partial(jax.jit, static_argnames=("env",))
def _step_lanes(env: CrystalEnv, key: jax.Array, state: Any, actions: jax.Array, params: EnvParams) -> tuple[Any, ...]:
    """The next key and state, then what ``step`` returns; lanes that end begin again."""
    key, step_key = jax.random.split(jax.random.wrap_key_data(key))
    keys = jax.random.split(step_key, actions.shape[0])
    observation, state, reward, terminated, truncated, info = jax.vmap(env.step, in_axes=(0, 0, 0, None))(
        keys, state, actions, params
    )
    info["final_obs"] = jax.vmap(_plain)(info.pop("final_observation"))
    return jax.random.key_data(key), state, jax.vmap(_plain)(observation), reward, terminated, truncated, info


def _crystal(env: CrystalEnv, elements: np.ndarray, skeleton: int) -> Atoms:
    """The crystal so far; ``X`` where there is no element yet."""
    cell = env.skeletons[skeleton]
    numbers = env.vocabulary.numbers[np.asarray(elements)[: cell.n_sites]]
    return Atoms(numbers, cell=cell.lattice, scaled_positions=cell.frac_coords, pbc=True)


def _render(env: CrystalEnv, params: EnvParams, shown: dict[str, Any], mode: str | None) -> Any:
    """A crystal as text (``ansi``) or as a picture uint8 [height, width, 3]; ``shown`` is like a step's ``info``."""
    if mode is None:
        raise ValueError("no render_mode was given; make the environment with render_mode='ansi' or 'rgb_array'")
    skeleton = int(shown["skeleton"])
    atoms = _crystal(env, shown["elements"], skeleton)
    symbols = " ".join("_" if symbol == "X" else symbol for symbol in atoms.get_chemical_symbols())
    if mode == "rgb_array":
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        from crystaljax.viewer import draw

        canvas = FigureCanvasAgg(draw(atoms, title=f"{env.skeletons[skeleton].name}: {symbols}"))
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
    text = f"{env.skeletons[skeleton].name}: {symbols}"
    if shown.get("terminated", False):
        status = Status(int(shown["status"]))
        told = [f"{name} {float(value):.4g}" for name, value in shown["values"].items()]
        text += f", {' '.join(told)}" if status == Status.OK else f", {status.name}"
    return f"{text} ({env.objective.with_targets(params.target).title})"


def _refuse_render_mode(mode: str | None) -> None:
    if mode not in (None, *RENDER_MODES):
        raise ValueError(f"unknown render_mode {mode!r}: use one of {', '.join(RENDER_MODES)}")


class GymnasiumEnv(gymnasium.Env):
    """One environment for Gymnasium clients. It can be pickled and deep-copied as the wrapped one can.

    ``step`` raises ``ValueError`` for an action outside the space, and, with its own type, whatever an evaluator
    could not raise on the device (a missing engine, a full disk). ``reset`` and ``step`` raise ``RuntimeError`` in a
    fork of a process in which JAX has been started.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 4}

    def __init__(self, env: CrystalEnv, params: EnvParams | None = None, render_mode: str | None = None):
        """``render_mode``: ``ansi`` for a line of text, ``rgb_array`` for a picture of the crystal so far."""
        _refuse_render_mode(render_mode)
        self.metadata = dict(type(self).metadata)  # Gymnasium's vectors write into it
        self.env, self.render_mode = env, render_mode
        self.params = env.default_params if params is None else params
        self.action_space = to_gymnasium_space(env.action_space(self.params))
        self.observation_space = to_gymnasium_space(env.observation_space(self.params))
        self._key: Any = None
        self._state: Any = None
        self._shown: dict[str, Any] = {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """A fresh episode; ``options={"target": x}`` changes the target from now on."""
        _refuse_fork()
        super().reset(seed=seed)
        if options and "target" in options:
            self.params = self.env.with_target(options["target"])
        if seed is not None or self._key is None:
            self._key = jax.random.key_data(jax.random.key(_seed(self.np_random)))
        told = self._run(_reset_one)
        self._shown = told.shown
        return _to_host(told.observation, self.observation_space), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        _refuse_fork()
        if self._state is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        if not self.action_space.contains(action):
            raise ValueError(f"action {action!r} is not an integer in [0, {self.env.num_actions})")
        told = self._run(_step_one, self._state, np.int32(action))
        self.env.evaluator.check()
        self._shown = told.info
        observation = _to_host(told.observation, self.observation_space)
        return observation, float(told.reward), bool(told.terminated), bool(told.truncated), told.info

    def _run(self, function: Any, *arguments: Any) -> Any:
        """What a reset or a step tells; the key and the state move on."""
        self._key, self._state, packed = _run(function, self.env, self._key, *arguments, self.params)
        return _unpacked(packed, _told(function, self.env))

    def render(self) -> str | np.ndarray:
        """The crystal so far, as text or as a picture uint8 [height, width, 3], by the ``render_mode``."""
        if self._state is None:
            raise gymnasium.error.ResetNeeded("call reset() before render()")
        return _render(self.env, self.params, self._shown, self.render_mode)


class GymnasiumVectorEnv(VectorEnv):
    """Many environments in one compiled program, for Gymnasium clients.

    Lanes reset themselves in the step that ends them (``AutoresetMode.SAME_STEP``): ``infos["final_obs"]`` holds the
    last observations where ``infos["_final_obs"]`` is true. Errors are those of :class:`GymnasiumEnv`.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 4, "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self, env: CrystalEnv, num_envs: int = 1, params: EnvParams | None = None, render_mode: str | None = None
    ):
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}; at least 1 is needed")
        _refuse_render_mode(render_mode)
        self.metadata = dict(type(self).metadata)
        self.env, self.render_mode = env, render_mode
        self.num_envs = num_envs
        self.params = env.default_params if params is None else params
        self.single_action_space = to_gymnasium_space(env.action_space(self.params))
        self.single_observation_space = to_gymnasium_space(env.observation_space(self.params))
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._key: Any = None
        self._state: Any = None
        self._shown: dict[str, Any] = {}

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Fresh episodes.

        Args:
            seed: one for all lanes, or one for each lane; a lane whose seed is ``None`` begins at random.
            options: ``target`` changes the target from now on, in all lanes. ``reset_mask``, bool [num_envs], leaves
                those lanes alone where it is false.
        """
        _refuse_fork()
        options = options or {}
        mask = self._mask(options) if "reset_mask" in options else None
        keys = self._keys(seed)
        if "target" in options:
            self.params = self.env.with_target(options["target"])
        if mask is None or self._key is None:
            # The lanes' own keys are spent by their resets.
            self._key = jax.random.key_data(jax.random.fold_in(keys[0], self.num_envs))
        rest = () if mask is None else (mask, self._state)
        observation, self._state = _reset_lanes(self.env, jax.random.key_data(keys), self.params, *rest)
        self._shown = {"elements": self._state.elements, "skeleton": self._state.skeleton}
        return _to_host(observation, self.single_observation_space), {}

    def _keys(self, seed: int | Sequence[int | None] | None) -> jax.Array:
        """Keys [num_envs] for the lanes' resets."""
        if seed is None or isinstance(seed, int | np.integer):
            super().reset(seed=None if seed is None else int(seed))
            return jax.random.split(jax.random.key(_seed(self.np_random)), self.num_envs)
        seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} environments; give one each, or one in all")
        given = [one for one in seeds if one is not None]
        if len(given) < len(seeds):
            given = [_seed(self.np_random) if one is None else one for one in seeds]
        else:
            super().reset(seed=int(given[0]))
        return jax.vmap(jax.random.key)(np.array(given, dtype=np.uint32))

    def _mask(self, options: dict[str, Any]) -> np.ndarray:
        mask = np.asarray(options["reset_mask"])
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
            raise ValueError(
                f"reset_mask is {options['reset_mask']!r}; give bool [{self.num_envs}], true for the lanes to reset"
            )
        if self._state is None:
            raise gymnasium.error.ResetNeeded("call reset() for all lanes before resetting some")
        if "target" in options:
            raise ValueError("all lanes have one target; leave out reset_mask to change it")
        return mask

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        _refuse_fork()
        if self._state is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        actions = np.asarray(actions)
        if not self.action_space.contains(actions.astype(self.action_space.dtype)) or actions.dtype.kind not in "iu":
            raise ValueError(f"actions must be {self.num_envs} integers in [0, {self.env.num_actions})")
        self._key, self._state, observation, reward, terminated, truncated, info = _step_lanes(
            self.env, self._key, self._state, actions.astype(np.int32), self.params
        )
        observation = _to_host(observation, self.single_observation_space)
        self.env.evaluator.check()
        last = _to_host(info.pop("final_obs"), self.single_observation_space)
        infos = jax.tree.map(np.asarray, info)
        self._shown = dict(infos)
        terminated, truncated = np.asarray(terminated), np.asarray(truncated)
        infos.update(final_obs=last, _final_obs=terminated | truncated)
        return observation, np.asarray(reward), terminated, truncated, infos

    def render(self) -> tuple[str | np.ndarray, ...]:
        """The crystal of each lane, as :meth:`GymnasiumEnv.render`; of a lane that has just ended, the finished one."""
        if self._state is None:
            raise gymnasium.error.ResetNeeded("call reset() before render()")
        shown = jax.tree.map(np.asarray, self._shown)
        lanes = [jax.tree.map(lambda leaf, lane=lane: leaf[lane], shown) for lane in range(self.num_envs)]
        return tuple(_render(self.env, self.params, of_lane, self.render_mode) for of_lane in lanes)


class FiveTupleEnv:
    """The environment with the five-value ``step`` of gymnax 0.0.x: (observation, state, reward, done, info).

    Deep-copyable; everything else is the wrapped environment's.
    """

    def __init__(self, env: CrystalEnv):
        self._env = env

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FiveTupleEnv) and self._env == other._env

    def __hash__(self) -> int:
        return hash((FiveTupleEnv, self._env))

    def __getattr__(self, name: str) -> Any:
        # copy and pickle look for dunder methods before _env exists.
        if name.startswith("__") or name == "_env":
            raise AttributeError(name)
        return getattr(self._env, name)

    @property
    def default_params(self) -> EnvParams:
        return self._env.default_params

    @partial(jax.jit, static_argnames=("self",))
    def reset(self, key: jax.Array, params: EnvParams | None = None) -> tuple[Any, Any]:
        """As the wrapped environment's."""
        return self._env.reset(key, params)

    @partial(jax.jit, static_argnames=("self",))
    def step(
        self, key: jax.Array, state: Any, action: int | jax.Array, params: EnvParams | None = None
    ) -> tuple[Any, Any, jax.Array, jax.Array, dict[str, Any]]:
        """As the wrapped environment's, with ``done = terminated | truncated``."""
        observation, state, reward, terminated, truncated, info = self._env.step(key, state, action, params)
        return observation, state, reward, terminated | truncated, info


def make_gymnasium(
    task_id: str,
    evaluator: Any = None,
    target: float | None = None,
    render_mode: str | None = None,
    **options: Any,
) -> GymnasiumEnv:
    """A registered task as a Gymnasium environment; arguments as :func:`crystaljax.make` and :class:`GymnasiumEnv`.

    Raises:
        ValueError: for structures of one's own whose episodes the registered limit would cut off.
    """
    if _forked_from_jax:  # only good for its spaces, so that reset() can tell the process that waits for it
        evaluator = Deferred()
    env, params = make(task_id, evaluator, target=target, **options)
    limit = task(task_id).max_episode_steps
    if env.horizon >= limit:
        raise ValueError(
            f"these structures take {env.horizon} steps, and gymnasium.make cuts episodes of {task_id} off after "
            f"{limit}; use crystaljax.adapters.GymnasiumEnv(*crystaljax.make(...)), which does not"
        )
    return GymnasiumEnv(env, params, render_mode)


make_gymnasium.metadata = GymnasiumEnv.metadata  # where gymnasium.make looks for the render modes


def make_gymnasium_vector(
    task_id: str,
    num_envs: int = 1,
    evaluator: Any = None,
    target: float | None = None,
    render_mode: str | None = None,
    max_episode_steps: int | None = None,
    **options: Any,
) -> GymnasiumVectorEnv:
    """A registered task as a Gymnasium vector environment; arguments as :func:`make_gymnasium`.

    ``max_episode_steps`` cuts episodes off; the registered number cuts none off, whatever the structures.
    """
    env, params = make(task_id, evaluator, target=target, **options)
    if max_episode_steps not in (None, -1, task(task_id).max_episode_steps):
        params = dataclasses.replace(params, max_steps_in_episode=max_episode_steps)
    return GymnasiumVectorEnv(env, num_envs, params, render_mode)
