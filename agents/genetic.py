"""A genetic algorithm: tournament selection, uniform crossover, mutation, and the best distinct crystals survive.

The population holds no crystal twice, up to symmetry, and only a better one takes a member's place (elitism).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from crystaljax.agents.base import Agent, Records
from crystaljax.agents.designs import (
    Designs,
    another,
    evaluate,
    identity,
    neutral,
    neutral_designs,
    random_designs,
    renewed,
    repeated,
)
from crystaljax.agents.hyperparameters import GeneticConfig, GeneticSettings
from crystaljax.env import CrystalEnv, EnvParams

MUTATIONS_TO_BE_NEW = 10
"""How often a child that the population knows already is mutated once more."""
SCREENED = 8
"""Children bred for each that is wanted, where they are screened."""


@struct.dataclass
class Population:
    """The best distinct crystals so far, the best one first; P members.

    Attributes:
        designs: leaves [P, ...].
        reward: float32 [P]; minus infinity of those that stand in for crystals yet to come.
    """

    designs: Designs
    reward: jax.Array


@struct.dataclass
class GeneticState:
    """Everything that the next update depends on; room for M crystals, for one without a memory.

    Attributes:
        update, key, env_params: updates done, key, environment parameters.
        population: the best crystals.
        seen: int32 [M, N + 1], identities of all crystals that were evaluated; -1 where there is none yet.
    """

    update: jax.Array
    key: jax.Array
    env_params: EnvParams
    population: Population
    seen: jax.Array


def first_population(key: jax.Array, env: CrystalEnv, size: int) -> Population:
    """Random crystals that nothing is known of."""
    return Population(random_designs(key, env, size), jnp.full(size, -jnp.inf, jnp.float32))


def select(key: jax.Array, reward: jax.Array, count: int, tournament: int) -> jax.Array:
    """int32 [count]: the best of ``tournament`` random members each time, with replacement."""
    drawn = jax.random.randint(key, (count, tournament), 0, reward.shape[0])
    return drawn[jnp.arange(count), jnp.argmax(reward[drawn], axis=1)]


def cross(key: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """Uniform crossover: each gene from either parent with equal probability; shapes of the parents."""
    return jnp.where(jax.random.bernoulli(key, shape=first.shape), first, second)


def mutate(key: jax.Array, env: CrystalEnv, genes: jax.Array, probability: float) -> jax.Array:
    """Each gene replaced by another one with that probability."""
    coin_key, gene_key = jax.random.split(key)
    return jnp.where(jax.random.bernoulli(coin_key, probability, genes.shape), another(gene_key, env, genes), genes)


def breed(
    key: jax.Array,
    env: CrystalEnv,
    population: Population,
    count: int,
    settings: GeneticSettings,
    seen: jax.Array | None = None,
) -> Designs:
    """``count`` children [count, ...]; each has the skeleton of its first parent.

    A child that is a member of the population, or in ``seen`` [M, N + 1], or the same as another one, has one gene more
    replaced, up to ``MUTATIONS_TO_BE_NEW`` times.
    """
    parents_key, coin_key, cross_key, mutate_key, key = jax.random.split(key, 5)
    parents = select(parents_key, population.reward, 2 * count, settings.tournament)
    first, second = (
        jax.tree.map(lambda leaf, half=half: leaf[half], population.designs) for half in parents.reshape(2, -1)
    )
    crossed = jax.random.bernoulli(coin_key, settings.crossover, (count, 1))
    genes = jnp.where(crossed, cross(cross_key, first.genes, second.genes), first.genes)
    children = Designs(mutate(mutate_key, env, genes, settings.mutation), first.skeleton)

    known = jax.vmap(partial(identity, env))(population.designs)
    known = known if seen is None else jnp.concatenate([known, seen])
    return renewed(key, env, children, known, MUTATIONS_TO_BE_NEW)


def screened(env: CrystalEnv, children: Designs, seen: jax.Array, count: int) -> Designs:
    """The first ``count`` of children [L]: those that are new and neutral, then others that are new, then the rest."""
    names = jax.vmap(partial(identity, env))(children)
    best = jnp.argsort(2 * repeated(names, seen) + ~neutral(env, children), stable=True)[:count]
    return jax.tree.map(lambda leaf: leaf[best], children)


def survive(env: CrystalEnv, population: Population, designs: Designs, reward: jax.Array) -> Population:
    """The best of the population and of evaluated crystals [L, ...], each distinct crystal once; members win ties."""
    name = jax.vmap(partial(identity, env))
    unknown = population.reward == -jnp.inf
    # A stand-in may happen to be one of the crystals; it must not keep it out.
    known = jnp.where(unknown[:, None], -1, name(population.designs))
    reward = jnp.where(repeated(name(designs), known), -jnp.inf, reward)
    everyone = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), population, Population(designs, reward))
    best = jax.lax.top_k(everyone.reward, population.reward.shape[0])[1]
    return jax.tree.map(lambda leaf: leaf[best], everyone)


def make_genetic(config: GeneticConfig, env: CrystalEnv, trunk: Any = None) -> Agent:
    """The genetic algorithm on an environment, one generation at a time; needs no network."""
    del trunk

    room = config.updates * config.lanes if config.remember else 1  # an array of no size cannot be saved
    bred = config.lanes * (SCREENED if config.screen else 1)

    def init(key: jax.Array, env_params: EnvParams) -> GeneticState:
        key, first_key = jax.random.split(key)
        env_params = jax.tree.map(jnp.asarray, env_params)
        population = first_population(first_key, env, config.population)
        seen = jnp.full((room, env.max_sites + 1), -1, jnp.int32)
        return GeneticState(jnp.int32(0), key, env_params, population, seen)

    def update(state: GeneticState) -> tuple[GeneticState, dict[str, jax.Array], Records]:
        key, breed_key = jax.random.split(state.key)
        children = breed(breed_key, env, state.population, bred, config, state.seen if config.remember else None)
        if config.screen:
            children = screened(env, children, state.seen, config.lanes)
        if config.first_batch == "neutral":
            first = neutral_designs(breed_key, env, config.lanes)
            children = jax.tree.map(lambda one, other: jnp.where(state.update == 0, one, other), first, children)
        reward, records = evaluate(env, state.env_params, children)
        population = survive(env, state.population, children, reward)
        seen = state.seen
        if config.remember:
            names = jax.vmap(partial(identity, env))(children)
            seen = jax.lax.dynamic_update_slice_in_dim(seen, names, state.update * config.lanes, axis=0)
        known = jnp.isfinite(population.reward)
        losses = {"population_reward": jnp.where(known, population.reward, 0.0).sum() / known.sum()}
        return GeneticState(state.update + 1, key, state.env_params, population, seen), losses, records

    return Agent(init, update, env.horizon, config.lanes)
