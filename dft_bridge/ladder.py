"""The recovery ladder: what is tried, one after the other, when an SCF does not converge.

A rung is data: what one attempt changes against the settings of its engine. A rung changes how a number is reached and
never what it means. Which rungs an engine has, and what they change, is its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from crystaljax.errors import CrystalJAXError
from crystaljax.status import Status

_WHOLE = 1e-3  # occupations this close to 0 or 1 are those of an insulator


@dataclasses.dataclass(frozen=True)
class Rung:
    """One attempt at an SCF; engines add what it changes.

    Attributes:
        name: for people, for settings and for the record.
        steps: factor of the engine's largest number of SCF steps.
        width: Gaussian smearing in place of fixed occupations, in the engine's unit; 0 leaves the occupations as they
            are. Its result stands for that of fixed occupations only if :func:`same_as_fixed`.
    """

    name: str
    steps: int = 1
    width: float = 0.0


AS_SET = "as set"
"""Name of the first attempt, with the engine's settings as they are."""

PARTLY_FILLED = "only smearing converges, and it fills the bands in part: not what fixed occupations would give"
"""Why a smeared SCF does not stand for one with fixed occupations, see :func:`same_as_fixed`."""

R = TypeVar("R", bound=Rung)
T = TypeVar("T")


def names_of(rungs: Sequence[Rung]) -> tuple[str, ...]:
    """Their names, in order: what the setting ``ladder`` of an engine holds."""
    return tuple(rung.name for rung in rungs)


def check_ladder(ladder: Sequence[str], rungs: Sequence[Rung]) -> None:
    """Raise ``ValueError`` for a name that is none of these rungs'."""
    unknown = sorted(set(ladder) - set(names_of(rungs)))
    if unknown:
        raise ValueError(f"no rung {', '.join(unknown)}; choose from {', '.join(names_of(rungs))}")


def chosen(ladder: Sequence[str], rungs: Sequence[R], fixed: bool) -> list[R]:
    """The rungs that are named, in their order; smearing only where occupations are ``fixed``."""
    return [rung for rung in rungs if rung.name in ladder and (fixed or not rung.width)]


def described(rungs: Sequence[Rung]) -> dict[str, Any]:
    """For a fingerprint: the whole ladder but its foot. No ladder leaves no trace."""
    return {"ladder": [dataclasses.asdict(rung) for rung in rungs]} if rungs else {}


class ScfFailure(CrystalJAXError):
    """A calculation without a result: the outcome, and a line for people."""

    def __init__(self, status: Status, message: str):
        super().__init__(message)
        self.status = status


class Climb(Generic[R]):
    """The way of one crystal up the ladder: an SCF that fails is repeated on the next rung, later ones start there.

    Attributes:
        rung: on which SCFs are tried now.
        failed_attempts: for the record, one entry for each rung that an SCF failed on.
    """

    def __init__(self, rungs: Sequence[R]):
        """``rungs``: what is tried, in order; first that which changes nothing."""
        self.rung, *self._higher = rungs
        self.failed_attempts: list[dict[str, str]] = []

    def fail(self, status: Status, message: str) -> bool:
        """Record that an attempt failed; whether there is another, which only an SCF that did not converge gets."""
        self.failed_attempts.append({"rung": self.rung.name, "status": status.name, "message": message})
        if status != Status.NOT_CONVERGED or not self._higher:
            return False
        self.rung, *self._higher = self._higher
        return True

    def run(self, attempt: Callable[[R], T]) -> T:
        """The result of the first attempt that has one; raises the last :class:`ScfFailure`."""
        while True:
            try:
                return attempt(self.rung)
            except ScfFailure as failed:
                if not self.fail(failed.status, str(failed)):
                    raise

    @property
    def facts(self) -> dict[str, Any]:
        """For the ``details`` of a result: the attempts that failed, if there are any."""
        return {"failed_attempts": self.failed_attempts} if self.failed_attempts else {}


def same_as_fixed(eigenvalues: np.ndarray, occupations: np.ndarray, occupied: int, property_name: str) -> bool:
    """Whether a smeared SCF says what one with fixed occupations would.

    It does where all occupations come out as 0 or 1, and where bands overlap the gap is 0 with either.

    Args:
        eigenvalues, occupations: [K, bands]; occupations from 0 to 1.
        occupied: bands that fixed occupations fill.
    """
    distance = np.minimum(np.abs(occupations), np.abs(1 - occupations)).max()
    overlap = eigenvalues[:, occupied].min() <= eigenvalues[:, occupied - 1].max()
    return bool(distance < _WHOLE or (property_name == "band_gap" and overlap))
