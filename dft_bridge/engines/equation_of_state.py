"""Murnaghan's equation of state: which volumes to calculate, and the fit behind a bulk modulus, for every engine.

Units eV and Å.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from ase.units import GPa
from scipy.optimize import minimize_scalar

B_PRIME_RANGE = (1.5, 12.0)
"""Pressure derivatives of bulk moduli that crystals have."""
MOST_FURTHER = 3
"""Volumes that may be calculated besides those planned, to bracket a minimum that lies beyond them."""
_STEP = 0.02
"""Of a volume: how far beyond an estimated minimum, or beside it, the next volume is."""
_NEAR = 0.025
"""Of a volume: a curvature needs three volumes so near to the minimum."""


@dataclasses.dataclass(frozen=True)
class MurnaghanFit:
    """A least-squares fit of Murnaghan's equation of state.

    Attributes:
        e0: eV, energy at the minimum.
        v0: Å^3, volume at the minimum.
        b0: eV/Å^3, bulk modulus at the minimum.
        b_prime: its pressure derivative.
        residual: eV, root mean square of the fit's errors.
    """

    e0: float
    v0: float
    b0: float
    b_prime: float
    residual: float

    def modulus(self, volume: float) -> float:
        """Bulk modulus -V dP/dV at a volume, eV/Å^3."""
        return self.b0 * (self.v0 / volume) ** self.b_prime

    def pressure(self, volume: float) -> float:
        """-dE/dV at a volume, eV/Å^3; positive where the crystal wants to expand."""
        return self.b0 / self.b_prime * ((self.v0 / volume) ** self.b_prime - 1)

    def bracketed(self, volumes: Sequence[float] | np.ndarray) -> bool:
        """Whether the minimum lies among these volumes, so that it is not extrapolated."""
        return bool(min(volumes) <= self.v0 <= max(volumes))

    def problem(self, volume: float, allowed: tuple[float, float]) -> str:
        """Why the fit means nothing, or an empty string; ``allowed`` bounds V0 / ``volume``."""
        if not (math.isfinite(self.b0) and math.isfinite(self.v0)) or self.b0 <= 0:
            return "the energies have no minimum"
        if not allowed[0] <= self.v0 / volume <= allowed[1]:
            return f"V0 is {self.v0 / volume:.3f} of the given volume, outside {allowed[0]}-{allowed[1]}"
        if min(abs(self.b_prime - bound) for bound in B_PRIME_RANGE) < 1e-3:
            return f"B0' leaves the range {B_PRIME_RANGE[0]}-{B_PRIME_RANGE[1]}"
        return ""

    def details(self, volume: float) -> dict[str, float | None]:
        """JSON-able facts, moduli and pressure in GPa, ``None`` where a fit without a minimum has no number."""
        at_cell, pressure = (
            (self.modulus(volume) / GPa, self.pressure(volume) / GPa) if self.v0 > 0 else (math.nan, math.nan)
        )
        facts = {
            "b0": self.b0 / GPa,
            "b_prime": self.b_prime,
            "v0": self.v0,
            "v0_over_v": self.v0 / volume,
            "fit_residual": self.residual,
            "modulus_at_cell": at_cell,
            "pressure_at_cell": pressure,
        }
        return {name: value if math.isfinite(value) else None for name, value in facts.items()}


def fit_murnaghan(volumes: np.ndarray, energies: np.ndarray) -> MurnaghanFit:
    """Fit E(V) (Å^3, eV) by least squares.

    For a fixed B' Murnaghan's E is linear in (1, V, V^(1 - B')), so the fit is a bounded search over B' alone around
    an exact linear solution: it needs no starting values and cannot diverge.
    """
    volumes, energies = np.asarray(volumes, dtype=float), np.asarray(energies, dtype=float)
    reference = float(volumes.mean())
    x, shifted = volumes / reference, energies - energies.mean()

    def solve(b_prime: float) -> tuple[np.ndarray, float]:
        columns = np.stack([np.ones_like(x), x - 1, x ** (1 - b_prime) - 1], axis=1)
        coefficients = np.linalg.lstsq(columns, shifted, rcond=None)[0]
        return coefficients, float(np.square(columns @ coefficients - shifted).sum())

    best = minimize_scalar(lambda b: solve(b)[1], bounds=B_PRIME_RANGE, method="bounded", options={"xatol": 1e-6})
    b_prime = float(best.x)
    (constant, linear, power), squares = solve(b_prime)
    residual = math.sqrt(squares / len(x))
    # E = constant + linear (x - 1) + power (x^(1-B') - 1): a minimum needs both slopes to pull against each other.
    ratio = (b_prime - 1) * power / linear if linear else math.nan
    if not ratio > 0 or linear <= 0:
        return MurnaghanFit(math.nan, math.nan, math.nan, b_prime, residual)
    x0 = ratio ** (1 / b_prime)
    e0 = energies.mean() + constant + linear * (x0 - 1) + power * (x0 ** (1 - b_prime) - 1)
    return MurnaghanFit(float(e0), float(x0 * reference), float(b_prime * linear / reference), b_prime, residual)


def fit_nearest(volumes: np.ndarray, energies: np.ndarray, count: int) -> MurnaghanFit:
    """Fit the ``count`` volumes nearest to the minimum of a fit to all.

    Murnaghan's B' does not change with volume as that of a crystal does: over a fifth of the volume its modulus is up
    to 6 % off, over the nearest volumes 3 % (with Vinet's equation of state, B' = 5.5).
    """
    volumes, energies = np.asarray(volumes, dtype=float), np.asarray(energies, dtype=float)
    fit = fit_murnaghan(volumes, energies)
    if len(volumes) <= count or not math.isfinite(fit.v0):
        return fit
    nearest = np.sort(np.argsort(np.abs(volumes / fit.v0 - 1), kind="stable")[:count])
    return fit_murnaghan(volumes[nearest], energies[nearest])


def further_volume(
    scales: Sequence[float], energies: Sequence[float], planned: int, most: int, allowed: tuple[float, float]
) -> float | None:
    """The volume to calculate next, where the minimum lies beyond the planned ones; ``None`` for no more.

    First beyond the estimated minimum, so that it is bracketed, then beside it, until three volumes are near it.

    Args:
        scales, energies: what has been calculated, the planned volumes first, in units of the given cell's volume.
        planned: how many volumes are calculated in any case.
        most: how many more there may be.
        allowed: where the minimum must lie.
    """
    if len(scales) >= planned + most or fit_murnaghan(scales[:planned], energies[:planned]).bracketed(scales[:planned]):
        return None
    fit = fit_nearest(scales, energies, planned)
    if fit.problem(1.0, allowed):
        return None
    if not fit.bracketed(scales):
        return fit.v0 * (1 - _STEP if fit.v0 < min(scales) else 1 + _STEP)
    if (np.abs(np.array(scales) / fit.v0 - 1) <= _NEAR).sum() >= 3:
        return None
    beside = [fit.v0 * (1 - _STEP), fit.v0, fit.v0 * (1 + _STEP)]
    return max(beside, key=lambda scale: min(abs(known / scale - 1) for known in scales))


def sample(
    energy: Callable[[float], float], planned: Sequence[float], most: int, allowed: tuple[float, float]
) -> tuple[list[float], list[float]]:
    """Energies at the planned volumes, and at those :func:`further_volume` asks for, one by one.

    Args:
        energy: eV of the crystal at a volume in units of the given cell's.
        planned, most, allowed: see :func:`further_volume`.

    Returns:
        The volumes, in the same unit, and their energies.
    """
    scales = list(planned)
    energies = [energy(scale) for scale in scales]
    while (scale := further_volume(scales, energies, len(planned), most, allowed)) is not None:
        scales.append(scale)
        energies.append(energy(scale))
    return scales, energies
