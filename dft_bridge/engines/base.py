"""What a DFT engine is: a crystal goes in, a result with a status comes out.

Everything here is NumPy and plain data, so that it travels to worker processes that never import JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from crystaljax.errors import CrystalJAXError
from crystaljax.status import Status

PROPERTIES = ("band_gap", "bulk_modulus", "density")
"""Names of the properties an engine may be asked for; units eV, GPa, g/cm3."""


class EngineNotReady(CrystalJAXError, RuntimeError):
    """An engine cannot run here; the message says what is missing and the command that installs it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Crystal:
    """A finished crystal.

    Attributes:
        lattice: float64 [3, 3], rows a, b, c, in Å.
        frac_coords: float64 [N, 3].
        numbers: int64 [N], atomic numbers.
    """

    lattice: np.ndarray
    frac_coords: np.ndarray
    numbers: np.ndarray


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one calculation.

    Attributes:
        value: eV, GPa or g/cm3; NaN unless ``status`` is OK.
        status: outcome code.
        seconds: CPU seconds of the worker (user and system).
        message: one line for people: the reason of a failure, empty when all went well.
        details: JSON-able facts worth keeping (iterations, fit residual, relaxed lattice ...).
        log: of a failure, the end of what the engine printed, if it prints; the store keeps the last 4,000 characters.
    """

    value: float
    status: Status
    seconds: float = 0.0
    message: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    log: str = ""

    @staticmethod
    def failure(status: Status, message: str, seconds: float = 0.0, log: str = "", **details: Any) -> Result:
        """A result without a value."""
        return Result(float("nan"), status, seconds, message, details, log)


@runtime_checkable
class Engine(Protocol):
    """One way to compute a property. Instances are small, picklable and hold settings only."""

    name: str

    def fingerprint(self, property_name: str) -> dict[str, Any]:
        """JSON-able facts that can change the number: engine, version, data sets, every setting used for it."""

    def preflight(self) -> None:
        """Raise :class:`EngineNotReady` with the fix if the engine cannot run on this machine."""

    def refuse(self, crystal: Crystal, property_name: str) -> Result | None:
        """A failure that needs no calculation (odd electrons, atoms too close, no data set), or ``None``."""

    def compute(self, crystal: Crystal, property_name: str) -> Result:
        """Run the calculation in this process. Failures of the physics are results, not exceptions."""


@runtime_checkable
class BatchEngine(Engine, Protocol):
    """An engine that calculates crystals together. Without these methods every crystal is a job of its own."""

    def compute_many(self, crystals: Sequence[Crystal], property_name: str) -> list[Result]:
        """As :meth:`Engine.compute` for several crystals, in their order; one that fails leaves the others alone."""

    def group(self, crystals: Sequence[Crystal], property_name: str) -> list[list[int]]:
        """Positions of the crystals that go together in one job, each once; the jobs run in this order.

        Small jobs are recorded early and keep all workers busy to the end, so the largest should come first.
        """

    def workers(self) -> int | None:
        """How many worker processes suit this machine; ``None`` for one per CPU core."""

    def worker_environment(self, index: int) -> dict[str, str]:
        """Environment variables of the worker process with this index, besides those of the main process."""

    def start_worker(self) -> None:
        """Called once in every worker process, before its first calculation."""
