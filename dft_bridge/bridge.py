"""The bridge: finished crystals of a batch come in, each distinct one is calculated once, all get their answer.

A crystal is looked for in the batch, in memory, among the calculations that run at this moment, and in the store;
only what is found nowhere goes to the workers. A result is in the store before anyone sees it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures import wait as futures_wait
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from crystaljax.caveats import Caveat
from crystaljax.dft_bridge.accounting import Account, Budget, Stats
from crystaljax.dft_bridge.answers import CANCELLED, Answers
from crystaljax.dft_bridge.archive import Archive
from crystaljax.dft_bridge.dispatch import Dispatcher
from crystaljax.dft_bridge.engines.base import BatchEngine, Engine, Result, outcome_of
from crystaljax.dft_bridge.gate import gate
from crystaljax.dft_bridge.interrupts import InterruptWatch
from crystaljax.dft_bridge.keys import Keys, Request
from crystaljax.dft_bridge.limits import ExecutorLost, Limits
from crystaljax.dft_bridge.pool import WorkerPool
from crystaljax.dft_bridge.store import Store, StoreError
from crystaljax.dft_bridge.tickets import Answer, Tickets
from crystaljax.evaluators import BoundEvaluator, Problem, joined
from crystaljax.skeleton import stack
from crystaljax.status import Status
from crystaljax.symmetry import canonical

if TYPE_CHECKING:
    from crystaljax.dft_bridge.delayed import DelayedEvaluation
    from crystaljax.env import CrystalEnv

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 3.0
"""How long an interrupted call waits for what has finished to be recorded."""


class Bridge:
    """Evaluates crystals with an engine, each one once; an evaluator for :func:`crystaljax.make`.

    Use it as a context manager, or call :meth:`close`. Thread-safe. Workers start with the first calculation. An engine
    that is a :class:`~crystaljax.dft_bridge.engines.base.BatchEngine` gets crystals in the batches it asks for; one
    whose worker dies or that takes too long is calculated again one by one, so that only the culprit fails.

    What is stored: every result of the engine, failures included. A calculation that needed more than its limits
    (``TIMEOUT``, ``OUT_OF_MEMORY``) or whose worker died (``WORKER_DIED``) is stored with these limits, and tried again
    under others. What is not stored, as it speaks of the machine, and is remembered for a while only: memory or files
    that ran out in a worker (``ENGINE_ERROR``). Refusals cost nothing and are not stored either.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store | str | os.PathLike[str] | None = None,
        workers: int | None = None,
        *,
        executor: Executor | None = None,
        scheduler: str | None = None,
        preset: str = "",
        limits: Limits = Limits(),  # noqa: B008, frozen
        budget: Budget = Budget(),  # noqa: B008, frozen
    ):
        """Cheap: nothing is started or opened, but for the connection to a scheduler.

        Args:
            engine: what calculates.
            store: a store or the path of one, by default :func:`crystaljax.dft_bridge.store.default_path`.
            workers: worker processes, by default as many as the engine suggests, or one per CPU core.
            executor: runs the calculations in place of worker processes of our own (MPI, a thread ...); stays yours to
                shut down, and knows no limits.
            scheduler: address of a Dask scheduler, ``tcp://host:8786``, whose workers calculate; see
                :mod:`crystaljax.dft_bridge.cluster`.
            preset: name of the engine's settings, for labels.
            limits: time, memory and attempts of a calculation.
            budget: how much may be calculated in all.

        Raises:
            ValueError: options that exclude each other.
            ExecutorLost: Dask is not installed, or no scheduler answers at that address.
        """
        if (executor is not None) + (scheduler is not None) + (workers is not None) > 1:
            raise ValueError("workers, executor and scheduler say where to calculate; give one of them")
        if executor is not None and limits != Limits():
            raise ValueError("an executor of yours has its own limits; leave out limits, or the executor")
        self.engine = engine
        self.store = store if isinstance(store, Store) else Store(store)
        self._executor = executor or _executor(engine, workers, scheduler, limits)
        self._archive = Archive(self.store, engine, preset, limits)
        self._answers = Answers()
        self._account = Account()
        self._tickets = Tickets()
        self._dispatcher = Dispatcher(engine, self._executor, self._archive, self._answers, self._account, budget)
        self._lock = threading.Lock()
        self._fatal: BaseException | None = None
        self._cancelled = False
        self._closed = False
        self._foreign_calls = 0
        self._interrupts: InterruptWatch | None = None
        # Also ends the workers when a bridge that nobody closed is dropped, or the program ends.
        ours = self._executor if executor is None else None
        self._stop_workers = weakref.finalize(self, _stop, self._dispatcher, self._archive, ours)

    def __enter__(self) -> Bridge:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __copy__(self) -> Bridge:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Bridge:
        return self  # workers and the store are there once: what holds a bridge can be copied, and shares it

    def __reduce__(self) -> str:
        raise TypeError(
            "a bridge has worker processes and an open store, so it cannot be pickled or sent to another process; "
            "give the evaluator by name there (evaluator='planewave'), or open a bridge in that process"
        )

    def bind(self, problem: Problem) -> BoundEvaluator:
        """The evaluator for a problem.

        Raises:
            EngineNotReady: the engine cannot run here; says what to install.
            StoreError: the store cannot be written.
            ValueError: the engine does not compute a property.
        """
        for property_name in problem.properties:
            self._archive.open(property_name)
        self._watch_interrupts()
        permutations = stack(problem.skeletons).permutations
        keys = [[self._archive.keys(skeleton, name) for name in problem.properties] for skeleton in problem.skeletons]

        def canonical_on_device(numbers: jax.Array, skeleton: jax.Array) -> jax.Array:
            return canonical(numbers, jnp.asarray(permutations)[0 if len(keys) == 1 else skeleton])

        def host(numbers: np.ndarray, skeletons: np.ndarray, pending: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            try:
                with self._in_program():
                    return self._answer(problem, keys, numbers, skeletons, pending)
            except (Exception, KeyboardInterrupt) as error:  # raising here is undefined behaviour; see check()
                self._keep(error)
                values = np.zeros((len(pending), len(problem.properties)), np.float32)
                return values, np.full(len(pending), Status.CANCELLED, np.int32)

        def check() -> None:  # not the bound method: a deep copy of the environment would copy the bridge with it
            self.check()

        def caveats(crystals: Sequence[tuple[np.ndarray, int]]) -> list[tuple[Caveat, ...] | None]:
            asked = [
                Request.of(problem.skeletons[index], numbers, name)
                for numbers, index in crystals
                for name in problem.properties
            ]
            try:
                found = [None if result is None else result.caveats for result in self.known(asked)]
            except StoreError as error:  # of a report that can do without
                logger.warning("caveats of values are not known: %s", error)
                found = [None] * len(asked)
            several = len(problem.properties)
            return [joined(found[start : start + several]) for start in range(0, len(found), several)]

        query = gate(host, canonical_on_device, len(problem.properties))
        label = "; ".join(dict.fromkeys(self._archive.label(name) for name in problem.properties))
        return BoundEvaluator(query, check, label, caveats=caveats)

    def check(self) -> None:
        """Raise, once and with its own type, what went wrong inside a compiled program or after :meth:`submit`."""
        with self._lock:
            error, self._fatal = self._fatal, None
        error = error or self._tickets.take_error()
        if error is not None:
            raise error

    def evaluate(self, requests: Sequence[Request]) -> list[Result]:
        """The results, in the order of the requests; waits for those that must be calculated.

        Raises:
            EngineNotReady, StoreError: as :meth:`bind`.
            BudgetSpent: the budget does not allow what must be calculated.
            ExecutorLost: whatever runs the calculations is gone.
            Also whatever :meth:`check` would raise.
        """
        self.check()
        keyed = self._keyed(requests)
        results = self._wait(self._ask(dict(keyed)))
        return [results[key] for key, _ in keyed]

    def known(self, requests: Sequence[Request]) -> list[Result | None]:
        """The results that memory or the store have, in the order of the requests; calculates nothing.

        Raises:
            EngineNotReady, StoreError: as :meth:`bind`.
        """
        for property_name in {request.property for request in requests}:
            self._archive.open(property_name)
        keys = [self._archive.keys(r.skeleton, r.property).key(r.numbers) for r in requests]
        found = self._answers.remembered(keys)
        found |= self._archive.find({k: r for k, r in zip(keys, requests, strict=True) if k not in found})
        return [found.get(key) for key in keys]

    def submit(self, requests: Sequence[Request], tickets: Iterable[int] | None = None) -> list[int]:
        """Have crystals evaluated while you go on; :meth:`collect` hands out the results.

        Args:
            requests: what to evaluate.
            tickets: a number of your choice for each, none of them in use; by default the next ones.

        Returns:
            The ticket of each request.

        Raises:
            As :meth:`evaluate`, for what can be seen at once.
        """
        self.check()
        keyed = self._keyed(requests)
        issued = self._tickets.issue(len(keyed), tickets)
        try:
            asked = self._ask(dict(keyed))
        except BaseException:
            self._tickets.withdraw(issued)
            raise
        for ticket, (key, _) in zip(issued, keyed, strict=True):
            answer = asked[key]
            if isinstance(answer, Future):
                self._tickets.await_promise(ticket, answer)
            else:
                self._tickets.arrive(ticket, answer)
        return issued

    def collect(self, wait: float | None = 0.0) -> list[Answer]:
        """What has arrived since the last call, in the order of arrival.

        Args:
            wait: seconds to wait for the first, if there is none yet; ``None`` waits for all that is outstanding.

        Raises:
            What stopped the calculations, once. Their tickets then come as ``CANCELLED``; submit them again.
        """
        self.check()
        answers = self._tickets.collect(wait)
        if not answers:
            self.check()
        return answers

    @property
    def outstanding(self) -> int:
        """How many tickets are still to be collected."""
        return self._tickets.outstanding

    def delayed(self, env: CrystalEnv, target: float | None = None) -> DelayedEvaluation:
        """Evaluates what the episodes of a :class:`crystaljax.delayed.DelayedRewards` design, while they go on."""
        from crystaljax.dft_bridge.delayed import (
            DelayedEvaluation,  # loads the environment, which a bridge alone does not need
        )

        return DelayedEvaluation(self, env, target)

    def cancel(self) -> None:
        """Stop: what is not finished becomes ``Status.CANCELLED``, workers are killed. Call it from any thread.

        Nothing is calculated any more until :meth:`resume`; crystals that are known keep their results.
        """
        with self._lock:
            self._cancelled = True
        self._dispatcher.cancel()

    def resume(self) -> None:
        """Calculate again after :meth:`cancel`."""
        with self._lock:
            self._cancelled = False

    def close(self) -> None:
        """Cancel what runs and end the workers. Finished results are in the store already."""
        self._closed = True
        self._cancelled = True
        self._stop_workers()
        if self._interrupts is not None:
            self._interrupts.close()
            self._interrupts = None

    def stats(self) -> Stats:
        """The counters so far."""
        return self._account.stats()

    def carry_on(self, summary: Mapping[str, Any]) -> None:
        """Count on from an earlier part of the run, given as :meth:`Stats.summary`; the budget is for all of it."""
        self._account.carry_on(summary)

    def _keyed(self, requests: Sequence[Request]) -> list[tuple[str, Request]]:
        with self._account.timed("keys"):
            for property_name in {request.property for request in requests}:
                self._archive.open(property_name)
            keyed = [(self._archive.keys(r.skeleton, r.property).key(r.numbers), r) for r in requests]
        self._account.count(requests=len(keyed), distinct=len(dict(keyed)))
        return keyed

    def _ask(self, requests: Mapping[str, Request]) -> dict[str, Result | Future[Result]]:
        """For every key its result, or the promise of one; each key is worked on once."""
        claim = self._answers.claim(requests)
        self._account.count(memory_hits=len(claim.known), shared=len(claim.elsewhere))
        if claim.mine:
            try:
                self._find_or_calculate({key: requests[key] for key in claim.mine})
            except BaseException:
                self._answers.settle(dict.fromkeys((k for k, p in claim.mine.items() if not p.done()), CANCELLED))
                raise
        return {**claim.known, **claim.elsewhere, **claim.mine}

    def _find_or_calculate(self, requests: Mapping[str, Request]) -> None:
        """See that the promise of every key is kept, now or later."""
        with self._account.timed("lookup"):
            found = self._archive.find(requests)
        self._account.count(store_hits=len(found))
        self._answers.settle(found)
        unknown = {key: request for key, request in requests.items() if key not in found}
        with self._account.timed("refusing"):
            asked = {key: self.engine.refuse(request.crystal, request.property) for key, request in unknown.items()}
        refused = {key: result for key, result in asked.items() if result is not None}
        self._account.count(refused=len(refused))
        self._answers.settle(refused)
        unknown = {key: request for key, request in unknown.items() if key not in refused}
        if unknown and self._closed:
            raise RuntimeError("this bridge is closed, so it calculates nothing more; open a new one")
        if unknown:
            self._dispatcher.add(unknown)
            if self._halted():
                self._dispatcher.cancel(unknown)

    def _wait(self, asked: Mapping[str, Result | Future[Result]]) -> dict[str, Result]:
        """The results, once all promises are kept; raises what broke one."""
        promises = {key: promise for key, promise in asked.items() if isinstance(promise, Future)}
        with self._account.timed("waiting"):
            try:
                futures_wait(promises.values())
            except KeyboardInterrupt:
                self._dispatcher.cancel(promises)
                futures_wait(promises.values(), SETTLE_SECONDS)  # what has finished is recorded
                raise
        return {key: answer.result() if isinstance(answer, Future) else answer for key, answer in asked.items()}

    def _answer(
        self, problem: Problem, keys: list[list[Keys]], numbers: np.ndarray, skeletons: np.ndarray, pending: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The host side of a query: rows are canonical already; see :data:`crystaljax.dft_bridge.gate.Host`."""
        with self._account.timed("duplicates"):
            lanes = np.flatnonzero(pending)
            rows = np.column_stack([skeletons[lanes], numbers[lanes]])
            rows, row_of_lane = np.unique(rows, axis=0, return_inverse=True)
        with self._account.timed("keys"):
            row_keys, requests = [], {}
            for index, *labels in rows.tolist():
                skeleton = problem.skeletons[index]
                labels = labels[: skeleton.n_sites]
                row_keys.append([of_property.key(labels) for of_property in keys[index]])
                for key, property_name in zip(row_keys[-1], problem.properties, strict=True):
                    requests[key] = Request(skeleton, tuple(labels), property_name)
        self._account.count(host_calls=1, requests=len(lanes) * len(problem.properties), distinct=len(requests))
        results = self._wait(self._ask(requests))
        with self._account.timed("duplicates"):
            found = [outcome_of([results[key] for key in of_crystal]) for of_crystal in row_keys]
            values = np.zeros((len(pending), len(problem.properties)), np.float32)
            statuses = np.zeros(len(pending), np.int32)
            if found:
                row_of_lane = row_of_lane.reshape(-1)
                values[lanes] = np.array([outcome.values for outcome in found], np.float32)[row_of_lane]
                statuses[lanes] = np.array([outcome.status for outcome in found], np.int32)[row_of_lane]
        return values, statuses

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
        """Counts the host calls that run in another than the main thread.

        Raises:
            KeyboardInterrupt: Ctrl-C came between two of them, while the main thread waited for the program.
        """
        foreign = threading.current_thread() is not threading.main_thread()
        if foreign and self._interrupts is not None and self._interrupts.pending:
            raise KeyboardInterrupt
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
        self._dispatcher.cancel()


def _executor(engine: Engine, workers: int | None, scheduler: str | None, limits: Limits) -> Executor:
    """Where an engine's calculations run if the user has no executor."""
    if scheduler is not None:
        try:
            from crystaljax.dft_bridge.cluster import DaskExecutor
        except ModuleNotFoundError as error:
            raise ExecutorLost("a scheduler needs Dask: pip install 'crystaljax[dask]', on every host") from error
        return DaskExecutor(scheduler, engine, limits)
    if not isinstance(engine, BatchEngine):
        return WorkerPool(workers, limits)
    return WorkerPool(
        engine.workers() if workers is None else workers, limits, engine.worker_environment, engine.start_worker
    )


def _stop(dispatcher: Dispatcher, archive: Archive, executor: Executor | None) -> None:
    dispatcher.close()
    if executor is not None:
        executor.shutdown(wait=False, cancel_futures=True)
    archive.close()
