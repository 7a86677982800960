"""Replay on the device, by flashbax: the one place where transitions, and so rewards, enter a buffer.

A lane's steps are stored in order and sampled as stretches of ``n_step`` of them, from which :func:`n_step` makes one
step. That puts off everything but storing until a stretch is drawn.

A reward may come later (:mod:`crystaljax.delayed`): its transition is stored at once, with a ticket, and no stretch
that needs the reward is drawn before it has been delivered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flashbax
import jax
import jax.numpy as jnp

from crystaljax.agents.hyperparameters import ReplayConfig
from crystaljax.agents.rollout import Transition
from crystaljax.delayed import NO_TICKET, fill

SMALLEST_PRIORITY = 1e-6
"""Added to the size of an error, so that a step without one can still be drawn."""


class Batch(NamedTuple):
    """Steps to learn from; leaves [B, ...].

    Attributes:
        observation, action: what was done.
        reward: float32, discounted sum of the next rewards, up to the end of the episode.
        discount: float32, weight of the value of ``after``; 0 if the episode has ended by then.
        after: observation after those rewards.
        index: int32, place in the buffer; 0 in a buffer without priorities.
        probability: float32, of having been drawn; 1 in a buffer without priorities.
    """

    observation: Any
    action: jax.Array
    reward: jax.Array
    discount: jax.Array
    after: Any
    index: jax.Array
    probability: jax.Array


class Replay(NamedTuple):
    """Pure functions over the state of a buffer.

    Attributes:
        init: a transition (for shapes and dtypes) to an empty buffer.
        add: (buffer, transitions [T, L, ...] with their rewards, which carry on from those added last) to buffer.
        deliver: (buffer, tickets int32 [K], rewards float32 [K]) to a buffer in which the transitions with these
            tickets have their rewards; pad with :data:`crystaljax.delayed.NO_TICKET`.
        ready: buffer to whether it holds enough to learn from, apart from steps whose reward is still to come.
        sample: (buffer, key) to :class:`Batch`.
        set_errors: (buffer, batch, errors float32 [B]) to a buffer that draws these steps by the size of the errors;
            changes nothing in a buffer without priorities.
    """

    init: Callable[[Transition], Any]
    add: Callable[[Any, Transition], Any]
    deliver: Callable[[Any, jax.Array, jax.Array], Any]
    ready: Callable[[Any], jax.Array]
    sample: Callable[[Any, jax.Array], Batch]
    set_errors: Callable[[Any, Batch, jax.Array], Any]


def n_step(stretch: Transition, discount: float) -> tuple[jax.Array, jax.Array, Any]:
    """Stretches of n steps [B, n, ...] as one step each: reward, discount and ``after`` of :class:`Batch`.

    Nothing is counted from beyond the end of an episode. One that was cut off goes on in the value of what came last.
    """
    count = stretch.done.shape[1]
    ended_before = _ended_before(stretch)
    reward = jnp.where(ended_before, 0.0, stretch.reward * discount ** jnp.arange(count)).sum(axis=1)
    last = count - 1 - ended_before.sum(axis=1)
    rows = jnp.arange(last.shape[0])
    after = jax.tree.map(lambda leaf: leaf[rows, last], stretch.after)
    return reward, jnp.where(stretch.terminated[rows, last], 0.0, discount ** (last + 1.0)), after


def awaited(stretch: Transition) -> jax.Array:
    """bool [B]: whether stretches [B, n, ...] need a reward that is still to come, up to the end of their episode."""
    return ((stretch.ticket != NO_TICKET) & ~_ended_before(stretch)).any(axis=1)


def _ended_before(stretch: Transition) -> jax.Array:
    """bool [B, n]: the steps beyond the end of the episode that a stretch begins in."""
    return jnp.cumsum(stretch.done, axis=1) - stretch.done > 0


def make_replay(config: ReplayConfig, priority_exponent: float = 0.0) -> Replay:
    """A buffer for the steps of ``config.lanes`` lanes; steps are drawn uniformly if the exponent is 0."""
    least, length = max(config.start // config.lanes, config.n_step), config.buffer // config.lanes
    sizes = {
        "add_batch_size": config.lanes,
        "sample_batch_size": config.batch,
        "sample_sequence_length": config.n_step,
        "period": 1,
        "min_length_time_axis": least,
        "max_length_time_axis": length,
    }
    prioritised = priority_exponent > 0
    if prioritised:
        buffer = flashbax.make_prioritised_trajectory_buffer(
            **sizes, priority_exponent=priority_exponent, device=jax.default_backend()
        )
    else:
        buffer = flashbax.make_trajectory_buffer(**sizes)

    def init(transition: Transition) -> Any:
        state = buffer.init(transition)
        if transition.ticket is None:
            return state
        nothing_awaited = jnp.full_like(state.experience.ticket, NO_TICKET)
        return state.replace(experience=state.experience.replace(ticket=nothing_awaited))

    def add(state: Any, transitions: Transition) -> Any:
        return buffer.add(state, jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), transitions))

    def deliver(state: Any, tickets: jax.Array, rewards: jax.Array) -> Any:
        stored = state.experience
        ticket, reward = fill(stored.ticket, stored.reward, tickets, rewards)
        return state.replace(experience=stored.replace(ticket=ticket, reward=reward))

    def ready(state: Any) -> jax.Array:
        ticket = state.experience.ticket
        if ticket is None:
            return buffer.can_sample(state)
        held = jnp.where(state.is_full, length, state.current_index) * config.lanes
        # A reward is needed by the steps that it ends, n of them.
        return held - config.n_step * (ticket != NO_TICKET).sum() >= least * config.lanes

    def draw(state: Any, key: jax.Array) -> Any:
        """Stretches without a reward that is still to come: those with one are drawn again, whatever the weights."""
        drawn = buffer.sample(state, key)
        if state.experience.ticket is None:
            return drawn

        def again(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            key, drawn = carry
            key, sample_key, order_key = jax.random.split(key, 3)
            lacking, other = awaited(drawn.experience), buffer.sample(state, sample_key)
            # By priority, each place of a batch is drawn from a part of the buffer, which may hold none that will do.
            order = jax.random.permutation(order_key, config.batch)

            def choose(new: jax.Array, old: jax.Array) -> jax.Array:
                return jnp.where(lacking.reshape(-1, *[1] * (old.ndim - 1)), new[order], old)

            return key, jax.tree.map(choose, other, drawn)

        return jax.lax.while_loop(lambda carry: awaited(carry[1].experience).any(), again, (key, drawn))[1]

    def sample(state: Any, key: jax.Array) -> Batch:
        drawn = draw(state, key)
        stretch = drawn.experience
        first = jax.tree.map(lambda leaf: leaf[:, 0], (stretch.observation, stretch.action))
        if prioritised:
            index, probability = drawn.indices, drawn.probabilities
        else:
            index, probability = jnp.zeros(config.batch, jnp.int32), jnp.ones(config.batch)
        return Batch(*first, *n_step(stretch, config.discount), index, probability)

    def set_errors(state: Any, batch: Batch, errors: jax.Array) -> Any:
        if not prioritised:
            return state
        return buffer.set_priorities(state, batch.index, jnp.abs(errors) + SMALLEST_PRIORITY)

    return Replay(init, add, deliver, ready, sample, set_errors)
