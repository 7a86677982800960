"""Anderson mixing of densities in the metric of their electrostatic energy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

_REGULARISATION = 1e-10


@struct.dataclass
class History:
    """The last densities and their residuals (complex [depth, G]), and how many were ever put in."""

    densities: jax.Array
    residuals: jax.Array
    count: jax.Array

    @classmethod
    def empty(cls, depth: int, size: int, dtype: jnp.dtype) -> History:
        """No density yet."""
        zeros = jnp.zeros((depth, size), dtype)
        return cls(zeros, zeros, jnp.zeros((), jnp.int32))


def anderson(
    history: History, density: jax.Array, residual: jax.Array, metric: jax.Array, step: float | jax.Array
) -> tuple[jax.Array, History]:
    """The next input density, and the history with this one.

    Among the combinations of past densities the one whose residual is smallest is taken, and moved by ``step`` along
    it. Anderson, J. ACM 12, 547 (1965); Pulay, Chem. Phys. Lett. 73, 393 (1980).

    Args:
        density, residual: complex [G], this input density and output minus input.
        metric: real [G], weights of the norm of a residual.
        step: share of the residual that is added.
    """
    depth = history.densities.shape[0]
    slot = history.count % depth
    densities = history.densities.at[slot].set(density)
    residuals = history.residuals.at[slot].set(residual)
    used = jnp.arange(depth) <= history.count
    overlap = jnp.einsum("ig,g,jg->ij", residuals.conj(), metric, residuals).real
    # Scaled to a unit diagonal; unused rows become those of the unit matrix.
    scale = jnp.where(used, 1 / jnp.sqrt(jnp.diag(overlap) + 1e-300), 0.0)
    matrix = overlap * scale[:, None] * scale + jnp.diag(jnp.where(used, _REGULARISATION, 1.0))
    coefficients = jnp.linalg.solve(matrix, scale) * scale
    coefficients = coefficients / jnp.sum(coefficients)
    mixed = coefficients @ densities + step * (coefficients @ residuals)
    return mixed, History(densities, residuals, history.count + 1)
