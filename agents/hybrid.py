"""A genetic algorithm seeds a policy: its best crystals are cloned, and PPO takes over from there.

Both parts act in the same rollout, one episode per lane and update. In the first part of the training the lanes build
the children of a genetic algorithm; then the policy learns, by cross-entropy, to build the crystals of the population;
then it acts, and PPO trains it. The population goes on taking in what the policy finds.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from crystaljax.agents.base import Agent, Records, learn_if
from crystaljax.agents.designs import Designs, next_gene
from crystaljax.agents.genetic import Population, breed, first_population, survive
from crystaljax.agents.hyperparameters import HybridConfig, PPOConfig, PPOSettings
from crystaljax.agents.ppo import PPO, TrainState, make_learner
from crystaljax.agents.rollout import Lanes, first_lanes, rollout
from crystaljax.env import CrystalEnv, EnvParams, EnvState

CLONE_BATCH = 128
"""Decisions in a gradient step of the cloning."""


@struct.dataclass
class HybridState(TrainState):
    """Everything that the next update depends on: that of PPO and the population."""

    population: Population


def decision(key: jax.Array, env: CrystalEnv, env_params: EnvParams, design: Designs) -> tuple[Any, jax.Array]:
    """A random moment of an episode that builds a crystal: the observation, and the action to carry on with."""
    start_key, time_key, blank_key = jax.random.split(key, 3)
    row = env.table.row(design.skeleton)
    start = jax.random.randint(start_key, (), 0, row.n_sites, jnp.int32)
    time = jax.random.randint(time_key, (), 0, row.n_decisions, jnp.int32)
    decided = (row.order[start] == row.group[:, None]) & (jnp.arange(env.max_sites) < time)
    undecided = jnp.full(env.max_sites, env.vocabulary.blank, jnp.int32)
    if env.mode == "substitution":
        drawn = jax.random.randint(blank_key, undecided.shape, 0, env.num_actions, jnp.int32)
        undecided = jnp.where(row.site_mask, drawn, undecided)
    elements = jnp.where(decided.any(axis=1) & row.site_mask, design.genes[row.group], undecided)
    state = EnvState(time, elements, design.skeleton, start)
    action = next_gene(env, design.genes, state)
    return env.observe(key, state, action, env_params), action


def clone(
    key: jax.Array,
    env: CrystalEnv,
    env_params: EnvParams,
    ppo: PPO,
    network: Any,
    population: Population,
    config: HybridConfig,
) -> Any:
    """The network after ``clone_steps`` steps towards a policy that builds the crystals of a population."""
    optimizer = optax.adam(config.clone_rate)
    weights = jnp.where(jnp.isfinite(population.reward), 0.0, -jnp.inf)

    def loss(network: Any, observation: Any, action: jax.Array) -> jax.Array:
        logits = jax.vmap(ppo.policy, in_axes=(None, 0))(network, observation)
        return optax.softmax_cross_entropy_with_integer_labels(logits, action).mean()

    def step(carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], None]:
        network, optimizer_state = carry
        member_key, key = jax.random.split(key)
        member = jax.random.categorical(member_key, weights, shape=(CLONE_BATCH,))
        designs = jax.tree.map(lambda leaf: leaf[member], population.designs)
        keys = jax.random.split(key, CLONE_BATCH)
        observation, action = jax.vmap(lambda key, one: decision(key, env, env_params, one))(keys, designs)
        gradient = jax.grad(loss)(network, observation, action)
        change, optimizer_state = optimizer.update(gradient, optimizer_state)
        return (optax.apply_updates(network, change), optimizer_state), None

    carry = network, optimizer.init(network)
    return jax.lax.scan(step, carry, jax.random.split(key, config.clone_steps))[0][0]


def make_hybrid(config: HybridConfig, env: CrystalEnv, trunk: nn.Module | None = None) -> Agent:
    """The hybrid on an environment, one episode per lane and update.

    Raises:
        ValueError: if the lanes would not finish together.
    """
    if not env.in_phase and len(set(env.horizons.tolist())) > 1:
        raise ValueError("the skeletons have different numbers of sites: make the environment with in_phase=True")
    searching = round(config.seeding * config.updates)
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(PPOSettings)}
    ppo = make_learner(
        PPOConfig(**shared, lanes=config.lanes, steps=env.horizon, updates=max(config.updates - searching, 1)),
        env,
        trunk,
    )

    def init(key: jax.Array, env_params: EnvParams) -> HybridState:
        key, network_key, reset_key, first_key = jax.random.split(key, 4)
        lanes = first_lanes(env, env_params, reset_key, config.lanes)
        learned = ppo.init(network_key, jax.tree.map(lambda leaf: leaf[0], lanes.observation))
        population = first_population(first_key, env, config.population)
        env_params = jax.tree.map(jnp.asarray, env_params)
        return HybridState(jnp.int32(0), key, *learned, env_params, lanes, population)

    def update(state: HybridState) -> tuple[HybridState, dict[str, jax.Array], Records]:
        key, breed_key, rollout_key, learn_key, clone_key = jax.random.split(state.key, 5)
        is_search = state.update < searching
        children = breed(breed_key, env, state.population, config.lanes, config)

        def choose(key: jax.Array, lanes: Lanes) -> tuple[jax.Array, Any]:
            action, kept = ppo.act(key, state.network, lanes)
            planned = jax.vmap(partial(next_gene, env))(children.genes, lanes.env_state)
            return jnp.where(is_search, planned, action), kept

        lanes, transitions, kept, records = rollout(
            env, state.env_params, state.lanes, rollout_key, env.horizon, choose
        )
        built = jax.tree.map(lambda leaf: leaf[-1], records)
        population = survive(env, state.population, as_designs(env, built), built.reward)

        def learn(learned: tuple[Any, Any]) -> tuple[tuple[Any, Any], dict[str, jax.Array]]:
            *learned, losses = ppo.learn(learn_key, *learned, transitions, kept, lanes, state.env_params)
            return tuple(learned), losses

        (network, optimizer), losses = learn_if(~is_search, learn, (state.network, state.optimizer))
        network = jax.lax.cond(
            state.update + 1 == searching,
            lambda network: clone(clone_key, env, state.env_params, ppo, network, population, config),
            lambda network: network,
            network,
        )
        state = HybridState(state.update + 1, key, network, optimizer, state.env_params, lanes, population)
        return state, losses, records

    return Agent(init, update, env.horizon, config.lanes, ppo.policy, draws=True)


def as_designs(env: CrystalEnv, built: Records) -> Designs:
    """The crystals of records [L, ...] as designs: a decision's gene is the element of the sites that it decided."""

    def genes(elements: jax.Array, skeleton: jax.Array) -> jax.Array:
        row = env.table.row(skeleton)
        return (
            jnp.zeros(env.max_sites, jnp.int32)
            .at[jnp.where(row.site_mask, row.group, env.max_sites)]
            .set(elements, mode="drop")
        )

    return Designs(jax.vmap(genes)(built.elements, built.skeleton), built.skeleton)
