"""Simulated annealing (Kirkpatrick et al. 1983): in each lane a walk from crystal to crystal, one element at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from crystaljax.agents.base import Agent, Records
from crystaljax.agents.designs import Designs, evaluate, random_designs, replace_gene
from crystaljax.agents.hyperparameters import AnnealingConfig
from flax import struct

from crystaljax.env import CrystalEnv, EnvParams


@struct.dataclass
class AnnealingState:
    """Everything that the next update depends on; L lanes.

    Attributes:
        update: int32 [], updates done.
        key: of the next update.
        env_params: parameters of the environment.
        designs: where the walks stand, leaves [L, ...].
        reward: float32 [L], of these crystals; minus infinity before they are evaluated.
    """

    update: jax.Array
    key: jax.Array
    env_params: EnvParams
    designs: Designs
    reward: jax.Array


def accept(key: jax.Array, reward: jax.Array, proposed: jax.Array, temperature: jax.Array) -> jax.Array:
    """Metropolis: bool, shape of ``reward``; a worse reward passes with probability exp(difference / temperature)."""
    drawn = jax.random.uniform(key, reward.shape, minval=jnp.finfo(jnp.float32).tiny)
    return proposed - reward >= temperature * jnp.log(drawn)


def make_annealing(config: AnnealingConfig, env: CrystalEnv, trunk: Any = None) -> Agent:
    """Simulated annealing on an environment; needs no network. A walk keeps the skeleton that it starts with."""
    del trunk

    def init(key: jax.Array, env_params: EnvParams) -> AnnealingState:
        key, first_key = jax.random.split(key)
        designs = random_designs(first_key, env, config.lanes)
        env_params = jax.tree.map(jnp.asarray, env_params)
        return AnnealingState(jnp.int32(0), key, env_params, designs, jnp.full(config.lanes, -jnp.inf, jnp.float32))

    def update(state: AnnealingState) -> tuple[AnnealingState, dict[str, jax.Array], Records]:
        key, move_key, accept_key = jax.random.split(state.key, 3)
        moved = jax.vmap(replace_gene, in_axes=(0, None, 0))(
            jax.random.split(move_key, config.lanes), env, state.designs
        )
        begins = state.reward == -jnp.inf  # where the walk has not begun, its first crystal comes first
        genes = jnp.where(begins[:, None], state.designs.genes, moved.genes)
        proposed = state.designs._replace(genes=genes)
        new_reward, records = evaluate(env, state.env_params, proposed)
        temperature = config.temperature * jnp.maximum(1.0 - state.update / config.updates, 0.0)
        taken = accept(accept_key, state.reward, new_reward, temperature)
        designs = state.designs._replace(genes=jnp.where(taken[:, None], genes, state.designs.genes))
        reward = jnp.where(taken, new_reward, state.reward)
        losses = {"temperature": temperature, "accepted": taken.mean(), "walk_reward": reward.mean()}
        return AnnealingState(state.update + 1, key, state.env_params, designs, reward), losses, records

    return Agent(init, update, env.horizon, config.lanes)
