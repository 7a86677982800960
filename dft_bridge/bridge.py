"""The bridge: finished crystals of a batch come in, each distinct one is calculated once, all get their answer.

A crystal is looked for in the batch, in memory, among the calculations that run at this moment, and in the store;
only what is found nowhere goes to the workers. A result is in the store before anyone sees it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from pickle import PicklingError
from typing import Any

import jax
import numpy as np

from crystaljax.evaluators import BoundEvaluator, Problem
from crystaljax.skeleton import Skeleton, stack
from crystaljax.status import Status
from crystaljax.symmetry import canonical
from dft_bridge.engines.base import BatchEngine, Engine, EngineNotReady, Result
from dft_bridge.gate import gate
from dft_bridge.interrupts import InterruptWatch
from dft_bridge.keys import Keys, Request
from dft_bridge.pool import JobTimeout, WorkerDied, WorkerPool, calculate_many
from dft_bridge.store import Record, Store

logger = logging.getLogger(__name__)

GATHER_SECONDS = 0.02
"""How long results may gather while others are outstanding: one transaction for many quick ones."""
NOT_BRIDGE_WORK = ("waiting", "refusing", "grouping")
"""Phases whose time belongs to the engine."""
_CANCELLED = Result.failure(Status.CANCELLED, "stopped before it finished")


@dataclasses.dataclass(frozen=True)
class Stats:
    """What a bridge has done so far.

    Attributes:
        host_calls: batches that came from compiled programs.
        requests: finished crystals asked for.
        distinct: of these, after removing duplicates within their batch.
        memory_hits: distinct ones answered from memory.
        shared: distinct ones that another thread was calculating already.
        store_hits: distinct ones found in the store.
        refused: distinct ones the engine refused without a calculation.
        calls: calculations run, whatever became of them.
        failures: calculations without a value, by status name.
        cpu_seconds: CPU time of the calculations, in the workers.
        waiting_seconds: wall time spent waiting for calculations.
        own_seconds: wall time of the bridge's own work.
        phases: wall time by phase.
    """

    host_calls: int
    requests: int
    distinct: int
    memory_hits: int
    shared: int
    store_hits: int
    refused: int
    calls: int
    failures: Mapping[str, int]
    cpu_seconds: float
    waiting_seconds: float
    own_seconds: float
    phases: Mapping[str, float]

    @property
    def batch_hits(self) -> int:
        """Requests that were duplicates within their batch."""
        return self.requests - self.distinct


class Bridge:
    """Evaluates crystals with an engine, each one once; an evaluator for :func:`crystaljax.make`.

    Use it as a context manager, or call :meth:`close`. Thread-safe. Workers start with the first calculation. An engine
    that is a :class:`~dft_bridge.engines.base.BatchEngine` gets crystals in the batches it asks for; one whose worker
    dies or that takes too long is calculated again one by one, so that only the culprit fails.

    What is stored: every result of the engine, failures included. What is not, as it says more about the machine than
    about the crystal, and is remembered until the bridge is closed only: a worker that died (``WORKER_DIED``), a
    calculation beyond ``timeout`` (``TIMEOUT``), memory or files that ran out (``ENGINE_ERROR``). Refusals cost
    nothing and are not stored either.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store | str | os.PathLike[str] | None = None,
        workers: int | None = None,
        *,
        executor: Executor | None = None,
        preset: str = "",
        retries: int = 2,
        timeout: float | None = None,
    ):
        """Cheap: nothing is started or opened.

        Args:
            engine: what calculates.
            store: a store or the path of one, by default :func:`dft_bridge.store.default_path`.
            workers: worker processes, by default as many as the engine suggests, or one per CPU core.
            executor: runs the calculations in place of worker processes of our own (Dask, MPI ...); stays yours to
                shut down. ``workers``, ``retries`` and ``timeout`` are then up to it.
            preset: name of the engine's settings, for labels.
            retries: how often a calculation is run again after its worker died.
            timeout: wall-clock seconds after which a calculation is stopped, times its size for a batch; ``None``
                waits for ever.
        """
        self.engine = engine
        environment = start = None
        if isinstance(engine, BatchEngine) and executor is None:
            workers = engine.workers() if workers is None else workers
            environment, start = engine.worker_environment, engine.start_worker
        self.store = store if isinstance(store, Store) else Store(store)
        self._pool = None if executor is not None else WorkerPool(workers, retries, timeout, environment, start)
        self._executor: Executor = executor if executor is not None else self._pool
        self._preset = preset
        self._lock = threading.Lock()
        self._fingerprints: dict[str, dict[str, Any]] = {}
        self._keys: dict[tuple[bytes, bytes, str], Keys] = {}
        self._memory: dict[str, Result] = {}
        self._in_flight: dict[str, Future[Result]] = {}
        self._inboxes: set[queue.SimpleQueue[Future | None]] = set()
        self._counts: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._seconds: Counter[str] = Counter()
        self._fatal: BaseException | None = None
        self._cancelled = False
        self._closed = False
        self._foreign_calls = 0
        self._interrupts: InterruptWatch | None = None
        # Also ends the workers when a bridge that nobody closed is dropped, or the program ends.
        self._stop_workers = weakref.finalize(self, _stop, self._pool)

    def __enter__(self) -> Bridge:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def bind(self, problem: Problem) -> BoundEvaluator:
        """The evaluator for a problem.

        Raises:
            EngineNotReady: the engine cannot run here; says what to install.
            StoreError: the store cannot be written.
            ValueError: the engine does not compute the property.
        """
        self._open(problem.property)
        self._watch_interrupts()
        permutations = stack(problem.skeletons).permutations
        keys = [self._keys_of(skeleton, problem.property) for skeleton in problem.skeletons]

        def canonical_on_device(numbers: jax.Array, skeleton: jax.Array) -> jax.Array:
            return canonical(numbers, permutations[0 if len(keys) == 1 else skeleton])

        def host(numbers: np.ndarray, skeletons: np.ndarray, pending: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            try:
                with self._in_program():
                    return self._answer(problem, keys, numbers, skeletons, pending)
            except (Exception, KeyboardInterrupt) as error:  # raising here is undefined behaviour; see check()
                self._keep(error)
                return np.zeros(len(pending), np.float32), np.full(len(pending), Status.CANCELLED, np.int32)

        def check() -> None:  # not the bound method: a deep copy of the environment would copy the bridge with it
            self.check()

        return BoundEvaluator(gate(host, canonical_on_device), check, self._label(problem.property))

    def check(self) -> None:
        """Raise, once and with its own type, what went wrong inside a compiled program."""
        with self._lock:
            error, self._fatal = self._fatal, None
        if error is not None:
            raise error

    def evaluate(self, requests: Sequence[Request]) -> list[Result]:
        """The results, in the order of the requests; waits for those that must be calculated.

        Raises:
            EngineNotReady, StoreError: as :meth:`bind`; also whatever :meth:`check` would raise.
        """
        self.check()
        with self._timed("keys"):
            for property_name in {request.property for request in requests}:
                self._open(property_name)
            keyed = [(self._keys_of(r.skeleton, r.property).key(r.numbers), r) for r in requests]
            distinct = dict(keyed)
        self._count(requests=len(keyed), distinct=len(distinct))
        results = self._resolve(distinct)
        return [results[key] for key, _ in keyed]

    def cancel(self) -> None:
        """Stop: what is not finished becomes ``Status.CANCELLED``, workers are killed. Call it from any thread.

        Nothing is calculated any more until :meth:`resume`; crystals that are known keep their results.
        """
        with self._lock:
            self._cancelled = True
        self._wake()

    def resume(self) -> None:
        """Calculate again after :meth:`cancel`."""
        with self._lock:
            self._cancelled = False

    def close(self) -> None:
        """Cancel what runs and end the workers. Finished results are in the store already."""
        self._closed = True
        self.cancel()
        self._stop_workers()
        if self._interrupts is not None:
            self._interrupts.close()
            self._interrupts = None

    def stats(self) -> Stats:
        """The counters so far."""
        with self._lock:
            counts, failures, seconds = Counter(self._counts), dict(self._failures), dict(self._seconds)
        cpu_seconds = seconds.pop("cpu", 0.0)
        integers = ("host_calls", "requests", "distinct", "memory_hits", "shared", "store_hits", "refused", "calls")
        return Stats(
            **{name: counts[name] for name in integers},
            failures=failures,
            cpu_seconds=cpu_seconds,
            waiting_seconds=seconds.get("waiting", 0.0),
            own_seconds=sum(spent for phase, spent in seconds.items() if phase not in NOT_BRIDGE_WORK),
            phases=seconds,
        )

    def _answer(
        self, problem: Problem, keys: list[Keys], numbers: np.ndarray, skeletons: np.ndarray, pending: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The host side of a query: rows are canonical already; see :data:`dft_bridge.gate.Host`."""
        with self._timed("duplicates"):
            lanes = np.flatnonzero(pending)
            rows = np.column_stack([skeletons[lanes], numbers[lanes]])
            rows, row_of_lane = np.unique(rows, axis=0, return_inverse=True)
        with self._timed("keys"):
            row_keys, requests = [], {}
            for index, *labels in rows.tolist():
                skeleton = problem.skeletons[index]
                labels = labels[: skeleton.n_sites]
                row_keys.append(keys[index].key(labels))
                requests[row_keys[-1]] = Request(skeleton, tuple(labels), problem.property)
        self._count(host_calls=1, requests=len(lanes), distinct=len(requests))
        results = self._resolve(requests)
        with self._timed("duplicates"):
            found = [results[key] for key in row_keys]
            values, statuses = np.zeros(len(pending), np.float32), np.zeros(len(pending), np.int32)
            # Zero, not NaN, where there is no value: NaN would trip jax_debug_nans.
            of_row = np.array([r.value if r.status == Status.OK else 0.0 for r in found], np.float32)
            values[lanes] = of_row[row_of_lane.reshape(-1)]
            statuses[lanes] = np.array([r.status for r in found], np.int32)[row_of_lane.reshape(-1)]
        return values, statuses

    def _resolve(self, requests: Mapping[str, Request]) -> dict[str, Result]:
        """The result of every key; each key is worked on by one thread only."""
        with self._lock:
            results = {key: self._memory[key] for key in requests if key in self._memory}
            elsewhere = {key: self._in_flight[key] for key in requests if key in self._in_flight}
            mine = {k: request for k, request in requests.items() if k not in results and k not in elsewhere}
            self._in_flight |= {key: Future() for key in mine}
        self._count(memory_hits=len(results), shared=len(elsewhere))
        settled: dict[str, Result] = {}
        try:
            if mine:
                self._find_or_calculate(mine, settled)
        finally:
            with self._lock:
                self._memory |= {k: result for k, result in settled.items() if result.status != Status.CANCELLED}
                promises = {key: self._in_flight.pop(key) for key in mine}
            for key, promise in promises.items():
                promise.set_result(settled.get(key, _CANCELLED))
        with self._timed("waiting"):
            return results | settled | {key: promise.result() for key, promise in elsewhere.items()}

    def _find_or_calculate(self, requests: Mapping[str, Request], settled: dict[str, Result]) -> None:
        """Put a result into ``settled`` for every key; those that are there when this raises are valid."""
        with self._timed("lookup"):
            settled |= self.store.read(requests)
        self._count(store_hits=len(settled))
        unknown = {key: request for key, request in requests.items() if key not in settled}
        with self._timed("refusing"):
            refused = {key: self.engine.refuse(request.crystal, request.property) for key, request in unknown.items()}
        settled |= {key: result for key, result in refused.items() if result is not None}
        unknown = {key: request for key, request in unknown.items() if refused[key] is None}
        self._count(refused=len(refused) - len(unknown))
        if unknown:
            self._calculate(unknown, settled)

    def _calculate(self, requests: Mapping[str, Request], settled: dict[str, Result]) -> None:
        """Run the engine on every request, and record each result as soon as it arrives."""
        if self._closed:
            raise RuntimeError("this bridge is closed, so it calculates nothing more; open a new one")
        with self._timed("grouping"):
            jobs = self._jobs(requests)
        inbox: queue.SimpleQueue[Future | None] = queue.SimpleQueue()
        outstanding: dict[Future, list[str]] = {}
        arrived: list[Future] = []

        def submit(jobs: Sequence[list[str]]) -> None:
            with self._timed("submitting"):
                for keys in jobs:
                    if self._halted():
                        break
                    future = self._submit([requests[key] for key in keys])
                    outstanding[future] = keys
                    future.add_done_callback(inbox.put)

        def record() -> list[list[str]]:
            done = {future: outstanding[future] for future in arrived if future in outstanding}
            broken = self._record(done, requests, settled)
            for future in done:
                del outstanding[future]
            arrived.clear()
            return [[key] for keys in broken for key in keys]

        with self._lock:
            self._inboxes.add(inbox)
        try:
            submit(jobs)
            while outstanding and not self._halted():
                with self._timed("waiting"):
                    arrived.append(inbox.get())
                    if len(outstanding) > 1:
                        time.sleep(GATHER_SECONDS)
                arrived += _drain(inbox)
                submit(record())
        except KeyboardInterrupt:
            arrived[:] = [future for future in outstanding if future.done()]
            record()  # what has finished is kept
            raise
        finally:
            with self._lock:
                self._inboxes.discard(inbox)
            for future in outstanding:
                future.cancel()  # in our own pool this ends what runs, too
            for key in requests:
                settled.setdefault(key, _CANCELLED)

    def _jobs(self, requests: Mapping[str, Request]) -> list[list[str]]:
        """The keys of each job, in the order in which the jobs should start."""
        if not isinstance(self.engine, BatchEngine):
            return [[key] for key in requests]
        keys_of: dict[str, list[str]] = defaultdict(list)
        for key, request in requests.items():
            keys_of[request.property].append(key)
        jobs = []
        for property_name, keys in keys_of.items():
            groups = self.engine.group([requests[key].crystal for key in keys], property_name)
            if sorted(i for group in groups for i in group) != list(range(len(keys))):
                raise ValueError(f"the {self.engine.name} engine must put each of {len(keys)} crystals into one group")
            jobs += [[keys[i] for i in group] for group in groups if group]
        return jobs

    def _submit(self, requests: Sequence[Request]) -> Future[list[Result]]:
        """Start a job; its requests are for one property."""
        job = calculate_many, self.engine, [request.crystal for request in requests], requests[0].property
        if isinstance(self._executor, WorkerPool):
            return self._executor.submit_batch(len(requests), *job)
        return self._executor.submit(*job)

    def _record(
        self, finished: Mapping[Future, list[str]], requests: Mapping[str, Request], settled: dict[str, Result]
    ) -> list[list[str]]:
        """Write what the engine returned to the store, then let it be seen; returns the batches to be run singly."""
        outcomes: dict[str, Result] = {}
        records, broken, fatal = [], [], None
        for future, keys in finished.items():
            try:
                found = _outcomes(future, len(keys))
            except (EngineNotReady, PicklingError, BrokenExecutor) as error:
                fatal = error
                continue
            if found is None:
                broken.append(keys)
                continue
            results, permanent = found
            for key, result in zip(keys, results, strict=True):
                outcomes[key] = result
                if permanent and result.status != Status.CANCELLED:
                    request = requests[key]
                    label, fingerprint = self._label(request.property), self._fingerprints[request.property]
                    records.append(Record(key, request.crystal, request.property, result, label, fingerprint))
        if records:
            with self._timed("writing"):
                self.store.write(records)
        settled |= outcomes
        with self._lock:
            for result in outcomes.values():
                if result.status != Status.CANCELLED:
                    self._counts["calls"] += 1
                    self._seconds["cpu"] += result.seconds
                    if result.status != Status.OK:
                        self._failures[result.status.name] += 1
        if fatal is not None:
            raise fatal
        return broken

    def _open(self, property_name: str) -> None:
        """Find out once, at the door, whether engine and store can be used."""
        if property_name not in self._fingerprints:
            self.engine.preflight()
            self.store.open()
            self._fingerprints[property_name] = self.engine.fingerprint(property_name)

    def _label(self, property_name: str) -> str:
        """Where values come from, such as ``gpaw 26.7.0, fast``; a fingerprint names the version as its engine."""
        version = self._fingerprints[property_name].get(self.engine.name, "")
        return f"{self.engine.name} {version}".strip() + (f", {self._preset}" if self._preset else "")

    def _keys_of(self, skeleton: Skeleton, property_name: str) -> Keys:
        which = (skeleton.lattice.tobytes(), skeleton.frac_coords.tobytes(), property_name)
        if which not in self._keys:
            self._keys[which] = Keys(skeleton, property_name, self._fingerprints[property_name])
        return self._keys[which]

    def _watch_interrupts(self) -> None:
        if self._interrupts is None and threading.current_thread() is threading.main_thread():
            bridge = weakref.ref(self)

            def on_interrupt() -> None:
                held = bridge()
                # In the main thread, or outside of a program, Python's own KeyboardInterrupt does it.
                if held is not None and held._foreign_calls:
                    held._keep(KeyboardInterrupt())

            self._interrupts = InterruptWatch(on_interrupt)

    @contextlib.contextmanager
    def _in_program(self) -> Iterator[None]:
        """Counts the host calls that run in another than the main thread."""
        foreign = threading.current_thread() is not threading.main_thread()
        with self._lock:
            self._foreign_calls += foreign
        try:
            yield
        finally:
            with self._lock:
                self._foreign_calls -= foreign

    def _halted(self) -> bool:
        return self._cancelled or self._fatal is not None

    def _keep(self, error: BaseException) -> None:
        """Remember an exception until :meth:`check` raises it; nothing is calculated until then."""
        logger.error("evaluation stopped: %s", str(error) or type(error).__name__)
        with self._lock:
            self._fatal = self._fatal or error
        self._wake()

    def _wake(self) -> None:
        """Let every thread that waits for a calculation look again."""
        with self._lock:
            inboxes = list(self._inboxes)
        for inbox in inboxes:
            inbox.put(None)

    def _count(self, **increments: int) -> None:
        with self._lock:
            self._counts.update(increments)

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[phase] += time.perf_counter() - start


def _drain(inbox: queue.SimpleQueue[Future | None]) -> Iterator[Future | None]:
    """Everything that is there already."""
    with contextlib.suppress(queue.Empty):
        while True:
            yield inbox.get_nowait()


def _outcomes(future: Future[list[Result]], size: int) -> tuple[list[Result], bool] | None:
    """The results of a finished job, and whether they speak of the crystals and so belong into the store.

    ``None`` for a batch that failed as a whole, as one of its crystals or its size may be the reason. Raises what
    concerns every calculation, not only this job.
    """
    error = CancelledError() if future.cancelled() else future.exception()
    match error:
        case None:
            return future.result(), True
        case CancelledError():
            return [_CANCELLED] * size, False
        case EngineNotReady() | PicklingError() | BrokenExecutor():
            raise error
        case _ if size > 1:
            logger.warning("a batch of %d failed (%s: %s); one by one", size, type(error).__name__, error)
            return None
        case WorkerDied():
            return [Result.failure(Status.WORKER_DIED, str(error))], False
        case JobTimeout():
            return [Result.failure(Status.TIMEOUT, str(error))], False
        case _:
            return [Result.failure(Status.ENGINE_ERROR, f"{type(error).__name__}: {error}")], False


def _stop(pool: WorkerPool | None) -> None:
    if pool is not None:
        pool.shutdown(wait=False, cancel_futures=True)
