"""Worker processes that calculate, as a ``concurrent.futures.Executor`` that survives them.

Each worker is a ``loky`` executor of its own with one process. When a process dies (killed, out of memory, a crash in
Fortran) loky declares its whole executor broken; here that is the one job it ran, and nothing else. Workers do not
import the caller's ``__main__``, nor JAX unless the engine does, and end when their parent does, however that ended.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from concurrent.futures import wait as futures_wait
from typing import Any

import loky
import numpy as np
from loky.process_executor import ShutdownExecutorError

from crystaljax.status import Status
from dft_bridge.engines.base import BatchEngine, Crystal, Engine, EngineNotReady, Result

logger = logging.getLogger(__name__)

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
"""Environment of a worker: parallel over crystals, so one thread for each."""
PARENT_CHECK_SECONDS = 1.0
"""How often a worker looks whether its parent still lives."""


class WorkerDied(RuntimeError):
    """The process that ran a job died, more often than the job is retried."""


class JobTimeout(RuntimeError):
    """A job exceeded its time limit and was killed."""


def calculate(engine: Engine, crystal: Crystal, property_name: str) -> Result:
    """Run one calculation, in a worker. An exception of the engine about the crystal becomes a result.

    Exceptions that speak of the machine (not ready, memory, files) are raised: they say nothing about the crystal.
    """
    start = _cpu_seconds()
    try:
        result = engine.compute(crystal, property_name)
    except Exception as error:  # an engine may raise anything; one crystal must not end a run
        if _about_the_machine(error):
            raise
        result = Result.failure(Status.ENGINE_ERROR, f"{type(error).__name__}: {error}")
    return _checked(result, _cpu_seconds() - start)


def calculate_many(engine: Engine, crystals: Sequence[Crystal], property_name: str) -> list[Result]:
    """Run a batch, in a worker; the results are in the order of the crystals.

    After an exception of the engine every crystal is calculated on its own, so that only the culprit fails.
    Exceptions that speak of the machine are raised, as by :func:`calculate`.
    """
    if len(crystals) == 1 or not isinstance(engine, BatchEngine):
        return [calculate(engine, crystal, property_name) for crystal in crystals]
    start = _cpu_seconds()
    try:
        results = engine.compute_many(crystals, property_name)
    except Exception as error:
        if _about_the_machine(error):
            raise
        logger.warning("a batch of %d failed (%s: %s); one by one", len(crystals), type(error).__name__, error)
        return [calculate(engine, crystal, property_name) for crystal in crystals]
    if len(results) != len(crystals):
        message = f"the engine returned {len(results)} results for {len(crystals)} crystals"
        results = [Result.failure(Status.ENGINE_ERROR, message)] * len(crystals)
    share = (_cpu_seconds() - start) / len(crystals)
    return [_checked(result, share) for result in results]


def _about_the_machine(error: Exception) -> bool:
    """Whether an exception says nothing about the crystal; XLA has no class of its own for memory that ran out."""
    return isinstance(error, (EngineNotReady, MemoryError, OSError)) or "RESOURCE_EXHAUSTED" in str(error)


def _checked(result: Result, seconds: float) -> Result:
    """A result fit for the store; ``seconds`` is what it took if it does not say so itself."""
    if result.status == Status.OK and not np.isfinite(result.value):
        result = Result.failure(Status.INVALID_RESULT, f"the engine returned {result.value}", **result.details)
    details = json.loads(json.dumps(result.details, default=_plain))
    return dataclasses.replace(result, seconds=result.seconds or seconds, details=details)


def _plain(value: Any) -> Any:
    """What JSON cannot hold, as something it can: NumPy's numbers and arrays as Python's, the rest as text."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else str(value)


def _cpu_seconds() -> float:
    """CPU seconds of this process and of the children it waited for."""
    return sum(os.times()[:4])


def _start_worker(parent: int, start: Callable[[], None] | None) -> None:
    """Runs first in every worker: a process group of its own, which ends with the parent.

    A Ctrl-C in the terminal reaches the main process only, which decides what becomes of the calculations. A process
    that is killed outright cannot tell its workers, so they look; PR_SET_PDEATHSIG would not do, for it follows the
    *thread* that started the worker.
    """
    if hasattr(os, "setsid"):
        os.setsid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_SECONDS)
        os.killpg(0, signal.SIGKILL)  # programs that the engine has started too

    if hasattr(os, "killpg"):
        threading.Thread(target=watch, name="parent-watch", daemon=True).start()
    if start is not None:
        start()


class _JobFuture(Future):
    """A future whose ``cancel`` also stops a job that runs already, by killing its worker."""

    def __init__(self, stop: Callable[[], None]):
        super().__init__()
        self._stop = stop

    def cancel(self) -> bool:
        if not super().cancel() and not self.done():
            self._stop()
        return self.cancelled()


@dataclasses.dataclass(eq=False)
class _Job:
    call: Callable[[], Any]
    limit: float | None = None  # seconds
    future: Future = dataclasses.field(init=False)
    deaths: int = 0
    stopped: Exception | None = None  # why it was killed on purpose
    timer: threading.Timer | None = None


@dataclasses.dataclass(eq=False)
class _Slot:
    index: int
    executor: loky.ProcessPoolExecutor | None = None
    job: _Job | None = None


