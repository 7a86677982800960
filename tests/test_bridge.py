"""The bridge: every distinct crystal once, whatever dies; nothing finished is lost, nothing unfinished is kept."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import functools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from worker_probes import worker_facts, xla_threads

import crystaljax
from crystaljax import evaluators, library
from crystaljax.dft_bridge import Bridge, Request, Store, open_bridge
from crystaljax.dft_bridge.engines.base import BatchEngine, Crystal, EngineNotReady, Result
from crystaljax.dft_bridge.engines.planewave import PlanewaveEngine
from crystaljax.dft_bridge.interrupts import InterruptWatch
from crystaljax.dft_bridge.keys import Keys, canonical_numbers
from crystaljax.dft_bridge.limits import JobTimeout, Limits, WorkerDied
from crystaljax.dft_bridge.pool import WorkerPool
from crystaljax.dft_bridge.store import StoreError
from crystaljax.dft_bridge.testing import FakeBatchEngine, FakeEngine, fake_value
from crystaljax.evaluators import Problem
from crystaljax.status import Status
from crystaljax.symmetry import canonical

C1 = library.benchmark("C1")
TESTS = Path(__file__).parent
HYDROGEN, CARBON, OXYGEN, NEON = 1, 6, 8, 10


@pytest.fixture
def engine(tmp_path):
    return FakeEngine(log=str(tmp_path / "calculations"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.db"


def requests_of(*labelings, property_name="band_gap"):
    return [Request.of(C1, labels, property_name) for labels in labelings]


def some(count, element=CARBON):
    """Requests for ``count`` distinct crystals that hold the element."""
    return requests_of(*([element, 20 + i, 8, 8, 8] for i in range(count)))


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def virtual_devices(count):
    """An environment in which JAX sees that many CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def inline(engine, path):
    """A bridge that calculates in a thread of this process."""
    return Bridge(engine, path, executor=ThreadPoolExecutor(1))


# Keys


def test_numpy_and_jax_agree_on_the_canonical_form():
    for name in ("C1", "C3", "C5"):
        skeleton = library.benchmark(name)
        labels = np.random.default_rng(0).integers(1, 5, (200, skeleton.n_sites), dtype=np.int32)
        ours = canonical_numbers(labels, skeleton.permutations)
        theirs = jax.vmap(canonical, (0, None))(jnp.asarray(labels), jnp.asarray(skeleton.permutations))
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == labels.dtype


def test_equivalent_labelings_have_one_key_and_different_questions_have_different_keys():
    labels = np.array([37, 23, 9, 9, 17])
    keys = Keys(C1, "band_gap", {"cutoff": 400.0})
    same = {keys.key(Request.of(C1, labels[p], "band_gap").numbers) for p in C1.permutations}
    assert len(same) == 1
    other_skeleton, other_property = Keys(library.benchmark("C2"), "band_gap", {"cutoff": 400.0}), "density"
    request = Request.of(C1, labels, "band_gap")
    different = [
        keys.key(request.numbers),
        keys.key(Request.of(C1, [37, 23, 9, 9, 9], "band_gap").numbers),
        other_skeleton.key(request.numbers),
        Keys(C1, other_property, {"cutoff": 400.0}).key(request.numbers),
        Keys(C1, "band_gap", {"cutoff": 500.0}).key(request.numbers),
    ]
    assert len(set(different)) == 5


def test_a_request_needs_an_element_on_every_site():
    with pytest.raises(ValueError, match="needs 5 atomic numbers"):
        Request.of(C1, [6, 6, 6], "band_gap")
    with pytest.raises(ValueError, match="needs 5 atomic numbers"):
        Request.of(C1, [6, 6, 6, 6, 0], "band_gap")


# Every distinct crystal once


def test_duplicates_and_equivalent_labelings_are_computed_once(engine, path):
    labels = np.array([37, 23, 9, 9, 17])
    with inline(engine, path) as bridge:
        results = bridge.evaluate(requests_of(*(labels[p] for p in C1.permutations), labels))
        assert {r.value for r in results} == {fake_value(labels)}
        assert results[0].details == {"iterations": 7, "bands": [0.5, 1.5]}
        bridge.evaluate(requests_of(labels))
        stats = bridge.stats()
    assert len(engine.calculations()) == stats.calls == 1
    assert (stats.requests, stats.distinct, stats.memory_hits) == (len(C1.permutations) + 2, 2, 1)
    assert stats.batch_hits == len(C1.permutations)


