"""What a run has spent on calculations, in its folder."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from crystaljax.files import replace_text
from crystaljax.run_folder import ACCOUNTING, read_spent

WRITE_SECONDS = 10.0
"""Smallest interval between two writes while a batch is being calculated."""


class Accounting:
    """Keeps ``accounting.json`` up to date with the counters of a DFT bridge; does nothing without one."""

    def __init__(self, folder: Path, evaluator: Any):
        """Counts on from what the file says, if the evaluator can (``stats`` and ``carry_on``)."""
        self._path, self._written = folder / ACCOUNTING, time.monotonic()
        self._stats = getattr(evaluator, "stats", lambda: None)
        earlier = read_spent(folder)
        if earlier and hasattr(evaluator, "carry_on"):
            evaluator.carry_on(earlier)

    def write(self, always: bool = True) -> None:
        """Write the counters; without ``always`` only if the last time is a while ago."""
        stats = self._stats()
        if stats is None or (not always and time.monotonic() - self._written < WRITE_SECONDS):
            return
        self._written = time.monotonic()
        replace_text(self._path, json.dumps(stats.summary(), indent=2) + "\n")
