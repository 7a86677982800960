"""Keeps an executor busy with calculations and records each as it comes.

One thread owns everything that is outstanding; others send it messages. So nothing here is locked, and an agent may
act while it works.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from pickle import PicklingError

from crystaljax.dft_bridge.accounting import Account, Budget
from crystaljax.dft_bridge.answers import CANCELLED, Answers
from crystaljax.dft_bridge.archive import Archive
from crystaljax.dft_bridge.engines.base import BatchEngine, Engine, EngineNotReady, Result
from crystaljax.dft_bridge.keys import Request
from crystaljax.dft_bridge.limits import ExecutorLost, JobFailed
from crystaljax.dft_bridge.store import StoreError
from crystaljax.dft_bridge.worker import Done, run_job
from crystaljax.evaluators import BudgetSpent
from crystaljax.status import Status

logger = logging.getLogger(__name__)

GATHER_SECONDS = 0.02
"""How long results may gather while others are outstanding: one transaction for many quick ones."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""What stops every calculation, whatever its crystal."""
CAPACITY = 256
"""Jobs outstanding at an executor that does not say how many it likes to have."""
JOIN_SECONDS = 5.0


@dataclasses.dataclass(eq=False)
class _Job:
    """Requests for one property, by key, that are calculated together."""

    requests: dict[str, Request]
    submitted: float = 0.0
    cancelled: bool = False


@dataclasses.dataclass(frozen=True)
class _Cancel:
    keys: frozenset[str] | None = None  # all


