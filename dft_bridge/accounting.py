"""What a bridge has done, what that cost, and what it may cost."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from crystaljax.dft_bridge.engines.base import Result
from crystaljax.status import Status

OF_THE_ENGINE = ("refusing", "grouping")
"""Phases whose time belongs to the engine."""
SECONDS_PER_HOUR = 3600.0


@dataclasses.dataclass(frozen=True)
class Stats:
    """What a bridge has done so far.

    Attributes:
        host_calls: batches that came from compiled programs.
        requests: finished crystals asked for.
        distinct: of these, after removing duplicates within their batch.
        memory_hits: distinct ones answered from memory.
        shared: distinct ones that were being calculated already.
        store_hits: distinct ones found in the store.
        refused: distinct ones the engine refused without a calculation.
        calls: calculations run, whatever became of them.
        failures: calculations without a value, by status name.
        core_seconds: CPU time of the calculations; wall time of those that had to be killed.
        queue_seconds: time that jobs waited for a worker, summed over jobs.
        waiting_seconds: wall time that callers spent waiting for calculations.
        own_seconds: wall time of the bridge's own work.
        phases: wall time by phase.
    """

    host_calls: int = 0
    requests: int = 0
    distinct: int = 0
    memory_hits: int = 0
    shared: int = 0
    store_hits: int = 0
    refused: int = 0
    calls: int = 0
    failures: Mapping[str, int] = dataclasses.field(default_factory=dict)
    core_seconds: float = 0.0
    queue_seconds: float = 0.0
    waiting_seconds: float = 0.0
    own_seconds: float = 0.0
    phases: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def batch_hits(self) -> int:
        """Requests that were duplicates within their batch."""
        return self.requests - self.distinct

    def summary(self) -> dict[str, Any]:
        """Every count, for a JSON file; :meth:`Account.carry_on` reads it."""
        return dataclasses.asdict(self) | {"batch_hits": self.batch_hits}


@dataclasses.dataclass(frozen=True)
class Budget:
    """What may be spent on calculations, those of an earlier part of the run included.

    Attributes:
        max_calls: calculations.
        max_core_hours: hours of :attr:`Stats.core_seconds`. What runs when they are used up is finished.
    """

    max_calls: int | None = None
    max_core_hours: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_calls", "max_core_hours"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} is {value}; give 0 or more, or None for no limit")

    def calls_left(self, calls: int, running: int, core_seconds: float) -> float:
        """How many calculations may be started; those that run are expected to take as long as those before them."""
        left = math.inf if self.max_calls is None else self.max_calls - calls - running
        if self.max_core_hours is not None:
            expected = core_seconds * (1 + running / max(calls, 1))
            left = left if expected < self.max_core_hours * SECONDS_PER_HOUR else 0
        return max(left, 0)

    def explain(self, stats: Stats) -> str:
        """For people: what has been spent of what."""
        hours = stats.core_seconds / SECONDS_PER_HOUR
        calls = f"{stats.calls}" + (f" of {self.max_calls}" if self.max_calls is not None else "")
        spent = f"{hours:.3g}" + (f" of {self.max_core_hours:g}" if self.max_core_hours is not None else "")
        return f"the budget is spent: {calls} DFT calls, {spent} core-hours"


class Account:
    """Thread-safe counters of a bridge."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._phases: defaultdict[str, float] = defaultdict(float)

    def carry_on(self, earlier: Mapping[str, Any]) -> None:
        """Add what an earlier part of the run has counted: a :meth:`Stats.summary`."""
        with self._lock:
            for field in dataclasses.fields(Stats):
                value = earlier.get(field.name, 0)
                if field.name == "failures":
                    self._failures.update(value or {})
                elif field.name == "phases":
                    for phase, seconds in (value or {}).items():
                        self._phases[phase] += seconds
                elif field.name.endswith("_seconds"):
                    self._seconds[field.name] += value
                else:
                    self._counts[field.name] += value

    def count(self, **increments: int) -> None:
        """Add to counters of that name."""
        with self._lock:
            self._counts.update(increments)

    def calculated(self, result: Result) -> None:
        """Enter a calculation."""
        with self._lock:
            self._counts["calls"] += 1
            self._seconds["core_seconds"] += result.seconds
            if result.status != Status.OK:
                self._failures[result.status.name] += 1

    def queued(self, seconds: float) -> None:
        """Enter how long a job waited for its worker."""
        with self._lock:
            self._seconds["queue_seconds"] += max(seconds, 0.0)

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the wall time of a block to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            with self._lock:
                self._phases[phase] += spent
                if phase == "waiting":
                    self._seconds["waiting_seconds"] += spent
                elif phase not in OF_THE_ENGINE:
                    self._seconds["own_seconds"] += spent

    def stats(self) -> Stats:
        """The counters so far."""
        with self._lock:
            counts = {name: self._counts[name] for name in self._counts}
            failures, phases = dict(self._failures), dict(self._phases)
            seconds: dict[str, Any] = dict(self._seconds)
            return Stats(**counts, **seconds, failures=failures, phases=phases)
