"""CHGNet as a policy on the skeletons of an environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from crystaljax.agents.chgnet.geometry import Neighbours, at_scale, cells_of
from crystaljax.agents.chgnet.model import FEATURES, Trunk
from crystaljax.agents.chgnet.weights import pretrained
from crystaljax.agents.networks.base import Features, Network, focus_of, masked_mean
from crystaljax.env import CrystalEnv
from crystaljax.observation import GraphObservation, scaled
from crystaljax.skeleton import Skeleton


def in_chunks(function: Callable[..., jax.Array], size: int) -> Callable[..., jax.Array]:
    """The same function, which under ``vmap`` goes through the batch ``size`` at a time and, for a gradient, computes
    each chunk again: memory then holds the inner layers of one chunk.

    What is not batched stays so. Reverse-mode gradients need that ``vmap`` inside of them: those of a single call are
    not defined.
    """
    whole = custom_vmap(function)

    @whole.def_vmap
    def chunks(axis_size: int, in_batched: list[Any], *arguments: Any) -> tuple[jax.Array, bool]:
        del axis_size
        leaves, tree = jax.tree.flatten(arguments)
        batched = jax.tree.leaves(in_batched)

        def one(moving: list[jax.Array]) -> jax.Array:
            moving = iter(moving)
            merged = [next(moving) if b else leaf for leaf, b in zip(leaves, batched, strict=True)]
            return function(*tree.unflatten(merged))

        moving = [leaf for leaf, b in zip(leaves, batched, strict=True) if b]
        return jax.lax.map(jax.checkpoint(one), moving, batch_size=size), True

    return whole


def _rounds(weights: dict[str, Any], atoms: jax.Array, cell: Neighbours) -> jax.Array:
    return Trunk(parent=None).apply({"params": weights}, atoms, at_scale(cell))


class CHGNetTrunk(nn.Module):
    """CHGNet's rounds of messages on graph observations of known skeletons; 381k parameters for 18 elements.

    A skeleton's neighbours and angles are constants, so that under ``vmap`` all that depends on them alone is computed
    once for a batch. The parameters do not depend on the skeletons. A blank site has features of its own, and the sites
    in focus have some more, both zero at first; the target joins the summary.

    Attributes:
        skeletons: those of the environment.
        numbers: atomic number of each element of the vocabulary.
        target_scale: the target is divided by this.
        pretrained: whether elements and rounds start from the weights of CHGNet 0.3.0.
        chunk: crystals of a batch at a time, see :func:`in_chunks`; 0 for all, which also allows the gradient of a
            single observation.
    """

    skeletons: tuple[Skeleton, ...]
    numbers: tuple[int, ...]
    target_scale: float | tuple[float, ...] = 1.0
    pretrained: bool = False
    chunk: int = 16
    head_layers: tuple[int, ...] = (64,)
    activation: Any = nn.silu

    @nn.compact
    def __call__(self, observation: GraphObservation) -> Features:
        cell = cells_of(self.skeletons).row(observation.skeleton)
        focus = focus_of(observation)
        atoms = self.param("elements", self._first_elements)[observation.elements]
        atoms = atoms + focus[:, None] * self.param("focus", nn.initializers.zeros, (FEATURES,))
        weights = self.param("rounds", self._first_rounds, atoms, cell)
        rounds = in_chunks(_rounds, self.chunk) if self.chunk else _rounds
        sites = rounds(weights, atoms, cell)
        means = [masked_mean(sites, mask) for mask in (focus, observation.site_mask)]
        return Features(sites, jnp.concatenate([*means, scaled(observation.target, self.target_scale)]))

    def _first_elements(self, key: jax.Array) -> jax.Array:
        """float32 [V + 1, 64]."""
        if self.pretrained:
            known = pretrained()["embedding"]["embedding"][jnp.array(self.numbers) - 1]
        else:
            known = jax.random.normal(key, (len(self.numbers), FEATURES))
        return jnp.concatenate([known, jnp.zeros((1, FEATURES))])

    def _first_rounds(self, key: jax.Array, atoms: jax.Array, cell: Neighbours) -> dict[str, Any]:
        if self.pretrained:
            return pretrained()["trunk"]
        return Trunk(parent=None).init(key, atoms, at_scale(cell))["params"]


def _trunk(env: CrystalEnv, pretrained: bool) -> CHGNetTrunk:
    numbers = tuple(env.vocabulary.numbers[:-1].tolist())
    return CHGNetTrunk(env.skeletons, numbers, env.objective.scale, pretrained)


NETWORK = Network(lambda env: _trunk(env, pretrained=False))
PRETRAINED = Network(lambda env: _trunk(env, pretrained=True))