class Dispatcher:
    """Runs requests on an executor. Its thread starts with the first of them."""

    def __init__(
        self,
        engine: Engine,
        executor: Executor,
        archive: Archive,
        answers: Answers,
        account: Account,
        budget: Budget,
    ):
        """``executor``: may say how many jobs run at a time (``workers``) and how many it likes to have (``capacity``),
        and take the size of a job (``submit_batch``), as a :class:`~crystaljax.dft_bridge.pool.WorkerPool` does."""
        self._engine, self._executor = engine, executor
        self._archive, self._answers, self._account, self._budget = archive, answers, account, budget
        self._inbox: queue.SimpleQueue[Future[Done] | _Cancel | list[_Job] | None] = queue.SimpleQueue()
        self._waiting: deque[_Job] = deque()
        self._running: dict[Future[Done], _Job] = {}
        self._thread: threading.Thread | None = None
        self._start = threading.Lock()
        self._closed = False

    def add(self, requests: Mapping[str, Request]) -> None:
        """Have these calculated; their promises will be settled, whatever happens."""
        with self._account.timed("grouping"):
            jobs = self._jobs(requests)
        with self._start:
            if self._closed:
                self._answers.settle(dict.fromkeys(requests, CANCELLED))
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="dispatcher", daemon=True)
                self._thread.start()
            self._inbox.put(jobs)

    def cancel(self, keys: Iterable[str] | None = None) -> None:
        """Give up these keys, by default all; what is not finished becomes ``CANCELLED``, its workers are killed."""
        self._inbox.put(_Cancel(None if keys is None else frozenset(keys)))

    def close(self) -> None:
        """Cancel everything, record what is finished, end the thread."""
        with self._start:
            self._closed = True
            self._inbox.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(JOIN_SECONDS)

    def _jobs(self, requests: Mapping[str, Request]) -> list[_Job]:
        """The jobs in the order in which they should start."""
        if not isinstance(self._engine, BatchEngine):
            return [_Job({key: request}) for key, request in requests.items()]
        keys_of: dict[str, list[str]] = defaultdict(list)
        for key, request in requests.items():
            keys_of[request.property].append(key)
        jobs = []
        for property_name, keys in keys_of.items():
            groups = self._engine.group([requests[key].crystal for key in keys], property_name)
            if sorted(i for group in groups for i in group) != list(range(len(keys))):
                raise ValueError(f"the {self._engine.name} engine must put each of {len(keys)} crystals into one group")
            jobs += [_Job({keys[i]: requests[keys[i]] for i in group}) for group in groups if group]
        return jobs

    def _run(self) -> None:
        closed = False
        while not closed:
            messages = [self._inbox.get()]
            if isinstance(messages[0], Future) and len(self._running) > 1:
                time.sleep(GATHER_SECONDS)
            messages += _drain(self._inbox)
            self._waiting.extend(job for message in messages if isinstance(message, list) for job in message)
            closed = None in messages
            try:
                self._record([message for message in messages if isinstance(message, Future)])
                for message in messages:
                    if isinstance(message, _Cancel):
                        self._give_up(message.keys)
                if closed:
                    self._give_up(None)
                self._feed()
            except Exception as error:  # what stops everything reaches those who wait, not only a log
                self._abandon(error)

    def _feed(self) -> None:
        """Submit what the executor likes to have and the budget allows."""
        # Hours are known once they are spent, so no more than can run at a time is paid for in advance.
        wanted = "capacity" if self._budget.max_core_hours is None else "workers"
        capacity = getattr(self._executor, wanted, CAPACITY)
        while self._waiting and len(self._running) < capacity:
            stats = self._account.stats()
            running = sum(len(job.requests) for job in self._running.values())
            left = self._budget.calls_left(stats.calls, running, stats.core_seconds)
            if not left:
                if not self._running:  # what runs is paid for: finish it first
                    self._abandon(BudgetSpent(self._budget.explain(stats)))
                return
            job = self._waiting.popleft()
            if len(job.requests) > left:
                requests = list(job.requests.items())
                job = _Job(dict(requests[: int(left)]))
                self._waiting.appendleft(_Job(dict(requests[int(left) :])))
            with self._account.timed("submitting"):
                self._submit(job)

    def _submit(self, job: _Job) -> None:
        requests = list(job.requests.values())
        call = run_job, self._engine, [request.crystal for request in requests], requests[0].property
        job.submitted = time.perf_counter()
        try:
            if hasattr(self._executor, "submit_batch"):
                future = self._executor.submit_batch(len(requests), *call)
            else:
                future = self._executor.submit(*call)
        except BaseException:
            self._waiting.appendleft(job)  # so that it is abandoned with the others
            raise
        self._running[future] = job
        future.add_done_callback(self._inbox.put)

    def _record(self, futures: Sequence[Future[Done]]) -> None:
        """Write what was calculated to the store, then let it be seen; batches that failed as a whole are split."""
        finished: dict[str, tuple[Request, Result]] = {}
        passing: dict[str, Result] = {}
        again, fatal = [], None
        for future in futures:
            job = self._running.pop(future, None)
            if job is None:
                continue
            now = time.perf_counter()
            try:
                outcome = self._outcome(future, job)
            except (EngineNotReady, PicklingError, BrokenExecutor, ExecutorLost) as error:
                fatal = error
                self._waiting.appendleft(job)  # abandoned below
                continue
            match outcome:
                case Done():
                    finished |= {
                        key: (request, self._archive.judged(request, result))
                        for (key, request), result in zip(job.requests.items(), outcome.results, strict=True)
                    }
                    self._account.queued(now - job.submitted - outcome.seconds)
                case Result():
                    passing |= dict.fromkeys(job.requests, outcome)
                case None:
                    again += [_Job({key: request}) for key, request in job.requests.items()]
        for result in [*(result for _, result in finished.values()), *passing.values()]:
            if result.status != Status.CANCELLED:
                self._account.calculated(result)
        self._answers.settle(passing)
        if finished:
            try:
                with self._account.timed("writing"):
                    self._archive.record(finished)
            except BaseException as error:
                self._answers.fail(finished, error)
                raise
            self._answers.settle({key: result for key, (_, result) in finished.items()})
        self._waiting.extendleft(reversed(again))
        if fatal is not None:
            raise fatal

    def _outcome(self, future: Future[Done], job: _Job) -> Done | Result | None:
        """What became of a job: results for the store, one that is not stored, or ``None`` for a batch to be split.

        A batch that fails as a whole is split, as one of its crystals or its size may be the reason. Not stored is
        what says more about the machine than about the crystal: exceptions of the system, and what was cancelled.
        Raises what concerns every calculation.
        """
        size = len(job.requests)
        error = CancelledError() if future.cancelled() else future.exception()
        match error:
            case None:
                return future.result()
            case CancelledError() if job.cancelled:
                return CANCELLED
            case CancelledError():
                raise ExecutorLost("the executor has cancelled a calculation by itself; start it again and resume")
            case EngineNotReady() | PicklingError() | BrokenExecutor() | ExecutorLost():
                raise error
            case ImportError():
                message = f"a worker cannot import what the engine needs ({error}); install it, then go on"
                raise EngineNotReady(message) from error
            case OSError() if error.errno in DISK_ERRORS:
                message = f"a calculation could not write its files ({error}); free some space, or set TMPDIR elsewhere"
                raise EngineNotReady(message) from error
            case _ if size > 1:
                logger.warning("a batch of %d failed (%s: %s); one by one", size, type(error).__name__, error)
                return None
            case JobFailed():
                return Done([self._archive.failure(error)], error.seconds)
            case _:
                return Result.failure(Status.ENGINE_ERROR, f"{type(error).__name__}: {error}")

    def _give_up(self, keys: frozenset[str] | None) -> None:
        """Cancel the jobs of these keys; a batch that holds others too goes on."""

        def unwanted(job: _Job) -> bool:
            return keys is None or keys.issuperset(job.requests)

        # What finished in the meantime is worth keeping.
        self._record([future for future, job in self._running.items() if unwanted(job) and future.done()])
        dropped = [job for job in self._waiting if unwanted(job)]
        self._waiting = deque(job for job in self._waiting if not unwanted(job))
        # The latest first, so that no worker that becomes free begins one that is to be cancelled next.
        for future, job in [(future, job) for future, job in reversed(self._running.items()) if unwanted(job)]:
            job.cancelled = True
            future.cancel()  # in our own pool this ends what runs, too
            del self._running[future]
            dropped.append(job)
        self._answers.settle({key: CANCELLED for job in dropped for key in job.requests})

    def _abandon(self, error: BaseException) -> None:
        """Stop everything for a reason that concerns everything; what has finished is kept."""
        for future, job in reversed(self._running.items()):  # as in _give_up
            if future.done() and not future.cancelled() and future.exception() is None:
                results = zip(job.requests.items(), future.result().results, strict=True)
                with contextlib.suppress(StoreError):  # kept until it can be written
                    self._archive.record({key: (request, result) for (key, request), result in results})
            future.cancel()
        jobs = [*self._waiting, *self._running.values()]
        self._running, self._waiting = {}, deque()
        self._answers.fail([key for job in jobs for key in job.requests], error)


def _drain(inbox: queue.SimpleQueue) -> Iterator:
    """Everything that is there already."""
    with contextlib.suppress(queue.Empty):
        while True:
            yield inbox.get_nowait()
