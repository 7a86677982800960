"""Bayesian optimisation by Optuna: a tree-structured Parzen estimator (Bergstra et al. 2011) proposes the crystals.

What was evaluated is part of the train state. Each update hands it to the host, where a fresh study is made of it and
asked for the next crystals: a pure function of state and key, so that a run resumes exactly and seeds can be mapped.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from crystaljax.agents.base import Agent, Records
from crystaljax.agents.designs import Designs, evaluate, random_designs
from crystaljax.agents.hyperparameters import BayesianConfig
from crystaljax.env import CrystalEnv, EnvParams


@struct.dataclass
class BayesianState:
    """Everything that the next update depends on; room for M crystals.

    Attributes:
        update: int32 [], updates done; each has added ``lanes`` crystals to the history.
        key: of the next update.
        env_params: parameters of the environment.
        designs: crystals evaluated so far, leaves [M, ...].
        reward: float32 [M], theirs.
    """

    update: jax.Array
    key: jax.Array
    env_params: EnvParams
    designs: Designs
    reward: jax.Array


def propose(
    config: BayesianConfig, sizes: tuple[int, int], genes: Any, skeleton: Any, reward: Any, count: Any, seed: Any
) -> tuple[np.ndarray, np.ndarray]:
    """What Optuna would evaluate next: genes int32 [L, N] and skeletons int32 [L]. On the host.

    Args:
        sizes: numbers of elements and of skeletons to choose from.
        genes, skeleton, reward: the history, [M, N], [M] and [M].
        count: crystals in it.
        seed: uint32.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    genes, skeleton, reward = np.asarray(genes), np.asarray(skeleton), np.asarray(reward)
    elements, skeletons = (optuna.distributions.CategoricalDistribution(tuple(range(size))) for size in sizes)
    space = {f"gene {place}": elements for place in range(genes.shape[1])} | {"skeleton": skeletons}

    def trial(row: int) -> optuna.trial.FrozenTrial:
        chosen = [*genes[row].tolist(), int(skeleton[row])]
        params = dict(zip(space, chosen, strict=True))
        return optuna.trial.create_trial(params=params, distributions=space, value=float(reward[row]))

    sampler = optuna.samplers.TPESampler(
        n_startup_trials=config.startup,
        n_ei_candidates=config.candidates,
        multivariate=True,
        constant_liar=True,  # the crystals of a batch keep away from each other
        seed=int(seed),
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trials([trial(row) for row in range(int(count))])
    asked = [list(study.ask(space).params.values()) for _ in range(config.lanes)]
    asked = np.array(asked, np.int32)
    return asked[:, :-1], asked[:, -1]


def make_bayesian(config: BayesianConfig, env: CrystalEnv, trunk: Any = None) -> Agent:
    """Bayesian optimisation on an environment; needs no network.

    Raises:
        ModuleNotFoundError: without Optuna, which comes with the extra ``bo``.
    """
    import optuna  # noqa: F401  (missed here rather than in the middle of a run)

    del trunk
    room = config.updates * config.lanes

    def init(key: jax.Array, env_params: EnvParams) -> BayesianState:
        empty = jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: random_designs(key, env, room)))
        env_params = jax.tree.map(jnp.asarray, env_params)
        return BayesianState(jnp.int32(0), key, env_params, empty, jnp.full(room, -jnp.inf, jnp.float32))

    def update(state: BayesianState) -> tuple[BayesianState, dict[str, jax.Array], Records]:
        key, seed_key = jax.random.split(state.key)
        count = state.update * config.lanes
        shapes = jax.eval_shape(lambda: tuple(random_designs(key, env, config.lanes)))
        ask = partial(propose, config, (env.num_actions, len(env.skeletons)))
        seed = jax.random.bits(seed_key, (), jnp.uint32)
        designs = Designs(
            *jax.pure_callback(ask, shapes, *state.designs, state.reward, count, seed, vmap_method="sequential")
        )
        reward, records = evaluate(env, state.env_params, designs)
        history = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, count, axis=0),
            (state.designs, state.reward),
            (designs, reward),
        )
        return BayesianState(state.update + 1, key, state.env_params, *history), {}, records

    return Agent(init, update, env.horizon, config.lanes)
