"""Tables of results: the value of every crystal that a small design space holds, from a DFT engine.

A table belongs to one skeleton, one vocabulary and one property. It has one entry for each distinct crystal whose
symmetry orbits (of the prototype as its own species colour it) hold one element each; labelings that symmetry turns
into each other share an entry. A failed calculation is an entry with its status and reason.

A table is a JSON file with one entry a line, made by ``python -m benchmarks make-tables``; those that the package
ships lie in :data:`FOLDER`. Its checksum is verified whenever it is read.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers, chemical_symbols

from crystaljax import caveats
from crystaljax.caveats import Caveat
from crystaljax.elements import Vocabulary
from crystaljax.errors import CrystalJAXError
from crystaljax.files import replace_text
from crystaljax.skeleton import Skeleton
from crystaljax.status import Status
from crystaljax.symmetry import canonical_numbers

FOLDER = Path(__file__).parent / "data" / "tables"
FORMAT = 1
UNITS = {"band_gap": "eV", "total_energy": "eV per cell", "bulk_modulus": "GPa", "density": "g/cm3"}
"""Properties that tables may hold, and the unit of their values."""


class TableError(CrystalJAXError, ValueError):
    """A table that is damaged, missing, or for another problem; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One crystal of a table.

    Attributes:
        elements: chemical symbol of each site, the canonical one of its equivalents.
        status: outcome of the calculation.
        value: in the unit of the property; ``None`` unless ``status`` is ``OK``.
        message: the reason of a failure.
        details: facts about this calculation: cut-off in Ha, k-points, SCF steps, CPU seconds ...
        caveats: as its engine told them; ``None`` in tables that are older than caveats (see :meth:`Table.caveats`).
    """

    elements: tuple[str, ...]
    status: Status
    value: float | None = None
    message: str = ""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    caveats: tuple[Caveat, ...] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """A property of every crystal of a small design space.

    Attributes:
        property: one of :data:`UNITS`.
        skeleton: lattice and sites.
        vocabulary: the elements.
        entries: one for each row of :func:`labelings`, in that order.
        origin: where the numbers come from: engine, preset, versions, every setting, pseudopotentials.
    """

    property: str
    skeleton: Skeleton
    vocabulary: Vocabulary
    entries: tuple[Entry, ...]
    origin: Mapping[str, Any]

    @builtins.property  # "property" is a field here
    def name(self) -> str:
        """Such as ``band_gap-RocksaltAB``; also that of the file."""
        return f"{self.property}-{self.skeleton.name}"

    @builtins.property  # "property" is a field here
    def label(self) -> str:
        """Where values come from, such as ``table: planewave, fast``."""
        return f"table: {self.origin['engine']}, {self.origin['preset']}"

    @functools.cached_property
    def values(self) -> np.ndarray:
        """float64 [E], NaN where there is none."""
        return np.array([np.nan if entry.value is None else entry.value for entry in self.entries])

    @functools.cached_property
    def statuses(self) -> np.ndarray:
        """int32 [E]."""
        return np.array([entry.status for entry in self.entries], np.int32)

    def caveats(self, entry: Entry) -> tuple[Caveat, ...]:
        """What a reader must know of an entry's value; of an older table, what follows from its crystal and details."""
        if entry.value is None or entry.caveats is not None:
            return entry.caveats or ()
        numbers = np.array([atomic_numbers[symbol] for symbol in entry.elements])
        sites = self.skeleton.lattice, self.skeleton.frac_coords, numbers
        return caveats.derive(*sites, self.property, entry.details, self.origin["settings"])

    def entry(self, symbols: Sequence[str]) -> Entry:
        """The entry of a crystal, given the element of each site; raises ``TableError`` if the table has none."""
        unknown = [symbol for symbol in symbols if symbol not in self.vocabulary.symbols]
        if unknown or len(symbols) != self.skeleton.n_sites:
            raise TableError(
                f"table {self.name} has crystals of {self.skeleton.n_sites} sites and of the elements "
                f"{' '.join(self.vocabulary.symbols)}; got {' '.join(symbols)}"
            )
        numbers = canonical_numbers(
            np.array([atomic_numbers[symbol] for symbol in symbols]), self.skeleton.permutations
        )
        found = np.flatnonzero((labelings(self.skeleton, self.vocabulary)[0] == numbers).all(axis=1))
        if not len(found):
            raise TableError(f"table {self.name} has one element for each orbit; got {' '.join(symbols)}")
        return self.entries[found[0]]


