"""How often the gate goes to the host, under every transformation a training loop may use."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crystaljax.dft_bridge.gate import gate
from crystaljax.status import Status

SITES = 3


class CountingHost:
    """Value: sum of the numbers plus 100 times the skeleton; remembers how many lanes were pending in each call."""

    def __init__(self):
        self.calls: list[int] = []

    def __call__(self, numbers, skeletons, pending):
        assert isinstance(numbers, np.ndarray) and numbers.dtype == np.int32 and numbers.ndim == 2
        assert skeletons.shape == pending.shape == numbers.shape[:1] and pending.dtype == bool
        self.calls.append(int(pending.sum()))
        statuses = np.where(numbers[:, 0] % 2 == 0, Status.OK, Status.ODD_ELECTRONS)
        return (numbers.sum(-1) + 100 * skeletons).astype(np.float32), statuses.astype(np.int32)


def numbers_of(lanes):
    return jnp.arange(lanes * SITES, dtype=jnp.int32).reshape(lanes, SITES)


def episodes(query, horizon, length):
    """A scan of one lane: pending at every ``horizon``-th step, counted from ``time``."""

    def lane(numbers, time):
        def step(time, _):
            time = time + 1
            done = time >= horizon
            return jnp.where(done, 0, time), (done, *query(numbers, jnp.int32(1), done))

        return jax.lax.scan(step, time, None, length=length)[1]

    return lane


@pytest.fixture
def host():
    return CountingHost()


def test_in_phase_calls_once_per_episode_end(host):
    lanes = 8
    run = jax.jit(jax.vmap(episodes(gate(host), 5, 20)))
    done, value, status = jax.block_until_ready(run(numbers_of(lanes), jnp.zeros(lanes, jnp.int32)))
    assert host.calls == [lanes] * 4
    expected = numbers_of(lanes).sum(-1) + 100
    np.testing.assert_array_equal(value, jnp.where(done, expected[:, None], 0.0))
    assert value.dtype == jnp.float32 and status.dtype == jnp.int32
    odd = numbers_of(lanes)[:, :1] % 2 == 1
    np.testing.assert_array_equal(status, jnp.where(done & odd, Status.ODD_ELECTRONS, Status.OK))


def test_staggered_lanes_call_at_each_step_that_ends_an_episode(host):
    run = jax.jit(jax.vmap(episodes(gate(host), 5, 20)))
    done, value, _ = jax.block_until_ready(run(numbers_of(5), jnp.arange(5, dtype=jnp.int32)))
    assert host.calls == [1] * 20
    np.testing.assert_array_equal(value, jnp.where(done, numbers_of(5).sum(-1)[:, None] + 100.0, 0.0))


def test_idle_steps_never_call(host):
    run = jax.jit(jax.vmap(episodes(gate(host), 10_000, 1_000)))
    _, value, _ = jax.block_until_ready(run(numbers_of(16), jnp.zeros(16, jnp.int32)))
    assert host.calls == [] and not value.any()


def test_nested_vmap_is_one_call(host):
    query = gate(host)
    numbers = numbers_of(24).reshape(2, 3, 4, SITES)
    pending = jnp.zeros((2, 3, 4), bool).at[1, 2, 3].set(True).at[0, 0, 0].set(True)
    nested = jax.jit(jax.vmap(jax.vmap(jax.vmap(query, (0, None, 0)), (0, None, 0)), (0, None, 0)))
    value, _ = jax.block_until_ready(nested(numbers, jnp.int32(2), pending))
    assert host.calls == [2]
    np.testing.assert_array_equal(value, jnp.where(pending, numbers.sum(-1) + 200.0, 0.0))


def test_vmap_over_a_whole_jitted_run_is_one_call_a_step(host):
    inner = jax.jit(jax.vmap(episodes(gate(host), 5, 10)))
    outer = jax.jit(jax.vmap(inner))
    jax.block_until_ready(outer(numbers_of(12).reshape(3, 4, SITES), jnp.zeros((3, 4), jnp.int32)))
    assert host.calls == [12, 12]


def test_unbatched_and_without_jit(host):
    value, status = gate(host)(jnp.array([2, 3, 4], jnp.int32), jnp.int32(0), jnp.bool_(True))
    assert (float(value), int(status), host.calls) == (9.0, Status.OK, [1])


def test_inside_while_loop(host):
    query = gate(host)

    def run(numbers):
        def body(carry):
            step, total = carry
            value, _ = query(numbers, jnp.int32(0), step % 4 == 3)
            return step + 1, total + value

        return jax.lax.while_loop(lambda carry: carry[0] < 12, body, (jnp.int32(0), jnp.float32(0)))[1]

    total = jax.block_until_ready(jax.jit(jax.vmap(run))(numbers_of(6)))
    assert host.calls == [6] * 3
    np.testing.assert_array_equal(total, 3.0 * numbers_of(6).sum(-1))


def test_prepare_runs_on_the_device_before_the_call(host):
    query = gate(host, prepare=lambda numbers, skeleton: jnp.sort(numbers) + skeleton)
    value, _ = jax.jit(jax.vmap(query, (0, None, 0)))(numbers_of(2), jnp.int32(1), jnp.array([True, False]))
    np.testing.assert_array_equal(value, [0 + 1 + 2 + 3 + 100, 0])


def test_gradients_through_a_query_are_zero(host):
    query = gate(host)

    def loss(weight):
        value, _ = query((weight * 4).astype(jnp.int32), jnp.int32(0), jnp.bool_(True))
        return value * weight.sum()

    weight = jnp.ones(SITES)
    np.testing.assert_array_equal(jax.grad(loss)(weight), jnp.full(SITES, 12.0))


def test_large_batches_come_through(host):
    lanes = 50_000
    value, _ = jax.jit(jax.vmap(gate(host), (0, None, 0)))(numbers_of(lanes), jnp.int32(0), jnp.ones(lanes, bool))
    np.testing.assert_array_equal(value, numbers_of(lanes).sum(-1))
    assert host.calls == [lanes]


SHARDED = """
    import itertools
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, PartitionSpec as P
    from crystaljax.dft_bridge.gate import gate
    from test_gate import CountingHost, episodes, numbers_of

    host, lanes = CountingHost(), 32
    mesh = Mesh(np.array(jax.devices()), ("lanes",))
    assert mesh.size == 4
    lane = jax.vmap(episodes(gate(host), 5, 20))
    run = jax.jit(jax.shard_map(lane, mesh=mesh, in_specs=(P("lanes"), P("lanes")), out_specs=P("lanes")))
    done, value, status = jax.block_until_ready(run(numbers_of(lanes), jnp.zeros(lanes, jnp.int32)))
    np.testing.assert_array_equal(value, jnp.where(done, numbers_of(lanes).sum(-1)[:, None] + 100.0, 0.0))
    assert host.calls == [8] * 16, host.calls  # four devices times four episode ends, eight lanes each

    host.calls.clear()
    time = jnp.where(jnp.arange(lanes) < 8, 0, -1000).astype(jnp.int32)  # only the first device's lanes ever end
    jax.block_until_ready(run(numbers_of(lanes), time))
    assert host.calls == [8] * 4, host.calls

    # Whichever of the inputs differ between devices, the program must type-check.
    given = (numbers_of(lanes), jnp.ones(lanes, jnp.int32), jnp.ones(lanes, bool))
    for sharded in itertools.product((False, True), repeat=3):
        specs = tuple(P("lanes") if s else P() for s in sharded)
        sizes = [lanes if s or not any(sharded) else lanes // 4 for s in sharded]
        query = jax.shard_map(jax.vmap(gate(host)), mesh=mesh, in_specs=specs, out_specs=P("lanes"))
        value, _ = jax.jit(query)(*(x[:n] for x, n in zip(given, sizes)))
        local = [x[:n].reshape(4, -1, *x.shape[1:]) if s else x[None, :n].repeat(4, 0)
                 for x, n, s in zip(given, sizes, sharded)]
        np.testing.assert_array_equal(value, (local[0].sum(-1) + 100 * local[1]).reshape(-1))
"""


def test_shard_map_on_four_devices():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
