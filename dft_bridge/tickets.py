"""Tickets for answers that come later, so that whoever asks can go on meanwhile."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from typing import NamedTuple

from crystaljax.dft_bridge.answers import CANCELLED
from crystaljax.dft_bridge.engines.base import Result


class Answer(NamedTuple):
    """What became of what a ticket was issued for."""

    ticket: int
    result: Result


class Tickets:
    """Holds answers, in the order of their arrival, until they are collected. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrived: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._outstanding: set[int] = set()
        self._next = 0
        self._error: BaseException | None = None

    @property
    def outstanding(self) -> int:
        """Tickets whose answer has not been collected."""
        return len(self._outstanding)

    def issue(self, count: int, wanted: Iterable[int] | None = None) -> list[int]:
        """``count`` tickets: the next numbers, or those ``wanted``; raises ``ValueError`` for one that is in use."""
        with self._lock:
            tickets = list(range(self._next, self._next + count)) if wanted is None else [int(t) for t in wanted]
            if len(tickets) != count or len(set(tickets)) != count or not self._outstanding.isdisjoint(tickets):
                used = sorted(self._outstanding.intersection(tickets))
                raise ValueError(
                    f"{count} requests need {count} different tickets, none of them in use; in use: {used}"
                )
            self._outstanding.update(tickets)
            self._next = max([self._next, *(ticket + 1 for ticket in tickets)])
        return tickets

    def withdraw(self, tickets: Iterable[int]) -> None:
        """Take back tickets that nothing will arrive for."""
        with self._lock:
            self._outstanding.difference_update(tickets)

    def arrive(self, ticket: int, result: Result) -> None:
        """The answer of a ticket is there."""
        self._arrived.put(Answer(ticket, result))

    def await_promise(self, ticket: int, promise: Future[Result]) -> None:
        """The answer of a ticket will be there when the promise is kept; if it is broken, it is ``CANCELLED``."""
        promise.add_done_callback(functools.partial(self._kept, ticket))

    def _kept(self, ticket: int, promise: Future[Result]) -> None:
        error = promise.exception()
        if error is not None:
            with self._lock:
                self._error = self._error or error
        self.arrive(ticket, CANCELLED if error is not None else promise.result())

    def take_error(self) -> BaseException | None:
        """What broke promises since the last call."""
        with self._lock:
            error, self._error = self._error, None
        return error

    def collect(self, wait: float | None) -> list[Answer]:
        """See :meth:`crystaljax.dft_bridge.bridge.Bridge.collect`."""
        answers: list[Answer] = []
        while self._outstanding:
            try:
                answer = self._arrived.get(timeout=None if wait is None else 0.0 if answers else wait)
            except queue.Empty:
                break
            self.withdraw([answer.ticket])
            answers.append(answer)
        return answers
