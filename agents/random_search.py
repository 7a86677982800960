"""The random baseline: every element is drawn uniformly from the vocabulary."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from agents.base import Agent, Records
from crystaljax.env import CrystalEnv, EnvParams


@dataclasses.dataclass(frozen=True)
class RandomConfig:
    """Attributes: ``lanes``, environments in parallel; ``steps``, steps per lane and update."""

    lanes: int = 16
    steps: int = 32


@struct.dataclass
class RandomState:
    """Everything that the next update depends on: updates done, key, and where the lanes stand."""

    update: jax.Array
    key: jax.Array
    env_params: EnvParams
    env_state: Any


def make_random_search(config: RandomConfig, env: CrystalEnv) -> Agent:
    """Uniform random actions on an environment, behind the interface of the learning agents."""
    step = jax.vmap(env.step, in_axes=(0, 0, 0, None))

    def init(key: jax.Array, env_params: EnvParams) -> RandomState:
        key, reset_key = jax.random.split(key)
        keys = jax.random.split(reset_key, config.lanes)
        _, env_state = jax.vmap(env.reset, in_axes=(0, None))(keys, env_params)
        return RandomState(jnp.int32(0), key, jax.tree.map(jnp.asarray, env_params), env_state)

    def update(state: RandomState) -> tuple[RandomState, dict[str, jax.Array], Records]:
        def one_step(env_state: Any, key: jax.Array) -> tuple[Any, Records]:
            action_key, env_key = jax.random.split(key)
            action = jax.random.randint(action_key, (config.lanes,), 0, env.num_actions)
            keys = jax.random.split(env_key, config.lanes)
            _, env_state, reward, terminated, truncated, info = step(keys, env_state, action, state.env_params)
            return env_state, Records.of_step(reward, terminated | truncated, info)

        key, rollout_key = jax.random.split(state.key)
        env_state, records = jax.lax.scan(one_step, state.env_state, jax.random.split(rollout_key, config.steps))
        return state.replace(update=state.update + 1, key=key, env_state=env_state), {}, records

    return Agent(init, update, config.steps, config.lanes)
