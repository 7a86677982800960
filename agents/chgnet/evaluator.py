"""CHGNet in place of DFT: bulk moduli and densities on the device, always labelled a surrogate.

Energies of the cell at several volumes, the sites at fixed fractional coordinates, give an equation of state. There is
no host call, no relaxation of the sites, and the error of a network that was trained near equilibrium: good for
studying how agents learn, not for naming crystals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ase.units import GPa
from jax.custom_batching import sequential_vmap

from crystaljax.agents.chgnet.geometry import Neighbours, at_scale, cells_of
from crystaljax.agents.chgnet.model import ELEMENTS, CHGNet
from crystaljax.agents.chgnet.weights import pretrained
from crystaljax.elements import masses
from crystaljax.evaluators import AVOGADRO, BoundEvaluator, Outcome, Problem
from crystaljax.status import Status

LABEL = "surrogate: CHGNet 0.3.0"
PROPERTIES = ("bulk_modulus", "density")
SEARCHED = np.geomspace(0.6, 1.8, 15)
"""Volumes, in units of the given cell's, among which the lowest energy is looked for."""
FITTED = np.linspace(0.94, 1.06, 7)
"""Volumes of the equation of state, in units of the lowest one found. The network's energies have a fine structure:
within 2 %, as DFT is fitted, moduli of the benchmark's own crystals change by up to a factor of two with the middle."""


def birch_murnaghan(energies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The third-order Birch-Murnaghan equation of state closest to energies [7] in eV at the volumes ``FITTED``.

    It is a cubic polynomial in V^(-2/3) (Birch, Phys. Rev. 71, 809 (1947)), so the fit is linear.

    Returns:
        The volume of the minimum, and V d2E/dV2 in eV there (the bulk modulus times the unit of volume); NaN if the
        fit has no minimum.
    """
    t = FITTED ** (-2 / 3) - 1
    inverse = np.linalg.pinv(np.vander(t, 4, increasing=True)).astype(np.float32)
    _, slope, half_bend, third = jnp.matmul(inverse, energies - energies.mean(), precision="highest")
    lowest = -slope / (half_bend + jnp.sqrt(jnp.square(half_bend) - 3 * slope * third))
    bend = 2 * half_bend + 6 * third * lowest
    volume = jnp.where(bend > 0, (1 + lowest) ** (-3 / 2), jnp.nan)
    return volume, 4 / 9 * bend * volume ** (-7 / 3)


def equation_of_state(energy: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The volume of lowest energy and V d2E/dV2 in eV there, for energies in eV as a function of the volume [].

    Volumes are in units of the given cell's. NaN if there is no minimum inside of ``SEARCHED``.
    """
    energies = jax.vmap(energy)(jnp.asarray(SEARCHED, jnp.float32))
    lowest = jnp.argmin(energies)
    inside = (lowest > 0) & (lowest < len(SEARCHED) - 1)
    middle = jnp.where(inside, jnp.asarray(SEARCHED, jnp.float32)[lowest], jnp.nan)
    volume, bend = birch_murnaghan(jax.vmap(energy)(jnp.where(inside, middle, 1.0) * FITTED.astype(np.float32)))
    return middle * volume, bend / middle


def solve(numbers: jax.Array, cell: Neighbours) -> tuple[jax.Array, jax.Array]:
    """Density in g/cm3 and bulk modulus in GPa at the volume of lowest energy; NaN if there is none."""
    parameters = {"params": pretrained()}

    def energy(volume: jax.Array) -> jax.Array:
        return CHGNet().apply(parameters, numbers, at_scale(cell, jnp.cbrt(volume)))

    given = jnp.abs(jnp.linalg.det(cell.lattice))
    volume, bend = equation_of_state(energy)
    mass = jnp.where(cell.site_mask, jnp.asarray(masses())[numbers], 0.0).sum()
    return mass / (given * volume * AVOGADRO), bend / given / GPa


@dataclasses.dataclass(frozen=True)
class CHGNetEvaluator:
    """Evaluates ``bulk_modulus`` (GPa) and ``density`` (g/cm3), both at the volume of lowest energy.

    A crystal without such a volume between 0.6 and 1.8 times the given one fails with ``FIT_MEANINGLESS``, one with an
    element beyond plutonium with ``UNSUPPORTED_ELEMENT``. Under ``vmap`` crystals are evaluated one after the other,
    all volumes of one together, and only those that are pending.
    """

    def bind(self, problem: Problem) -> BoundEvaluator:
        problem.refuse_others(PROPERTIES, LABEL)
        cells = cells_of(problem.skeletons, float(np.cbrt(SEARCHED[0])))

        @sequential_vmap
        def query(numbers: jax.Array, skeleton: jax.Array, pending: jax.Array) -> Outcome:
            def evaluate() -> Outcome:
                density, modulus = solve(numbers, cells.row(skeleton))
                known = {"density": density, "bulk_modulus": modulus}
                values = jnp.stack([known[name] for name in problem.properties])
                status = jnp.where(jnp.isfinite(values).all(), Status.OK, Status.FIT_MEANINGLESS)
                status = jnp.where((numbers > ELEMENTS).any(), Status.UNSUPPORTED_ELEMENT, status)
                return Outcome(values, status.astype(jnp.int32))

            nothing = Outcome(jnp.zeros(len(problem.properties), jnp.float32), jnp.int32(Status.OK))
            return jax.lax.cond(pending, evaluate, lambda: nothing)

        return BoundEvaluator(query, lambda: None, LABEL)
