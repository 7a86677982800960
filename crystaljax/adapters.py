"""The environment for clients of other interfaces: Gymnasium (single and vector) and the older five-tuple step."""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium
import jax
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from gymnax.environments import spaces

from crystaljax.env import CrystalEnv, EnvParams
from crystaljax.observation import GraphObservation
from crystaljax.tasks import make


def to_gymnasium_space(space: spaces.Space) -> gymnasium.Space:
    """The Gymnasium space that holds the same values; masks become ``MultiBinary``."""
    if isinstance(space, spaces.Discrete):
        return gymnasium.spaces.Discrete(space.n)
    if isinstance(space, spaces.Dict):
        return gymnasium.spaces.Dict({key: to_gymnasium_space(value) for key, value in space.spaces.items()})
    if space.dtype == np.bool_:
        return gymnasium.spaces.MultiBinary(space.shape)
    return gymnasium.spaces.Box(space.low, space.high, space.shape, np.dtype(space.dtype))


def to_numpy(observation: Any) -> Any:
    """An observation as Gymnasium wants it: a NumPy array, or a dict of them (masks as int8)."""
    if not isinstance(observation, GraphObservation):
        return np.asarray(observation)
    fields = {key: np.asarray(value) for key, value in vars(observation).items()}
    return {key: value.astype(np.int8) if value.dtype == np.bool_ else value for key, value in fields.items()}


def _seed(random: np.random.Generator) -> jax.Array:
    return jax.random.key(int(random.integers(2**31)))


class GymnasiumEnv(gymnasium.Env):
    """One environment for Gymnasium clients.

    ``step`` raises ``ValueError`` for an action outside the space, and, with its own type, whatever an evaluator
    could not raise on the device (a missing engine, a full disk).
    """

    metadata = {"render_modes": []}

    def __init__(self, env: CrystalEnv, params: EnvParams | None = None):
        self.env = env
        self.params = env.default_params if params is None else params
        self.action_space = to_gymnasium_space(env.action_space(self.params))
        self.observation_space = to_gymnasium_space(env.observation_space(self.params))
        self._key: jax.Array | None = None
        self._state: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """A fresh episode; ``options={"target": x}`` changes the target from now on."""
        super().reset(seed=seed)
        if options and "target" in options:
            self.params = self.env.with_target(options["target"])
        if seed is not None or self._key is None:
            self._key = _seed(self.np_random)
        self._key, key = jax.random.split(self._key)
        observation, self._state = self.env.reset(key, self.params)
        return to_numpy(observation), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self._state is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        if not self.action_space.contains(action):
            raise ValueError(f"action {action!r} is not an integer in [0, {self.action_space.n})")
        self._key, key = jax.random.split(self._key)
        _, self._state, reward, terminated, truncated, info = self.env.step(
            key, self._state, np.int32(action), self.params
        )
        observation = to_numpy(info.pop("final_observation"))  # Gymnasium resets by itself
        self.env.evaluator.check()
        info = {name: np.asarray(value) for name, value in info.items()}
        return observation, float(reward), bool(terminated), bool(truncated), info


class GymnasiumVectorEnv(VectorEnv):
    """Many environments in one compiled program, for Gymnasium clients.

    Lanes reset themselves in the step that ends them (``AutoresetMode.SAME_STEP``): ``infos["final_obs"]`` holds the
    last observations where ``infos["_final_obs"]`` is true.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, env: CrystalEnv, num_envs: int = 1, params: EnvParams | None = None):
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}; at least 1 is needed")
        self.env = env
        self.num_envs = num_envs
        self.params = env.default_params if params is None else params
        self.single_action_space = to_gymnasium_space(env.action_space(self.params))
        self.single_observation_space = to_gymnasium_space(env.observation_space(self.params))
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._reset = jax.jit(jax.vmap(env.reset, in_axes=(0, None)))
        self._step = jax.jit(jax.vmap(env.step, in_axes=(0, 0, 0, None)))
        self._key: jax.Array | None = None
        self._state: Any = None

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Fresh episodes in every lane; one seed for all lanes, or a list with one for each."""
        if isinstance(seed, list):
            if len(seed) != self.num_envs:
                raise ValueError(f"{len(seed)} seeds for {self.num_envs} environments; give one each, or one in all")
            keys = jax.vmap(jax.random.key)(np.array(seed, dtype=np.uint32))
            super().reset(seed=seed[0])
        else:
            super().reset(seed=seed)
            keys = jax.random.split(_seed(self.np_random), self.num_envs)
        if options and "target" in options:
            self.params = self.env.with_target(options["target"])
        self._key = jax.random.fold_in(keys[0], self.num_envs)  # the lanes' own keys are spent by their resets
        observation, self._state = self._reset(keys, self.params)
        return to_numpy(observation), {}

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        if self._state is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        actions = np.asarray(actions)
        if not self.action_space.contains(actions.astype(self.action_space.dtype)) or actions.dtype.kind not in "iu":
            raise ValueError(f"actions must be {self.num_envs} integers in [0, {self.single_action_space.n})")
        self._key, key = jax.random.split(self._key)
        observation, self._state, reward, terminated, truncated, info = self._step(
            jax.random.split(key, self.num_envs), self._state, actions.astype(np.int32), self.params
        )
        last = to_numpy(info.pop("final_observation"))
        self.env.evaluator.check()
        infos = {name: np.asarray(value) for name, value in info.items()}
        terminated, truncated = np.asarray(terminated), np.asarray(truncated)
        infos.update(final_obs=last, _final_obs=terminated | truncated)
        return to_numpy(observation), np.asarray(reward), terminated, truncated, infos


class FiveTupleEnv:
    """The environment with the five-value ``step`` of gymnax 0.0.x: (observation, state, reward, done, info).

    Deep-copyable; everything else is the wrapped environment's.
    """

    def __init__(self, env: CrystalEnv):
        self._env = env

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


def make_gymnasium(task_id: str, evaluator: Any = None, target: float | None = None, **options: Any) -> GymnasiumEnv:
    """A registered task as a Gymnasium environment; arguments as :func:`crystaljax.make`."""
    return GymnasiumEnv(*make(task_id, evaluator, target=target, **options))


def make_gymnasium_vector(
    task_id: str, num_envs: int = 1, evaluator: Any = None, target: float | None = None, **options: Any
) -> GymnasiumVectorEnv:
    """A registered task as a Gymnasium vector environment; arguments as :func:`crystaljax.make`."""
    env, params = make(task_id, evaluator, target=target, **options)
    return GymnasiumVectorEnv(env, num_envs, params)
