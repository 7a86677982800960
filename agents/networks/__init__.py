"""Policy and value networks in Flax, by name: a trunk that reads observations, and a head for the algorithm."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn

from crystaljax.agents.config import NETWORKS
from crystaljax.agents.networks.base import ActorCritic, Features, QValues, count_parameters
from crystaljax.agents.networks.chgnet import CHGNetTrunk
from crystaljax.agents.networks.megnet import MEGNet
from crystaljax.agents.networks.mlp import MLP
from crystaljax.agents.networks.transformer import GraphTransformer
from crystaljax.env import CrystalEnv

__all__ = [
    "MLP",
    "NETWORKS",
    "ActorCritic",
    "CHGNetTrunk",
    "Features",
    "GraphTransformer",
    "MEGNet",
    "QValues",
    "count_parameters",
    "make_network",
    "make_trunk",
]


def make_trunk(env: CrystalEnv, name: str | None = None) -> nn.Module:
    """The trunk of that name for an environment; by default the one that fits its observations.

    Raises:
        ValueError: for an unknown name, or a network that cannot read the observations.
    """
    flat = env.observation_type == "flat"
    fitting = "mlp" if flat else "transformer"
    name = name or fitting
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}: use one of {NETWORKS}")
    if (name == "mlp") != flat:
        raise ValueError(f"the {name} network does not read {env.observation_type} observations; use {fitting!r}")
    scale = env.objective.scale
    if flat:
        return MLP()
    if name == "transformer":
        return GraphTransformer(env.num_actions, scale)
    if name == "megnet":
        return MEGNet(env.num_actions, scale)
    numbers = tuple(env.vocabulary.numbers[:-1].tolist())
    return CHGNetTrunk(env.skeletons, numbers, scale, pretrained=name == "chgnet-pretrained")


def make_network(
    env: CrystalEnv, name: str | None = None, head: Callable[[nn.Module, int], nn.Module] = ActorCritic
) -> nn.Module:
    """The network of that name for an environment, as :func:`make_trunk`, with a head.

    ``head`` makes a network of a trunk and the number of actions: :class:`ActorCritic`, :class:`QValues`, or
    ``functools.partial(QValues, dueling=True)``.
    """
    return head(make_trunk(env, name), env.num_actions)