class WorkerPool(Executor):
    """Runs jobs in worker processes, one at a time in each. Workers start with the first job."""

    def __init__(
        self,
        workers: int | None = None,
        retries: int = 2,
        timeout: float | None = None,
        environment: Callable[[int], Mapping[str, str]] | None = None,
        start: Callable[[], None] | None = None,
    ):
        """A pool of ``workers`` processes.

        Args:
            workers: number of processes, by default the CPU cores this process may use.
            retries: how often a job is run again after its worker died, before it fails with :class:`WorkerDied`.
            timeout: wall-clock seconds after which a job is killed and fails with :class:`JobTimeout`.
            environment: variables of the worker with the given index, besides :data:`ONE_THREAD`.
            start: called in every worker before its first job; must be picklable.
        """
        count = loky.cpu_count() if workers is None else workers
        if count < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.workers, self.retries, self.timeout = count, retries, timeout
        self._lock = threading.RLock()
        self._queue: deque[_Job] = deque()
        self._slots = [_Slot(index) for index in range(count)]
        self._environment = environment or (lambda index: {})
        self._start_worker = start
        self._closed = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Schedule a call; the function and its arguments must be picklable."""
        return self.submit_batch(1, fn, *args, **kwargs)

    def submit_batch(self, size: int, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Schedule a call that does ``size`` calculations: it may take as many times the time limit."""
        job = _Job(functools.partial(fn, *args, **kwargs), None if self.timeout is None else size * self.timeout)
        job.future = _JobFuture(functools.partial(self._stop, job, CancelledError()))
        with self._lock:
            if self._closed:
                raise RuntimeError("the worker pool is closed; make a new one")
            self._queue.append(job)
        self._dispatch()
        return job.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more jobs and end the workers: once all jobs are done or, with ``cancel_futures``, at once."""
        with self._lock:
            self._closed = True
            jobs = [*self._queue, *(slot.job for slot in self._slots if slot.job is not None)]
        for job in jobs:
            if cancel_futures:
                job.future.cancel()
            elif wait:
                futures_wait([job.future])
        for slot in self._slots:
            executor = slot.executor
            if executor is not None and (wait or cancel_futures or slot.job is None):
                executor.shutdown(wait=wait, kill_workers=cancel_futures)

    def processes(self) -> list[int]:
        """Process ids of the workers that are up."""
        executors = [slot.executor for slot in self._slots]
        return [pid for executor in executors if executor is not None for pid in list(executor._processes)]

    def _dispatch(self) -> None:
        """Give queued jobs to idle workers."""
        while True:
            with self._lock:
                slot = next((slot for slot in self._slots if slot.job is None), None)
                if slot is None or not self._queue:
                    return
                job = self._queue.popleft()
                if job.stopped is not None:  # while it waited to be run again
                    job.future.set_exception(job.stopped)
                    continue
                if not job.deaths and not job.future.set_running_or_notify_cancel():
                    continue  # cancelled while it waited
                try:
                    inner = self._start(slot, job)
                except RuntimeError as error:  # the interpreter is shutting down
                    job.future.set_exception(error)
                    continue
                slot.job = job
            inner.add_done_callback(functools.partial(self._finished, slot, job))

    def _start(self, slot: _Slot, job: _Job) -> Future:
        if slot.executor is None:
            slot.executor = self._new_executor(slot)
        try:
            inner = slot.executor.submit(job.call)
        except (BrokenExecutor, ShutdownExecutorError):  # its process died while idle
            slot.executor = self._new_executor(slot)
            inner = slot.executor.submit(job.call)
        if job.limit is not None:
            why = JobTimeout(f"stopped after {job.limit:g} s")
            job.timer = threading.Timer(job.limit, self._stop, (job, why))
            job.timer.daemon = True
            job.timer.start()
        return inner

    def _new_executor(self, slot: _Slot) -> loky.ProcessPoolExecutor:
        env = {**ONE_THREAD, **self._environment(slot.index)}
        start = os.getpid(), self._start_worker
        return loky.ProcessPoolExecutor(1, initializer=_start_worker, initargs=start, env=env)

    def _finished(self, slot: _Slot, job: _Job, inner: Future) -> None:
        if job.timer is not None:
            job.timer.cancel()
        error = CancelledError() if inner.cancelled() else inner.exception()
        died = isinstance(error, (BrokenExecutor, ShutdownExecutorError))
        with self._lock:
            slot.job = None
            if died:
                slot.executor = None
                if job.stopped is None:
                    job.deaths += 1
                    if job.deaths <= self.retries and not self._closed:
                        logger.warning("a worker process died; running its calculation again")
                        self._queue.appendleft(job)
                        job = None
        if job is not None:
            self._settle(job, inner, error, died)
        self._dispatch()

    def _settle(self, job: _Job, inner: Future, error: BaseException | None, died: bool) -> None:
        if error is None:
            job.future.set_result(inner.result())
        elif not died:
            job.future.set_exception(error)
        elif job.stopped is not None:
            job.future.set_exception(job.stopped)
        else:
            job.future.set_exception(WorkerDied(f"its worker died {job.deaths} times: {error}"))

    def _stop(self, job: _Job, why: Exception) -> None:
        """Kill the worker that runs a job, which then fails with ``why``."""
        with self._lock:
            job.stopped = why
            slot = next((slot for slot in self._slots if slot.job is job), None)
            if slot is None or slot.executor is None:
                return  # over, or waiting to be run again, which will not happen now
            executor, slot.executor = slot.executor, None
        executor.shutdown(wait=False, kill_workers=True)
