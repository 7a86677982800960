"""What a DFT engine is: a crystal goes in, a result with a status comes out.

Everything here is NumPy and plain data, so that it travels to worker processes that never import JAX.
"""

from __future__ import annotations

import dataclasses
import math
import re
import signal
from collections.abc import Sequence
from subprocess import CalledProcessError
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from crystaljax.caveats import Caveat
from crystaljax.errors import CrystalJAXError
from crystaljax.status import Status

DEEPEST = 30
"""Tables and lists within each other, in the details of a result and in a fingerprint."""
NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""Characters that no store can hold: PostgreSQL has no NUL, UTF-8 no surrogates."""


class EngineNotReady(CrystalJAXError, RuntimeError):
    """An engine cannot run here; the message says what is missing and the command that installs it."""


_OF_MACHINES = (EngineNotReady, MemoryError, OSError, ImportError, SyntaxError, SystemError, EOFError)
_OF_OTHERS = ("JaxRuntimeError", "XlaRuntimeError", "zlib.error", "UnpicklingError")
"""Names of classes of modules that are loaded only where they are needed: XLA's for a program that cannot be loaded or
run, for a lost device and for its memory; and those for files of compiled programs and of data that are damaged."""
_IN_WORDS = ("RESOURCE_EXHAUSTED", "can't start new thread", "partially initialized module")
"""What errors of a general class say."""
_SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGBUS", "SIGILL", "SIGXCPU", "SIGXFSZ")
MACHINE_RETURNS = (126, 127, *(-getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)))
"""Return codes of programs that say nothing about a crystal: there is no such program or it cannot be run, or a signal
that comes from outside or speaks of the machine (no memory or disk left, a program for another processor)."""


def about_the_machine(error: BaseException) -> bool:
    """Whether an exception, or one that led to it, speaks of the machine or of what is installed, not of a crystal.

    Such a calculation has no result: it may well have one at another time, so nothing of it may be stored. In doubt
    the machine is to blame; then a crystal is calculated again, while a wrong failure would stay for ever.
    """
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        names = {name for kind in type(link).__mro__ for name in (kind.__name__, f"{kind.__module__}.{kind.__name__}")}
        if (
            isinstance(link, _OF_MACHINES)
            or not names.isdisjoint(_OF_OTHERS)
            or any(text in str(link) for text in _IN_WORDS)
            or (isinstance(link, CalledProcessError) and link.returncode in MACHINE_RETURNS)
        ):
            return True
        seen.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return False


def tells_of_the_machine(result: Result) -> bool:
    """Whether a stored failure is one that earlier versions kept though it speaks of the machine."""
    names = ("JaxRuntimeError", "XlaRuntimeError", "ImportError", "ModuleNotFoundError", "MemoryError", "OSError")
    return result.status == Status.ENGINE_ERROR and result.message.startswith(tuple(f"{name}: " for name in names))


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
        caveats: what a reader must know of the value; ``None`` if nobody has looked, so that whoever shows it derives
            them (:func:`crystaljax.dft_bridge.engines.caveats.with_caveats`).
    """

    value: float
    status: Status
    seconds: float = 0.0
    message: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    log: str = ""
    caveats: tuple[Caveat, ...] | None = None

    @staticmethod
    def failure(status: Status, message: str, seconds: float = 0.0, log: str = "", **details: Any) -> Result:
        """A result without a value."""
        return Result(float("nan"), status, seconds, message, details, log)


class Values(NamedTuple):
    """What became of the calculations of one crystal: float [P], 0 where there is none, and the first failure."""

    values: list[float]
    status: Status


def outcome_of(results: Sequence[Result]) -> Values:
    """The results of the properties of one crystal as one; zero, not NaN, which would trip ``jax_debug_nans``."""
    status = next((result.status for result in results if result.status != Status.OK), Status.OK)
    return Values([result.value if status == Status.OK else 0.0 for result in results], status)