def test_a_second_bridge_on_the_store_computes_none(engine, path):
    with inline(engine, path) as bridge:
        first = bridge.evaluate(some(5))
    with inline(engine, path) as bridge:
        assert bridge.evaluate(some(5)) == first
        assert (bridge.stats().store_hits, bridge.stats().calls) == (5, 0)
    assert len(engine.calculations()) == 5


def test_a_changed_setting_of_the_engine_is_another_calculation(engine, path, tmp_path):
    with inline(engine, path) as bridge:
        one = bridge.evaluate(some(1))
    with inline(FakeEngine(log=engine.log, scale=0.5), path) as bridge:
        other = bridge.evaluate(some(1))
        assert bridge.stats().store_hits == 0
    assert len(engine.calculations()) == 2 and one[0].value != other[0].value


def test_the_query_reduces_equivalent_labelings_on_the_device(engine, path):
    labels = jnp.asarray(np.array([37, 23, 9, 9, 17])[C1.permutations], jnp.int32)
    with inline(engine, path) as bridge:
        bound = bridge.bind(Problem((C1,), "band_gap"))
        query = jax.jit(jax.vmap(bound.query, (0, None, 0)))
        value, status = query(labels, jnp.int32(0), jnp.ones(len(labels), bool))
        bound.check()
        assert bound.label == "fake 1.0"
        stats = bridge.stats()
    np.testing.assert_allclose(value, fake_value(labels[0]), rtol=1e-6)
    assert (status == Status.OK).all()
    assert (stats.host_calls, stats.requests, stats.distinct, stats.calls) == (1, len(labels), 1, 1)


def test_threads_that_ask_for_one_crystal_share_the_calculation(engine, path):
    slow = FakeEngine(log=engine.log, sleep=0.3)
    with Bridge(slow, path, executor=ThreadPoolExecutor(4)) as bridge:
        with ThreadPoolExecutor(4) as threads:
            results = list(threads.map(lambda _: bridge.evaluate(some(2)), range(4)))
        assert bridge.stats().calls == 2
    assert len(slow.calculations()) == 2 and all(r == results[0] for r in results)


