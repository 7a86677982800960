"""The random baseline: every element is drawn uniformly from the vocabulary."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from crystaljax.agents.base import Agent, Records
from crystaljax.agents.hyperparameters import RandomConfig
from crystaljax.agents.rollout import Lanes, first_lanes, rollout
from crystaljax.env import CrystalEnv, EnvParams


@struct.dataclass
class RandomState:
    """Everything that the next update depends on: updates done, key, and where the lanes stand."""

    update: jax.Array
    key: jax.Array
    env_params: EnvParams
    lanes: Lanes


def make_random_search(config: RandomConfig, env: CrystalEnv, trunk: Any = None) -> Agent:
    """Uniform random actions on an environment, behind the interface of the learning agents; needs no network."""
    del trunk

    def init(key: jax.Array, env_params: EnvParams) -> RandomState:
        key, reset_key = jax.random.split(key)
        lanes = first_lanes(env, env_params, reset_key, config.lanes)
        return RandomState(jnp.int32(0), key, jax.tree.map(jnp.asarray, env_params), lanes)

    def choose(key: jax.Array, lanes: Lanes) -> tuple[jax.Array, tuple[()]]:
        del lanes
        return jax.random.randint(key, (config.lanes,), 0, env.num_actions), ()

    def update(state: RandomState) -> tuple[RandomState, dict[str, jax.Array], Records]:
        key, rollout_key = jax.random.split(state.key)
        lanes, _, _, records = rollout(env, state.env_params, state.lanes, rollout_key, config.steps, choose)
        return state.replace(update=state.update + 1, key=key, lanes=lanes), {}, records

    def deliver(state: RandomState, tickets: jax.Array, rewards: jax.Array) -> RandomState:
        del tickets, rewards  # nothing is remembered, so nothing has been waiting
        return state

    return Agent(init, update, config.steps, config.lanes, deliver=deliver)
