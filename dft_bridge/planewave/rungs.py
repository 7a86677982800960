"""The recovery ladder of the plane-wave code, as data; :mod:`crystaljax.dft_bridge.planewave.recovery` climbs it."""

from __future__ import annotations

import dataclasses

from crystaljax.dft_bridge.ladder import AS_SET, Rung


@dataclasses.dataclass(frozen=True)
class ScfRung(Rung):
    """One attempt at an SCF: what is changed against its settings; ``width`` in Ha.

    Attributes:
        mixing: share of the residual that is mixed in, from the first step to the last.
        sweeps: Davidson calls at each k-point in an SCF step.
        double: wave functions in double precision.
    """

    mixing: float = 0.4
    sweeps: int = 1
    double: bool = False


FOOT = ScfRung(AS_SET)
"""The first attempt, which changes nothing."""
RUNGS: tuple[ScfRung, ...] = (
    ScfRung("smaller mixing", mixing=0.05),
    ScfRung("more diagonalisation", mixing=0.05, sweeps=3),
    ScfRung("more steps", steps=3, mixing=0.05, sweeps=2),
    ScfRung("double precision", steps=3, mixing=0.05, sweeps=2, double=True),
    ScfRung("smearing", mixing=0.1, sweeps=2, width=0.005),
)
"""The ladder: what is tried, one after the other, when an SCF does not converge with the engine's settings.

The first three share one more program, the others have programs of their own.
"""
