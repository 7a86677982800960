"""Proximal policy optimisation, in the manner of PureJaxRL: rollout, advantages and updates are one program.

``make_train(config, env, params)`` returns ``train(key)``, which can be compiled, and vmapped over seeds.
``make_ppo(config, env)`` returns the same thing in pieces, one update at a time, as the training runner uses it.

Where rewards come later (:mod:`crystaljax.delayed`), a rollout is learned from some updates later, with the
probabilities and values that the network gives its choices by then. With those of when it was made, the clip and
``target_kl`` would count what has been learned since.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from crystaljax.agents.base import Agent, Records, learn_if, whole_training
from crystaljax.agents.hyperparameters import PPOConfig
from crystaljax.agents.networks import ActorCritic, make_trunk
from crystaljax.agents.rollout import Lanes, Transition, first_lanes, rollout
from crystaljax.delayed import NO_TICKET, DelayedRewards, fill
from crystaljax.env import CrystalEnv, EnvParams, EnvState


@struct.dataclass
class TrainState:
    """Everything that the next update depends on; L lanes.

    Attributes:
        update: int32 [], updates done.
        key: of the next update.
        network: parameters of the network.
        optimizer: optax state.
        env_params: parameters of the environment, shared by all lanes.
        lanes: where the lanes stand.
    """

    update: jax.Array
    key: jax.Array
    network: Any
    optimizer: Any
    env_params: EnvParams
    lanes: Lanes


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


def log_prob_of(logits: jax.Array, action: jax.Array) -> jax.Array:
    """Logarithm of the probability of actions [...] by logits [..., V]."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), action[..., None], axis=-1)[..., 0]


class Kept(NamedTuple):
    """What is kept of a choice besides the action; leaves [L, ...]."""

    log_prob: jax.Array
    value: jax.Array
    env_state: EnvState


class Rollout(NamedTuple):
    """What an update learns from.

    Attributes:
        steps: transitions [T, L, ...].
        kept: what was kept of the choices, [T, L, ...].
        lanes: where the lanes stood after them, [L, ...].
    """

    steps: Transition
    kept: Kept
    lanes: Lanes


@struct.dataclass
class DelayedTrainState(TrainState):
    """A :class:`TrainState` where rewards come later.

    Attributes:
        waiting: the rollouts that are to be learned from, leaves [lag, ...]; that of update ``u`` is at ``u % lag``.
    """

    waiting: Rollout


class PPO(NamedTuple):
    """What PPO is made of; T steps, L lanes.

    Attributes:
        init: (key, an observation) to (parameters of the network, optax state).
        act: (key, parameters, lanes) to (actions int32 [L], :class:`Kept`).
        learn: (key, parameters, optax state, transitions and what ``act`` kept [T, L, ...], the lanes after them,
            parameters of the environment) to (parameters, optax state, losses).
        reconsider: (parameters, transitions and what ``act`` kept [T, L, ...]) to what it would have kept with these
            parameters.
        policy: (parameters, an observation) to logits.
    """

    init: Callable[[jax.Array, Any], tuple[Any, Any]]
    act: Callable[[jax.Array, Any, Lanes], tuple[jax.Array, Kept]]
    learn: Callable[..., tuple[Any, Any, dict[str, jax.Array]]]
    reconsider: Callable[[Any, Transition, Kept], Kept]
    policy: Callable[[Any, Any], jax.Array]


