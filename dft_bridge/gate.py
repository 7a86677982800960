"""The gate: a host call that a batched JAX program makes only when some lane has something to ask.

``vmap`` turns ``lax.cond`` into ``select``, which runs both branches: under it a plain callback would go to the host
at every step. The gate first reduces "is any lane pending" over every enclosing ``vmap``, so that its condition has
no batch axis and the ``cond`` stays a ``cond``. An episode of N steps then costs one host call per batch, not N.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from crystaljax.evaluators import Outcome
from crystaljax.status import Status

Host = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(numbers int32 [B, N], skeletons int32 [B], pending bool [B]) to (values float32 [B, P], statuses int32 [B])."""
Prepare = Callable[[jax.Array, jax.Array], jax.Array]
"""(numbers int32 [N], skeleton int32 []) to what the host gets in place of the numbers, int32 [N]."""
Query = Callable[[jax.Array, jax.Array, jax.Array], Outcome]
"""(numbers int32 [N], skeleton int32 [], pending bool []) to values float32 [P] and a status int32 []."""


@custom_vmap
def any_lane(pending: jax.Array) -> jax.Array:
    """bool []: whether ``pending`` holds in any lane of any enclosing ``vmap``; has no batch axis itself."""
    return pending


@any_lane.def_vmap
def _any_lane_batched(axis_size: int, in_batched: list[bool], pending: jax.Array) -> tuple[jax.Array, bool]:
    del axis_size, in_batched
    return any_lane(jnp.any(pending, axis=0)), False


def _as_given(numbers: jax.Array, skeleton: jax.Array) -> jax.Array:
    del skeleton
    return numbers


def gate(host: Host, prepare: Prepare = _as_given, properties: int | None = None) -> Query:
    """The query that asks ``host`` for the lanes that are pending, all of them in one call.

    XLA may drop, move or repeat the call, and an exception in it is undefined behaviour. Under ``jax.shard_map`` every
    device calls for its own lanes, from several threads at once.

    Args:
        host: NumPy only, idempotent, thread-safe, never raises. Rows that are not pending hold anything.
        prepare: a pure function applied on the device before the call, skipped while nothing is pending.
        properties: P, how many values a crystal has; ``None`` for one, without an axis of its own.

    Returns:
        A pure function for any nesting of ``jit``, ``vmap``, ``scan``, ``while_loop`` and ``shard_map``; not
        differentiable (gradients through it are zero). Lanes that are not pending get (0, ``Status.OK``).
    """
    of_crystal = () if properties is None else (properties,)
    answer = (jax.ShapeDtypeStruct(of_crystal, jnp.float32), jax.ShapeDtypeStruct((), jnp.int32))

    def flat_host(numbers: jax.Array, skeletons: jax.Array, pending: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        lanes, of_skeleton, asked = np.asarray(numbers), np.asarray(skeletons), np.asarray(pending)
        values, statuses = host(lanes.reshape(-1, lanes.shape[-1]), of_skeleton.reshape(-1), asked.reshape(-1))
        shape = asked.shape
        values = np.asarray(values, np.float32).reshape((*shape, *of_crystal))
        return values, np.asarray(statuses, np.int32).reshape(shape)

    def query(numbers: jax.Array, skeleton: jax.Array, pending: jax.Array) -> Outcome:
        numbers, skeleton, pending = jax.lax.stop_gradient((numbers, skeleton, pending))
        # Under shard_map the answers of both branches must have one type, varying over devices as the inputs do. A
        # callback's result forgets that; adding a zero made of the inputs brings it back.
        zero = 0 * (numbers[0] + skeleton + pending.astype(jnp.int32))

        def ask(numbers: jax.Array, skeleton: jax.Array, pending: jax.Array) -> tuple[jax.Array, jax.Array]:
            prepared = prepare(numbers, skeleton)
            values, status = jax.pure_callback(
                flat_host, answer, prepared, skeleton, pending, vmap_method="broadcast_all"
            )
            return values + zero.astype(jnp.float32), status + zero.astype(jnp.int32)

        def idle(numbers: jax.Array, skeleton: jax.Array, pending: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.zeros(of_crystal, jnp.float32) + zero.astype(jnp.float32), zero.astype(jnp.int32)

        values, status = jax.lax.cond(any_lane(pending), ask, idle, numbers, skeleton, pending)
        return Outcome(jnp.where(pending, values, 0.0), jnp.where(pending, status, jnp.int32(Status.OK)))

    return query
