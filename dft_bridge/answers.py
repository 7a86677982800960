"""Who waits for which crystal, and what became of the latest ones.

A crystal that is asked for while it is being calculated is not calculated again: whoever asks gets the same promise.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from typing import NamedTuple

from crystaljax.dft_bridge.engines.base import Result
from crystaljax.status import Status

REMEMBERED = 4096
"""Results kept in memory, the latest used ones; the store has all of them."""
CANCELLED = Result.failure(Status.CANCELLED, "stopped before it finished")


class Claim(NamedTuple):
    """What came of asking for keys.

    Attributes:
        known: results from memory.
        elsewhere: promises of what somebody else asked for before.
        mine: promises that the caller must see settled.
    """

    known: dict[str, Result]
    elsewhere: dict[str, Future[Result]]
    mine: dict[str, Future[Result]]


class Answers:
    """Promises and remembered results by key. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._remembered: OrderedDict[str, Result] = OrderedDict()
        self._promises: dict[str, Future[Result]] = {}

    def claim(self, keys: Iterable[str]) -> Claim:
        """Ask for keys; each that is in nobody's hands becomes the caller's to settle."""
        claim = Claim({}, {}, {})
        with self._lock:
            for key in keys:
                if key in self._remembered:
                    self._remembered.move_to_end(key)
                    claim.known[key] = self._remembered[key]
                elif key in self._promises:
                    claim.elsewhere[key] = self._promises[key]
                else:
                    self._promises[key] = claim.mine[key] = Future()
        return claim

    def remembered(self, keys: Iterable[str]) -> dict[str, Result]:
        """Those results that are in memory; nothing is promised."""
        with self._lock:
            return {key: self._remembered[key] for key in keys if key in self._remembered}

    def settle(self, results: Mapping[str, Result]) -> None:
        """Keep promises; everything but what was cancelled is remembered."""
        with self._lock:
            promises = [(self._promises.pop(key, None), result) for key, result in results.items()]
            self._remembered |= {k: result for k, result in results.items() if result.status != Status.CANCELLED}
            while len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        for promise, result in promises:
            if promise is not None:
                promise.set_result(result)

    def fail(self, keys: Iterable[str], error: BaseException) -> None:
        """Break promises: who waits gets the error. Those that are kept already stay so."""
        with self._lock:
            promises = [self._promises.pop(key) for key in keys if key in self._promises]
        for promise in promises:
            promise.set_exception(error)