def make_learner(config: PPOConfig, env: CrystalEnv, trunk: nn.Module | None = None) -> PPO:
    """PPO without a loop around it."""
    network = ActorCritic(trunk or make_trunk(env), env.num_actions)
    optimizer = make_optimizer(config)
    forward = jax.vmap(network.apply, in_axes=(None, 0))

    def init(key: jax.Array, observation: Any) -> tuple[Any, Any]:
        params = network.init(key, observation)
        return params, optimizer.init(params)

    def act(key: jax.Array, params: Any, lanes: Lanes) -> tuple[jax.Array, Kept]:
        logits, value = forward(params, lanes.observation)
        action = jax.random.categorical(key, logits)
        return action, Kept(log_prob_of(logits, action), value, lanes.env_state)

    def reconsider(params: Any, steps: Transition, kept: Kept) -> Kept:
        logits, value = jax.vmap(forward, in_axes=(None, 0))(params, steps.observation)
        return kept._replace(log_prob=log_prob_of(logits, steps.action), value=value)

    def values_after(params: Any, steps: Transition, kept: Kept, lanes: Lanes, env_params: EnvParams) -> jax.Array:
        """Values of what followed each step, [T, L]; where an episode terminated they do not count."""
        next_value = jnp.concatenate([kept.value[1:], forward(params, lanes.observation)[1][None]])

        def before_reset(env_state: EnvState, action: jax.Array) -> jax.Array:
            observation = env.observe(None, env.decide(env_state, action), action, env_params)
            return network.apply(params, observation)[1]

        def cut_off() -> jax.Array:
            return jnp.where(steps.done, jax.vmap(jax.vmap(before_reset))(kept.env_state, steps.action), next_value)

        # Only an episode that was cut off needs another value than that of the next step. Its last observation is made
        # again then: to keep ``steps.after`` for this would cost every rollout.
        return jax.lax.cond((steps.done & ~steps.terminated).any(), cut_off, lambda: next_value)

    def to_samples(params: Any, steps: Transition, kept: Kept, lanes: Lanes, env_params: EnvParams) -> Sample:
        """Transitions [T, L, ...] as samples [T * L, ...]."""
        next_value = values_after(params, steps, kept, lanes, env_params)
        advantage = advantages(
            steps.reward, kept.value, next_value, steps.terminated, steps.done, config.discount, config.trace
        )
        samples = Sample(steps.observation, steps.action, kept.log_prob, kept.value, advantage, advantage + kept.value)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), samples)

    def gradient_step(carry: tuple[Any, Any], batch: Sample) -> tuple[tuple[Any, Any], dict[str, jax.Array]]:
        params, optimizer_state = carry
        gradient, parts = jax.grad(loss, has_aux=True)(params, network.apply, batch, config)
        change, new_optimizer_state = optimizer.update(gradient, optimizer_state, params)
        new = optax.apply_updates(params, change), new_optimizer_state
        if config.target_kl is None:
            return new, parts
        near = parts["approx_kl"] <= config.target_kl
        return jax.tree.map(lambda after, before: jnp.where(near, after, before), new, carry), parts

    def learn(
        key: jax.Array,
        params: Any,
        optimizer_state: Any,
        steps: Transition,
        kept: Kept,
        lanes: Lanes,
        env_params: EnvParams,
    ) -> tuple[Any, Any, dict[str, jax.Array]]:
        samples = to_samples(params, steps, kept, lanes, env_params)

        def minibatch(carry: tuple[Any, Any], members: jax.Array) -> tuple[tuple[Any, Any], dict[str, jax.Array]]:
            return gradient_step(carry, jax.tree.map(lambda leaf: leaf[members], samples))

        # One sort for the shuffles of all epochs takes fewer kernels than one for each.
        shuffle = partial(shuffled, count=config.lanes * config.steps, minibatches=config.minibatches)
        members = jax.vmap(shuffle)(jax.random.split(key, config.epochs)).reshape(
            config.epochs * config.minibatches, -1
        )
        (params, optimizer_state), parts = jax.lax.scan(minibatch, (params, optimizer_state), members)
        return params, optimizer_state, jax.tree.map(jnp.mean, parts)

    def policy(params: Any, observation: Any) -> jax.Array:
        return network.apply(params, observation)[0]

    return PPO(init, act, learn, reconsider, policy)


