"""Deep Q-learning (Mnih et al. 2015): a network of Q values, a replay buffer, a target network.

``make_train(config, env, params)`` returns ``train(key)``, which can be compiled, and vmapped over seeds;
``make_dqn(config, env)`` the same thing one update at a time, as the training runner uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from crystaljax.agents.base import Agent, whole_training
from crystaljax.agents.hyperparameters import DQNConfig
from crystaljax.agents.networks import QValues, make_trunk
from crystaljax.agents.off_policy import Learner, make_off_policy
from crystaljax.agents.replay import Batch, make_replay
from crystaljax.env import CrystalEnv, EnvParams


def epsilon(progress: jax.Array, config: DQNConfig) -> jax.Array:
    """Probability of a random action: from 1 down to ``final_epsilon``, linearly, over the exploration."""
    explored = jnp.minimum(progress / jnp.maximum(config.exploration, 1e-9), 1.0)
    return 1.0 + explored * (config.final_epsilon - 1.0)


def explore(key: jax.Array, best: jax.Array, probability: jax.Array, num_actions: int) -> jax.Array:
    """Actions int32 [L]: the best ones, each replaced by a random one with a probability."""
    key, coin_key = jax.random.split(key)
    random = jax.random.randint(key, best.shape, 0, num_actions)
    return jnp.where(jax.random.uniform(coin_key, best.shape) < probability, random, best)


def chosen(values: jax.Array, action: jax.Array) -> jax.Array:
    """The rows of values [B, V, ...] at actions [B]: [B, ...]."""
    return values[jnp.arange(action.shape[0]), action]


def make_dqn(config: DQNConfig, env: CrystalEnv, trunk: nn.Module | None = None) -> Agent:
    """DQN on an environment, one update at a time.

    ``trunk`` is the network that reads observations, see :mod:`crystaljax.agents.networks`; by default the one that
    fits them.
    """
    network = QValues(trunk or make_trunk(env), env.num_actions)
    optimizer = optax.adam(config.learning_rate)
    q_values = jax.vmap(network.apply, in_axes=(None, 0))

    def init(key: jax.Array, observation: Any) -> tuple[Any, Any]:
        params = network.init(key, observation)
        return params, (params, optimizer.init(params), jnp.int32(0))

    def act(key: jax.Array, params: Any, observation: Any, progress: jax.Array) -> jax.Array:
        best = jnp.argmax(q_values(params, observation), axis=1)
        return explore(key, best, epsilon(progress, config), env.num_actions)

    def learn(key: jax.Array, params: Any, rest: Any, batch: Batch, progress: jax.Array) -> tuple[Any, ...]:
        target_params, optimizer_state, count = rest
        goal = batch.reward + batch.discount * q_values(target_params, batch.after).max(axis=1)

        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            value = chosen(q_values(params, batch.observation), batch.action)
            return jnp.square(value - goal).mean(), value

        (error, value), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        change, optimizer_state = optimizer.update(gradient, optimizer_state)
        params, count = optax.apply_updates(params, change), count + 1
        target_params = optax.periodic_update(params, target_params, count, config.target_every // config.train_every)
        losses = {"loss": error, "q_value": value.mean(), "epsilon": epsilon(progress, config)}
        return params, (target_params, optimizer_state, count), losses, value - goal

    learner = Learner(init, act, learn, policy=network.apply, draws=False)
    return make_off_policy(config, env, learner, make_replay(config))


def make_train(config: DQNConfig, env: CrystalEnv, params: EnvParams, trunk: nn.Module | None = None) -> Callable:
    """The whole training as one pure function, see :func:`crystaljax.agents.base.whole_training`."""
    return whole_training(make_dqn(config, env, trunk), config.updates, params)