def test_two_processes_on_one_store(engine, path):
    code = f"""
        import sys
        sys.path.insert(0, {str(TESTS)!r})
        from test_bridge import FakeEngine, inline, some
        with inline(FakeEngine(log={engine.log!r}), {str(path)!r}) as bridge:
            for start in range(0, 40, 4):
                assert all(r.status == 0 for r in bridge.evaluate(some(40)[start:start + 4]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.wait(120) == 0, process.stderr.read()
    assert len(Store(path)) == 40
    with inline(engine, path) as bridge:
        bridge.evaluate(some(40))
        assert bridge.stats().store_hits == 40


# The environment


def random_episodes(env, params, lanes=64, length=12):
    """(rewards [T, B], terminated, infos) of a random policy, the whole of it compiled."""

    def run(key):
        key, reset_key = jax.random.split(key)
        _, state = jax.vmap(env.reset, (0, None))(jax.random.split(reset_key, lanes), params)

        def step(state, key):
            action_key, step_key = jax.random.split(key)
            actions = jax.random.randint(action_key, (lanes,), 0, env.num_actions)
            step_keys = jax.random.split(step_key, lanes)
            _, state, reward, terminated, _, info = jax.vmap(env.step, (0, 0, 0, None))(
                step_keys, state, actions, params
            )
            return state, (reward, terminated, info)

        return jax.lax.scan(step, state, jax.random.split(key, length))[1]

    return jax.block_until_ready(jax.jit(run)(jax.random.key(0)))


@pytest.mark.parametrize("task", ["BandGap-C1-v0", "BandGap-Mixed-v0"])
def test_rewards_of_the_environment_equal_a_direct_calculation(engine, path, task):
    failing = FakeEngine(log=engine.log, fail_element=OXYGEN, refuse_element=HYDROGEN)
    with inline(failing, path) as bridge:
        env, params = crystaljax.make(task, evaluator=bridge, in_phase=True)
        reward, terminated, info = random_episodes(env, params)
        env.evaluator.check()
        stats = bridge.stats()
    numbers = env.vocabulary.numbers[np.asarray(info["elements"])]
    assert terminated.any() and stats.failures.keys() == {"NOT_CONVERGED"} and stats.refused > 0
    assert stats.host_calls == np.asarray(terminated).any(axis=1).sum()
    for t, lane in np.argwhere(np.asarray(terminated)):
        crystal = numbers[t, lane][numbers[t, lane] > 0]
        failed = HYDROGEN in crystal or OXYGEN in crystal
        expected = -1.0 if failed else np.exp(-((1.12 - fake_value(crystal)) ** 2))
        np.testing.assert_allclose(reward[t, lane], expected, rtol=1e-5)
    assert not np.asarray(reward)[~np.asarray(terminated)].any()


def test_several_properties_of_a_crystal_make_one_outcome(engine, path):
    """Each property is a result of its own in the store, so a later question about one of them costs nothing."""
    asked = ("band_gap", "density")
    with Bridge(dataclasses.replace(engine, refuse_element=HYDROGEN), path, workers=1) as bridge:
        bound = bridge.bind(Problem((C1,), asked))
        numbers = jnp.array([[3, 9, 9, 9, 8], [9, 3, 9, 9, 8], [1, 9, 9, 9, 8], [4, 9, 9, 9, 8]], jnp.int32)
        pending = jnp.array([True, True, True, False])
        values, status = jax.jit(jax.vmap(bound.query, (0, None, 0)))(numbers, jnp.int32(0), pending)
        bound.check()
        gap = fake_value(np.asarray(numbers[0]))
        np.testing.assert_allclose(values, [[gap, gap], [fake_value([9, 3, 9, 9, 8])] * 2, [0, 0], [0, 0]], rtol=1e-6)
        assert status.tolist() == [Status.OK, Status.OK, Status.ODD_ELECTRONS, Status.OK]
        made = bridge.stats().calls
        assert bound.caveats([(np.asarray(numbers[0]), 0)]) == [()]
        assert [r.value for r in bridge.evaluate(requests_of([3, 9, 9, 9, 8], property_name="density"))] == [gap]
        assert bridge.stats().calls == made == len(engine.calculations())


def test_an_environment_on_a_bridge_can_be_deep_copied(engine, path):
    with inline(engine, path) as bridge:
        env, params = crystaljax.make("BandGap-C1-v0", evaluator=bridge)
        copied = copy.deepcopy(env)
        reward = random_episodes(env, params, lanes=8)[0]
        calls = bridge.stats().calls
        np.testing.assert_array_equal(random_episodes(copied, params, lanes=8)[0], reward)
        assert bridge.stats().calls == calls > 0, "the copy shares the bridge and its memory"


TWO_DEVICES = """
    import sys
    sys.path.insert(0, {tests!r})
    from test_bridge import FakeEngine, inline, query_some
    with inline(FakeEngine(log={log!r}, sleep=0.01), {path!r}) as bridge:
        # Twice the same six crystals, one half on each device.
        bound, status = query_some(bridge, 12, devices=2, check_vma={check_vma}, distinct=6)
        bound.check()
        stats = bridge.stats()
    assert status == [0] * 12 and stats.host_calls == 2 and stats.calls == 6, (status, stats)
