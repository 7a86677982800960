"""Steps of an environment in all lanes, as every algorithm collects them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from crystaljax.agents.base import Records
from crystaljax.delayed import DelayedRewards
from crystaljax.env import CrystalEnv, EnvParams


class Lanes(NamedTuple):
    """Where L environments stand; leaves [L, ...]."""

    observation: Any
    env_state: Any


@struct.dataclass
class Transition:
    """One step.

    Attributes:
        observation: what ``action`` answered.
        action: int32.
        reward: float32.
        terminated: bool, the episode came to its end, so that nothing is left to earn.
        done: bool, terminated or cut off.
        after: the observation that followed, before any reset.
        ticket: int32, of a reward that comes later; ``None`` where none does, see :mod:`crystaljax.delayed`.
    """

    observation: Any
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    done: jax.Array
    after: Any
    ticket: jax.Array | None = None


def first_lanes(env: CrystalEnv | DelayedRewards, env_params: EnvParams, key: jax.Array, lanes: int) -> Lanes:
    """Fresh episodes in ``lanes`` lanes."""
    keys = jax.random.split(key, lanes)
    if isinstance(env, DelayedRewards):  # whose lanes have tickets of their own
        return Lanes(*jax.vmap(env.reset, in_axes=(0, None, 0))(keys, env_params, jnp.arange(lanes)))
    return Lanes(*jax.vmap(env.reset, in_axes=(0, None))(keys, env_params))


def rollout(
    env: CrystalEnv | DelayedRewards,
    env_params: EnvParams,
    lanes: Lanes,
    key: jax.Array,
    steps: int,
    choose: Callable[[jax.Array, Lanes], tuple[jax.Array, Any]],
) -> tuple[Lanes, Transition, Any, Records]:
    """``steps`` steps of every lane.

    Args:
        choose: (key, :class:`Lanes`) to (actions int32 [L], anything else to keep of the choice).

    Returns:
        The lanes after it; transitions, what else was kept, and records, leaves [T, L, ...].
    """
    step = jax.vmap(env.step, in_axes=(0, 0, 0, None))

    def one_step(lanes: Lanes, key: jax.Array) -> tuple[Lanes, tuple[Transition, Any, dict[str, Any]]]:
        action_key, env_key = jax.random.split(key)
        action, kept = choose(action_key, lanes)
        action = action.astype(jnp.int32)  # a draw or an argmax is 64 bits wide where JAX has them enabled
        keys = jax.random.split(env_key, action.shape[0])
        observation, env_state, reward, terminated, truncated, info = step(keys, lanes.env_state, action, env_params)
        done = terminated | truncated
        after, ticket = info["final_observation"], info.get("ticket")
        transition = Transition(lanes.observation, action, reward, terminated, done, after, ticket)
        return Lanes(observation, env_state), (transition, kept, info)

    lanes, (transitions, kept, info) = jax.lax.scan(one_step, lanes, jax.random.split(key, steps))
    return lanes, transitions, kept, Records.of_step(env, transitions.reward, transitions.done, info)
