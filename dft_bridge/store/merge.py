"""Rows of two origins under one key each: no key twice, a success wins over a failure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from crystaljax.dft_bridge.store.databases import Database
from crystaljax.dft_bridge.store.records import Row
from crystaljax.dft_bridge.store.table import CHUNK, delete_rows, find, insert_rows
from crystaljax.status import Status

SAME_VALUE = 1e-6
"""Relative difference up to which two values of one key are one number, calculated on two machines."""

NAMED = 1000
"""Refused rows that are named one by one; a file of somebody else may hold any number."""


@dataclasses.dataclass(frozen=True)
class Conflict:
    """Two different values under one key: the engine is not deterministic, or a fingerprint lacks a setting."""

    key: str
    formula: str
    property: str
    ours: float
    theirs: float


@dataclasses.dataclass
class Merged:
    """What came of rows that were to be merged into a store.

    Attributes:
        added: rows with new keys.
        replaced: failures that gave way to a success.
        known: rows whose key was there already.
        conflicts: of these, those whose value is another; the store keeps its own.
        refused: rows that make no sense, or whose key is not that of their crystal, property and settings: changed or
            damaged.
        problems: why, of the first :data:`NAMED` of them.
    """

    added: int = 0
    replaced: int = 0
    known: int = 0
    conflicts: list[Conflict] = dataclasses.field(default_factory=list)
    refused: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)

    def refuse(self, problem: str) -> None:
        """Count a row that is not taken over."""
        self.refused += 1
        if len(self.problems) < NAMED:
            self.problems.append(problem)


def chunks(rows: Iterable[Row]) -> Iterator[dict[str, Row]]:
    """The rows by key, some at a time, in their order; a key comes once in a chunk."""
    chunk: dict[str, Row] = {}
    for row in rows:
        if row.key in chunk or len(chunk) == CHUNK:
            yield chunk
            chunk = {}
        chunk[row.key] = row
    if chunk:
        yield chunk


def merge_chunk(database: Database, connection: Any, theirs: Mapping[str, Row], merged: Merged) -> list[Row]:
    """Merge rows, by key, into the tables within a writing transaction; counts in ``merged``, returns what is new."""
    found = find(database, connection, theirs, "found.value, systems.id, systems.key_value_pairs")
    ours = {key: (row_id, database.decode(pairs)) for key, row_id, pairs in found}
    failed = {key: row_id for key, (row_id, pairs) in ours.items() if pairs["status"] != Status.OK.name}
    better = {key: failed[key] for key in failed if theirs[key].status == Status.OK}
    delete_rows(database, connection, list(better.values()))
    new = [row for key, row in theirs.items() if key not in ours or key in better]
    insert_rows(database, connection, new)
    merged.replaced += len(better)
    merged.added += len(new) - len(better)
    merged.known += len(theirs) - len(new)
    for key, (_, pairs) in ours.items():
        row, value = theirs[key], pairs.get("value", math.nan)
        if abs(value - row.value) > SAME_VALUE * max(abs(value), abs(row.value)):
            merged.conflicts.append(Conflict(key, row.formula, row.property, value, row.value))
    return new
