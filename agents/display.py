"""How far a run is: a progress bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from crystaljax.agents.ledger import Ledger

logger = logging.getLogger(__name__)

LOG_SECONDS = 10.0
"""Smallest interval between two log lines while a batch is being calculated."""


def _time_left(seconds: float | None) -> str:
    if seconds is None:
        return "-:--"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Display:
    """Shows the progress of a run; call :meth:`show` as often as you like."""

    def __init__(self, updates: int, done: int, console: Console | None):
        """``console=None`` shows log lines only; so does a console that is no terminal."""
        self._updates, self._first, self._done = updates, done, done
        self._start: float | None = None
        self._left: float | None = None
        self._logged = time.monotonic()
        self._bar: Progress | None = None
        if console is not None and console.is_terminal:
            columns = (BarColumn(bar_width=24), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=console, refresh_per_second=5)
            self._task = self._bar.add_task("compiling", total=updates, completed=done)

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def finished(self, update: int) -> None:
        """An update is done: estimate the time left."""
        self._done = update
        if self._start is None:  # the first update compiles, so it tells nothing about the others
            self._first, self._start = update, time.monotonic()
        else:
            elapsed = time.monotonic() - self._start
            self._left = elapsed / (update - self._first) * (self._updates - update)

    def show(self, ledgers: Sequence[Ledger], stats: Any | None, always: bool = False) -> None:
        """Show where the run, or the runs of a sweep, stand.

        ``stats`` are those of a DFT bridge, ``always`` writes a log line even so soon.
        """
        text = self._text(ledgers, stats)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=text)
        elif always or time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            logger.info("update %d/%d: %s", self._done, self._updates, text)

    def _text(self, ledgers: Sequence[Ledger], stats: Any | None) -> str:
        best = max((ledger.best_reward for ledger in ledgers if ledger.crystals), default=None)
        shown = "none" if best is None else f"{best:.3f}"
        parts = [f"{sum(ledger.episodes for ledger in ledgers)} episodes", f"best reward {shown}"]
        if stats is not None:
            hits = stats.batch_hits + stats.memory_hits + stats.store_hits + stats.shared
            failed = ", ".join(f"{count} {reason}" for reason, count in sorted(stats.failures.items())) or "0 failed"
            parts += [f"{stats.calls} DFT", f"{hits} cached", f"{stats.refused} refused", failed]
            parts += [f"{stats.core_seconds / 3600:.2f} core-h", f"{stats.queue_seconds / 3600:.2f} h queued"]
        else:
            parts += [f"{sum(len(ledger.crystals) for ledger in ledgers)} crystals"]
        return " · ".join([*parts, f"{_time_left(self._left)} left"])
