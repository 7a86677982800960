"""The loop that DQN, Rainbow and SAC share: act in all lanes, remember, then learn from what is remembered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from crystaljax.agents.base import Agent, Records, learn_if
from crystaljax.agents.hyperparameters import ReplayConfig
from crystaljax.agents.replay import Batch, Replay
from crystaljax.agents.rollout import Lanes, Transition, first_lanes, rollout
from crystaljax.delayed import NO_TICKET, DelayedRewards
from crystaljax.env import CrystalEnv, EnvParams


class Learner(NamedTuple):
    """What tells one off-policy algorithm from another; ``progress`` is the fraction of the training that is over.

    Attributes:
        init: (key, an observation) to (parameters of the network that acts, whatever else is learned).
        act: (key, network, observations [L, ...], progress) to actions int32 [L].
        learn: (key, network, rest, batch, progress) to (network, rest, losses, errors float32 [B]).
        policy, draws: as in :class:`crystaljax.agents.base.Agent`.
    """

    init: Callable[[jax.Array, Any], tuple[Any, Any]]
    act: Callable[[jax.Array, Any, Any, jax.Array], jax.Array]
    learn: Callable[[jax.Array, Any, Any, Batch, jax.Array], tuple[Any, Any, dict[str, jax.Array], jax.Array]]
    policy: Callable[[Any, Any], jax.Array]
    draws: bool


@struct.dataclass
class OffPolicyState:
    """Everything that the next update depends on.

    Attributes:
        update: int32 [], updates done.
        key: of the next update.
        network: parameters of the network that acts.
        rest: whatever else the algorithm learns (target network, optimizer ...).
        replay: the buffer.
        env_params: parameters of the environment, shared by all lanes.
        lanes: where the lanes stand.
    """

    update: jax.Array
    key: jax.Array
    network: Any
    rest: Any
    replay: Any
    env_params: EnvParams
    lanes: Lanes


def make_off_policy(config: ReplayConfig, env: CrystalEnv | DelayedRewards, learner: Learner, replay: Replay) -> Agent:
    """An off-policy algorithm on an environment.

    Raises:
        ValueError: if the training is over before learning starts.
    """
    total = config.updates * config.lanes * config.steps
    if total <= config.start:
        raise ValueError(
            f"learning starts after {config.start} steps, but the whole training has {total}; "
            "give more episodes, or lower start"
        )

    def init(key: jax.Array, env_params: EnvParams) -> OffPolicyState:
        key, network_key, reset_key = jax.random.split(key, 3)
        lanes = first_lanes(env, env_params, reset_key, config.lanes)
        observation = jax.tree.map(lambda leaf: leaf[0], lanes.observation)
        nothing = jnp.float32(0), jnp.bool_(False), jnp.bool_(False)
        ticket = jnp.int32(NO_TICKET) if isinstance(env, DelayedRewards) else None
        buffer = replay.init(Transition(observation, jnp.int32(0), *nothing, observation, ticket))
        env_params = jax.tree.map(jnp.asarray, env_params)
        return OffPolicyState(jnp.int32(0), key, *learner.init(network_key, observation), buffer, env_params, lanes)

    def update(state: OffPolicyState) -> tuple[OffPolicyState, dict[str, jax.Array], Records]:
        key, act_key, learn_key = jax.random.split(state.key, 3)
        progress = state.update / config.updates

        def choose(key: jax.Array, lanes: Lanes) -> tuple[jax.Array, tuple[()]]:
            return learner.act(key, state.network, lanes.observation, progress), ()

        lanes, transitions, _, records = rollout(env, state.env_params, state.lanes, act_key, config.steps, choose)
        buffer = replay.add(state.replay, transitions)

        def gradient_step(carry: tuple[Any, Any, Any], key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
            network, rest, buffer = carry
            sample_key, key = jax.random.split(key)
            batch = replay.sample(buffer, sample_key)
            network, rest, losses, errors = learner.learn(key, network, rest, batch, progress)
            return (network, rest, replay.set_errors(buffer, batch, errors)), losses

        def learn(carry: Any) -> tuple[Any, dict[str, jax.Array]]:
            carry, losses = jax.lax.scan(gradient_step, carry, jax.random.split(learn_key, config.gradient_steps))
            return carry, jax.tree.map(jnp.mean, losses)

        learned = state.network, state.rest, buffer
        (network, rest, buffer), losses = learn_if(replay.ready(buffer), learn, learned)
        state = OffPolicyState(state.update + 1, key, network, rest, buffer, state.env_params, lanes)
        return state, losses, records

    def deliver(state: OffPolicyState, tickets: jax.Array, rewards: jax.Array) -> OffPolicyState:
        return state.replace(replay=replay.deliver(state.replay, tickets, rewards))

    return Agent(init, update, config.steps, config.lanes, learner.policy, learner.draws, deliver)