@runtime_checkable
class Engine(Protocol):
    """One way to compute a property. Instances are small, picklable and hold settings only."""

    name: str

    def fingerprint(self, property_name: str) -> dict[str, Any]:
        """JSON-able facts that can change the number: engine, version, data sets, every setting used for it."""
        ...

    def preflight(self) -> None:
        """Raise :class:`EngineNotReady` with the fix if the engine cannot run on this machine."""
        ...

    def refuse(self, crystal: Crystal, property_name: str) -> Result | None:
        """A failure that needs no calculation (odd electrons, atoms too close, no data set), or ``None``."""
        ...

    def compute(self, crystal: Crystal, property_name: str) -> Result:
        """Run the calculation in this process. Failures of the physics are results, not exceptions."""
        ...


@runtime_checkable
class CrystalFingerprint(Protocol):
    """An engine some of whose settings count for some crystals only. Without it all have one fingerprint."""

    def fingerprint_of(self, lattice: np.ndarray, frac_coords: np.ndarray, property_name: str) -> dict[str, Any]:
        """As :meth:`Engine.fingerprint`, for crystals with this lattice [3, 3] in Å and sites [N, 3].

        It must be the same whatever cell, origin and order of the sites describe them.
        """
        ...


@runtime_checkable
class RenewedEngine(Engine, Protocol):
    """An engine whose settings change the numbers of some crystals only, against those of an engine before it.

    Results of that one which it would find too are not calculated again, though their keys are others.
    """

    def before(self, property_name: str) -> Engine | None:
        """The engine whose results may be taken over; ``None`` for no other."""
        ...

    def would_find(self, result: Result, property_name: str) -> bool:
        """Whether a result of the engine before is what this one would find."""
        ...


@runtime_checkable
class BatchEngine(Engine, Protocol):
    """An engine that calculates crystals together. Without these methods every crystal is a job of its own."""

    def compute_many(self, crystals: Sequence[Crystal], property_name: str) -> list[Result]:
        """As :meth:`Engine.compute` for several crystals, in their order; one that fails leaves the others alone."""
        ...

    def group(self, crystals: Sequence[Crystal], property_name: str) -> list[list[int]]:
        """Positions of the crystals that go together in one job, each once; the jobs run in this order.

        Small jobs are recorded early and keep all workers busy to the end, so the largest should come first.
        """
        ...

    def workers(self) -> int | None:
        """How many worker processes suit this machine; ``None`` for one per CPU core."""
        ...

    def worker_environment(self, index: int) -> dict[str, str]:
        """Environment variables of the worker process with this index, besides those of the main process."""
        ...

    def start_worker(self) -> None:
        """Called once in every worker process, before its first calculation."""
        ...


def check_plain(value: Any, what: str, finite: bool = False, depth: int = 0) -> None:
    """Raise ``ValueError`` unless a value is data that every part of a store can hold and give back as it is.

    ASE keeps arrays and objects as tables with names such as ``__ndarray__``, and makes them when it reads a row; in
    data of somebody else such a name would be made into whatever it says.
    """
    if depth > DEEPEST:
        raise ValueError(f"its {what} are nested more than {DEEPEST} deep")
    if isinstance(value, dict):
        for name, entry in value.items():
            if not isinstance(name, str) or name.startswith("__"):
                raise ValueError(f"its {what} have the name {name!r:.40}, which only ASE may use")
            check_plain(name, what)
            check_plain(entry, what, finite, depth + 1)
    elif isinstance(value, list):
        for entry in value:
            check_plain(entry, what, finite, depth + 1)
    elif isinstance(value, str):
        if NO_TEXT.search(value):
            raise ValueError(f"its {what} hold a text with characters that are none: {value!r:.40}")
    elif isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            raise ValueError(f"its {what} hold an array of {value.dtype}")
    elif type(value) is int:
        if abs(value) >= 2**63:
            raise ValueError(f"its {what} hold a whole number of more than 64 bits")
    elif not (value is None or type(value) in (bool, float)):
        raise ValueError(f"its {what} hold {type(value).__name__}, which is no plain data")
    elif finite and type(value) is float and not math.isfinite(value):
        raise ValueError(f"its {what} hold {value}, which is no finite number")
