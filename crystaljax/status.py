"""Outcome codes of a property calculation.

A failed calculation is an outcome of the task, never an exception in the training loop: every evaluator returns
values and a status, and the reward of a failure is part of the task (see :mod:`crystaljax.objectives`).
"""

from __future__ import annotations

import enum


class Status(enum.IntEnum):
    """Why a calculation has a value, or has none. Stored by number: never renumber."""

    OK = 0
    """The value is valid."""
    NOT_CONVERGED = 1
    """The self-consistent field or the relaxation did not converge within its steps."""
    ODD_ELECTRONS = 2
    """An odd number of valence electrons: no fixed occupations exist without spin polarisation."""
    ATOMS_TOO_CLOSE = 3
    """Two atoms are closer than the engine can treat."""
    INVALID_RESULT = 4
    """The engine finished, but its number is NaN, infinite or outside physical bounds."""
    FIT_MEANINGLESS = 5
    """The equation of state has no minimum near the sampled volumes, so its bulk modulus means nothing."""
    TIMEOUT = 6
    """The calculation exceeded its time limit."""
    WORKER_DIED = 7
    """The worker process died (signal, memory) more often than it is retried."""
    ENGINE_ERROR = 8
    """The engine raised; the record holds its message."""
    UNSUPPORTED_ELEMENT = 9
    """The engine has no pseudopotential or data set for one of the elements."""
    CANCELLED = 10
    """The run was stopped before the calculation finished. Never stored."""
    OUT_OF_MEMORY = 11
    """The calculation exceeded its memory limit."""
    PENDING = 12
    """Asked for, not calculated yet: the reward comes later (see :mod:`crystaljax.delayed`). Never stored."""
