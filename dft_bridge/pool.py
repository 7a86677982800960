"""Worker processes that calculate, as a ``concurrent.futures.Executor`` that survives them.

Each worker is a ``loky`` executor of its own with one process. When a process dies (killed, out of memory, a crash in
Fortran) loky declares its whole executor broken; here that is the one job it ran, and nothing else. Workers do not
import the caller's ``__main__``, nor JAX unless the engine does, and end when their parent does, however that ended.
Each has a scratch folder as its ``TMPDIR``, which goes with it. loky's resource tracker, a process of its own that
outlives all others, knows the folder too: it is deleted whoever is killed while it is made or deleted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import re
import signal
import tempfile
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from concurrent.futures import wait as futures_wait
from typing import Any

import loky
import psutil
from loky.backend import resource_tracker
from loky.backend.utils import kill_process_tree
from loky.process_executor import ShutdownExecutorError

from crystaljax.dft_bridge.engines.base import EngineNotReady
from crystaljax.dft_bridge.limits import JobFailed, JobTimeout, Limits, OutOfMemory, WorkerDied
from crystaljax.dft_bridge.worker import arrive, remove_scratch, start_worker

logger = logging.getLogger(__name__)

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
"""Environment of a worker: parallel over crystals, so one thread for each."""
MEMORY_CHECK_SECONDS = 0.5
"""How often the memory of the workers is looked at."""
START_SECONDS = 600.0
"""How long a worker may take to start, maybe from a slow shared folder; the time limit of its first job begins then."""
LEAST_CAPACITY = 64
"""Jobs that a pool holds at least, so that quick ones do not wait for who submits them."""


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
    hangs: int = 0
    started: float = 0.0
    seconds: float = 0.0  # of all attempts
    stopped: JobFailed | EngineNotReady | None = None  # why this attempt was killed
    cancelled: bool = False
    timer: threading.Timer | None = None


@dataclasses.dataclass(eq=False)
class _Worker:
    """A process, its scratch folder and the executor that feeds it."""

    executor: loky.ProcessPoolExecutor
    scratch: str
    pid: int = 0  # known once it has its first job
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    tracked: bool = True  # the resource tracker knows the scratch folder

    def end(self) -> None:
        """Kill it, if it still lives, and the programs it has started; delete its scratch folder."""
        for process in list((self.executor._processes or {}).values()):
            kill_process_tree(process)
        if self.pid and hasattr(os, "killpg"):  # programs that outlived it; it led a group of its own
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self.executor.shutdown(wait=False)
        with self.lock:  # the tracker must be told once
            if self.tracked:
                remove_scratch(self.scratch)
                resource_tracker.unregister(self.scratch, "folder")
                self.tracked = False


@dataclasses.dataclass(eq=False)
class _Slot:
    index: int
    worker: _Worker | None = None
    job: _Job | None = None


class WorkerPool(Executor):
    """Runs jobs in worker processes, one at a time in each. Workers start with the first job."""

    def __init__(
        self,
        workers: int | None = None,
        limits: Limits = Limits(),  # noqa: B008, frozen
        environment: Callable[[int], Mapping[str, str]] | None = None,
        start: Callable[[], None] | None = None,
    ):
        """A pool of ``workers`` processes.

        Args:
            workers: number of processes, by default the CPU cores this process may use.
            limits: beyond which a job is killed; it then fails with a :class:`crystaljax.dft_bridge.limits.JobFailed`.
            environment: variables of the worker with the given index, besides :data:`ONE_THREAD`.
            start: called in every worker before its first job; must be picklable.
        """
        count = loky.cpu_count() if workers is None else workers
        if count < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.workers, self.limits = count, limits
        self._lock = threading.RLock()
        self._queue: deque[_Job] = deque()
        self._slots = [_Slot(index) for index in range(count)]
        self._environment = environment or (lambda index: {})
        self._start_worker = start
        self._closed = threading.Event()
        self._watched = limits.memory is None

    @property
    def capacity(self) -> int:
        """How many jobs it is worth to have submitted at a time."""
        return max(2 * self.workers, LEAST_CAPACITY)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Schedule a call; the function and its arguments must be picklable."""
        return self.submit_batch(1, fn, *args, **kwargs)

    def submit_batch(self, size: int, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Schedule a call that does ``size`` calculations: it may take as many times the time limit."""
        timeout = self.limits.timeout
        job = _Job(functools.partial(fn, *args, **kwargs), None if timeout is None else size * timeout)
        job.future = _JobFuture(functools.partial(self._cancel, job))
        with self._lock:
            if self._closed.is_set():
                raise RuntimeError("the worker pool is closed; make a new one")
            self._queue.append(job)
            if not self._watched:
                self._watched = True
                watch = functools.partial(_watch_memory, weakref.ref(self), self._closed)
                threading.Thread(target=watch, name="memory-watch", daemon=True).start()
        self._dispatch()
        return job.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more jobs and end the workers: once all jobs are done or, with ``cancel_futures``, at once."""
        with self._lock:
            self._closed.set()
            jobs = [*self._queue, *(slot.job for slot in self._slots if slot.job is not None)]
        for job in jobs:
            if cancel_futures:
                job.future.cancel()
            elif wait:
                futures_wait([job.future])
        for slot in self._slots:
            with self._lock:
                worker = slot.worker if wait or cancel_futures or slot.job is None else None
                slot.worker = None if worker is not None else slot.worker
            if worker is not None:
                worker.end()

    def processes(self) -> list[int]:
        """Process ids of the workers that are up."""
        with self._lock:
            return [slot.worker.pid for slot in self._slots if slot.worker is not None]

    def check_memory(self) -> None:
        """Kill the workers that use more memory than they may."""
        with self._lock:
            running = [(s.job, s.worker.pid) for s in self._slots if s.job is not None and s.worker is not None]
        for job, pid in running:
            used = resident_memory(pid)
            if used > self.limits.memory:
                message = f"stopped with {used:.2f} GiB of memory; the limit is {self.limits.memory:g}"
                self._stop(job, OutOfMemory(message))

    def _dispatch(self) -> None:
        """Give queued jobs to idle workers."""
        while True:
            with self._lock:
                slot = next((slot for slot in self._slots if slot.job is None), None)
                if slot is None or not self._queue:
                    return
                job = self._queue.popleft()
                if job.cancelled:  # while it waited to be run again
                    job.future.set_exception(CancelledError())
                    continue
                if not (job.deaths or job.hangs) and not job.future.set_running_or_notify_cancel():
                    continue  # cancelled while it waited
                slot.job = job
                try:
                    inner = self._start(slot, job)
                except (RuntimeError, OSError) as error:  # the interpreter is shutting down, or no process can start
                    slot.job = None
                    job.future.set_exception(error)
                    continue
            inner.add_done_callback(functools.partial(self._finished, slot, slot.worker, job))

    def _start(self, slot: _Slot, job: _Job) -> Future:
        if slot.worker is not None:
            try:
                inner = slot.worker.executor.submit(job.call)
            except (BrokenExecutor, ShutdownExecutorError):  # its process died while idle
                slot.worker.end()
                slot.worker = None
            else:
                self._time(job)
                return inner
        slot.worker = self._new_worker(slot)
        arrived = slot.worker.executor.submit(arrive, job.call)
        inner = slot.worker.executor.submit(job.call)
        slot.worker.pid = next(iter(slot.worker.executor._processes))
        late = EngineNotReady(f"a worker process has not started within {START_SECONDS:g} s; is a file system slow?")
        self._set_timer(job, START_SECONDS, late)
        arrived.add_done_callback(functools.partial(self._arrived, slot, slot.worker, job))
        return inner

    def _arrived(self, slot: _Slot, worker: _Worker, job: _Job, arrived: Future) -> None:
        with self._lock:
            if not arrived.cancelled() and arrived.exception() is None and (slot.worker, slot.job) == (worker, job):
                self._time(job)

    def _time(self, job: _Job) -> None:
        """The time of a job begins."""
        self._set_timer(job, job.limit, None if job.limit is None else JobTimeout(f"stopped after {job.limit:g} s"))

    def _set_timer(self, job: _Job, seconds: float | None, why: JobFailed | EngineNotReady | None) -> None:
        job.started = time.monotonic()
        if job.timer is not None:
            job.timer.cancel()
            job.timer = None
        if seconds is not None:
            job.timer = threading.Timer(seconds, self._stop, (job, why))
            job.timer.daemon = True
            job.timer.start()

    def _new_worker(self, slot: _Slot) -> _Worker:
        scratch = os.path.join(tempfile.gettempdir(), f"crystaljax-worker-{uuid.uuid4().hex}")
        resource_tracker.register(scratch, "folder")
        env = {**ONE_THREAD, **self._environment(slot.index)}
        start = os.getpid(), scratch, self._start_worker
        executor = loky.ProcessPoolExecutor(1, initializer=start_worker, initargs=start, env=env)
        return _Worker(executor, scratch)

    def _finished(self, slot: _Slot, worker: _Worker, job: _Job, inner: Future) -> None:
        error = CancelledError() if inner.cancelled() else inner.exception()
        died = isinstance(error, (BrokenExecutor, ShutdownExecutorError))
        if died:
            worker.end()
        again = False
        with self._lock:
            slot.job = None
            if job.timer is not None:
                job.timer.cancel()
            job.seconds += time.monotonic() - job.started
            if died:
                slot.worker = None
                again = self._runs_again(job) and not self._closed.is_set()
                if again:
                    logger.warning("%s; running its calculation again", job.stopped or "a worker process died")
                    job.stopped = None
                    self._queue.appendleft(job)
        if not again:
            self._settle(job, inner, error, died)
        self._dispatch()

    def _runs_again(self, job: _Job) -> bool:
        """Whether a job whose worker is gone has another attempt."""
        if job.cancelled or isinstance(job.stopped, OutOfMemory | EngineNotReady):
            return False
        if job.stopped is not None:
            job.hangs += 1
            return job.hangs <= min(self.limits.retries, 1)
        job.deaths += 1
        return job.deaths <= self.limits.retries

    def _settle(self, job: _Job, inner: Future, error: BaseException | None, died: bool) -> None:
        if error is None:
            job.future.set_result(inner.result())
        elif not died:
            job.future.set_exception(error)
        elif job.cancelled:
            job.future.set_exception(CancelledError())
        elif isinstance(job.stopped, EngineNotReady):
            job.future.set_exception(job.stopped)
        elif job.stopped is not None:
            job.future.set_exception(type(job.stopped)(str(job.stopped), job.seconds))
        else:
            how = re.search(r"{(.*)}", str(error))  # loky's text lists the exit codes
            text = f"its worker died {job.deaths} times: {how[1] if how else error}"
            job.future.set_exception(WorkerDied(text, job.seconds))

    def _cancel(self, job: _Job) -> None:
        job.cancelled = True
        self._stop(job, None)

    def _stop(self, job: _Job, why: JobFailed | EngineNotReady | None) -> None:
        """Kill the worker that runs a job, whose attempt then fails with ``why``."""
        with self._lock:
            slot = next((slot for slot in self._slots if slot.job is job), None)
            if slot is None or slot.worker is None:
                return  # over, or waiting to be run again
            job.stopped = why
            worker = slot.worker
        worker.end()


def resident_memory(pid: int) -> float:
    """GiB of resident memory of a process and its descendants; pages they share count for each."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        worker = psutil.Process(pid)
        for process in [worker, *worker.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
    return total / 2**30


def _watch_memory(pool: weakref.ref[WorkerPool], closed: threading.Event) -> None:
    while not closed.wait(MEMORY_CHECK_SECONDS):
        held = pool()
        if held is None:
            return
        held.check_memory()
        del held
