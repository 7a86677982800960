"""What installed packages offer by name, as entry points: evaluators, properties, agents, networks; its own too.

Code of a package that somebody has installed is trusted; a file can only choose among the names.
"""

from __future__ import annotations

import functools
import sys
from importlib import metadata
from typing import Any, NamedTuple

from crystaljax.errors import CrystalJAXError

EVALUATORS, PROPERTIES = "crystaljax.evaluators", "crystaljax.properties"
AGENTS, NETWORKS = "crystaljax.agents", "crystaljax.networks"
"""The groups of entry points."""
OWN = "crystaljax"
"""The distribution whose offers come first."""


class PluginError(CrystalJAXError, ValueError):
    """Nothing is offered under a name, with the known ones, or what is cannot be used; the message says by whom."""


class Offer(NamedTuple):
    """An entry point, which is loaded no earlier than asked for."""

    point: metadata.EntryPoint

    @property
    def package(self) -> str:
        """The distribution that it is from."""
        return self.point.dist.name if self.point.dist else "?"

    def __str__(self) -> str:
        return f"{_kind(self.point.group)} {self.point.name!r} of the package {self.package}"

    def load(self) -> Any:
        """What is offered; raises :class:`PluginError` if it cannot be imported."""
        try:
            return self.point.load()
        except (ImportError, AttributeError) as error:
            raise PluginError(f"{self} cannot be loaded ({error}); mend or uninstall it") from error


def offered(group: str) -> dict[str, Offer]:
    """The offers of a group by name, those of this package first; nothing is loaded.

    Raises:
        PluginError: two packages offer different things under one name.
    """
    found: dict[str, Offer] = {}
    offers = [Offer(point) for point in _points(group, tuple(sys.path))]
    for offer in sorted(offers, key=lambda offer: (offer.package != OWN, offer.point.name)):
        other = found.setdefault(offer.point.name, offer)
        if other.point.value != offer.point.value:
            raise PluginError(f"{other} is offered by {offer.package} too; uninstall one of them")
    return found


@functools.lru_cache(maxsize=32)
def _points(group: str, path: tuple[str, ...]) -> tuple[metadata.EntryPoint, ...]:
    """The entry points of a group, looked up once for a search path: all that is installed is read for it."""
    del path
    return tuple(metadata.entry_points(group=group))


def find(group: str, name: str) -> Offer:
    """The offer of that name; raises :class:`PluginError` if there is none, with the known names."""
    offers = offered(group)
    if name not in offers:
        known = f"use one of {', '.join(offers)}" if offers else "none is installed; run pip install -e . again"
        raise PluginError(f"unknown {_kind(group)} {name!r}: {known}")
    return offers[name]


def _kind(group: str) -> str:
    """What a group holds one of, for messages."""
    return {PROPERTIES: "property"}.get(group, group.rpartition(".")[2].removesuffix("s"))
