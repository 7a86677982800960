"""Replay on the device, by flashbax: the one place where transitions, and so rewards, enter a buffer.

A lane's steps are stored in order and sampled as stretches of ``n_step`` of them, from which :func:`n_step` makes one
step. That puts off everything but storing until a stretch is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flashbax
import jax
import jax.numpy as jnp

from agents.hyperparameters import ReplayConfig
from agents.rollout import Transition

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
        ready: buffer to whether it holds enough to learn from.
        sample: (buffer, key) to :class:`Batch`.
        set_errors: (buffer, batch, errors float32 [B]) to a buffer that draws these steps by the size of the errors;
            changes nothing in a buffer without priorities.
    """

    init: Callable[[Transition], Any]
    add: Callable[[Any, Transition], Any]
    ready: Callable[[Any], jax.Array]
    sample: Callable[[Any, jax.Array], Batch]
    set_errors: Callable[[Any, Batch, jax.Array], Any]


def n_step(stretch: Transition, discount: float) -> tuple[jax.Array, jax.Array, Any]:
    """Stretches of n steps [B, n, ...] as one step each: reward, discount and ``after`` of :class:`Batch`.

    Nothing is counted from beyond the end of an episode. One that was cut off goes on in the value of what came last.
    """
    count = stretch.done.shape[1]
    ended_before = jnp.cumsum(stretch.done, axis=1) - stretch.done > 0
    reward = jnp.where(ended_before, 0.0, stretch.reward * discount ** jnp.arange(count)).sum(axis=1)
    last = count - 1 - ended_before.sum(axis=1)
    rows = jnp.arange(last.shape[0])
    after = jax.tree.map(lambda leaf: leaf[rows, last], stretch.after)
    return reward, jnp.where(stretch.terminated[rows, last], 0.0, discount ** (last + 1.0)), after


def make_replay(config: ReplayConfig, priority_exponent: float = 0.0) -> Replay:
    """A buffer for the steps of ``config.lanes`` lanes; steps are drawn uniformly if the exponent is 0."""
    sizes = {
        "add_batch_size": config.lanes,
        "sample_batch_size": config.batch,
        "sample_sequence_length": config.n_step,
        "period": 1,
        "min_length_time_axis": max(config.start // config.lanes, config.n_step),
        "max_length_time_axis": config.buffer // config.lanes,
    }
    prioritised = priority_exponent > 0
    if prioritised:
        buffer = flashbax.make_prioritised_trajectory_buffer(
            **sizes, priority_exponent=priority_exponent, device=jax.default_backend()
        )
    else:
        buffer = flashbax.make_trajectory_buffer(**sizes)

    def add(state: Any, transitions: Transition) -> Any:
        return buffer.add(state, jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), transitions))

    def sample(state: Any, key: jax.Array) -> Batch:
        drawn = buffer.sample(state, key)
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

    return Replay(buffer.init, add, buffer.can_sample, sample, set_errors)