"""


@pytest.mark.parametrize("check_vma", [False, True])
def test_devices_of_a_shard_map_share_calculations(engine, path, check_vma):
    code = textwrap.dedent(TWO_DEVICES.format(tests=str(TESTS), log=engine.log, path=str(path), check_vma=check_vma))
    done = subprocess.run([sys.executable, "-c", code], env=virtual_devices(2), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Failures are outcomes


def test_failures_are_results_with_a_reason(engine, path):
    faulty = FakeEngine(
        log=engine.log, refuse_element=1, fail_element=2, nan_element=3, raise_element=4, unready_element=-1
    )
    with inline(faulty, path) as bridge:
        results = bridge.evaluate([some(1, element)[0] for element in (1, 2, 3, 4, CARBON)])
        stats = bridge.stats()
    assert [r.status for r in results] == [
        Status.ODD_ELECTRONS,
        Status.NOT_CONVERGED,
        Status.INVALID_RESULT,
        Status.ENGINE_ERROR,
        Status.OK,
    ]
    assert "ArithmeticError: division by cucumber" in results[3].message
    assert (stats.refused, stats.calls) == (1, 4)
    assert stats.failures == {"NOT_CONVERGED": 1, "INVALID_RESULT": 1, "ENGINE_ERROR": 1}
    assert len(Store(path)) == 4, "failed calculations are stored, refusals are not"


def test_engines_are_evaluators_by_name(monkeypatch, path):
    monkeypatch.setenv("CRYSTALJAX_STORE", str(path))
    for name in ("planewave", None):
        with evaluators.evaluator(name) as bridge:
            assert isinstance(bridge, Bridge) and bridge.engine.name == "planewave" and bridge.store.path == path
    with pytest.raises(ValueError, match="gpaw"):
        open_bridge("no such engine")
    assert not path.exists(), "naming an engine opens nothing"


def test_a_missing_engine_is_one_error_at_the_door(path):
    with Bridge(FakeEngine(ready=False), path) as bridge:
        with pytest.raises(EngineNotReady, match="install it"):
            bridge.bind(Problem((C1,), "band_gap"))
    assert not path.exists()


def test_an_unknown_property_is_refused_at_the_door(engine, path):
    with Bridge(engine, path) as bridge, pytest.raises(ValueError, match="bulk_modulus"):
        bridge.bind(Problem((C1,), "bulk_modulus"))


def query_some(bridge, count=3, element=CARBON, devices=1, check_vma=False, distinct=None):
    """Ask for :func:`some` from a compiled program, on several devices by ``shard_map``; the bound and the statuses."""
    bound = bridge.bind(Problem((C1,), "band_gap"))
    labels = jnp.asarray([request.numbers for request in some(distinct or count, element)], jnp.int32)
    labels = jnp.tile(labels, (count // len(labels), 1))
    query = jax.vmap(bound.query)
    if devices > 1:
        mesh = Mesh(np.array(jax.devices()[:devices]), ("lanes",))
        lanes = PartitionSpec("lanes")
        query = jax.shard_map(query, mesh=mesh, in_specs=lanes, out_specs=lanes, check_vma=check_vma)
    _, status = jax.jit(query)(labels, jnp.zeros(count, jnp.int32), jnp.ones(count, bool))
    return bound, np.asarray(status).tolist()


def test_what_goes_wrong_inside_a_program_is_raised_by_check_with_its_own_type(engine, path):
    with inline(FakeEngine(unready_element=CARBON), path) as bridge:
        bound, status = query_some(bridge)
        assert status == [Status.CANCELLED] * 3
        with pytest.raises(EngineNotReady, match="vanished"):
            bound.check()
        bound.check()  # once
    with inline(engine, path) as bridge:
        bound = bridge.bind(Problem((C1,), "band_gap"))
        path.write_bytes(b"not a database any more" * 1000)
        assert query_some(bridge)[1] == [Status.CANCELLED] * 3
        with pytest.raises(StoreError, match="move it away"):
            bridge.evaluate(some(1))


def test_a_closed_bridge_says_so(engine, path):
    with inline(engine, path) as bridge:
        bridge.evaluate(some(1))
    assert bridge.evaluate(some(1))[0].status == Status.OK, "what is known stays known"
    with pytest.raises(RuntimeError, match="closed"):
        bridge.evaluate(some(2))


@dataclasses.dataclass(frozen=True)
class RaisingEngine(FakeEngine):
    """Raises what ``error`` makes."""

    error: Callable[[], Exception] = ArithmeticError

    def compute(self, crystal, property_name):
        super().compute(crystal, property_name)
        raise self.error()


def led_to(kind, cause):
    error = kind("the calculation failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        lambda: jax.errors.JaxRuntimeError("INTERNAL: the executable expects 7 buffers"),
        lambda: MemoryError("too much"),
        lambda: RuntimeError("can't start new thread"),
        lambda: zlib.error("Error -3 while decompressing data"),
        lambda: AttributeError("partially initialized module 'spglib' has no attribute 'get_spacegroup'"),
        lambda: led_to(RuntimeError, ImportError("no module named moon")),
        lambda: led_to(ValueError, OSError("stale file handle")),
        lambda: subprocess.CalledProcessError(127, "vasp"),
    ],
)
def test_what_speaks_of_the_machine_is_never_a_result_in_the_store(engine, path, error):
    with inline(RaisingEngine(log=engine.log, error=error), path) as bridge:
        assert bridge.evaluate(some(1))[0].status == Status.ENGINE_ERROR
    assert len(Store(path)) == 0
    with inline(engine, path) as bridge:
        assert bridge.evaluate(some(1))[0].status == Status.OK


def test_a_module_that_a_worker_lacks_is_one_error_and_no_result(engine, path):
    lacking = RaisingEngine(log=engine.log, error=lambda: ModuleNotFoundError("No module named 'gpaw'"))
    with inline(lacking, path) as bridge, pytest.raises(EngineNotReady, match="cannot import .*gpaw.*install it"):
        bridge.evaluate(some(1))
    assert len(Store(path)) == 0


def test_an_error_of_the_physics_is_kept(engine, path):
    program = subprocess.CalledProcessError(1, "vasp")
    for number, error in enumerate((ArithmeticError("cucumber"), led_to(ValueError, KeyError("moon")), program)):
        with inline(RaisingEngine(scale=1.0 + number, error=lambda error=error: error), path) as bridge:
            assert bridge.evaluate(some(1))[0].status == Status.ENGINE_ERROR
        assert len(Store(path)) == number + 1


def test_a_failure_of_the_machine_that_an_earlier_version_stored_is_calculated_again(engine, path):
    old = Result.failure(Status.ENGINE_ERROR, "JaxRuntimeError: INTERNAL: the executable expects 7 buffers")
    with inline(engine, path) as bridge:
        request = some(1)[0]
        bridge.bind(Problem((C1,), "band_gap"))
        bridge._archive.record({bridge._archive.keys(C1, "band_gap").key(request.numbers): (request, old)})
        assert bridge.evaluate([request])[0].status == Status.OK
    with inline(engine, path) as bridge:
        assert bridge.evaluate([request])[0].status == Status.OK and bridge.stats().store_hits == 1
    assert len(engine.calculations()) == len(Store(path)) == 1


# Worker processes


def test_a_killed_worker_breaks_only_what_it_ran(engine, path, tmp_path):
    killing = FakeEngine(log=engine.log, kill_element=NEON, kill_once=str(tmp_path / "killed"))
    with Bridge(killing, path, workers=2) as bridge:
        results = bridge.evaluate([*some(6), *some(1, NEON)])
        again = bridge.evaluate(some(1, NEON))
    assert [r.status for r in results] == [Status.OK] * 6 + [Status.WORKER_DIED]
    assert "died 3 times" in results[-1].message and again[0].status == Status.WORKER_DIED
    # Each surviving crystal ran once, but for the one whose first worker was killed.
    assert len(killing.calculations()) == 6 + 1 + 3
    assert len(Store(path)) == 7, "with the limits under which the worker died"


def test_a_hanging_calculation_is_stopped(engine, path):
    hanging = FakeEngine(log=engine.log, hang_element=NEON)
    with Bridge(hanging, path, workers=2, limits=Limits(timeout=3.0, retries=0)) as bridge:
        results = bridge.evaluate([*some(1, NEON), *some(3)])
    assert [r.status for r in results] == [Status.TIMEOUT] + [Status.OK] * 3
    assert len(hanging.calculations()) == len(Store(path)) == 4


def test_workers_are_light_and_in_a_group_of_their_own():
    with WorkerPool(1) as pool:
        assert pool.processes() == []
        assert pool.submit(worker_facts).result() == ([], "1", True)
        assert len(pool.processes()) == 1


KILLED_AT_ITS_END = """
    import os, signal, tempfile
    from crystaljax.dft_bridge import pool

    def killed(folder):
        assert os.listdir(folder)
        os.kill(os.getpid(), signal.SIGKILL)

    pool.remove_scratch = killed
    with pool.WorkerPool(1) as workers:
        print(workers.submit(tempfile.mkdtemp).result(), flush=True)