def make_ppo(config: PPOConfig, env: CrystalEnv | DelayedRewards, trunk: nn.Module | None = None) -> Agent:
    """PPO on an environment, one update at a time.

    ``trunk`` is the network that reads observations, see :mod:`crystaljax.agents.networks`; by default the one that
    fits them.
    """
    ppo = make_learner(config, env, trunk)
    lag = (config.lag or 1) if isinstance(env, DelayedRewards) else 0

    def act(key: jax.Array, params: Any, env_params: EnvParams, lanes: Lanes) -> tuple[Rollout, Records]:
        lanes, steps, kept, records = rollout(
            env, env_params, lanes, key, config.steps, lambda key, lanes: ppo.act(key, params, lanes)
        )
        return Rollout(steps.replace(after=None), kept, lanes), records

    def init(key: jax.Array, env_params: EnvParams) -> TrainState:
        key, network_key, reset_key = jax.random.split(key, 3)
        lanes = first_lanes(env, env_params, reset_key, config.lanes)
        learned = ppo.init(network_key, jax.tree.map(lambda leaf: leaf[0], lanes.observation))
        first = jnp.int32(0), key, *learned, jax.tree.map(jnp.asarray, env_params), lanes
        if not lag:
            return TrainState(*first)
        one, _ = jax.eval_shape(act, key, learned[0], env_params, lanes)
        return DelayedTrainState(*first, jax.tree.map(lambda leaf: jnp.zeros((lag, *leaf.shape), leaf.dtype), one))

    def update(state: TrainState) -> tuple[TrainState, dict[str, jax.Array], Records]:
        key, rollout_key, shuffle_key = jax.random.split(state.key, 3)
        new, records = act(rollout_key, state.network, state.env_params, state.lanes)
        params, optimizer_state, losses = ppo.learn(shuffle_key, state.network, state.optimizer, *new, state.env_params)
        state = TrainState(state.update + 1, key, params, optimizer_state, state.env_params, new.lanes)
        return state, losses, records

    def delayed_update(state: DelayedTrainState) -> tuple[DelayedTrainState, dict[str, jax.Array], Records]:
        key, rollout_key, shuffle_key = jax.random.split(state.key, 3)
        slot = state.update % lag

        def learn(learned: tuple[Any, Any]) -> tuple[tuple[Any, Any], dict[str, jax.Array]]:
            steps, kept, lanes = jax.tree.map(lambda leaf: leaf[slot], state.waiting)
            kept = ppo.reconsider(learned[0], steps, kept)
            # What has not come in time counts as what the critic expected: it teaches nothing about its crystal.
            missing = steps.ticket != NO_TICKET
            steps = steps.replace(reward=jnp.where(missing, kept.value, steps.reward))
            params, optimizer_state, losses = ppo.learn(shuffle_key, *learned, steps, kept, lanes, state.env_params)
            return (params, optimizer_state), losses | {"missing_rewards": missing.sum().astype(jnp.float32)}

        learned, losses = learn_if(state.update >= lag, learn, (state.network, state.optimizer))
        new, records = act(rollout_key, learned[0], state.env_params, state.lanes)
        waiting = jax.tree.map(lambda leaves, leaf: leaves.at[slot].set(leaf), state.waiting, new)
        state = DelayedTrainState(state.update + 1, key, *learned, state.env_params, new.lanes, waiting)
        return state, losses, records

    def deliver(state: DelayedTrainState, tickets: jax.Array, rewards: jax.Array) -> DelayedTrainState:
        steps = state.waiting.steps
        ticket, reward = fill(steps.ticket, steps.reward, tickets, rewards)
        return state.replace(waiting=state.waiting._replace(steps=steps.replace(ticket=ticket, reward=reward)))

    if lag:
        return Agent(init, delayed_update, config.steps, config.lanes, ppo.policy, draws=True, deliver=deliver)
    return Agent(init, update, config.steps, config.lanes, ppo.policy, draws=True)


def shuffled(key: jax.Array, count: int, minibatches: int) -> jax.Array:
    """The numbers below ``count`` in random order, int32 [M, count / M]: which samples make up each minibatch."""
    return jax.random.permutation(key, count).reshape(minibatches, -1)


def make_train(config: PPOConfig, env: CrystalEnv, params: EnvParams, trunk: nn.Module | None = None) -> Callable:
    """The whole training as one pure function, see :func:`crystaljax.agents.base.whole_training`."""
    return whole_training(make_ppo(config, env, trunk), config.updates, params)
