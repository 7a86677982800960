"""Murnaghan's equation of state: the fit behind a bulk modulus, the same for every engine. Units eV and Å."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from ase.units import GPa
from scipy.optimize import minimize_scalar

B_PRIME_RANGE = (1.5, 12.0)
"""Pressure derivatives of bulk moduli that crystals have."""


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
        """JSON-able facts, moduli in GPa, ``None`` where a fit without a minimum has no number."""
        at_cell = self.modulus(volume) / GPa if self.v0 > 0 else math.nan
        facts = {
            "b0": self.b0 / GPa,
            "b_prime": self.b_prime,
            "v0": self.v0,
            "v0_over_v": self.v0 / volume,
            "fit_residual": self.residual,
            "modulus_at_cell": at_cell,
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
