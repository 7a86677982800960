"""What all networks share: the interface of trunk and head, and features of a padded graph.

A *trunk* maps one observation to :class:`Features`; a *head* on top of it gives what an algorithm learns: logits and
value, or Q values. Both are written for a single observation; ``jax.vmap`` makes batches. A trunk of one's own is a
Flax module with the fields ``head_layers`` and ``activation``, which say what its heads look like.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from crystaljax.agents.networks.noisy import NoisyDense
from crystaljax.env import CrystalEnv
from crystaljax.observation import ANGLE_SCALE, LENGTH_SCALE, GraphObservation, scaled

LARGE_NEGATIVE = -1e9
"""Attention bias of padding: its weight underflows to exactly 0."""
POLICY_INIT = nn.initializers.variance_scaling(1e-4, "fan_in", "truncated_normal")
"""A small last layer: the first policy is almost uniform, whatever the observation."""
DEFAULT_INIT = nn.initializers.lecun_normal()


class Features(NamedTuple):
    """What a trunk makes of an observation.

    Attributes:
        sites: float32 [N, D], one row per site, meaningless on padding; [0, 0] where sites cannot be told apart.
        summary: float32 [G], the crystal so far and the decision at hand; what heads read.
    """

    sites: jax.Array
    summary: jax.Array


class Network(NamedTuple):
    """A kind of trunk, as packages offer it by name (entry points of the group ``crystaljax.networks``).

    Attributes:
        trunk: environment to the trunk on its observations.
        observation: those that it reads, ``graph`` or ``flat``.
    """

    trunk: Callable[[CrystalEnv], nn.Module]
    observation: str = "graph"


class Perceptron(nn.Module):
    """Dense layers with an activation between them.

    Attributes:
        hidden: widths of the hidden layers.
        outputs: width of the last one, which is linear.
        activation: between the layers.
        last_init: initialiser of the last layer, and
        hidden_init: of the others, unless they are noisy.
        noisy: whether the layers are noisy.
    """

    hidden: tuple[int, ...]
    outputs: int
    activation: Any
    last_init: Any = DEFAULT_INIT
    noisy: bool = False
    hidden_init: Any = DEFAULT_INIT

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.hidden:
            x = self.activation(self._layer(width, self.hidden_init)(x))
        return self._layer(self.outputs, self.last_init)(x)

    def _layer(self, width: int, init: Any) -> nn.Module:
        return NoisyDense(width) if self.noisy else nn.Dense(width, kernel_init=init)


def read(trunk: nn.Module, observation: Any) -> tuple[tuple[int, ...], Any, jax.Array]:
    """What a head needs of a trunk: widths of the head's layers, their activation, and the summary of an observation.

    Raises:
        TypeError: for a trunk that does not have them, or returns something else.
    """
    name = type(trunk).__name__
    for field in ("head_layers", "activation"):
        if not hasattr(trunk, field):
            raise TypeError(f"the trunk {name} has no {field}; give it the fields head_layers and activation")
    features = trunk(observation)
    summary = getattr(features, "summary", None)
    if jnp.ndim(0 if summary is None else summary) != 1:
        kind = "an array" if isinstance(features, jax.Array) else f"a {type(features).__name__}"
        shapes = ", ".join(str(jnp.shape(leaf)) for leaf in jax.tree.leaves(features))
        raise TypeError(
            f"the trunk {name} returned {kind} with arrays of shapes {shapes or 'none'}; it must "
            "return crystaljax.agents.networks.Features(sites (N, D), summary (G,)) of one observation"
        )
    return trunk.head_layers, trunk.activation, summary


class ActorCritic(nn.Module):
    """An observation to ``(logits float32 [V], value float32 [])``.

    Attributes:
        trunk: what reads the observation.
        num_actions: V, size of the vocabulary.
    """

    trunk: nn.Module
    num_actions: int

    @nn.compact
    def __call__(self, observation: Any) -> tuple[jax.Array, jax.Array]:
        layers, activation, summary = read(self.trunk, observation)
        logits = Perceptron(layers, self.num_actions, activation, POLICY_INIT, name="policy")(summary)
        return logits, Perceptron(layers, 1, activation, name="critic")(summary)[0]


class QValues(nn.Module):
    """An observation to Q values, float32 [V]; with several atoms, to logits of their distributions, [V, atoms].

    Attributes:
        trunk, num_actions: as in :class:`ActorCritic`.
        dueling: sum of a value and of advantages whose mean over the actions is 0 (Wang et al. 2016).
        atoms: of the distribution of an action's return (Bellemare et al. 2017).
        noisy: whether the layers of the head are noisy.
    """

    trunk: nn.Module
    num_actions: int
    dueling: bool = False
    atoms: int = 1
    noisy: bool = False

    @nn.compact
    def __call__(self, observation: Any) -> jax.Array:
        layers, activation, summary = read(self.trunk, observation)
        outputs = self.num_actions * self.atoms
        scores = Perceptron(layers, outputs, activation, POLICY_INIT, self.noisy, name="advantage")(summary)
        scores = scores.reshape(self.num_actions, self.atoms)
        if self.dueling:
            value = Perceptron(layers, self.atoms, activation, noisy=self.noisy, name="value")(summary)
            scores = value + (scores - scores.mean(axis=0))
        return scores if self.atoms > 1 else scores[:, 0]


def radial_features(distances: jax.Array, count: int, longest: float) -> jax.Array:
    """Bond lengths in Å, any shape [...], as ``count`` Gaussians on a grid up to ``longest`` Å: [..., count]."""
    centres = jnp.linspace(0.0, longest, count)
    width = longest / (count - 1)
    return jnp.exp(-jnp.square((distances[..., None] - centres) / width))


def masked_mean(rows: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of rows [N, D] over mask [N]: [D]; zeros where the mask is empty."""
    return (rows * mask[:, None]).sum(axis=0) / jnp.maximum(mask.sum(), 1)


def global_features(observation: GraphObservation, target_scale: float | tuple[float, ...]) -> jax.Array:
    """Cell lengths over 10 Å, angles over 180 degrees, targets over ``target_scale``: float32 [6 + T]."""
    scale = jnp.array([LENGTH_SCALE] * 3 + [ANGLE_SCALE] * 3)
    return jnp.concatenate([observation.lattice / scale, scaled(observation.target, target_scale)])


def focus_of(observation: GraphObservation) -> jax.Array:
    """bool [N]: the sites that the next action decides."""
    return observation.focus_mask & observation.site_mask


def count_parameters(params: Any) -> int:
    """Number of scalars in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
