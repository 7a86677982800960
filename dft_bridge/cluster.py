"""Calculations on many hosts: a Dask scheduler hands them out, a worker pool in each Dask worker runs them.

Start a scheduler and workers by hand, or with ``dask-jobqueue`` in the jobs of a batch system (Slurm, PBS, SGE ...),
and give the scheduler's address. Needs the extra: ``pip install 'crystaljax[dask]'``, on every host. The time limit,
the memory limit and the retries hold there as they do here, because a Dask worker only hosts a
:class:`~crystaljax.dft_bridge.pool.WorkerPool`, with a process for each of its threads; a crash in a calculation never
reaches it. What Dask adds is for hosts: the jobs of one that is lost go to another.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from distributed import Client, Worker, WorkerPlugin, get_worker
from distributed.scheduler import KilledWorker

from crystaljax.dft_bridge.engines.base import BatchEngine, Engine
from crystaljax.dft_bridge.limits import ExecutorLost, Limits, WorkerDied
from crystaljax.dft_bridge.pool import LEAST_CAPACITY, WorkerPool

CONNECT_SECONDS = 10.0
COUNT_SECONDS = 5.0
"""How often the threads of the cluster are counted; it may grow and shrink."""
CANCEL_CHECK_SECONDS = 0.5
"""How often a Dask worker looks whether what it calculates is still wanted."""


class DaskExecutor(Executor):
    """Runs jobs on the workers of a Dask scheduler."""

    def __init__(self, scheduler: str, engine: Engine, limits: Limits):
        """Connects to the scheduler at this address.

        Raises:
            ExecutorLost: nobody answers there.
        """
        try:
            self._client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise ExecutorLost(
                f"no Dask scheduler answers at {scheduler} ({error}); start one with: dask scheduler"
            ) from error
        self._scheduler = scheduler
        self._name = f"crystaljax-{hashlib.sha256(f'{engine!r} {limits!r}'.encode()).hexdigest()}"
        self._client.register_plugin(_Host(self._name, engine, limits))
        self._executor = self._client.get_executor(pure=False)
        self._threads, self._counted = 0, -math.inf

    @property
    def workers(self) -> int:
        """Threads of all Dask workers that are there at the moment, at least 1."""
        now = time.monotonic()
        if now - self._counted > COUNT_SECONDS:
            self._counted = now
            with contextlib.suppress(OSError):  # the scheduler is gone, as the next job will say
                self._threads = sum(self._client.nthreads().values())
        return max(self._threads, 1)

    @property
    def capacity(self) -> int:
        """How many jobs it is worth to have submitted at a time; an adaptive cluster grows with them."""
        return max(2 * self.workers, LEAST_CAPACITY)

    @property
    def _connected(self) -> bool:
        return self._client.status == "running"

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Schedule a call."""
        return self.submit_batch(1, fn, *args, **kwargs)

    def submit_batch(self, size: int, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Schedule a call that does ``size`` calculations: it may take as many times the time limit.

        Raises:
            ExecutorLost: the scheduler is gone.
        """
        if not self._connected:
            raise self._lost()
        inner = self._executor.submit(_run_here, self._name, size, fn, args, kwargs)
        outer = _Outer(inner)
        inner.add_done_callback(lambda done: self._settle(outer, done))
        return outer

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Disconnect. The scheduler then stops what was submitted here, unless it was waited for; it goes on itself."""
        if self._connected:
            self._executor.shutdown(wait=wait and not cancel_futures)
        self._client.close(timeout=5)

    def _lost(self) -> ExecutorLost:
        return ExecutorLost(f"the Dask scheduler at {self._scheduler} is gone; start it again and resume")

    def _settle(self, outer: _Outer, inner: Future) -> None:
        """Give the outcome of a Dask future in our own words."""
        outer.release()
        error = CancelledError() if inner.cancelled() else inner.exception()
        if outer.cancelled() or not outer.set_running_or_notify_cancel():
            return
        match error:
            case None:
                outer.set_result(inner.result())
            case KilledWorker():
                outer.set_exception(WorkerDied(f"every host that it ran on was lost: {error}"))
            case CancelledError() if not self._connected:
                outer.set_exception(self._lost())
            case _:
                outer.set_exception(error)


class _Outer(Future):
    """A future that cancels the one it stands for."""

    def __init__(self, inner: Future):
        super().__init__()
        self._inner: Future | None = inner

    def cancel(self) -> bool:
        cancelled, inner = super().cancel(), self._inner
        if inner is not None:
            inner.cancel()
        return cancelled

    def release(self) -> None:
        """Let go: as long as somebody holds a Dask future, its job is run again when the host that ran it is lost."""
        self._inner = None


class _Host(WorkerPlugin):
    """The worker pool of one Dask worker, which ends with it."""

    idempotent = True  # programs that ask for the same share it

    def __init__(self, name: str, engine: Engine, limits: Limits):
        self.name, self._engine, self._limits = name, engine, limits

    def setup(self, worker: Worker) -> None:
        # A Dask worker is a daemon of its nanny, and daemons may have no children; ours end with it by themselves.
        multiprocessing.current_process()._config["daemon"] = False
        batch = isinstance(self._engine, BatchEngine)
        hooks = (self._engine.worker_environment, self._engine.start_worker) if batch else ()
        self.pool = WorkerPool(worker.state.nthreads, self._limits, *hooks)

    def teardown(self, worker: Worker) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def _run_here(name: str, size: int, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a job in this Dask worker's pool; stop it when nobody wants it any more."""
    worker = get_worker()
    task = worker.get_current_task()
    future = worker.plugins[name].pool.submit_batch(size, fn, *args, **kwargs)
    while True:
        try:
            return future.result(CANCEL_CHECK_SECONDS)
        except FutureTimeoutError:
            state = worker.state.tasks.get(task)
            if not future.done() and (state is None or state.state != "executing"):
                future.cancel()
