"""Questions to a store: which results, and how many."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from ase.data import atomic_numbers
from ase.formula import Formula

from crystaljax.dft_bridge.store.records import Row
from crystaljax.properties import known_properties
from crystaljax.status import Status


@dataclasses.dataclass(frozen=True)
class Query:
    """Which rows are wanted; what is ``None`` or empty does not matter.

    Attributes:
        property_name: name of the property.
        status: name of a status, such as ``OK``.
        engine: part of the engine's label, such as ``planewave`` or ``fast``.
        formula: such as ``CaTiO3``; cells of several formula units match too.
        elements: chemical symbols, all of which must be there.
        minimum, maximum: bounds of the value, inclusive; failures have none and are left out.

    Raises:
        ValueError: for an unknown name; lists the known ones.
    """

    property_name: str | None = None
    status: str | None = None
    engine: str | None = None
    formula: str | None = None
    elements: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None

    def __post_init__(self) -> None:
        if self.property_name is not None and self.property_name not in known_properties():
            raise ValueError(f"no property {self.property_name!r}; choose one of {', '.join(known_properties())}")
        if self.status is not None and self.status not in Status.__members__:
            raise ValueError(f"no status {self.status!r}; choose one of {', '.join(Status.__members__)}")
        unknown = [symbol for symbol in self.elements if not atomic_numbers.get(symbol)]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: not an element; give symbols such as Ca,Ti,O")
        if self.formula is not None and not (self._composition and all(map(atomic_numbers.get, self._composition))):
            raise ValueError(f"{self.formula!r} is not a formula such as CaTiO3")

    @property
    def _composition(self) -> dict[str, int]:
        """Atoms per formula unit; empty if the formula cannot be read."""
        try:
            return Formula(self.formula).reduce()[0].count() if self.formula else {}
        except ValueError:
            return {}

    def select(self, rows: Iterable[Row]) -> Iterable[Row]:
        """The wanted ones of the rows."""
        composition = self._composition
        low = -float("inf") if self.minimum is None else self.minimum
        high = float("inf") if self.maximum is None else self.maximum
        bounded = (self.minimum, self.maximum) != (None, None)
        for row in rows:
            if (
                self.property_name in (None, row.property)
                and self.status in (None, row.status.name)
                and (self.engine or "") in row.pairs["engine"]
                and (not bounded or low <= row.value <= high)
                and all(row.counts[symbol] for symbol in self.elements)
                and (not composition or Formula.from_dict(row.counts).reduce()[0].count() == composition)
            ):
                yield row


@dataclasses.dataclass
class Tally:
    """Results of one property, engine and status.

    Attributes:
        results: how many.
        core_seconds: CPU time of their calculations.
    """

    property: str
    engine: str
    status: str
    results: int = 0
    core_seconds: float = 0.0


def tally(rows: Iterable[Row]) -> list[Tally]:
    """Counts by property, engine and status, in alphabetical order."""
    tallies: dict[tuple[str, str, str], Tally] = {}
    for row in rows:
        which = row.property, row.pairs["engine"], row.status.name
        entry = tallies.setdefault(which, Tally(*which))
        entry.results += 1
        entry.core_seconds += row.pairs["seconds"]
    return [entry for _, entry in sorted(tallies.items())]
