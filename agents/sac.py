"""Soft actor-critic for discrete actions (Christodoulou 2019): all expectations over actions are exact sums.

``make_train(config, env, params)`` returns ``train(key)``, which can be compiled, and vmapped over seeds;
``make_sac(config, env)`` the same thing one update at a time, as the training runner uses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from crystaljax.agents.base import Agent, whole_training
from crystaljax.agents.dqn import chosen
from crystaljax.agents.hyperparameters import SACConfig
from crystaljax.agents.networks import ActorCritic, QValues, make_trunk
from crystaljax.agents.off_policy import Learner, make_off_policy
from crystaljax.agents.replay import Batch, make_replay
from crystaljax.env import CrystalEnv, EnvParams


@struct.dataclass
class Critics:
    """All that is learned besides the policy; leaves of the two critics are [2, ...].

    Attributes:
        critics, targets: parameters of the critics and their slowly moving copies.
        log_alpha: float32 [].
        actor_optimizer, critic_optimizer, alpha_optimizer: optax states.
    """

    critics: Any
    targets: Any
    log_alpha: jax.Array
    actor_optimizer: Any
    critic_optimizer: Any
    alpha_optimizer: Any


def alpha_loss(log_alpha: jax.Array, entropy: jax.Array, target: float) -> jax.Array:
    """Its gradient lowers the temperature of a policy that has more entropy than the target, and raises it if less."""
    return jnp.exp(log_alpha) * (entropy - target)


def make_sac(config: SACConfig, env: CrystalEnv, trunk: nn.Module | None = None) -> Agent:
    """Discrete SAC on an environment, one update at a time.

    ``trunk`` is the network that reads observations, see :mod:`crystaljax.agents.networks`; by default the one that
    fits them.
    The actor and both critics have one each. The actor has a value too, which is not used, so that its parameters fit
    PPO's.
    """
    trunk = trunk or make_trunk(env)
    actor, critic = ActorCritic(trunk, env.num_actions), QValues(trunk, env.num_actions)
    optimizer = optax.adam(config.learning_rate)
    target_entropy = config.target_entropy * math.log(env.num_actions)  # positive: entropies are

    def policy(params: Any, observation: Any) -> jax.Array:
        return actor.apply(params, observation)[0]

    log_policy = jax.vmap(lambda params, one: jax.nn.log_softmax(policy(params, one)), in_axes=(None, 0))
    both_critics = jax.vmap(jax.vmap(critic.apply, in_axes=(None, 0)), in_axes=(0, None))
    """([2, ...], observations [B, ...]) to Q values [2, B, V]."""

    def init(key: jax.Array, observation: Any) -> tuple[Any, Critics]:
        actor_key, critic_key = jax.random.split(key)
        params = actor.init(actor_key, observation)
        critics = jax.vmap(critic.init, in_axes=(0, None))(jax.random.split(critic_key), observation)
        log_alpha = jnp.float32(
            math.log(config.alpha) if isinstance(config.alpha, float | int) else jnp.log(config.alpha)
        )
        return params, Critics(critics, critics, log_alpha, *map(optimizer.init, (params, critics, log_alpha)))

    def act(key: jax.Array, params: Any, observation: Any, progress: jax.Array) -> jax.Array:
        return jax.random.categorical(key, log_policy(params, observation))

    def learn(key: jax.Array, params: Any, rest: Critics, batch: Batch, progress: jax.Array) -> tuple[Any, ...]:
        alpha = jnp.exp(rest.log_alpha)
        log_after = log_policy(params, batch.after)
        soft = both_critics(rest.targets, batch.after).min(axis=0) - alpha * log_after
        goal = batch.reward + batch.discount * (jnp.exp(log_after) * soft).sum(axis=1)

        def critic_loss(critics: Any) -> tuple[jax.Array, jax.Array]:
            values = jax.vmap(chosen, in_axes=(0, None))(both_critics(critics, batch.observation), batch.action)
            return jnp.square(values - goal).mean(axis=1).sum(), values

        (critic_error, values), gradient = jax.value_and_grad(critic_loss, has_aux=True)(rest.critics)
        change, critic_optimizer = optimizer.update(gradient, rest.critic_optimizer)
        critics = optax.apply_updates(rest.critics, change)
        best = both_critics(critics, batch.observation).min(axis=0)

        def actor_loss(params: Any) -> tuple[jax.Array, jax.Array]:
            log_probs = log_policy(params, batch.observation)
            probs = jnp.exp(log_probs)
            return (probs * (alpha * log_probs - best)).sum(axis=1).mean(), -(probs * log_probs).sum(axis=1).mean()

        (actor_error, entropy), gradient = jax.value_and_grad(actor_loss, has_aux=True)(params)
        change, actor_optimizer = optimizer.update(gradient, rest.actor_optimizer)
        params = optax.apply_updates(params, change)

        log_alpha, alpha_optimizer = rest.log_alpha, rest.alpha_optimizer
        if config.tune:
            gradient = jax.grad(alpha_loss)(log_alpha, entropy, target_entropy)
            change, alpha_optimizer = optimizer.update(gradient, alpha_optimizer)
            log_alpha = log_alpha + change
        targets = optax.incremental_update(critics, rest.targets, config.smoothing)
        losses = {"loss": critic_error, "policy_loss": actor_error, "entropy": entropy, "alpha": alpha}
        rest = Critics(critics, targets, log_alpha, actor_optimizer, critic_optimizer, alpha_optimizer)
        return params, rest, losses, values[0] - goal

    learner = Learner(init, act, learn, policy, draws=True)
    return make_off_policy(config, env, learner, make_replay(config))


def make_train(config: SACConfig, env: CrystalEnv, params: EnvParams, trunk: nn.Module | None = None) -> Callable:
    """The whole training as one pure function, see :func:`crystaljax.agents.base.whole_training`."""
    return whole_training(make_sac(config, env, trunk), config.updates, params)
