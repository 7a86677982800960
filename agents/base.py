"""What the training runner expects of an agent, and what a rollout leaves behind for the logs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

if TYPE_CHECKING:
    from crystaljax.env import CrystalEnv

LEARNED = "learned"
"""The loss that says whether the others mean anything, see :func:`learn_if`."""


@struct.dataclass
class Records:
    """What happened at each step of a rollout; T steps, L lanes, N sites.

    Attributes:
        reward: float32 [T, L].
        finished: bool [T, L], an episode ended at this step; the fields below mean something only there.
        values: float32 [T, L, P], properties of the finished crystal; meaningless unless ``status`` is ``OK``.
        status: int32 [T, L], :class:`crystaljax.status.Status`.
        elements: int32 [T, L, N], vocabulary index of each site.
        skeleton: int32 [T, L].
        ticket: int32 [T, L], of a reward that comes later; ``None`` where none does, see :mod:`crystaljax.delayed`.
    """

    reward: jax.Array
    finished: jax.Array
    values: jax.Array
    status: jax.Array
    elements: jax.Array
    skeleton: jax.Array
    ticket: jax.Array | None = None

    @classmethod
    def of_step(cls, env: CrystalEnv, reward: jax.Array, finished: jax.Array, info: dict[str, Any]) -> Records:
        """The records of one step or of several, from what ``env.step`` returned."""
        values = jnp.stack([info["values"][name] for name in env.objective.names], axis=-1)
        of_crystal = values, info["status"], info["elements"], info["skeleton"]
        return cls(reward, finished, *of_crystal, info.get("ticket"))


class Agent(NamedTuple):
    """An algorithm bound to an environment: pure functions over a train state, whose field ``network`` acts.

    Attributes:
        init: (key, environment parameters) to train state.
        update: train state to (train state, losses as a dict of float32 scalars, :class:`Records`).
        steps: environment steps per lane and update.
        lanes: environments in parallel.
        policy: (``network`` of a train state, one observation) to a score of each action, float32 [V]; the greedy
            policy takes the highest. ``None`` for an agent that learns nothing.
        draws: whether the scores are logits of a policy that can be drawn from.
        deliver: (train state, tickets int32 [K], rewards float32 [K]) to a train state in which the transitions with
            these tickets have their rewards; ``None`` for an agent that needs every reward at once.
        needs_values: whether ``deliver`` also takes the values float32 [K, P] and the statuses int32 [K].
    """

    init: Callable[[jax.Array, Any], Any]
    update: Callable[[Any], tuple[Any, dict[str, jax.Array], Records]]
    steps: int
    lanes: int
    policy: Callable[[Any, Any], jax.Array] | None = None
    draws: bool = False
    deliver: Callable[..., Any] | None = None
    needs_values: bool = False


def learn_if(
    ready: jax.Array, learn: Callable[[Any], tuple[Any, dict[str, jax.Array]]], learned: Any
) -> tuple[Any, dict[str, jax.Array]]:
    """``learn(learned)``, which returns it and losses, once ``ready``; before, nothing changes.

    The losses gain :data:`LEARNED`, float32 []: 1, or 0 where all others are 0 as well and mean nothing. (NaN would say
    so too, but stops a program under ``jax_debug_nans``.)
    """

    def now(learned: Any) -> tuple[Any, dict[str, jax.Array]]:
        learned, losses = learn(learned)
        return learned, losses | {LEARNED: jnp.float32(1)}

    def wait(learned: Any) -> tuple[Any, dict[str, jax.Array]]:
        losses = jax.eval_shape(learn, learned)[1]
        zeros = jax.tree.map(lambda loss: jnp.zeros(loss.shape, loss.dtype), losses)
        return learned, zeros | {LEARNED: jnp.float32(0)}

    return jax.lax.cond(ready, now, wait, learned)


def whole_training(agent: Agent, updates: int, env_params: Any) -> Callable[..., tuple[Any, dict[str, Any], Records]]:
    """All updates as one pure function ``train(key, params=env_params)``.

    Compile it with ``jax.jit``, run several seeds by ``jax.vmap(train)(keys)`` and several targets by mapping over
    the parameters too.

    Returns:
        A function that returns the last train state, the losses (leaves [updates]) and the records (leaves
        [updates, T, L, ...]).
    """

    def train(key: jax.Array, params: Any = env_params) -> tuple[Any, dict[str, Any], Records]:
        def one_update(state: Any, _: None) -> tuple[Any, tuple[dict[str, Any], Records]]:
            state, losses, records = agent.update(state)
            return state, (losses, records)

        state, (losses, records) = jax.lax.scan(one_update, agent.init(key, params), length=updates)
        return state, losses, records

    return train
