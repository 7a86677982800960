"""Whole crystals, as search algorithms handle them: proposed and evaluated in one batch, compared up to symmetry."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from crystaljax.agents.base import Records
from crystaljax.agents.chemistry import is_neutral
from crystaljax.env import CrystalEnv, EnvParams, EnvState
from crystaljax.symmetry import canonical

NEUTRAL_POOL = 24
"""Random crystals drawn for each neutral one that is wanted; some 13 % are."""


class Designs(NamedTuple):
    """Finished crystals; leaves [...] as many as there are.

    Attributes:
        genes: int32 [..., N], vocabulary index of each decision (a site, or an orbit); meaningless beyond a skeleton's
            decisions.
        skeleton: int32 [...], index into the environment's skeletons.
    """

    genes: jax.Array
    skeleton: jax.Array


def random_designs(key: jax.Array, env: CrystalEnv, count: int) -> Designs:
    """Every skeleton and every element with equal probability; leaves [count, ...]."""
    genes_key, skeleton_key = jax.random.split(key)
    genes = jax.random.randint(genes_key, (count, env.max_sites), 0, env.num_actions, jnp.int32)
    return Designs(genes, jax.random.randint(skeleton_key, (count,), 0, len(env.skeletons), jnp.int32))


def elements(env: CrystalEnv, design: Designs) -> jax.Array:
    """Vocabulary index of each site of one crystal, int32 [N]; the blank on padding."""
    row = env.table.row(design.skeleton)
    return jnp.where(row.site_mask, design.genes[row.group], env.vocabulary.blank)


def identity(env: CrystalEnv, design: Designs) -> jax.Array:
    """int32 [N + 1], equal for equal crystals: the canonical labeling and the skeleton."""
    labeling = canonical(elements(env, design), env.table.row(design.skeleton).permutations)
    return jnp.append(labeling, design.skeleton)


def evaluate(env: CrystalEnv, env_params: EnvParams, designs: Designs) -> tuple[jax.Array, Records]:
    """Rewards float32 [L] of crystals [L], all in one batch, and records [1, L, ...].

    Each takes the last step of its episode, as the environment would be before it.
    """

    def last_step(design: Designs) -> tuple[jax.Array, Records]:
        row = env.table.row(design.skeleton)
        time = (env.horizon if env.in_phase else row.n_decisions) - 1
        state = EnvState(jnp.int32(time), elements(env, design), design.skeleton, start=jnp.int32(0))
        action = next_gene(env, design.genes, state)
        _, _, reward, finished, info = env.step_env(jax.random.key(0), state, action, env_params)
        return reward, Records.of_step(env, reward, finished, info)

    reward, records = jax.vmap(last_step)(designs)
    return reward, jax.tree.map(lambda leaf: leaf[None], records)


def next_gene(env: CrystalEnv, genes: jax.Array, state: EnvState) -> jax.Array:
    """The action int32 [] that carries on with a crystal of these genes [N] in an episode's state."""
    order = env.table.row(state.skeleton).order[state.start]
    return genes[order[jnp.minimum(state.time, env.max_sites - 1)]]


def replace_gene(key: jax.Array, env: CrystalEnv, design: Designs) -> Designs:
    """One crystal with another element in one of its decisions."""
    place_key, gene_key = jax.random.split(key)
    place = jax.random.randint(place_key, (), 0, env.table.row(design.skeleton).n_decisions)
    return design._replace(genes=design.genes.at[place].set(another(gene_key, env, design.genes[place])))


def renewed(key: jax.Array, env: CrystalEnv, designs: Designs, known: jax.Array, tries: int) -> Designs:
    """Crystals [L] of which each that is in ``known`` [M, N + 1], or came before, has one gene after another replaced.

    ``tries``: how often, at most; a crystal may then still be known.
    """
    name = jax.vmap(partial(identity, env))

    def renew(designs: Designs, key: jax.Array) -> tuple[Designs, None]:
        keys = jax.random.split(key, len(designs.skeleton))
        changed = jax.vmap(replace_gene, in_axes=(0, None, 0))(keys, env, designs)
        again = repeated(name(designs), known)
        return designs._replace(genes=jnp.where(again[:, None], changed.genes, designs.genes)), None

    return jax.lax.scan(renew, designs, jax.random.split(key, tries))[0]


def neutral(env: CrystalEnv, designs: Designs) -> jax.Array:
    """bool [L]: which crystals have a formula that is neutral by common oxidation states."""
    labels = jax.vmap(partial(elements, env))(designs)
    return is_neutral(jnp.asarray(env.vocabulary.numbers)[labels], jnp)


def neutral_designs(key: jax.Array, env: CrystalEnv, count: int) -> Designs:
    """Random crystals [count], distinct and charge-neutral as far as they can be found; leaves [count, ...]."""
    pool = random_designs(key, env, NEUTRAL_POOL * count)
    names = jax.vmap(partial(identity, env))(pool)
    worse = 2 * repeated(names, names[:0]) + ~neutral(env, pool)
    best = jnp.argsort(worse, stable=True)[:count]
    return jax.tree.map(lambda leaf: leaf[best], pool)


def another(key: jax.Array, env: CrystalEnv, genes: jax.Array) -> jax.Array:
    """Each gene, any shape, replaced by one of the others; unchanged if the vocabulary has no other."""
    shift = jax.random.randint(key, genes.shape, 1, max(env.num_actions, 2), genes.dtype)
    return (genes + shift) % env.num_actions


def repeated(new: jax.Array, known: jax.Array) -> jax.Array:
    """bool [L]: which of the identities ``new`` [L, D] is in ``known`` [M, D], or earlier in ``new``."""
    is_known = (new[:, None] == known[None]).all(axis=-1).any(axis=1)
    same = (new[:, None] == new[None]).all(axis=-1)
    return is_known | jnp.tril(same, k=-1).any(axis=1)
