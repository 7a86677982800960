"""Simulated annealing (Kirkpatrick et al. 1983): in each lane a walk from crystal to crystal, one element at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from crystaljax.agents.base import Agent, Records
from crystaljax.agents.designs import Designs, evaluate, identity, random_designs, renewed, replace_gene
from crystaljax.agents.hyperparameters import AnnealingConfig
from crystaljax.env import CrystalEnv, EnvParams

MOVES_TO_BE_NEW = 10
"""How often a crystal that was evaluated before is changed once more, with a memory."""


@struct.dataclass
class AnnealingState:
    """Everything that the next update depends on; L lanes, room for M crystals, for one without a memory.

    Attributes:
        update: int32 [], updates done.
        key: of the next update.
        env_params: parameters of the environment.
        designs: where the walks stand, leaves [L, ...].
        reward: float32 [L], of these crystals; minus infinity before they are evaluated.
        best: float32 [L], the best reward of each walk, and
        idle: int32 [L], moves since it was found.
        seen: int32 [M, N + 1], identities of all crystals that were evaluated; -1 where there is none yet.
    """

    update: jax.Array
    key: jax.Array
    env_params: EnvParams
    designs: Designs
    reward: jax.Array
    best: jax.Array
    idle: jax.Array
    seen: jax.Array


def accept(key: jax.Array, reward: jax.Array, proposed: jax.Array, temperature: jax.Array) -> jax.Array:
    """Metropolis: bool, shape of ``reward``; a worse reward passes with probability exp(difference / temperature)."""
    drawn = jax.random.uniform(key, reward.shape, minval=jnp.finfo(jnp.float32).tiny)
    return proposed - reward >= temperature * jnp.log(drawn)


def make_annealing(config: AnnealingConfig, env: CrystalEnv, trunk: Any = None) -> Agent:
    """Simulated annealing on an environment; needs no network. A walk keeps the skeleton that it starts with."""
    del trunk
    room = config.updates * config.lanes if config.remember else 1  # an array of no size cannot be saved
    name = jax.vmap(partial(identity, env))

    def init(key: jax.Array, env_params: EnvParams) -> AnnealingState:
        key, first_key = jax.random.split(key)
        designs = random_designs(first_key, env, config.lanes)
        env_params = jax.tree.map(jnp.asarray, env_params)
        nothing = jnp.full(config.lanes, -jnp.inf, jnp.float32)
        seen = jnp.full((room, env.max_sites + 1), -1, jnp.int32)
        idle = jnp.zeros(config.lanes, jnp.int32)
        return AnnealingState(jnp.int32(0), key, env_params, designs, nothing, nothing, idle, seen)

    def update(state: AnnealingState) -> tuple[AnnealingState, dict[str, jax.Array], Records]:
        key, move_key, accept_key = jax.random.split(state.key, 3)
        designs, reward, best, idle = state.designs, state.reward, state.best, state.idle
        if config.patience is not None:
            again = idle >= config.patience
            fresh = random_designs(jax.random.fold_in(move_key, 1), env, config.lanes)
            designs = Designs(jnp.where(again[:, None], fresh.genes, designs.genes), designs.skeleton)
            reward, best = jnp.where(again, -jnp.inf, reward), jnp.where(again, -jnp.inf, best)
            idle = jnp.where(again, 0, idle)
        moved = jax.vmap(replace_gene, in_axes=(0, None, 0))(jax.random.split(move_key, config.lanes), env, designs)
        begins = reward == -jnp.inf  # where the walk has not begun, its first crystal comes first
        genes = jnp.where(begins[:, None], designs.genes, moved.genes)
        proposed = designs._replace(genes=genes)
        if config.remember:
            proposed = renewed(jax.random.fold_in(move_key, 2), env, proposed, state.seen, MOVES_TO_BE_NEW)
        new_reward, records = evaluate(env, state.env_params, proposed)
        temperature = config.temperature * jnp.maximum(1.0 - state.update / config.updates, 0.0)
        taken = accept(accept_key, reward, new_reward, temperature)
        designs = designs._replace(genes=jnp.where(taken[:, None], proposed.genes, designs.genes))
        idle = jnp.where(new_reward > best, 0, idle + 1)
        best = jnp.maximum(best, new_reward)
        reward = jnp.where(taken, new_reward, reward)
        seen = state.seen
        if config.remember:
            seen = jax.lax.dynamic_update_slice_in_dim(seen, name(proposed), state.update * config.lanes, axis=0)
        losses = {"temperature": temperature, "accepted": taken.mean(), "walk_reward": reward.mean()}
        after = AnnealingState(state.update + 1, key, state.env_params, designs, reward, best, idle, seen)
        return after, losses, records

    return Agent(init, update, env.horizon, config.lanes)
