"""Rewards that arrive later: the environment gives a ticket, a host loop brings the value, the buffer is filled.

An agent need not wait for DFT. :class:`DelayedRewards` steps without a host call; where an episode ends,
``info["ticket"]`` holds an integer that is given once, and the reward is 0 for the time being. Store the ticket with
the transition. Whatever evaluates the crystals (:class:`crystaljax.dft_bridge.delayed.DelayedEvaluation`) returns
(ticket, value, status) in any order, and :func:`fill` puts the rewards where they belong. Everything here is pure, so
what is in the buffer depends on which answers have arrived, and on nothing else.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from crystaljax.env import CrystalEnv, EnvParams, EnvState
from crystaljax.status import Status

NO_TICKET = -1
"""Ticket of a transition whose reward is known."""


@struct.dataclass
class DelayedState:
    """State of a lane.

    Attributes:
        env_state: of the wrapped environment.
        ticket: int32 [], for the end of the episode in progress.
    """

    env_state: EnvState
    ticket: jax.Array


class DelayedRewards:
    """A :class:`CrystalEnv` whose rewards come later; the same interface, but for the lane at reset.

    Make the environment with ``evaluator=Deferred()``. Tickets of lane ``i`` of ``n`` are ``i``, ``i + n``,
    ``i + 2n`` ...; they stay different through auto-resets, in every lane.
    """

    def __init__(self, env: CrystalEnv, lanes: int = 1):
        """``lanes``: environments in parallel. Raises ``ValueError`` for an environment that evaluates at once."""
        if not env.evaluator.deferred:
            raise ValueError(
                f"the environment evaluates its crystals at once ({env.evaluator.label}); make it with "
                "evaluator=Deferred()"
            )
        self.env, self.lanes = env, lanes

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "env":
            raise AttributeError(name)
        return getattr(self.env, name)

    @partial(jax.jit, static_argnames=("self",))
    def reset(
        self, key: jax.Array, params: EnvParams | None = None, lane: int | jax.Array = 0
    ) -> tuple[Any, DelayedState]:
        """``lane``: which of the lanes, int32 []; under ``vmap`` over lanes, ``jnp.arange(lanes)``."""
        observation, state = self.env.reset(key, params)
        return observation, DelayedState(state, jnp.asarray(lane, jnp.int32))

    @partial(jax.jit, static_argnames=("self",))
    def step(
        self, key: jax.Array, state: DelayedState, action: int | jax.Array, params: EnvParams | None = None
    ) -> tuple[Any, DelayedState, jax.Array, jax.Array, jax.Array, dict[str, jax.Array]]:
        """As :meth:`CrystalEnv.step`, with two more entries in ``info``.

        ``ticket`` is int32 [], :data:`NO_TICKET` unless an episode ended; ``target`` is float32 [], what the episode
        aimed at, so that its reward is that of its own target when it comes, under ``vmap`` over targets too.
        """
        observation, env_state, reward, terminated, truncated, info = self.env.step(
            key, state.env_state, action, params
        )
        pending = info["status"] == Status.PENDING
        ticket = jnp.where(pending, state.ticket, NO_TICKET)
        state = DelayedState(env_state, state.ticket + jnp.where(pending, self.lanes, 0))
        reward = jnp.where(pending, 0.0, reward)
        target = jnp.asarray((self.env.default_params if params is None else params).target, jnp.float32)
        return observation, state, reward, terminated, truncated, {**info, "ticket": ticket, "target": target}

    def decide(self, state: DelayedState, action: int | jax.Array) -> DelayedState:
        """As :meth:`CrystalEnv.decide`."""
        return dataclasses.replace(state, env_state=self.env.decide(state.env_state, action))

    def observe(self, key: jax.Array, state: DelayedState, action: Any, params: EnvParams) -> Any:
        """As :meth:`CrystalEnv.observe`."""
        return self.env.observe(key, state.env_state, action, params)


def fill(
    tickets: jax.Array, rewards: jax.Array, arrived: jax.Array, arrived_rewards: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Put rewards that have arrived into stored transitions; compiled, and quick for a large buffer.

    Args:
        tickets: int32 [B], of the stored transitions; :data:`NO_TICKET` where the reward is known.
        rewards: float32 [B], of the stored transitions.
        arrived: int32 [K], tickets of the answers, in any order; pad with :data:`NO_TICKET`. One whose transition has
            left the buffer is ignored.
        arrived_rewards: float32 [K].

    Returns:
        The tickets and rewards of the transitions; sample those whose ticket is :data:`NO_TICKET`.
    """
    order = jnp.argsort(arrived)
    arrived, arrived_rewards = arrived[order], arrived_rewards[order]
    at = jnp.clip(jnp.searchsorted(arrived, tickets), 0, len(arrived) - 1)
    known = (tickets != NO_TICKET) & (arrived[at] == tickets)
    return jnp.where(known, NO_TICKET, tickets), jnp.where(known, arrived_rewards[at], rewards)
