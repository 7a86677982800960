"""Proximal policy optimisation, in the manner of PureJaxRL: rollout, advantages and updates are one program.

``make_train(config, env, params)`` returns ``train(key)``, which can be compiled, and vmapped over seeds.
``make_ppo(config, env)`` returns the same thing in pieces, one update at a time, as the training runner uses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from agents.base import Agent, Records
from agents.networks import make_network
from crystaljax.env import CrystalEnv, EnvParams


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Hyperparameters; the defaults are those of CrystalGym (arXiv 2509.23156).

    Attributes:
        updates: updates in all; the learning rate falls linearly to 0 over them if ``anneal``.
        lanes: environments in parallel.
        steps: steps per lane and update. An update thus sees ``lanes * steps`` steps.
        learning_rate: of Adam, at the first update.
        minibatches: parts into which the steps of an update are shuffled; must divide ``lanes * steps``.
        epochs: passes over the steps of an update.
        discount: gamma.
        trace: lambda of the generalised advantage estimate.
        clip: range of the probability ratio and of the value's change.
        entropy: weight of the entropy bonus.
        value_weight: weight of the value loss.
        max_gradient: largest norm of a gradient.
        min_deviation: advantages are divided by their standard deviation, but at least by this. Where a policy that
            has settled sees equal rewards only, it keeps noise from being blown up to full size.
        target_kl: once the policy has moved this far (nats) from the one that acted, the rest of the update's
            minibatches changes nothing; ``None`` for no such limit.
        anneal: whether the learning rate falls.
    """

    updates: int = 100
    lanes: int = 16
    steps: int = 32
    learning_rate: float = 2.5e-4
    minibatches: int = 2
    epochs: int = 4
    discount: float = 0.99
    trace: float = 0.95
    clip: float = 0.2
    entropy: float = 0.01
    value_weight: float = 0.5
    max_gradient: float = 0.5
    min_deviation: float = 1e-8
    target_kl: float | None = None
    anneal: bool = True

    def __post_init__(self) -> None:
        for name in ("updates", "lanes", "steps", "minibatches", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.learning_rate <= 0:
            raise ValueError(f"learning rate {self.learning_rate} is not positive")
        if self.lanes * self.steps % self.minibatches:
            raise ValueError(
                f"{self.lanes} lanes x {self.steps} steps cannot be split into {self.minibatches} equal minibatches; "
                "choose a divisor"
            )


@struct.dataclass
class TrainState:
    """Everything that the next update depends on; L lanes.

    Attributes:
        update: int32 [], updates done.
        key: of the next update.
        network: parameters of the network.
        optimizer: optax state.
        env_params: parameters of the environment, shared by all lanes.
        env_state, observation: leaves [L, ...], where the lanes stand.
    """

    update: jax.Array
    key: jax.Array
    network: Any
    optimizer: Any
    env_params: EnvParams
    env_state: Any
    observation: Any


@struct.dataclass
class Transition:
    """One step: the action belongs to ``observation``, ``after`` is what followed it, before any reset."""

    observation: Any
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    reward: jax.Array
    terminated: jax.Array
    done: jax.Array
    after: Any


@struct.dataclass
class Sample:
    """What the loss needs of a step."""

    observation: Any
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    advantage: jax.Array
    returns: jax.Array


def advantages(
    reward: jax.Array,
    value: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    done: jax.Array,
    discount: float,
    trace: float,
) -> jax.Array:
    """Generalised advantage estimates (Schulman et al. 2016), all arrays [T, ...].

    ``next_value`` is the value of what followed *before* any reset: it counts after a truncation (the episode would
    have gone on), not after a termination. The trace stops at both.
    """
    error = reward + discount * jnp.where(terminated, 0.0, next_value) - value

    def backwards(later: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        error, done = step
        estimate = error + discount * trace * jnp.where(done, 0.0, later)
        return estimate, estimate

    return jax.lax.scan(backwards, jnp.zeros_like(error[0]), (error, done), reverse=True)[1]


def loss(
    network_params: Any, apply: Callable, batch: Sample, config: PPOConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The clipped loss of a minibatch (leaves [B, ...]), and its parts."""
    logits, value = jax.vmap(apply, in_axes=(None, 0))(network_params, batch.observation)
    log_probs = jax.nn.log_softmax(logits)
    log_prob = jnp.take_along_axis(log_probs, batch.action[:, None], axis=1)[:, 0]
    entropy = -(jnp.exp(log_probs) * log_probs).sum(axis=1).mean()

    deviation = jnp.maximum(batch.advantage.std(), config.min_deviation)
    advantage = (batch.advantage - batch.advantage.mean()) / deviation
    log_ratio = log_prob - batch.log_prob
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
    policy_loss = -jnp.minimum(ratio * advantage, clipped * advantage).mean()

    near = batch.value + jnp.clip(value - batch.value, -config.clip, config.clip)
    value_loss = 0.5 * jnp.maximum(jnp.square(value - batch.returns), jnp.square(near - batch.returns)).mean()

    total = policy_loss + config.value_weight * value_loss - config.entropy * entropy
    return total, {
        "loss": total,
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "clip_fraction": (jnp.abs(ratio - 1) > config.clip).mean(),
    }


def make_optimizer(config: PPOConfig) -> optax.GradientTransformation:
    """Adam behind a clip of the gradient; the learning rate is constant within an update."""
    per_update = config.minibatches * config.epochs

    def schedule(count: jax.Array) -> jax.Array:
        left = 1.0 - (count // per_update) / config.updates
        return config.learning_rate * jnp.maximum(left, 0.0)

    rate = schedule if config.anneal else config.learning_rate
    return optax.chain(optax.clip_by_global_norm(config.max_gradient), optax.adam(rate, eps=1e-5))


def make_ppo(config: PPOConfig, env: CrystalEnv, network: nn.Module | None = None) -> Agent:
    """PPO on an environment, one update at a time; the default network is the one that fits its observations."""
    network = make_network(env) if network is None else network
    optimizer = make_optimizer(config)
    forward = jax.vmap(network.apply, in_axes=(None, 0))
    reset = jax.vmap(env.reset, in_axes=(0, None))
    step = jax.vmap(env.step, in_axes=(0, 0, 0, None))

    def init(key: jax.Array, env_params: EnvParams) -> TrainState:
        key, network_key, reset_key = jax.random.split(key, 3)
        observation, env_state = reset(jax.random.split(reset_key, config.lanes), env_params)
        params = network.init(network_key, jax.tree.map(lambda leaf: leaf[0], observation))
        env_params = jax.tree.map(jnp.asarray, env_params)
        return TrainState(jnp.int32(0), key, params, optimizer.init(params), env_params, env_state, observation)

    def rollout(state: TrainState, key: jax.Array) -> tuple[TrainState, Transition, Records]:
        """``steps`` steps of every lane; leaves [T, L, ...]."""

        def one_step(carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], tuple[Transition, Records]]:
            observation, env_state = carry
            action_key, env_key = jax.random.split(key)
            logits, value = forward(state.network, observation)
            action = jax.random.categorical(action_key, logits)
            log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], axis=1)[:, 0]
            env_keys = jax.random.split(env_key, config.lanes)
            following, env_state, reward, terminated, truncated, info = step(
                env_keys, env_state, action, state.env_params
            )
            done = terminated | truncated
            after = info["final_observation"]
            transition = Transition(observation, action, log_prob, value, reward, terminated, done, after)
            return (following, env_state), (transition, Records.of_step(reward, done, info))

        keys = jax.random.split(key, config.steps)
        carry, (transitions, records) = jax.lax.scan(one_step, (state.observation, state.env_state), keys)
        return state.replace(observation=carry[0], env_state=carry[1]), transitions, records

    def to_samples(state: TrainState, steps: Transition) -> Sample:
        """Transitions [T, L, ...] as samples [T * L, ...]."""
        _, next_value = jax.vmap(forward, in_axes=(None, 0))(state.network, steps.after)
        advantage = advantages(
            steps.reward, steps.value, next_value, steps.terminated, steps.done, config.discount, config.trace
        )
        samples = Sample(
            steps.observation, steps.action, steps.log_prob, steps.value, advantage, advantage + steps.value
        )
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), samples)

    def learn(carry: tuple[Any, Any], batch: Sample) -> tuple[tuple[Any, Any], dict[str, jax.Array]]:
        params, optimizer_state = carry
        gradient, parts = jax.grad(loss, has_aux=True)(params, network.apply, batch, config)
        change, new_optimizer_state = optimizer.update(gradient, optimizer_state, params)
        new = optax.apply_updates(params, change), new_optimizer_state
        if config.target_kl is None:
            return new, parts
        near = parts["approx_kl"] <= config.target_kl
        return jax.tree.map(lambda after, before: jnp.where(near, after, before), new, carry), parts

    def update(state: TrainState) -> tuple[TrainState, dict[str, jax.Array], Records]:
        key, rollout_key, shuffle_key = jax.random.split(state.key, 3)
        state, transitions, records = rollout(state, rollout_key)
        samples = to_samples(state, transitions)

        def epoch(carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], dict[str, jax.Array]]:
            return jax.lax.scan(learn, carry, shuffled(key, samples, config.minibatches))

        keys = jax.random.split(shuffle_key, config.epochs)
        (params, optimizer_state), parts = jax.lax.scan(epoch, (state.network, state.optimizer), keys)
        state = state.replace(update=state.update + 1, key=key, network=params, optimizer=optimizer_state)
        return state, jax.tree.map(jnp.mean, parts), records

    return Agent(init, update, config.steps, config.lanes)


def shuffled(key: jax.Array, samples: Sample, minibatches: int) -> Sample:
    """Samples [B, ...] in random order as minibatches [M, B / M, ...]; every leaf in the same order."""
    order = jax.random.permutation(key, samples.action.shape[0])
    return jax.tree.map(lambda leaf: leaf[order].reshape(minibatches, -1, *leaf.shape[1:]), samples)


def make_train(
    config: PPOConfig, env: CrystalEnv, params: EnvParams, network: nn.Module | None = None
) -> Callable[..., tuple[TrainState, dict[str, jax.Array], Records]]:
    """The whole training as one pure function ``train(key, params=params)``.

    Compile it with ``jax.jit``, run several seeds by ``jax.vmap(train)(keys)`` and several targets by mapping over
    the parameters too.

    Returns:
        A function that returns the last train state, the losses (leaves [updates]) and the records (leaves
        [updates, T, L, ...]).
    """
    agent = make_ppo(config, env, network)

    def train(key: jax.Array, params: EnvParams = params) -> tuple[TrainState, dict[str, jax.Array], Records]:
        def one_update(state: TrainState, _: None) -> tuple[TrainState, tuple[dict[str, jax.Array], Records]]:
            state, losses, records = agent.update(state)
            return state, (losses, records)

        state, (losses, records) = jax.lax.scan(one_update, agent.init(key, params), length=config.updates)
        return state, losses, records

    return train
