"""What is kept of a calculation, and how a row of ASE's layout, or a line of an export, holds it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from ase.db.core import now
from ase.formula import Formula
from crystaljax.dft_bridge.engines.base import Crystal, Result
from crystaljax.dft_bridge.keys import KeyRing

from crystaljax.status import Status

COLUMNS = ("formula", "property", "value", "status", "engine", "seconds", "key")
"""What is worth listing: ``ase db results.db -c formula,property,value,status,engine``. Failures have no value."""
LOG_CHARACTERS = 4000
"""How much of the end of an engine's log a row keeps."""


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished calculation.

    Attributes:
        key: see :mod:`crystaljax.dft_bridge.keys`.
        crystal: what was computed.
        property: name of the property.
        result: what became of it.
        engine: for people, such as ``gpaw 26.7.0, fast``.
        fingerprint: JSON-able facts that can change the number.
    """

    key: str
    crystal: Crystal
    property: str
    result: Result
    engine: str
    fingerprint: Mapping[str, Any]

    def pairs(self) -> dict[str, str | float]:
        """Key-value pairs of the row. NaN is no value, so that ``value>1`` selects what it should."""
        result = self.result
        pairs = {"key": self.key, "property": self.property, "status": result.status.name, "engine": self.engine}
        value = {"value": float(result.value)} if result.status == Status.OK else {}
        return pairs | value | {"seconds": float(result.seconds)}

    def data(self) -> dict[str, Any]:
        """What the row keeps besides."""
        result = self.result
        return {"details": result.details, "message": result.message, "log": result.log[-LOG_CHARACTERS:]}


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A row of a store.

    Attributes:
        cell: float64 [3, 3], rows a, b, c, Å.
        positions: float64 [N, 3], Cartesian, Å.
        numbers: int32 [N], atomic numbers.
        pairs: ASE's key-value pairs, see :meth:`Record.pairs`.
        fingerprint: ASE's parameters of the calculator; empty if it was not asked for, as is ``data``.
        data: see :meth:`Record.data`.
        created: years since 2000, as ASE has it.
        user: who wrote it.
        id: ASE's number of the row; 0 as long as it has none.
    """

    cell: np.ndarray
    positions: np.ndarray
    numbers: np.ndarray
    pairs: dict[str, Any]
    fingerprint: dict[str, Any]
    data: dict[str, Any]
    created: float
    user: str | None
    id: int = 0

    @classmethod
    def of(cls, record: Record) -> Row:
        """The row for a record, from now and by this user."""
        cell = np.asarray(record.crystal.lattice, dtype=np.float64)
        return cls(
            cell,
            record.crystal.frac_coords @ cell,
            np.asarray(record.crystal.numbers, dtype=np.int32),
            record.pairs(),
            dict(record.fingerprint),
            record.data(),
            now(),
            os.getenv("USER"),
        )

    @property
    def key(self) -> str:
        return self.pairs["key"]

    @property
    def calculator(self) -> str:
        """Name of the engine, for ASE."""
        return re.split("[ ,]", self.pairs["engine"])[0]

    @property
    def status(self) -> Status:
        return Status[self.pairs["status"]]

    @property
    def value(self) -> float:
        """NaN for a failure."""
        return self.pairs.get("value", math.nan)

    @property
    def result(self) -> Result:
        return result_of(self.pairs, self.data)

    @property
    def counts(self) -> Counter[str]:
        """Number of atoms by chemical symbol."""
        return Counter(chemical_symbols[number] for number in self.numbers)

    @property
    def formula(self) -> str:
        """Such as ``CaTiO3``; not reduced."""
        return Formula.from_dict(self.counts).format("metal")

    @functools.cached_property
    def crystal(self) -> Crystal:
        frac_coords = self.positions @ np.linalg.inv(self.cell)
        return Crystal(self.cell, frac_coords, self.numbers.astype(np.int64))

    def expected_key(self, keys: KeyRing) -> str:
        """The key that belongs to the row's crystal, property and settings."""
        # A failure that speaks of limits (time, memory) is filed under them.
        limits = None if self.status == Status.OK else self.data["details"].get("limits")
        return keys.key(self.crystal, self.property, self.fingerprint, limits)

    def with_key(self, key: str) -> Row:
        """The same row under another key."""
        return dataclasses.replace(self, pairs=self.pairs | {"key": key})

    def to_json(self, schema: int) -> str:
        """One line of an export. Exact: numbers have all their digits, NaN and infinities are written as such."""
        value = {"value": self.pairs.get("value")}
        arrays = {name: getattr(self, name).tolist() for name in ("numbers", "cell", "positions")}
        line = {"schema": schema, "formula": self.formula, **self.pairs, **value, **arrays}
        line |= {"fingerprint": self.fingerprint, **self.data, "created": self.created, "user": self.user}
        return json.dumps(line, separators=(",", ":"), default=np.ndarray.tolist)

    @classmethod
    def from_json(cls, text: str) -> tuple[Row, int]:
        """The row and the schema of a line of an export.

        Raises:
            ValueError: the line is not one; says what is missing or wrong.
        """
        try:
            line = json.loads(text)
            pairs = {name: line[name] for name in ("key", "property", "status", "engine", "value", "seconds")}
            if pairs["value"] is None:
                del pairs["value"]
            data = {"details": line["details"], "message": line["message"], "log": line.get("log", "")}
            cell, positions = (np.array(line[name], dtype=np.float64) for name in ("cell", "positions"))
            numbers = np.array(line["numbers"], dtype=np.int32)
            row = cls(cell, positions, numbers, pairs, line["fingerprint"], data, float(line["created"]), line["user"])
            schema = int(line["schema"])
            row.check()
        except KeyError as error:
            raise ValueError(f"it has no {error}") from error
        except TypeError as error:
            raise ValueError(str(error)) from error
        return row, schema

    def check(self) -> None:
        """Raise ``ValueError`` that says what of a row makes no sense."""
        n = len(self.numbers)
        if not n or self.cell.shape != (3, 3) or self.positions.shape != (n, 3):
            raise ValueError("numbers, cell and positions must be [N], [3, 3] and [N, 3]")
        if not (np.isfinite(self.cell).all() and np.isfinite(self.positions).all()):
            raise ValueError("its crystal has numbers that are not finite")
        if not ((self.numbers > 0) & (self.numbers < len(chemical_symbols))).all():
            raise ValueError(f"its atomic numbers must be 1-{len(chemical_symbols) - 1}")
        if self.pairs.get("status") not in Status.__members__:
            raise ValueError(f"its status {self.pairs.get('status')!r} is not one of {', '.join(Status.__members__)}")
        if (self.status == Status.OK) != math.isfinite(self.value):
            raise ValueError(f"its status is {self.status.name}, its value is {self.value}")
        texts = [self.pairs.get(name) for name in ("key", "property", "engine")] + [self.data.get("message")]
        tables = self.fingerprint, self.data.get("details")
        if not all(isinstance(t, str) for t in texts) or not all(isinstance(t, dict) for t in tables):
            raise ValueError("key, property, engine and message must be texts, fingerprint and details tables")
        if not (isinstance(self.pairs.get("seconds"), float | int) and self.pairs["seconds"] >= 0):
            raise ValueError(f"its seconds are {self.pairs.get('seconds')!r}")

    @property
    def property(self) -> str:  # last, since it hides the decorator
        return self.pairs["property"]


def result_of(pairs: Mapping[str, Any], data: Mapping[str, Any]) -> Result:
    """The result that a row holds."""
    return Result(
        value=pairs.get("value", math.nan),
        status=Status[pairs["status"]],
        seconds=pairs["seconds"],
        message=data["message"],
        details=data["details"],
        log=data.get("log", ""),
    )
