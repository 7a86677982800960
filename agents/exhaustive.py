"""Exhaustive search: every distinct crystal of the environment is evaluated once, where there are few enough."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from crystaljax.agents.base import Agent, Records
from crystaljax.agents.designs import Designs, evaluate
from crystaljax.agents.hyperparameters import ExhaustiveConfig
from crystaljax.env import CrystalEnv, EnvParams
from crystaljax.skeleton import Skeleton
from crystaljax.symmetry import canonical_numbers, count_distinct

MOST_LABELINGS = 2**25
"""Labelings of a skeleton that are listed to find the distinct ones among them."""


@struct.dataclass
class ExhaustiveState:
    """Everything that the next update depends on: updates done and environment parameters; ``key`` is not used."""

    update: jax.Array
    key: jax.Array
    env_params: EnvParams


def distinct_genes(env: CrystalEnv, skeleton: Skeleton) -> np.ndarray:
    """int32 [D, G]: one choice of elements for the G decisions, for each distinct crystal of a skeleton, in order.

    Raises:
        ValueError: if too many labelings would have to be listed.
    """
    by_orbit, colours = env.mode == "orbit", env.num_actions
    group = skeleton.orbits if by_orbit else np.arange(skeleton.n_sites)
    decisions = int(group.max()) + 1
    if colours**decisions > MOST_LABELINGS:
        raise ValueError(
            f"{skeleton.name} over {colours} elements has {colours**decisions:,} labelings, more than the "
            f"{MOST_LABELINGS:,} that exhaustive search can list; choose a smaller vocabulary or fewer decisions "
            "(mode orbit)"
        )
    small = np.min_scalar_type(colours)
    genes = np.stack(np.unravel_index(np.arange(colours**decisions), (colours,) * decisions), axis=1).astype(small)
    kept, seen = [], set()
    for chunk in np.array_split(genes, max(len(genes) // 2**16, 1)):
        labels = chunk[:, group]
        smallest = canonical_numbers(labels, skeleton.permutations)
        if not by_orbit:  # a labeling that is its own canonical form stands for all its equivalents
            kept.append(chunk[(labels == smallest).all(axis=1)])
            continue
        # The canonical form need not be a labeling by orbits; the first labeling that has it stands for it.
        for row, name in zip(chunk, map(bytes, smallest), strict=True):
            if name not in seen:
                seen.add(name)
                kept.append(row[None])
    return np.concatenate(kept).astype(np.int32)


def all_designs(env: CrystalEnv, most: int) -> Designs:
    """Every distinct crystal of an environment once, leaves [D, ...] on the host.

    Raises:
        ValueError: if there are more than ``most`` of them.
    """

    def refuse(count: int) -> None:
        if count > most:
            raise ValueError(
                f"exhaustive search of {env.name} over {env.num_actions} elements evaluates {count:,} distinct "
                f"crystals, but the run has {most:,} episodes; give --episodes {count}, or choose a smaller "
                "vocabulary or fewer decisions (mode orbit)"
            )

    if env.mode != "orbit":  # counted without listing
        refuse(sum(count_distinct(skeleton.permutations, env.num_actions) for skeleton in env.skeletons))
    designs = list_designs(env)
    refuse(len(designs.skeleton))
    return designs


def list_designs(env: CrystalEnv) -> Designs:
    """Every distinct crystal of an environment once, leaves [D, ...] on the host, however many there are."""
    found = [distinct_genes(env, skeleton) for skeleton in env.skeletons]
    genes = [np.pad(rows, ((0, 0), (0, env.max_sites - rows.shape[1]))) for rows in found]
    skeleton = np.repeat(np.arange(len(found), dtype=np.int32), [len(rows) for rows in found])
    return Designs(np.concatenate(genes), skeleton)


def make_exhaustive(config: ExhaustiveConfig, env: CrystalEnv, trunk: Any = None) -> Agent:
    """Exhaustive search of an environment; needs no network, and does nothing once it is through.

    Raises:
        ValueError: if the run has fewer episodes than there are distinct crystals, with the number.
    """
    del trunk
    designs = all_designs(env, config.updates * config.lanes)
    count = len(designs.skeleton)
    rounds = math.ceil(count / config.lanes)
    designs = jax.tree.map(lambda leaf: jnp.asarray(np.resize(leaf, (rounds * config.lanes, *leaf.shape[1:]))), designs)

    def init(key: jax.Array, env_params: EnvParams) -> ExhaustiveState:
        return ExhaustiveState(jnp.int32(0), key, jax.tree.map(jnp.asarray, env_params))

    def update(state: ExhaustiveState) -> tuple[ExhaustiveState, dict[str, jax.Array], Records]:
        place = state.update * config.lanes + jnp.arange(config.lanes)
        mine = jax.tree.map(lambda leaf: leaf[place % len(leaf)], designs)
        _, records = evaluate(env, state.env_params, mine)
        # The last batch is filled up with crystals that are done already.
        records = records.replace(finished=records.finished & (place < count))
        return state.replace(update=state.update + 1), {"searched": jnp.minimum(place[-1] + 1, count) / count}, records

    return Agent(init, update, env.horizon, config.lanes)