"""


def test_no_scratch_folder_is_left_by_a_program_that_is_killed_between_its_worker_and_the_folder(tmp_path):
    command, env = [sys.executable, "-c", textwrap.dedent(KILLED_AT_ITS_END)], {**os.environ, "TMPDIR": str(tmp_path)}
    killed = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    assert killed.returncode == -signal.SIGKILL
    assert Path(killed.stdout).is_relative_to(tmp_path)
    wait_for(lambda: not list(tmp_path.iterdir()))


def test_cancel_stops_at_once_and_stores_nothing_unfinished(engine, path):
    hanging = FakeEngine(log=engine.log, hang_element=NEON)
    with Bridge(hanging, path, workers=2) as bridge, ThreadPoolExecutor(1) as thread:
        pending = thread.submit(bridge.evaluate, [*some(2), *some(4, NEON)])
        wait_for(lambda: len(hanging.calculations()) == 4 and len(Store(path)) == 2)
        start = time.monotonic()
        bridge.cancel()
        statuses = [r.status for r in pending.result(30)]
        assert time.monotonic() - start < 10
        assert statuses == [Status.OK] * 2 + [Status.CANCELLED] * 4
        assert [r.status for r in bridge.evaluate(some(3))] == [Status.OK] * 2 + [Status.CANCELLED]
        bridge.resume()
        assert bridge.evaluate(some(3))[2].status == Status.OK
    assert len(Store(path)) == 3


SLOW_RUN = """
    import sys
    sys.path.insert(0, {tests!r})
    from test_bridge import Bridge, FakeEngine, query_some
    with Bridge(FakeEngine(log={log!r}, sleep=0.3), {path!r}, workers=2) as bridge:
        bound, status = query_some(bridge, 20, devices={devices})
        print("statuses", *status, flush=True)
        bound.check()
