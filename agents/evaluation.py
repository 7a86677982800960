"""What a trained policy designs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from agents.base import Records
from crystaljax.env import CrystalEnv, EnvParams


def refuse_other_shapes(env: CrystalEnv, network: nn.Module, network_params: Any) -> None:
    """Raise ``ValueError`` if trained parameters are not those of this network on this environment."""
    observation = jax.eval_shape(env.reset, jax.random.key(0), env.default_params)[0]
    expected = jax.eval_shape(network.init, jax.random.key(0), observation)
    shapes = [jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (expected, network_params)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the policy was not trained for crystals like those of {env.name}: it must have the same vocabulary and, "
            "unless it reads graphs as the transformer does, the same number of sites"
        )


def make_designer(
    env: CrystalEnv, network: nn.Module, episodes: int, greedy: bool = True
) -> Callable[[jax.Array, Any, EnvParams], Records]:
    """A pure function (key, network parameters, environment parameters) to the records of ``episodes`` episodes.

    Every lane plays one episode. ``greedy`` takes the likeliest element at each step, otherwise it is drawn.
    """

    def design(key: jax.Array, network_params: Any, env_params: EnvParams) -> Records:
        reset_key, key = jax.random.split(key)
        first = jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(reset_key, episodes), env_params)

        def one_step(carry: tuple[Any, Any, jax.Array], key: jax.Array) -> tuple[Any, Records]:
            observation, env_state, over = carry
            action_key, env_key = jax.random.split(key)
            logits, _ = jax.vmap(network.apply, in_axes=(None, 0))(network_params, observation)
            action = jnp.argmax(logits, axis=1) if greedy else jax.random.categorical(action_key, logits)
            keys = jax.random.split(env_key, episodes)
            observation, env_state, reward, terminated, truncated, info = jax.vmap(env.step, in_axes=(0, 0, 0, None))(
                keys, env_state, action, env_params
            )
            finished = (terminated | truncated) & ~over
            return (observation, env_state, over | finished), Records.of_step(reward, finished, info)

        nobody = jnp.zeros(episodes, bool)
        return jax.lax.scan(one_step, (*first, nobody), jax.random.split(key, env.horizon))[1]

    return design
