"""Hears Ctrl-C while the main thread is deep inside a compiled program.

Python acts on a signal when its main thread next runs Python code. While the main thread waits for a program on an
accelerator, and that program for calculations in another thread, it does not: Ctrl-C would do nothing for hours. The
signal's number is, however, written at once to the process's wake-up descriptor, which a thread of ours reads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import threading
from collections.abc import Callable


class InterruptWatch:
    """Calls ``on_interrupt``, in a thread of its own, as soon as SIGINT arrives. Python's own handling goes on.

    Attributes:
        pending: whether SIGINT has come, and the main thread has had no chance yet to act on it.

    A process has one wake-up descriptor. Whoever had it before (an event loop, another watch) is passed every byte.
    """

    def __init__(self, on_interrupt: Callable[[], None]):
        """Does nothing outside the main thread, where signals cannot be set up."""
        self._on_interrupt = on_interrupt
        self.pending = False
        # Run by the main thread when it next runs Python code, as its handling of signals is.
        self._noticed = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(self._main_thread_runs)
        self._before = -1
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        with contextlib.suppress(ValueError):
            self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, name="interrupt-watch", daemon=True).start()

    def close(self) -> None:
        """Give the descriptor back. If someone else has taken it since, they pass bytes on to us: stay."""
        with contextlib.suppress(ValueError, OSError):
            current = signal.set_wakeup_fd(-1)
            if current != self._writer.fileno():
                signal.set_wakeup_fd(current, warn_on_full_buffer=False)
                return
            signal.set_wakeup_fd(self._before, warn_on_full_buffer=False)
            self._writer.close()  # ends the thread

    def _watch(self) -> None:
        while received := self._reader.recv(64):
            if self._before != -1:
                with contextlib.suppress(OSError):
                    os.write(self._before, received)
            if signal.SIGINT in received:
                self.pending = True
                if ctypes.pythonapi.Py_AddPendingCall(self._noticed, None):
                    self.pending = False  # the queue is full: the main thread would not tell us
                self._on_interrupt()
        self._reader.close()

    def _main_thread_runs(self, _: object) -> int:
        self.pending = False
        return 0
