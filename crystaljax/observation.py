"""What an agent sees: a graph of the crystal so far, or the same as one flat vector."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from crystaljax.skeleton import SkeletonTable

LENGTH_SCALE = 10.0
"""Å; cell lengths of flat observations are divided by this, and stay below 1 for cells shorter than it."""
ANGLE_SCALE = 180.0
"""Degrees; cell angles of flat observations are divided by this."""


@struct.dataclass
class GraphObservation:
    """The crystal so far, as a padded graph. N sites, E directed bonds, V elements in the vocabulary.

    Attributes:
        elements: int32 [N], vocabulary index of each site; V where there is none yet, and on padding.
        site_mask: bool [N], false on padding.
        focus: int32 [], the site that the next action decides (a representative of its orbit in orbit mode).
        focus_mask: bool [N], every site that the next action decides.
        senders, receivers: int32 [E], bonds, both directions.
        distances: float32 [E], bond lengths in Å, 0 on padding.
        edge_mask: bool [E], false on padding.
        lattice: float32 [6], cell lengths in Å and angles in degrees.
        target: float32 [], in the unit of the property; [T] where the objective has several targets.
        skeleton: int32 [], index into the environment's skeletons, for networks that know their geometry.
    """

    elements: jax.Array
    site_mask: jax.Array
    focus: jax.Array
    focus_mask: jax.Array
    senders: jax.Array
    receivers: jax.Array
    distances: jax.Array
    edge_mask: jax.Array
    lattice: jax.Array
    target: jax.Array
    skeleton: jax.Array


def graph(
    elements: jax.Array,
    focus: jax.Array,
    focus_mask: jax.Array,
    skeleton: SkeletonTable,
    target: jax.Array | np.ndarray | float,
    index: jax.Array,
) -> GraphObservation:
    """The graph observation; ``skeleton`` is row ``index`` of a table."""
    return GraphObservation(
        elements=elements,
        site_mask=skeleton.site_mask,
        focus=focus,
        focus_mask=focus_mask,
        senders=skeleton.senders,
        receivers=skeleton.receivers,
        distances=skeleton.distances,
        edge_mask=skeleton.edge_mask,
        lattice=skeleton.lattice,
        target=jnp.asarray(target, jnp.float32),
        skeleton=index,
    )


def flat_size(sites: int, vocabulary_size: int, targets: int = 1) -> int:
    """Length of the flat observation: one-hot elements with blank, focus sites, cell, targets."""
    return sites * (vocabulary_size + 1) + sites + 6 + targets


def flat(observation: GraphObservation, vocabulary_size: int, target_scale: float | tuple[float, ...]) -> jax.Array:
    """The observation as float32 [N (V + 1) + N + 6 + T].

    One-hot elements (the last class is "none yet"; padding sites are all zero), the sites that the next action
    decides, cell lengths over 10 Å, angles over 180 degrees, targets over the default ones.
    """
    one_hot = jax.nn.one_hot(observation.elements, vocabulary_size + 1, dtype=jnp.float32)
    one_hot = one_hot * observation.site_mask[:, None].astype(jnp.float32)
    scale = jnp.array([LENGTH_SCALE] * 3 + [ANGLE_SCALE] * 3, jnp.float32)
    target = scaled(observation.target, target_scale)
    return jnp.concatenate(
        [one_hot.ravel(), observation.focus_mask.astype(jnp.float32), observation.lattice / scale, target]
    )


def scaled(target: jax.Array, scale: float | tuple[float, ...]) -> jax.Array:
    """Targets [] or [T] in units of usual ones, float32 [T]."""
    return jnp.atleast_1d(target) / jnp.asarray(scale, jnp.float32)