"""


def start_slow_run(engine, path, devices=1):
    code = textwrap.dedent(SLOW_RUN.format(tests=str(TESTS), log=engine.log, path=str(path), devices=devices))
    env = virtual_devices(devices)
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    wait_for(lambda: path.exists() and len(Store(path)) >= 4)
    return process


def resume(engine, path):
    """Run it again to its end; returns how many were calculated before and how many now."""
    before = len(Store(path))
    with inline(FakeEngine(log=engine.log), path) as bridge:
        assert all(r.status == Status.OK for r in bridge.evaluate(some(20)))
        return before, bridge.stats().calls


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" if Path("/proc").exists() else True


def test_killing_the_program_loses_nothing_finished_and_leaves_no_orphans(engine, path):
    process = start_slow_run(engine, path)
    process.kill()
    process.wait(30)
    pids = {int(line.split()[0]) for line in Path(engine.log).read_text().splitlines()}
    wait_for(lambda: not any(alive(pid) for pid in pids), 15)
    before, calls = resume(engine, path)
    assert before >= 4 and before + calls == 20


@pytest.mark.parametrize("devices", [1, 2])  # on two, the host calls run outside the main thread, as on a GPU
def test_ctrl_c_ends_a_compiled_program_and_loses_nothing_finished(engine, path, devices):
    process = start_slow_run(engine, path, devices)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    before, calls = resume(engine, path)
    assert 4 <= before < 20 and before + calls == 20


def test_every_interrupt_watch_hears_ctrl_c_and_leaves_things_as_they_were():
    heard = [threading.Event(), threading.Event()]
    handler = signal.signal(signal.SIGINT, lambda *_: None)
    before = signal.set_wakeup_fd(-1)
    try:
        first, second = [InterruptWatch(event.set) for event in heard]
        os.kill(os.getpid(), signal.SIGINT)
        assert all(event.wait(10) for event in heard)
        first.close()  # not the latest: keeps its place in the chain
        second.close()
        first.close()
        assert signal.set_wakeup_fd(before) == -1
    finally:
        signal.signal(signal.SIGINT, handler)


def test_ctrl_c_between_two_host_calls_ends_the_next_one(engine, path):
    """While a program runs on an accelerator, the main thread runs no Python code for hours; nor does it here."""
    with inline(engine, path) as bridge, ThreadPoolExecutor(1) as other:
        bound = bridge.bind(Problem((C1,), "band_gap"))
        handler = signal.signal(signal.SIGINT, lambda *_: None)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # else it would wake the main thread

        def host_call():
            time.sleep(0.5)  # the main thread sleeps by now
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            os.kill(os.getpid(), signal.SIGINT)
            wait_for(lambda: bridge._interrupts.pending, 5)
            with bridge._in_program():
                pass

        try:
            sleep = ctypes.CDLL(None).sleep
            call = other.submit(host_call)
            sleep(2)
            with pytest.raises(KeyboardInterrupt):
                call.result(10)
            wait_for(lambda: not bridge._interrupts.pending, 10)
            other.submit(bridge._in_program().__enter__).result(10)
            bound.check()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            signal.signal(signal.SIGINT, handler)


# Batches


@pytest.fixture
def batched(tmp_path):
    return FakeBatchEngine(log=str(tmp_path / "calculations"), batches_log=str(tmp_path / "batches"))


def statuses(results):
    return [r.status for r in results]


def test_batches_are_those_of_the_engine_and_each_is_written_at_once(batched, path, monkeypatch):
    slow = dataclasses.replace(batched, sleep=0.05)
    written = []
    with inline(slow, path) as bridge:
        write = bridge.store.write
        monkeypatch.setattr(bridge.store, "write", lambda records: (written.append(len(records)), write(records)))
        requests = some(10)
        results = bridge.evaluate(requests)
        assert [r.value for r in results] == [fake_value(r.numbers) for r in requests], "in the order of the requests"
        assert bridge.stats().calls == 10 and bridge.evaluate(requests) == results
    assert isinstance(slow, BatchEngine) and not isinstance(FakeEngine(), BatchEngine)
    assert slow.batches() == written == [4, 4, 2]
    assert [numbers[1] for numbers in slow.calculations()] == list(range(29, 19, -1)), "in the order of the engine"


def test_properties_are_not_mixed_in_a_batch(batched, path):
    with inline(batched, path) as bridge:
        results = bridge.evaluate([*some(2), *requests_of([6, 7, 8, 8, 8], property_name="density"), *some(3)])
    assert statuses(results) == [Status.OK] * 6 and batched.batches() == [3], "one crystal needs no batch"


def test_a_poisoned_crystal_fails_alone(batched, path):
    poisoned = dataclasses.replace(batched, raise_element=NEON, nan_element=HYDROGEN)
    with inline(poisoned, path) as bridge:
        results = bridge.evaluate([*some(2), *some(1, NEON), *some(1, HYDROGEN), *some(6)])
        assert bridge.stats().failures == {"ENGINE_ERROR": 1, "INVALID_RESULT": 1}
    assert statuses(results[2:4]) == [Status.ENGINE_ERROR, Status.INVALID_RESULT]
    assert "cucumber" in results[2].message
    assert statuses(results[:2] + results[4:]) == [Status.OK] * 8
    assert len(Store(path)) == 8, "failures too; two of the ten requests were asked for twice"


def test_a_batch_with_the_wrong_number_of_results_fails(batched, path):
    with inline(dataclasses.replace(batched, lost=1), path) as bridge:
        results = bridge.evaluate(some(5))
    assert statuses(results) == [Status.OK] + [Status.ENGINE_ERROR] * 4
    assert "3 results for 4 crystals" in results[1].message


def test_an_engine_must_group_every_crystal_once(batched, path, monkeypatch):
    monkeypatch.setattr(FakeBatchEngine, "group", lambda self, crystals, property_name: [[0, 1], [1]])
    with inline(batched, path) as bridge, pytest.raises(ValueError, match="each of 3 crystals into one group"):
        bridge.evaluate(some(3))


@dataclasses.dataclass
class FailingExecutor(Executor):
    """Runs jobs at once, but for those with neon, which fail; holds the sizes of all."""

    error: Exception
    sizes: list[int] = dataclasses.field(default_factory=list)

    def submit(self, fn, /, engine, crystals, property_name):
        self.sizes.append(len(crystals))
        future = Future()
        if any(NEON in crystal.numbers for crystal in crystals):
            future.set_exception(self.error)
        else:
            future.set_result(fn(engine, crystals, property_name))
        return future


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (JobTimeout("too long"), Status.TIMEOUT),
        (WorkerDied("it died"), Status.WORKER_DIED),
        (MemoryError("too much"), Status.ENGINE_ERROR),
    ],
)
def test_a_batch_that_fails_as_a_whole_is_split(batched, path, error, status):
    executor = FailingExecutor(error)
    with Bridge(batched, path, executor=executor) as bridge:
        results = bridge.evaluate([*some(6), *some(1, NEON)])
        stats = bridge.stats()
    assert statuses(results) == [Status.OK] * 6 + [status]
    assert executor.sizes == [4, 3, 1, 1, 1, 1] and batched.batches() == [3]
    assert (stats.calls, stats.failures) == (7, {status.name: 1})
    assert len(Store(path)) == (6 if status == Status.ENGINE_ERROR else 7)


def test_a_missing_engine_stops_a_batch_with_one_error(batched, path):
    with inline(dataclasses.replace(batched, unready_element=NEON), path) as bridge:
        with pytest.raises(EngineNotReady, match="vanished"):
            bridge.evaluate([*some(1, NEON), *some(3)])


def test_a_crystal_that_kills_its_worker_fails_alone(batched, path):
    killing = dataclasses.replace(batched, kill_element=NEON)
    with Bridge(killing, path, workers=2, limits=Limits(retries=1)) as bridge:
        results = bridge.evaluate([*some(3), *some(1, NEON), *some(6)[3:]])
    assert statuses(results) == [Status.OK] * 3 + [Status.WORKER_DIED] + [Status.OK] * 3
    assert results[3].message == "its worker died 2 times: SIGKILL(-9)" and len(Store(path)) == 7
    assert sorted(killing.batches()) == [3, 4, 4], "with its retry"


def test_a_batch_has_the_time_of_all_its_crystals():
    with WorkerPool(1, Limits(timeout=0.5)) as pool:
        assert pool.submit_batch(60, time.sleep, 0.6).result() is None


def test_the_start_of_a_worker_is_not_part_of_the_time_limit():
    with WorkerPool(1, Limits(timeout=1.0, retries=0), start=functools.partial(time.sleep, 2.5)) as pool:
        assert pool.submit(time.sleep, 0.1).result() is None
        with pytest.raises(JobTimeout, match="after 1 s"):
            pool.submit(time.sleep, 20.0).result()
        assert pool.submit(time.sleep, 0.1).result() is None, "its second worker starts as slowly"


def test_a_worker_that_never_starts_is_an_error_about_the_machine(monkeypatch):
    monkeypatch.setattr("crystaljax.dft_bridge.pool.START_SECONDS", 1.0)
    with WorkerPool(1, start=functools.partial(time.sleep, 100.0)) as pool:
        with pytest.raises(EngineNotReady, match="not started within 1 s"):
            pool.submit(time.sleep, 0.1).result()


def test_the_engine_chooses_the_workers_and_their_environment(batched, path):
    with Bridge(dataclasses.replace(batched, size=1), path) as bridge:
        results = bridge.evaluate(some(3))
    assert sorted(r.details["worker"] for r in results) == ["0", "1", "2"]
    assert [r.details["starts"] for r in results] == ["+"] * 3


def test_cancel_stops_batches(batched, path):
    hanging = dataclasses.replace(batched, hang_element=NEON, size=2)
    with Bridge(hanging, path, workers=2) as bridge, ThreadPoolExecutor(1) as thread:
        pending = thread.submit(bridge.evaluate, [*some(4, NEON), *some(2)])
        wait_for(lambda: len(hanging.calculations()) == 4 and len(Store(path)) == 2)
        start = time.monotonic()
        bridge.cancel()
        assert statuses(pending.result(30)) == [Status.CANCELLED] * 4 + [Status.OK] * 2
        assert time.monotonic() - start < 10
    assert len(Store(path)) == 2


def planewave(**settings):
    return PlanewaveEngine.preset("fast", band_gap_cutoff=15.0, **settings)


def perovskites(*cations):
    """ATiO3 with these elements A, all at one lattice parameter."""
    sites = np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    return [Crystal(3.95 * np.eye(3), sites, np.array([cation, 22, 8, 8, 8])) for cation in cations]


def test_planewave_runs_crystals_of_different_programs_first():
    calcium, strontium, oganesson = 20, 38, 118
    crystals = [
        *perovskites(oganesson, calcium),
        *(dataclasses.replace(crystal, lattice=4.2 * np.eye(3)) for crystal in perovskites(calcium)),
        *perovskites(strontium, calcium, strontium),
    ]
    assert planewave().group(crystals, "band_gap") == [[2], [1], [0], [3], [4], [5]]
    assert planewave(batch=8).group(crystals, "band_gap") == [[1, 3, 4, 5], [2], [0]]
    assert planewave(batch=8).group(crystals[3:4] * 33, "band_gap") == [[*range(17)], [*range(17, 33)]]


def test_planewave_workers_use_one_core_and_remember_programs(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert planewave().workers() is None and isinstance(planewave(), BatchEngine)
    environment = planewave().worker_environment(1)
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "crystaljax" / "xla")
    with WorkerPool(1, environment=planewave().worker_environment, start=planewave().start_worker) as pool:
        cores, width = pool.submit(xla_threads).result()
    assert cores == os.sched_getaffinity(0) and width <= 1
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    assert planewave().worker_environment(0)["JAX_COMPILATION_CACHE_DIR"] == "mine"


def test_planewave_workers_have_a_gpu_each(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    environments = [planewave().worker_environment(index) for index in range(3)]
    assert planewave().workers() == 2 and "JAX_PLATFORMS" not in environments[0]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert planewave().worker_environment(1)["CUDA_VISIBLE_DEVICES"] == "7"
    groups = planewave().group(perovskites(*[20] * 9), "band_gap")
    assert groups == [[0, 1, 2, 3, 4], [5, 6, 7, 8]], "both have something to do"
    groups = planewave(batch=1).group(perovskites(*[20] * 9), "band_gap")
    assert [len(group) for group in groups] == [3, 3, 3]


def test_nothing_is_started_before_it_is_needed(engine, path):
    pool = WorkerPool(2)
    with Bridge(engine, path, executor=pool) as bridge:
        bound = bridge.bind(Problem((C1,), "band_gap"))
        idle = jax.jit(bound.query)(jnp.zeros(5, jnp.int32), jnp.int32(0), jnp.bool_(False))
        assert idle.values.tolist() == [0.0] and idle.status == Status.OK
        assert pool.processes() == [] and bridge.stats().host_calls == 0
    pool.shutdown()
