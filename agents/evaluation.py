"""What a trained policy designs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from crystaljax.agents.base import Agent, Records
from crystaljax.env import CrystalEnv, EnvParams


def refuse_other_shapes(env: CrystalEnv, agent: Agent, network_params: Any) -> None:
    """Raise ``ValueError`` if trained parameters are not those of this agent on this environment."""
    expected = jax.eval_shape(agent.init, jax.random.key(0), env.default_params).network
    shapes = [jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (expected, network_params)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the policy was not trained for crystals like those of {env.name}: it must have the same vocabulary and, "
            "unless it reads graphs as the transformer does, the same number of sites"
        )


def make_designer(
    env: CrystalEnv, policy: Callable[[Any, Any], jax.Array], episodes: int, greedy: bool = True
) -> Callable[[jax.Array, Any, EnvParams], Records]:
    """A pure function (key, network parameters, environment parameters) to the records of ``episodes`` episodes.

    Every lane plays one episode. ``policy`` is that of an agent; ``greedy`` takes the element of the highest score at
    each step, otherwise the scores are logits from which it is drawn.
    """

    def design(key: jax.Array, network_params: Any, env_params: EnvParams) -> Records:
        reset_key, key = jax.random.split(key)
        first = jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(reset_key, episodes), env_params)

        def one_step(carry: tuple[Any, Any, jax.Array], key: jax.Array) -> tuple[Any, Records]:
            observation, env_state, over = carry
            action_key, env_key = jax.random.split(key)
            scores = jax.vmap(policy, in_axes=(None, 0))(network_params, observation)
            action = jnp.argmax(scores, axis=1) if greedy else jax.random.categorical(action_key, scores)
            keys = jax.random.split(env_key, episodes)
            observation, env_state, reward, terminated, truncated, info = jax.vmap(env.step, in_axes=(0, 0, 0, None))(
                keys, env_state, action, env_params
            )
            finished = (terminated | truncated) & ~over
            return (observation, env_state, over | finished), Records.of_step(env, reward, finished, info)

        nobody = jnp.zeros(episodes, bool)
        return jax.lax.scan(one_step, (*first, nobody), jax.random.split(key, env.horizon))[1]

    return design
