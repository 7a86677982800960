"""Ctrl-C is heard wherever it arrives."""

from __future__ import annotations

import gc
import signal
import sys
import time

import pytest

from crystaljax.signals import no_interrupt_is_lost


class Ignored:
    """Its end is a place where Python can only ignore an exception."""

    def __init__(self, error):
        self.error = error

    def __del__(self):
        raise self.error


@pytest.mark.parametrize("where", ["finalizer", "garbage collector"])
def test_an_interrupt_where_python_ignores_exceptions_arrives_all_the_same(where):
    armed = [True]

    def callback(phase, info):
        if armed:
            armed.clear()
            signal.raise_signal(signal.SIGINT)

    before = sys.unraisablehook
    try:
        with pytest.raises(KeyboardInterrupt), no_interrupt_is_lost():
            if where == "finalizer":
                Ignored(KeyboardInterrupt())
            else:
                gc.callbacks.append(callback)  # as JAX's is
                gc.collect()
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                time.sleep(0.01)
    finally:
        if callback in gc.callbacks:
            gc.callbacks.remove(callback)
    assert sys.unraisablehook is before


def test_other_ignored_exceptions_are_left_to_who_was_told_before(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda ignored: told.append(ignored.exc_type))
    with no_interrupt_is_lost():
        Ignored(ValueError())
    assert told == [ValueError]
