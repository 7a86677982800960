"""Policy and value networks in Flax, by name: a trunk that reads observations, and a head for the algorithm."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn

from crystaljax import plugins
from crystaljax.agents.networks.base import ActorCritic, Features, Network, QValues, count_parameters
from crystaljax.agents.networks.chgnet import CHGNetTrunk
from crystaljax.agents.networks.megnet import MEGNet
from crystaljax.agents.networks.mlp import MLP
from crystaljax.agents.networks.transformer import GraphTransformer
from crystaljax.env import CrystalEnv

__all__ = [
    "MLP",
    "ActorCritic",
    "CHGNetTrunk",
    "Features",
    "GraphTransformer",
    "MEGNet",
    "Network",
    "QValues",
    "count_parameters",
    "make_network",
    "make_trunk",
    "network",
]


def network(name: str) -> Network:
    """The kind of network of that name; raises ``ValueError`` for an unknown one, with the known ones."""
    offer = plugins.find(plugins.NETWORKS, name)
    found = offer.load()
    if not isinstance(found, Network):
        raise plugins.PluginError(f"{offer} is {found!r}, no Network; mend it")
    return found


def make_trunk(env: CrystalEnv, name: str | None = None) -> nn.Module:
    """The trunk of that name for an environment; by default the one that fits its observations.

    Raises:
        ValueError: for an unknown name, or a network that cannot read the observations.
    """
    fitting = "mlp" if env.observation_type == "flat" else "transformer"
    chosen = network(name or fitting)
    if chosen.observation != env.observation_type:
        raise ValueError(f"the {name} network does not read {env.observation_type} observations; use {fitting!r}")
    return chosen.trunk(env)


def make_network(
    env: CrystalEnv, name: str | None = None, head: Callable[[nn.Module, int], nn.Module] = ActorCritic
) -> nn.Module:
    """The network of that name for an environment, as :func:`make_trunk`, with a head.

    ``head`` makes a network of a trunk and the number of actions: :class:`ActorCritic`, :class:`QValues`, or
    ``functools.partial(QValues, dueling=True)``.
    """
    return head(make_trunk(env, name), env.num_actions)
