"""The dense graph transformer, the default network."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from crystaljax.agents.networks.base import (
    LARGE_NEGATIVE,
    Features,
    Network,
    focus_of,
    global_features,
    masked_mean,
    radial_features,
)
from crystaljax.observation import GraphObservation


def pair_features(observation: GraphObservation, count: int, longest: float) -> jax.Array:
    """Geometry between sites: float32 [N, N, count], radial features summed over all bonds of a pair.

    Parallel bonds, to several periodic images of one site, add up, so the coordination number is not lost. A product
    of one-hot matrices instead of a scatter: it is fast on accelerators, and bit-for-bit repeatable.
    """
    sites = observation.elements.shape[0]
    radial = radial_features(observation.distances, count, longest) * observation.edge_mask[:, None]
    senders = jax.nn.one_hot(observation.senders, sites)
    receivers = jax.nn.one_hot(observation.receivers, sites)
    return jnp.einsum("ei,ejk->ijk", senders, receivers[:, :, None] * radial[:, None, :])


class Attention(nn.Module):
    """Multi-head attention over all pairs of sites, with the geometry as a bias."""

    heads: int

    @nn.compact
    def __call__(self, nodes: jax.Array, pairs: jax.Array, site_mask: jax.Array) -> jax.Array:
        """nodes [N, D], pairs [N, N, K], site_mask [N] to [N, D]."""
        features = nodes.shape[-1]
        size = features // self.heads
        query, key, value = jnp.split(nn.Dense(3 * features, use_bias=False)(nodes), 3, axis=-1)
        query, key, value = (x.reshape(-1, self.heads, size) for x in (query, key, value))
        scores = jnp.einsum("ihd,jhd->ijh", query, key) / jnp.sqrt(size)
        scores = scores + nn.Dense(self.heads, use_bias=False)(pairs)
        scores = jnp.where(site_mask[None, :, None], scores, LARGE_NEGATIVE)
        mixed = jnp.einsum("ijh,jhd->ihd", jax.nn.softmax(scores, axis=1), value)
        return nn.Dense(features)(mixed.reshape(-1, features))


class Block(nn.Module):
    """A pre-norm transformer block."""

    heads: int

    @nn.compact
    def __call__(self, nodes: jax.Array, pairs: jax.Array, site_mask: jax.Array) -> jax.Array:
        nodes = nodes + Attention(self.heads)(nn.LayerNorm()(nodes), pairs, site_mask)
        hidden = nn.gelu(nn.Dense(2 * nodes.shape[-1])(nn.LayerNorm()(nodes)))
        return nodes + nn.Dense(nodes.shape[-1])(hidden)


class GraphTransformer(nn.Module):
    """Dense graph transformer on :class:`crystaljax.observation.GraphObservation`; 121k parameters for 18 elements.

    The bond lengths enter as a bias of the attention and as each site's coordination; cell and target are added to
    every site. Relabeling the sites or padding the graph changes nothing.

    Attributes:
        num_actions: V, size of the vocabulary.
        target_scale: the target is divided by this; the task's default target is a good choice.
        features, blocks, heads: size of the network.
        radial: number of Gaussians of the bond length.
        longest: centre of the last Gaussian, Å.
    """

    num_actions: int
    target_scale: float | tuple[float, ...] = 1.0
    features: int = 64
    blocks: int = 3
    heads: int = 4
    radial: int = 16
    longest: float = 6.0
    head_layers: tuple[int, ...] = (64,)
    activation: Any = nn.gelu

    @nn.compact
    def __call__(self, observation: GraphObservation) -> Features:
        pairs = pair_features(observation, self.radial, self.longest)
        nodes = self._embed(observation, pairs)
        for _ in range(self.blocks):
            nodes = Block(self.heads)(nodes, pairs, observation.site_mask)
        nodes = nn.LayerNorm()(nodes)
        means = [masked_mean(nodes, mask) for mask in (focus_of(observation), observation.site_mask)]
        return Features(nodes, jnp.concatenate(means))

    def _embed(self, observation: GraphObservation, pairs: jax.Array) -> jax.Array:
        """The first node features, [N, D]."""
        init = nn.initializers.normal(1.0)
        return (
            nn.Embed(self.num_actions + 1, self.features, embedding_init=init)(observation.elements)
            + nn.Embed(2, self.features, embedding_init=init)(observation.focus_mask.astype(jnp.int32))
            + nn.Dense(self.features, use_bias=False)(pairs.sum(axis=1))
            + nn.Dense(self.features)(global_features(observation, self.target_scale))
        )


NETWORK = Network(lambda env: GraphTransformer(env.num_actions, env.objective.scale))
