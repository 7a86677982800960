"""What runs in a worker process: the calculations of a job, and a watch that ends it with its parent."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import psutil

from crystaljax.dft_bridge.engines.base import BatchEngine, Crystal, Engine, Result, about_the_machine, check_plain
from crystaljax.status import Status

logger = logging.getLogger(__name__)

PARENT_CHECK_SECONDS = 1.0
"""How often a worker looks whether its parent still lives."""
FILES = "files"
"""Name of the folder for the files of engines, within the scratch folder of a worker."""


class Done(NamedTuple):
    """A finished job: the results in the order of its crystals, and the wall-clock seconds that it ran."""

    results: list[Result]
    seconds: float


def run_job(engine: Engine, crystals: Sequence[Crystal], property_name: str) -> Done:
    """Run the calculations of a job. Every crystal has a result, whatever its physics does.

    After an exception of the engine about a batch each crystal is calculated on its own, so that only the culprit
    fails. Exceptions that speak of the machine are raised
    (:func:`~crystaljax.dft_bridge.engines.base.about_the_machine`).
    """
    start = time.perf_counter()
    if len(crystals) == 1 or not isinstance(engine, BatchEngine):
        results = [_calculate(engine, crystal, property_name) for crystal in crystals]
    else:
        results = _calculate_batch(engine, crystals, property_name)
    return Done(results, time.perf_counter() - start)


def _calculate(engine: Engine, crystal: Crystal, property_name: str) -> Result:
    start = _cpu_seconds()
    try:
        result = engine.compute(crystal, property_name)
    except Exception as error:  # an engine may raise anything; one crystal must not end a run
        if about_the_machine(error):
            raise
        result = Result.failure(Status.ENGINE_ERROR, f"{type(error).__name__}: {error}")
    return _checked(result, _cpu_seconds() - start)


def _calculate_batch(engine: BatchEngine, crystals: Sequence[Crystal], property_name: str) -> list[Result]:
    start = _cpu_seconds()
    try:
        results = engine.compute_many(crystals, property_name)
    except Exception as error:
        if about_the_machine(error):
            raise
        logger.warning("a batch of %d failed (%s: %s); one by one", len(crystals), type(error).__name__, error)
        return [_calculate(engine, crystal, property_name) for crystal in crystals]
    if len(results) != len(crystals):
        message = f"the engine returned {len(results)} results for {len(crystals)} crystals"
        results = [Result.failure(Status.ENGINE_ERROR, message)] * len(crystals)
    share = (_cpu_seconds() - start) / len(crystals)
    return [_checked(result, share) for result in results]


def _checked(result: Any, seconds: float) -> Result:
    """A result fit for the store; ``seconds`` is what it took if it does not say so itself."""
    if not isinstance(result, Result):
        result = Result.failure(Status.INVALID_RESULT, f"the engine returned {result!r:.200}, no result")
    if result.status == Status.OK and not np.isfinite(result.value):
        result = Result.failure(Status.INVALID_RESULT, f"the engine returned {result.value}", **result.details)
    details = json.loads(json.dumps(result.details, default=_plain))
    try:
        check_plain(details, "details")
    except ValueError as error:  # of an engine of the user's; the value is good
        details = {"left_out": str(error)}
    return dataclasses.replace(result, seconds=result.seconds or seconds, details=details)


def _plain(value: Any) -> Any:
    """What JSON cannot hold, as something it can: NumPy's numbers and arrays as Python's, the rest as text."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else str(value)


def _cpu_seconds() -> float:
    """CPU seconds of this process and of the children it waited for."""
    return sum(os.times()[:4])


def start_worker(parent: int, scratch: str, start: Callable[[], None] | None) -> None:
    """Runs first in every worker: a process group, and a folder ``scratch`` for its files, which end with the parent.

    A Ctrl-C in the terminal reaches the main process only, which decides what becomes of the calculations. A process
    that is killed outright cannot tell its workers, so they look; PR_SET_PDEATHSIG would not do, for it follows the
    *thread* that started the worker. Programs that the engine starts belong to the group and end with it.
    """
    if hasattr(os, "setsid"):
        os.setsid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_SECONDS)
        for program in psutil.Process().children(recursive=True):
            program.kill()
        remove_scratch(scratch)
        os.killpg(0, signal.SIGKILL)

    if hasattr(os, "killpg"):
        threading.Thread(target=watch, name="parent-watch", daemon=True).start()
    with contextlib.suppress(OSError):  # a full disk; the engine will say so
        files = os.path.join(scratch, FILES)
        os.makedirs(files, 0o700)
        os.environ["TMPDIR"] = tempfile.tempdir = files
    if start is not None:
        start()


def arrive(call: Any) -> None:
    """Nothing, in a worker that is ready: it has started, and has imported what a call needs."""


def remove_scratch(folder: str) -> None:
    """Delete a worker's scratch folder; its files are moved first, so that nothing more is written there."""
    with contextlib.suppress(OSError):  # the worker did not come so far, or somebody else has done it
        os.rename(os.path.join(folder, FILES), os.path.join(folder, "gone"))
    shutil.rmtree(folder, ignore_errors=True)
