"""Dask: what holds for worker processes of our own holds on many hosts, and hosts may go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from crystaljax import library
from crystaljax.dft_bridge import Bridge, Limits, Request, Store, open_bridge
from crystaljax.dft_bridge.limits import ExecutorLost
from crystaljax.dft_bridge.testing import FakeBatchEngine, FaultyEngine, fake_value
from crystaljax.status import Status

distributed = pytest.importorskip("distributed", reason="needs the extra: pip install 'crystaljax[dask]'")

C1 = library.benchmark("C1")
TESTS = Path(__file__).parent
NEON, FLUORINE = 10, 9


def some(count, element=6):
    return [Request.of(C1, [element, 20 + i, 8, 8, 8], "band_gap") for i in range(count)]


def alive(log):
    """Processes noted in a log that still run."""
    pids = {int(line.split()[0]) for line in Path(log).read_text().splitlines()} if Path(log).exists() else set()
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster():
    """Two separate worker processes, each under its nanny."""
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        yield cluster


@pytest.fixture
def engine(tmp_path):
    return FaultyEngine(
        log=str(tmp_path / "log"), programs=str(tmp_path / "programs"), kill_element=NEON, hang_element=FLUORINE
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.db"


def test_limits_hold_on_the_hosts(cluster, engine, path):
    limits = Limits(timeout=3.0, retries=0)
    with Bridge(engine, path, scheduler=cluster.scheduler_address, limits=limits) as bridge:
        *results, died, hung = bridge.evaluate([*some(6), *some(1, NEON), *some(1, FLUORINE)])
        assert bridge.stats().calls == 8
    assert [r.value for r in results] == [fake_value(r.numbers) for r in some(6)]
    assert (died.status, died.message) == (Status.WORKER_DIED, "its worker died 1 times: SIGKILL(-9)")
    assert hung.status == Status.TIMEOUT and hung.details["limits"]["timeout"] == 3.0
    assert len(Store(path)) == 8 and alive(engine.programs) == []


def test_batches_and_their_environment(cluster, tmp_path, path):
    engine = FakeBatchEngine(batches_log=str(tmp_path / "batches"))
    with Bridge(engine, path, scheduler=cluster.scheduler_address) as bridge:
        results = bridge.evaluate(some(10))
    assert [r.value for r in results] == [fake_value(r.numbers) for r in some(10)]
    assert sorted(engine.batches()) == [2, 4, 4] and {r.details["starts"] for r in results} == {"+"}


def test_the_jobs_of_a_lost_host_go_to_another(cluster, engine, path):
    slow = FaultyEngine(log=engine.log, programs=engine.programs, sleep=0.2)
    with Bridge(slow, path, scheduler=cluster.scheduler_address) as bridge:
        bridge.submit(some(20))
        wait_for(lambda: len(Store(path)) >= 4)
        host = next(iter(cluster.workers.values()))
        os.kill(host.pid, signal.SIGKILL)
        answers = bridge.collect(wait=None)
        assert {a.result.status for a in answers} == {Status.OK} and len(answers) == 20
    assert len(Store(path)) == 20 and len(slow.calculations()) <= 24
    wait_for(lambda: not alive(engine.programs))


def test_cancelling_stops_what_runs_on_the_hosts(cluster, engine, path):
    with Bridge(engine, path, scheduler=cluster.scheduler_address) as bridge:
        bridge.submit(some(4, FLUORINE))
        wait_for(lambda: len(alive(engine.programs)) == 2)
        bridge.cancel()
        assert {a.result.status for a in bridge.collect(wait=None)} == {Status.CANCELLED}
        wait_for(lambda: not alive(engine.programs))
    assert not len(Store(path))


def test_killing_the_program_stops_what_runs_on_the_hosts(cluster, engine, path):
    code = f"""
        import sys
        sys.path.insert(0, {str(TESTS)!r})
        from test_cluster import Bridge, FaultyEngine, some, FLUORINE
        engine = FaultyEngine(log={engine.log!r}, programs={engine.programs!r}, hang_element=FLUORINE)
        Bridge(engine, {str(path)!r}, scheduler={cluster.scheduler_address!r}).evaluate(some(4, FLUORINE))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    wait_for(lambda: len(alive(engine.programs)) == 2)
    process.kill()
    process.wait()
    wait_for(lambda: not alive(engine.programs))


def test_a_scheduler_that_goes_is_one_clear_error(engine, path):
    slow = FaultyEngine(log=engine.log, sleep=0.3)
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard"]
    command += ["--scheduler-file", str(path.parent / "scheduler.json")]
    # Both unpickle the engine of the test.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    scheduler = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for((path.parent / "scheduler.json").exists)
    address = distributed.Client(scheduler_file=str(path.parent / "scheduler.json"), set_as_default=False)
    url = address.scheduler.address
    address.close()
    worker = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_worker", url, "--no-nanny", "--nthreads", "1", "--no-dashboard"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with Bridge(slow, path, scheduler=url) as bridge:
            bridge.submit(some(200))
            wait_for(lambda: len(Store(path)) > 2)
            scheduler.kill()
            with pytest.raises(ExecutorLost, match=url):
                while True:
                    assert {a.result.status for a in bridge.collect(wait=30.0)} <= {Status.OK, Status.CANCELLED}
            with pytest.raises(ExecutorLost, match="start it again"):
                bridge.evaluate(some(200))
    finally:
        scheduler.kill()
        worker.kill()
    assert len(Store(path)) > 2, "what was finished is kept"


def test_no_scheduler_is_one_clear_error(path, monkeypatch):
    monkeypatch.setattr("crystaljax.dft_bridge.cluster.CONNECT_SECONDS", 1.0)
    with pytest.raises(ExecutorLost, match="no Dask scheduler answers at tcp://127.0.0.1:9"):
        open_bridge(store=path, scheduler="tcp://127.0.0.1:9")
