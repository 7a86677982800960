"""A MEGNet-style network (Chen et al., Chem. Mater. 31, 3564 (2019)), with the sizes of CrystalGym's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from crystaljax.agents.networks.base import (
    LARGE_NEGATIVE,
    Features,
    Network,
    Perceptron,
    focus_of,
    global_features,
    masked_mean,
    radial_features,
)
from crystaljax.observation import GraphObservation

SOFTPLUS_INIT = nn.initializers.variance_scaling(3.0, "fan_in", "truncated_normal")
"""Makes up for the activation: that of a unit normal number has a mean square of 0.28."""


def shifted_softplus(x: jax.Array) -> jax.Array:
    """Softplus that is 0 at 0."""
    return nn.softplus(x) - jnp.log(2.0)


class Update(nn.Module):
    """Dense layers with the activation after every one, the last too: parts [..., D_i] to [..., sizes[-1]]."""

    sizes: Sequence[int]

    @nn.compact
    def __call__(self, *parts: jax.Array) -> jax.Array:
        *hidden, outputs = self.sizes
        layers = Perceptron(tuple(hidden), outputs, shifted_softplus, SOFTPLUS_INIT, hidden_init=SOFTPLUS_INIT)
        return shifted_softplus(layers(jnp.concatenate(parts, axis=-1)))


class Block(nn.Module):
    """Bonds learn from their ends, sites from their bonds, the state from both; each adds to what was there.

    Attributes:
        encoder: sizes of the layers ahead of the block.
        sizes: sizes of the layers of each update.
    """

    encoder: Sequence[int]
    sizes: Sequence[int]

    @nn.compact
    def __call__(
        self, bonds: jax.Array, sites: jax.Array, state: jax.Array, ends: tuple[jax.Array, jax.Array], masks: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """bonds [E, D], sites [N, D], state [D]; ends, one-hot [E, N] each; masks of bonds [E] and sites [N]."""
        bond_mask, site_mask = masks
        sender, receiver = ends
        bonds, sites, state = (Update(self.encoder)(x) for x in (bonds, sites, state))

        def spread(rows: jax.Array) -> jax.Array:
            return jnp.broadcast_to(state, (len(rows), len(state)))

        new_bonds = Update(self.sizes)(sender @ sites, receiver @ sites, bonds, spread(bonds))
        arriving = receiver * bond_mask[:, None]
        arrived = arriving.T @ new_bonds / jnp.maximum(arriving.sum(axis=0), 1)[:, None]
        new_sites = Update(self.sizes)(arrived, sites, spread(sites))
        means = masked_mean(new_bonds, bond_mask), masked_mean(new_sites, site_mask)
        return bonds + new_bonds, sites + new_sites, state + Update(self.sizes)(*means, state)


class Set2Set(nn.Module):
    """A set of rows [N, D] as one vector [2 D], whatever their order (Vinyals et al. 2016).

    Attributes:
        steps: rounds of attention.
    """

    steps: int = 2

    @nn.compact
    def __call__(self, rows: jax.Array, mask: jax.Array) -> jax.Array:
        size = rows.shape[1]
        cell, carry, answer = nn.OptimizedLSTMCell(size), (jnp.zeros(size), jnp.zeros(size)), jnp.zeros(2 * size)
        for _ in range(self.steps):
            carry, query = cell(carry, answer)
            scores = jnp.where(mask, rows @ query, LARGE_NEGATIVE)
            answer = jnp.concatenate([query, (jax.nn.softmax(scores) * mask) @ rows])
        return answer


class MEGNet(nn.Module):
    """Sites, bonds and a global state that update each other, on :class:`crystaljax.observation.GraphObservation`.

    190k parameters for 18 elements. Cell and target are the state at the start; the focus is an embedding of its own.

    Attributes:
        num_actions: V, size of the vocabulary.
        target_scale: the target is divided by this.
        radial, longest: number of Gaussians of the bond length, and the last one's centre in Å.
        embedding, focus_embedding: sizes.
        encoder: sizes of the layers ahead of each block.
        sizes: sizes of the layers in it.
        blocks: how many.
    """

    num_actions: int
    target_scale: float | tuple[float, ...] = 1.0
    radial: int = 16
    longest: float = 6.0
    embedding: int = 16
    focus_embedding: int = 8
    encoder: tuple[int, ...] = (64, 32)
    sizes: tuple[int, ...] = (64, 64, 32)
    blocks: int = 3
    head_layers: tuple[int, ...] = (32, 16)
    activation: Any = shifted_softplus

    @nn.compact
    def __call__(self, observation: GraphObservation) -> Features:
        focus = focus_of(observation).astype(jnp.int32)
        init = nn.initializers.normal(1.0)
        elements = nn.Embed(self.num_actions + 1, self.embedding, embedding_init=init)(observation.elements)
        focused = nn.Embed(2, self.focus_embedding, embedding_init=init)(focus)
        sites = jnp.concatenate([elements, focused], axis=-1)
        bonds = radial_features(observation.distances, self.radial, self.longest)
        state = global_features(observation, self.target_scale)
        # One-hot products instead of gathers and scatters: fast on accelerators, and bit-for-bit repeatable.
        ends = tuple(jax.nn.one_hot(end, len(sites)) for end in (observation.senders, observation.receivers))
        masks = observation.edge_mask, observation.site_mask
        for _ in range(self.blocks):
            bonds, sites, state = Block(self.encoder, self.sizes)(bonds, sites, state, ends, masks)
        pooled = Set2Set()(sites, observation.site_mask), Set2Set()(bonds, observation.edge_mask)
        return Features(sites, jnp.concatenate([*pooled, state]))


NETWORK = Network(lambda env: MEGNet(env.num_actions, env.objective.scale))
