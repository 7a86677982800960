"""Exchange and correlation energy per electron: LDA (Perdew-Wang 1992) and PBE (1996), without spin. Hartree units.

Potentials come from automatic differentiation of the energy, so only energies are written down.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

FUNCTIONALS = ("PBE", "LDA")
DENSITY_FLOOR = 1e-11
"""Densities (bohr^-3) are raised to this before they are put into the formulas."""

_KAPPA, _MU, _BETA = 0.804, 0.2195149727645171, 0.06672455060314922
_GAMMA = (1 - math.log(2)) / math.pi**2
_TINY_GRADIENT = 1e-30


def correlation_pw92(density: jax.Array) -> jax.Array:
    """Correlation energy per electron (Ha) of the uniform gas; Perdew and Wang, Phys. Rev. B 45, 13244 (1992).

    Their Table I prints A = 0.031091, which pw.x uses too. The authors' later codes have 0.0310907, which raises total
    energies by some 0.05 meV per atom.
    """
    a, a1, b1, b2, b3, b4 = 0.031091, 0.21370, 7.5957, 3.5876, 1.6382, 0.49294
    rs = math.cbrt(3 / (4 * math.pi)) / jnp.cbrt(density)  # the same root everywhere, so that it is taken once
    s = jnp.sqrt(rs)
    return -2 * a * (1 + a1 * rs) * jnp.log1p(1 / (2 * a * (b1 * s + b2 * rs + b3 * rs * s + b4 * rs * rs)))


def exchange_uniform(density: jax.Array) -> jax.Array:
    """Exchange energy per electron (Ha) of the uniform gas."""
    return -0.75 * math.cbrt(3 / math.pi) * jnp.cbrt(density)


def energy_lda(density: jax.Array) -> jax.Array:
    """LDA energy per electron (Ha) at a density (bohr^-3)."""
    density = jnp.maximum(density, DENSITY_FLOOR)
    return exchange_uniform(density) + correlation_pw92(density)


def energy_pbe(density: jax.Array, gradient_squared: jax.Array) -> jax.Array:
    """PBE energy per electron (Ha); Perdew, Burke and Ernzerhof, Phys. Rev. Lett. 77, 3865 (1996).

    Args:
        density: bohr^-3.
        gradient_squared: |grad n|^2, bohr^-8.
    """
    density = jnp.maximum(density, DENSITY_FLOOR)
    g2 = gradient_squared + _TINY_GRADIENT
    kf = math.cbrt(3 * math.pi**2) * jnp.cbrt(density)
    s2 = g2 / (4 * kf**2 * density**2)
    enhancement = 1 + _KAPPA - _KAPPA / (1 + _MU * s2 / _KAPPA)
    correlation = correlation_pw92(density)
    t2 = g2 * math.pi / (16 * kf * density**2)
    x = _BETA / _GAMMA / jnp.expm1(-correlation / _GAMMA) * t2
    h = _GAMMA * jnp.log1p(_BETA / _GAMMA * t2 * (1 + x) / (1 + x + x * x))
    return exchange_uniform(density) * enhancement + correlation + h
