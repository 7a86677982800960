"""Compiled calls that a Ctrl-C can end.

Python handles signals in the bytecode of the main thread only, so while that thread sits in a compiled program nothing
happens. Here the program runs in another thread, and the main thread waits in Python.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

POLL_SECONDS = 0.2
REPEAT_SECONDS = 1.0
"""A signal so soon after the first is the same one, passed on by a wrapper."""


@dataclasses.dataclass
class Stop:
    """Whether somebody asked to stop. A plain flag: a signal handler must not take a lock."""

    requested: bool = False


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """A flag that SIGINT (Ctrl-C) and SIGTERM (batch systems) set; a later signal raises ``KeyboardInterrupt``."""
    stop = Stop()
    first = 0.0

    def handler(number: int, frame: Any) -> None:
        nonlocal first
        if not stop.requested:
            stop.requested, first = True, time.monotonic()
        elif time.monotonic() - first > REPEAT_SECONDS:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals are the business of the main thread
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def call(
    function: Callable[..., Any], *arguments: Any, stop: Stop, cancel: Callable[[], None], waiting: Callable[[], None]
) -> Any:
    """``function(*arguments)`` with its arrays ready, run in another thread.

    Args:
        stop: once it is requested, ``cancel`` is called, once; the function is then expected to return soon.
        cancel: tells what the function waits for to give up.
        waiting: called several times a second until the function returns.

    Raises:
        What the function raises.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = jax.block_until_ready(function(*arguments))
        except BaseException as error:  # re-raised in the calling thread
            outcome["error"] = error

    thread = threading.Thread(target=run, name="update", daemon=True)
    thread.start()
    cancelled = False
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        if stop.requested and not cancelled:
            cancelled = True
            cancel()
        waiting()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]
