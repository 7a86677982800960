"""Ctrl-C that is heard wherever it arrives.

Python turns SIGINT into a ``KeyboardInterrupt`` at whatever its main thread does next. If that is a callback of the
garbage collector (JAX has one), of a weak reference or of a C library, nothing can be done with an exception there:
Python prints "Exception ignored in ..." and goes on, and the program as if nobody had asked it to stop.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

AGAIN_SECONDS = 0.05
"""After which an interrupt that was ignored is raised again, somewhere else."""


@contextlib.contextmanager
def no_interrupt_is_lost() -> Iterator[None]:
    """A ``KeyboardInterrupt`` that Python would ignore is raised again until it arrives. May be nested."""
    before = sys.unraisablehook

    def hook(ignored: Any) -> None:
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            # Not from here: it would be raised in this hook, and be ignored again.
            timer = threading.Timer(AGAIN_SECONDS, signal.raise_signal, (signal.SIGINT,))
            timer.daemon = True
            timer.start()
        else:
            before(ignored)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        if sys.unraisablehook is hook:
            sys.unraisablehook = before
