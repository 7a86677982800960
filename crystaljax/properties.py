"""The properties that a crystal can be designed for: one entry each, and everything else reads it here.

A package offers more of them as entry points of the group :data:`crystaljax.plugins.PROPERTIES`: the name of the
property, and a :class:`Property`.
"""

from __future__ import annotations

import dataclasses
import math

from crystaljax import plugins

COMBINE = ("product", "sum")
"""How an objective makes one reward of the scores of its terms: their product, or their weighted mean."""


@dataclasses.dataclass(frozen=True)
class Property:
    """A number that a crystal has.

    Attributes:
        name: such as ``band_gap``; a key in results, tables and run folders.
        unit: of its values; empty for a number without one.
        scale: a disagreement that matters, in the unit: the width of a term that does not say its own.
        tolerance: how far from what is asked for a crystal may be and still count as a success, in the unit.
        bounds: lowest and highest value that a crystal can have: beyond them a number is a failed calculation.
    """

    name: str
    unit: str = ""
    scale: float = 1.0
    tolerance: float = 0.25
    bounds: tuple[float, float] = (-math.inf, math.inf)

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"a property is called {self.name!r}; its name must be an identifier, such as band_gap")
        for what in ("scale", "tolerance"):
            if not 0 < getattr(self, what) < math.inf:
                raise ValueError(f"the {what} of {self.name} is {getattr(self, what)}; it must be positive")
        if not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"the bounds of {self.name} are {self.bounds}; the lowest value comes first")

    @property
    def title(self) -> str:
        """For people: ``Band gap``."""
        return self.name.replace("_", " ").capitalize()

    @property
    def heading(self) -> str:
        """Title and unit: ``Band gap (eV)``."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def prefix(self) -> str:
        """How the ids of its tasks begin: ``BandGap``."""
        return "".join(word.capitalize() for word in self.name.split("_"))


BAND_GAP = Property("band_gap", "eV", scale=1.0, tolerance=0.25, bounds=(0.0, 30.0))
BULK_MODULUS = Property("bulk_modulus", "GPa", scale=100.0, tolerance=25.0, bounds=(0.0, 1000.0))
DENSITY = Property("density", "g/cm3", scale=math.sqrt(3.0), tolerance=0.25, bounds=(0.0, 60.0))
PROPERTIES = {known.name: known for known in (BAND_GAP, BULK_MODULUS, DENSITY)}
"""Those that the shipped engines calculate."""


def known_properties() -> dict[str, Property]:
    """All of them by name: the shipped ones, and those of installed packages."""
    return PROPERTIES | {name: offer.load() for name, offer in plugins.offered(plugins.PROPERTIES).items()}


def property_of(choice: str | Property) -> Property:
    """The property of that name, or the one given; raises ``ValueError`` for an unknown name, with the known ones."""
    if isinstance(choice, Property):
        return choice
    found = known_properties()
    if choice not in found:
        raise ValueError(f"unknown property {choice!r}: use one of {', '.join(found)}, or a Property of your own")
    return found[choice]