def labelings(skeleton: Skeleton, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """The distinct crystals with one element of the vocabulary on each of the skeleton's G orbits.

    Returns:
        Atomic numbers int32 [E, N], canonical and sorted; and int32 [V^G], the row of each assignment of elements to
        orbits, at ``sum(element[g] * V^(G - 1 - g))``.
    """
    count = int(skeleton.orbits.max()) + 1
    chosen = np.array(list(itertools.product(range(len(vocabulary)), repeat=count)), np.int32)
    numbers = canonical_numbers(vocabulary.numbers[chosen[:, skeleton.orbits]], skeleton.permutations)
    distinct, row = np.unique(numbers, axis=0, return_inverse=True)
    return distinct, row.reshape(-1).astype(np.int32)


def symbols_of(numbers: np.ndarray) -> tuple[str, ...]:
    """Chemical symbols of atomic numbers [N]."""
    return tuple(chemical_symbols[int(number)] for number in numbers)


def write(table: Table, folder: str | os.PathLike = FOLDER) -> Path:
    """Write the table's file; returns its path."""
    header, lines = _header(table), [json.dumps(_to_json(entry)) for entry in table.entries]
    header["checksum"] = _checksum(header, lines)
    text = json.dumps(header, indent=1)[:-2] + ',\n "entries": [\n' + ",\n".join(lines) + "\n ]\n}\n"
    path = Path(folder, f"{table.name}.json")
    replace_text(path, text)
    return path


def read(path: str | os.PathLike) -> Table:
    """The table of a file.

    Raises:
        TableError: the file is no table, of another format, incomplete or changed since it was made.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        entries, checksum = content.pop("entries"), content.pop("checksum")
        lines = [json.dumps(entry) for entry in entries]
        if content["format"] != FORMAT:
            raise TableError(f"{path} has format {content['format']}, this version reads {FORMAT}; update crystaljax")
        if _checksum(content, lines) != checksum:
            raise TableError(f"{path} is not as it was made: its checksum differs; restore the file, or make it anew")
        table = _from_json(content, entries)
    except TableError:
        raise
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise TableError(f"{path} is not a table of results ({type(error).__name__}: {error}); restore it") from error
    expected = [symbols_of(numbers) for numbers in labelings(table.skeleton, table.vocabulary)[0]]
    if [entry.elements for entry in table.entries] != expected:
        raise TableError(f"{path} lacks crystals or has others than its skeleton and vocabulary allow; make it anew")
    return table


def shipped() -> list[str]:
    """Names of the tables that the package ships."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


@functools.cache
def load(name: str) -> Table:
    """A table that the package ships, such as ``band_gap-RocksaltAB``; raises ``TableError`` for an unknown name."""
    if name not in shipped():
        raise TableError(f"no table {name!r}; the package has {', '.join(shipped())}")
    return read(FOLDER / f"{name}.json")


def _header(table: Table) -> dict[str, Any]:
    skeleton = table.skeleton
    return {
        "format": FORMAT,
        "property": table.property,
        "unit": UNITS[table.property],
        "skeleton": {
            "name": skeleton.name,
            "source": skeleton.source,
            "lattice": skeleton.lattice.tolist(),
            "frac_coords": skeleton.frac_coords.tolist(),
            "species": list(skeleton.species),
        },
        "vocabulary": {"name": table.vocabulary.name, "symbols": list(table.vocabulary.symbols)},
        "origin": dict(table.origin),
    }


def _to_json(entry: Entry) -> dict[str, Any]:
    shown = {"elements": list(entry.elements), "status": entry.status.name, "value": entry.value}
    known = {} if entry.caveats is None else {"caveats": caveats.names(entry.caveats)}
    return shown | {"message": entry.message, "details": dict(entry.details)} | known


def _from_json(header: dict[str, Any], entries: list[dict[str, Any]]) -> Table:
    skeleton, vocabulary = header["skeleton"], header["vocabulary"]
    return Table(
        property=header["property"],
        skeleton=Skeleton(
            skeleton["name"],
            np.array(skeleton["lattice"]),
            np.array(skeleton["frac_coords"]),
            tuple(skeleton["species"]),
            skeleton["source"],
        ),
        vocabulary=Vocabulary(vocabulary["name"], tuple(vocabulary["symbols"])),
        entries=tuple(
            Entry(
                tuple(e["elements"]),
                Status[e["status"]],
                e["value"],
                e["message"],
                e["details"],
                caveats.parse(e["caveats"]) if "caveats" in e else None,
            )
            for e in entries
        ),
        origin=header["origin"],
    )


def _checksum(header: Mapping[str, Any], lines: Sequence[str]) -> str:
    """SHA-256 of everything else in the file, white space aside."""
    return hashlib.sha256("\n".join([json.dumps(header, sort_keys=True), *lines]).encode()).hexdigest()
