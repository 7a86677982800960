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

from crystaljax import caveats
from crystaljax.dft_bridge.engines.base import NO_TEXT, Crystal, Result, check_plain
from crystaljax.dft_bridge.engines.caveats import with_caveats
from crystaljax.dft_bridge.keys import KeyRing
from crystaljax.status import Status

COLUMNS = ("formula", "property", "value", "caveats", "status", "engine", "seconds", "key")
"""What is worth listing: ``ase db results.db -c formula,property,value,status,engine``. Failures have no value."""
LOG_CHARACTERS = 4000
"""How much of the end of an engine's log a row keeps."""
UNREADABLE = (
    ValueError,
    KeyError,
    TypeError,
    AssertionError,
    IndexError,
    AttributeError,
    OverflowError,
    RecursionError,
)
"""What decoding raises on bytes that are not what was written."""
MOST_SITES = 500
"""Of a crystal in a store: to find the key of a symmetric one takes memory that grows with the square of its sites, for
so many 0.3 GB and three seconds, and a file of somebody else could ask for any."""


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
        ok = result.status == Status.OK
        value = {"value": float(result.value)} if ok else {}
        known = {"caveats": caveats.text(result.caveats)} if ok and result.caveats is not None else {}
        return pairs | value | {"seconds": float(result.seconds)} | known

    def data(self) -> dict[str, Any]:
        """What the row keeps besides."""
        result = self.result
        message, log = (NO_TEXT.sub("\ufffd", text) for text in (result.message, result.log[-LOG_CHARACTERS:]))
        return {"details": result.details, "message": message, "log": log}


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

    def with_caveats(self) -> Row:
        """The row with the caveats of its value; an old one gets those that its crystal, details and settings tell."""
        if self.status != Status.OK or "caveats" in self.pairs:
            return self
        judged = with_caveats(self.result, self.crystal, self.property, self.fingerprint)
        return dataclasses.replace(self, pairs=self.pairs | {"caveats": caveats.text(judged.caveats)})

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
            if not isinstance(line, dict):
                raise ValueError("it is no JSON object")
            pairs = {name: line[name] for name in ("key", "property", "status", "engine", "value", "seconds")}
            if pairs["value"] is None:
                del pairs["value"]
            if "caveats" in line:
                pairs["caveats"] = line["caveats"]
            data = {"details": line["details"], "message": line["message"], "log": line.get("log", "")}
            numbers = _whole_numbers(line["numbers"])
            cell, positions = (_vectors(line[name], name) for name in ("cell", "positions"))
            created = _number(line["created"], "created")
            row = cls(cell, positions, numbers, pairs, line["fingerprint"], data, created, line["user"])
            if type(line["schema"]) is not int or line["schema"] < 1:
                raise ValueError(f"its schema is {line['schema']!r:.40}")
            row.check()
        except KeyError as error:
            raise ValueError(f"it has no {error}") from error
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        return row, line["schema"]

    def check(self, data: bool = True) -> None:
        """Raise ``ValueError`` that says what of a row makes no sense, or is not plain data; ``data``: it has some.

        A row may come from anybody. What is accepted here can be written, read and exported by every other part.
        """
        n = len(self.numbers)
        if not 0 < n <= MOST_SITES:
            raise ValueError(f"it has {n} sites; a crystal of a store has 1 to {MOST_SITES}")
        if self.cell.shape != (3, 3) or self.positions.shape != (n, 3):
            raise ValueError("numbers, cell and positions must be [N], [3, 3] and [N, 3]")
        if not (np.isfinite(self.cell).all() and np.isfinite(self.positions).all()):
            raise ValueError("its crystal has numbers that are not finite")
        if not ((self.numbers > 0) & (self.numbers < len(chemical_symbols))).all():
            raise ValueError(f"its atomic numbers must be 1-{len(chemical_symbols) - 1}")
        if not isinstance(self.pairs, dict) or self.pairs.get("status") not in list(Status.__members__):
            status = self.pairs.get("status") if isinstance(self.pairs, dict) else None
            raise ValueError(f"its status {status!r:.40} is not one of {', '.join(Status.__members__)}")
        has_value = "value" in self.pairs
        if has_value:
            _number(self.value, "value", finite=False)
        if (self.status == Status.OK) != has_value or (has_value and not math.isfinite(self.value)):
            raise ValueError(f"its status is {self.status.name}, its value is {self.value}")
        _number(self.pairs.get("seconds"), "seconds")
        if self.pairs["seconds"] < 0:
            raise ValueError(f"its seconds are {self.pairs['seconds']!r:.40}")
        texts = [self.pairs.get(name) for name in ("key", "property", "engine")]
        tables: list[Any] = []
        if data:
            if not isinstance(self.data, dict):
                raise ValueError("its data are no table")
            texts += [self.data.get("message"), self.data.get("log", "")]
            tables = [self.fingerprint, self.data.get("details")]
        if not all(isinstance(t, str) for t in texts) or not all(isinstance(t, dict) for t in tables):
            raise ValueError("key, property, engine, message and log must be texts, fingerprint and details tables")
        if not isinstance(self.user, str | None):
            raise ValueError(f"its user is {self.user!r:.40}, which is no name")
        _number(self.created, "created")
        for what, value in (("texts", [*texts, self.user or ""]), ("pairs", self.pairs)):
            check_plain(value, what)
        if data:
            check_plain(self.fingerprint, "fingerprint", finite=True)
            check_plain(self.data["details"], "details")
        if not isinstance(self.pairs.get("caveats", ""), str):
            raise ValueError(f"its caveats {self.pairs['caveats']!r:.40} are no text of codes")
        caveats.parse(self.pairs.get("caveats", caveats.NONE))

    @property
    def property(self) -> str:  # last, since it hides the decorator
        return self.pairs["property"]


def _number(value: Any, name: str, finite: bool = True) -> float:
    """A number that a float can hold; ``true`` is none, nor is a text."""
    try:
        if type(value) in (int, float) and (math.isfinite(value) or not finite):
            return float(value)
    except OverflowError:  # more digits than a float has
        pass
    raise ValueError(f"its {name} is {value!r:.40}, which is no {'finite ' if finite else ''}number")


def _whole_numbers(values: Any) -> np.ndarray:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError("its numbers must be a list of whole numbers")
    if not all(0 < value < len(chemical_symbols) for value in values):
        raise ValueError(f"its atomic numbers must be 1-{len(chemical_symbols) - 1}")
    return np.array(values, dtype=np.int32)


def _vectors(rows: Any, name: str) -> np.ndarray:
    """Float64 [..., 3] from lists of three numbers."""
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 3 for row in rows):
        raise ValueError("numbers, cell and positions must be [N], [3, 3] and [N, 3]")
    return np.array([[_number(value, name) for value in row] for row in rows], dtype=np.float64).reshape(-1, 3)


def result_of(pairs: Mapping[str, Any], data: Mapping[str, Any]) -> Result:
    """The result that a row holds."""
    return Result(
        value=pairs.get("value", math.nan),
        status=Status[pairs["status"]],
        seconds=pairs["seconds"],
        message=data["message"],
        details=data["details"],
        log=data.get("log", ""),
        caveats=caveats.parse(pairs["caveats"]) if "caveats" in pairs else None,
    )
