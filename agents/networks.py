"""Policy and value networks in Flax, written for one observation; ``jax.vmap`` makes batches.

Every network maps an observation to ``(logits float32 [V], value float32 [])``.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from crystaljax.env import CrystalEnv
from crystaljax.observation import ANGLE_SCALE, LENGTH_SCALE, GraphObservation

NETWORKS = ("transformer", "mlp")
LARGE_NEGATIVE = -1e9
"""Attention bias of padding: its weight underflows to exactly 0."""
POLICY_INIT = nn.initializers.variance_scaling(1e-4, "fan_in", "truncated_normal")
"""A small last layer: the first policy is almost uniform, whatever the observation."""


def radial_features(distances: jax.Array, count: int, longest: float) -> jax.Array:
    """Bond lengths in Å, any shape [...], as ``count`` Gaussians on a grid up to ``longest`` Å: [..., count]."""
    centres = jnp.linspace(0.0, longest, count)
    width = longest / (count - 1)
    return jnp.exp(-jnp.square((distances[..., None] - centres) / width))


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


def masked_mean(nodes: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of nodes [N, D] over mask [N]: [D]; zeros where the mask is empty."""
    return (nodes * mask[:, None]).sum(axis=0) / jnp.maximum(mask.sum(), 1)


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
    target_scale: float = 1.0
    features: int = 64
    blocks: int = 3
    heads: int = 4
    radial: int = 16
    longest: float = 6.0

    @nn.compact
    def __call__(self, observation: GraphObservation) -> tuple[jax.Array, jax.Array]:
        pairs = pair_features(observation, self.radial, self.longest)
        nodes = self._embed(observation, pairs)
        for _ in range(self.blocks):
            nodes = Block(self.heads)(nodes, pairs, observation.site_mask)
        nodes = nn.LayerNorm()(nodes)
        focus = observation.focus_mask & observation.site_mask
        summary = jnp.concatenate([masked_mean(nodes, focus), masked_mean(nodes, observation.site_mask)])
        policy = nn.gelu(nn.Dense(self.features)(summary))
        logits = nn.Dense(self.num_actions, kernel_init=POLICY_INIT)(policy)
        critic = nn.gelu(nn.Dense(self.features)(summary))
        return logits, nn.Dense(1)(critic)[0]

    def _embed(self, observation: GraphObservation, pairs: jax.Array) -> jax.Array:
        """The first node features, [N, D]."""
        scale = jnp.array([LENGTH_SCALE] * 3 + [ANGLE_SCALE] * 3)
        target = observation.target[None] / self.target_scale
        globals_ = jnp.concatenate([observation.lattice / scale, target])
        return (
            nn.Embed(self.num_actions + 1, self.features, embedding_init=nn.initializers.normal(1.0))(
                observation.elements
            )
            + nn.Embed(2, self.features, embedding_init=nn.initializers.normal(1.0))(
                observation.focus_mask.astype(jnp.int32)
            )
            + nn.Dense(self.features, use_bias=False)(pairs.sum(axis=1))
            + nn.Dense(self.features)(globals_)
        )


class MLP(nn.Module):
    """A small network on the flat observation, for one skeleton; separate trunks for policy and value.

    Attributes:
        num_actions: V, size of the vocabulary.
        features: width of the two hidden layers.
    """

    num_actions: int
    features: int = 64

    @nn.compact
    def __call__(self, observation: jax.Array) -> tuple[jax.Array, jax.Array]:
        policy = value = observation
        for _ in range(2):
            policy = nn.tanh(nn.Dense(self.features)(policy))
            value = nn.tanh(nn.Dense(self.features)(value))
        logits = nn.Dense(self.num_actions, kernel_init=POLICY_INIT)(policy)
        return logits, nn.Dense(1)(value)[0]


def make_network(env: CrystalEnv, name: str | None = None) -> nn.Module:
    """The network of that name for an environment; by default the one that fits its observations.

    Raises:
        ValueError: for an unknown name, or a network that cannot read the observations.
    """
    fitting = "transformer" if env.observation_type == "graph" else "mlp"
    name = name or fitting
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}: use one of {NETWORKS}")
    if name != fitting:
        raise ValueError(f"the {name} network does not read {env.observation_type} observations; use {fitting!r}")
    if name == "mlp":
        return MLP(env.num_actions)
    return GraphTransformer(env.num_actions, target_scale=env.objective.target)


def count_parameters(params: Any) -> int:
    """Number of scalars in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
