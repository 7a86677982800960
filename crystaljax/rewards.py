"""The reward of every task, in one place.

Rewards follow CrystalGym (arXiv 2509.23156): a Gaussian around the target for the band gap and the density, a
relative distance for the bulk modulus. ``p`` is the target, ``v`` the calculated value:

=============  ======================================  ==========
property       reward                                  on failure
=============  ======================================  ==========
band gap       ``exp(-(p - v)^2)``, v >= 0, eV         -1
density        ``exp(-(p - v)^2 / 3)``, g/cm3          -1
bulk modulus   ``-|p - v| / p``, at least -5, GPa      -5
=============  ======================================  ==========
"""

from __future__ import annotations

import builtins
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from crystaljax.status import Status

MAX_TARGET_RATIO = 10.0
"""Largest target, in units of the task's default target, unless an objective says otherwise."""
DENSITY_WIDTH = 3.0
"""The beta of the density reward, (g/cm3)^2."""
BULK_MODULUS_FLOOR = -5.0
"""The lowest reward of the bulk-modulus task, also its reward on failure."""


def band_gap_reward(value: jax.Array, target: jax.Array) -> jax.Array:
    """``exp(-(target - gap)^2)`` with the gap in eV, negative gaps (metals) counted as zero."""
    return jnp.exp(-jnp.square(target - jnp.maximum(value, 0.0)))


def density_reward(value: jax.Array, target: jax.Array) -> jax.Array:
    """``exp(-(target - density)^2 / 3)`` with densities in g/cm3."""
    return jnp.exp(-jnp.square(target - value) / DENSITY_WIDTH)


def bulk_modulus_reward(value: jax.Array, target: jax.Array) -> jax.Array:
    """``-|target - modulus| / target`` clipped at -5, moduli in GPa."""
    return jnp.maximum(-jnp.abs(target - value) / target, BULK_MODULUS_FLOOR)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a task asks for: a property, a target and the reward of a value.

    Attributes:
        property: ``band_gap``, ``bulk_modulus`` or ``density``.
        unit: unit of value and target.
        target: default target.
        far_target: the out-of-distribution target of the benchmark.
        formula: the reward as a function of (value, target), float32 scalars.
        failure_reward: reward of a crystal without a valid value.
        best_reward: the supremum of the reward.
        targets: lowest and highest target that makes sense. By default up to ten times the default target, on its side
            of zero and zero left out; -10 to 10 around a default target of 0.
    """

    property: str
    unit: str
    target: float
    far_target: float
    formula: Callable[[jax.Array, jax.Array], jax.Array]
    failure_reward: float
    best_reward: float
    targets: tuple[float, float] | None = None

    @builtins.property  # "property" is a field here
    def scale(self) -> float:
        """Size of a usual target, positive: networks and flat observations see targets in units of it."""
        return abs(self.target) or 1.0

    @builtins.property  # "property" is a field here
    def target_range(self) -> tuple[float, float]:
        """Lowest and highest target."""
        if self.targets is not None:
            return self.targets
        far = MAX_TARGET_RATIO * self.scale
        return (-far if self.target <= 0 else 0.0), (far if self.target >= 0 else 0.0)

    def refuse_target(self, target: float) -> None:
        """Raise ``ValueError`` for a target that makes no sense."""
        low, high = self.target_range
        zero_too = self.targets is not None or self.target == 0
        if low <= target <= high and (zero_too or target != 0):  # false for NaN
            return
        left, right = ("(" if low == 0 and not zero_too else "["), (")" if high == 0 and not zero_too else "]")
        raise ValueError(
            f"target {target} {self.unit} outside {left}{low:g}, {high:g}{right}; choose one inside"
            + (
                ""
                if self is OBJECTIVES.get(self.property)
                else ", or give the Objective other targets=(lowest, highest)"
            )
        )

    def reward(
        self, value: jax.Array | np.ndarray, status: jax.Array | np.ndarray, target: jax.Array | np.ndarray
    ) -> jax.Array:
        """Reward of an evaluated crystal: float32, shape of ``value``.

        A status other than ``Status.OK`` and a value that is not finite earn the reward of a failure.
        """
        valid = (status == Status.OK) & jnp.isfinite(value)
        reward = self.formula(jnp.where(valid, value, 0.0), jnp.asarray(target))
        return jnp.where(valid, reward, self.failure_reward).astype(jnp.float32)


BAND_GAP = Objective("band_gap", "eV", 1.12, 2.0, band_gap_reward, -1.0, 1.0)
BULK_MODULUS = Objective("bulk_modulus", "GPa", 300.0, 500.0, bulk_modulus_reward, -5.0, 0.0)
DENSITY = Objective("density", "g/cm3", 3.0, 5.0, density_reward, -1.0, 1.0)
OBJECTIVES = {o.property: o for o in (BAND_GAP, BULK_MODULUS, DENSITY)}


def objective(choice: str | Objective) -> Objective:
    """The objective of that property name, or the one given; raises ``ValueError`` for an unknown name."""
    if isinstance(choice, Objective):
        return choice
    if choice not in OBJECTIVES:
        raise ValueError(f"unknown property {choice!r}: use one of {sorted(OBJECTIVES)} or an Objective")
    return OBJECTIVES[choice]
