"""Rainbow (Hessel et al. 2018): double, dueling, n-step and prioritised DQN; noisy layers and C51 as options.

``make_train(config, env, params)`` returns ``train(key)``, which can be compiled, and vmapped over seeds;
``make_rainbow(config, env)`` the same thing one update at a time, as the training runner uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from crystaljax.agents.base import Agent, whole_training
from crystaljax.agents.dqn import chosen, epsilon, explore
from crystaljax.agents.hyperparameters import RainbowConfig
from crystaljax.agents.networks import QValues, make_trunk
from crystaljax.agents.networks.noisy import NOISE
from crystaljax.agents.off_policy import Learner, make_off_policy
from crystaljax.agents.replay import Batch, make_replay
from crystaljax.env import CrystalEnv, EnvParams


def importance_weights(probability: jax.Array, exponent: jax.Array) -> jax.Array:
    """Weights [B] that undo the priorities of a batch, the largest one 1: ``probability^-exponent``, scaled.

    Rounding in the sum tree can draw a step whose probability is 0; its weight is 0.
    """
    drawable = probability > 0
    weights = jnp.where(drawable, jnp.where(drawable, probability, 1.0) ** -exponent, 0.0)
    return weights / weights.max()


def project(atoms: jax.Array, probabilities: jax.Array, support: jax.Array) -> jax.Array:
    """Distributions on ``atoms`` [B, A] as ones on the equally spaced ``support`` [A]; probabilities [B, A].

    Each atom's probability goes to its two neighbours on the support, in proportion to how near they are.
    """
    spacing = support[1] - support[0]
    distance = jnp.abs(jnp.clip(atoms, support[0], support[-1])[:, None, :] - support[None, :, None])
    return (jnp.clip(1.0 - distance / spacing, 0.0, 1.0) * probabilities[:, None, :]).sum(axis=2)


def make_rainbow(config: RainbowConfig, env: CrystalEnv, trunk: nn.Module | None = None) -> Agent:
    """Rainbow on an environment, one update at a time.

    ``trunk`` is the network that reads observations, see :mod:`crystaljax.agents.networks`; by default the one that
    fits them.
    """
    head = {"dueling": config.dueling, "atoms": config.atoms, "noisy": config.noisy}
    network = QValues(trunk or make_trunk(env), env.num_actions, **head)
    optimizer = optax.adam(config.learning_rate)
    support = jnp.linspace(env.objective.failure_reward, env.objective.best_reward, config.atoms)

    def apply(params: Any, observation: Any, key: jax.Array) -> jax.Array:
        """Of one observation: Q values [V] or logits [V, A]; ``key`` is that of the noise."""
        return network.apply(params, observation, rngs={NOISE: key} if config.noisy else None)

    outputs = jax.vmap(apply, in_axes=(None, 0, None))
    """Of a batch, with the same noise for all of it."""

    def mean(output: jax.Array) -> jax.Array:
        """Q values [..., V] of a network's output."""
        return output if config.atoms == 1 else jax.nn.softmax(output) @ support

    def init(key: jax.Array, observation: Any) -> tuple[Any, Any]:
        params = network.init(key, observation)
        return params, (params, optimizer.init(params), jnp.int32(0))

    def act(key: jax.Array, params: Any, observation: Any, progress: jax.Array) -> jax.Array:
        key, noise_key = jax.random.split(key)
        # Every lane has noise of its own, or lanes in equal states would do the same.
        keys = jax.random.split(noise_key, config.lanes)
        best = jnp.argmax(mean(jax.vmap(apply, in_axes=(None, 0, 0))(params, observation, keys)), axis=1)
        return best if config.noisy else explore(key, best, epsilon(progress, config), env.num_actions)

    def goal(key: jax.Array, params: Any, target_params: Any, batch: Batch) -> jax.Array:
        """What the chosen action's output should be: values [B], or probabilities [B, A]."""
        target_key, choice_key = jax.random.split(key)
        after = outputs(target_params, batch.after, target_key)
        chooser = outputs(params, batch.after, choice_key) if config.double else after
        after = chosen(after, jnp.argmax(mean(chooser), axis=1))
        if config.atoms == 1:
            return batch.reward + batch.discount * after
        atoms = batch.reward[:, None] + batch.discount[:, None] * support
        return project(atoms, jax.nn.softmax(after), support)

    def learn(key: jax.Array, params: Any, rest: Any, batch: Batch, progress: jax.Array) -> tuple[Any, ...]:
        target_params, optimizer_state, count = rest
        goal_key, noise_key = jax.random.split(key)
        wanted = goal(goal_key, params, target_params, batch)
        exponent = config.importance + progress * (1.0 - config.importance)
        weights = importance_weights(batch.probability, exponent)

        def loss(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            output = chosen(outputs(params, batch.observation, noise_key), batch.action)
            if config.atoms == 1:
                return (weights * jnp.square(output - wanted)).mean(), (output, output - wanted)
            errors = optax.softmax_cross_entropy(output, wanted)
            return (weights * errors).mean(), (mean(output), errors)

        (error, (value, errors)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        change, optimizer_state = optimizer.update(gradient, optimizer_state)
        params, count = optax.apply_updates(params, change), count + 1
        target_params = optax.periodic_update(params, target_params, count, config.target_every // config.train_every)
        losses = {"loss": error, "q_value": value.mean(), "epsilon": epsilon(progress, config) * (not config.noisy)}
        return params, (target_params, optimizer_state, count), losses, errors

    def policy(params: Any, observation: Any) -> jax.Array:
        return mean(network.apply(params, observation))

    learner = Learner(init, act, learn, policy, draws=False)
    return make_off_policy(config, env, learner, make_replay(config, config.priority_exponent))


def make_train(config: RainbowConfig, env: CrystalEnv, params: EnvParams, trunk: nn.Module | None = None) -> Callable:
    """The whole training as one pure function, see :func:`crystaljax.agents.base.whole_training`."""
    return whole_training(make_rainbow(config, env, trunk), config.updates, params)
