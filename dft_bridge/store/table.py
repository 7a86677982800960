"""Rows of ASE's tables, read and written many at a time: a fifth of the time that ASE takes row by row."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from ase.data import atomic_masses, atomic_numbers

from crystaljax.dft_bridge.store.databases import Database
from crystaljax.dft_bridge.store.records import UNREADABLE, Row

CHUNK = 1000
"""Rows read or written at a time."""
_PERIODIC = 1 + 2 + 4  # ASE's code for all three directions
_OF_A_ROW = ("species", "keys", "text_key_values", "number_key_values")


def read_rows(
    database: Database, connection: Any, after: int = 0, upto: int | None = None, data: bool = True
) -> Iterator[tuple[int, Row | Exception]]:
    """Ids and rows with an id above ``after``, by id: up to the id ``upto``, or else at most :data:`CHUNK`.

    In place of a row that cannot be decoded comes the reason.
    """
    extras = "calculator_parameters, data" if data else "NULL, NULL"
    query = f"SELECT id, ctime, username, numbers, positions, cell, key_value_pairs, {extras} FROM systems WHERE id > ?"
    query += f" ORDER BY id LIMIT {CHUNK}" if upto is None else f" AND id <= {upto} ORDER BY id"
    deblob, decode = database.ase.deblob, database.decode
    for id, created, user, numbers, positions, cell, pairs, parameters, more in database.execute(
        connection, query, [after]
    ):
        try:
            more = decode(more) if data else {}
            # Stores of the first version have the fingerprint among the data.
            fingerprint = decode(parameters) if parameters is not None else more.pop("fingerprint", {})
            row = Row(
                deblob(cell, shape=(3, 3)),
                deblob(positions, shape=(-1, 3)),
                deblob(numbers, np.int32),
                decode(pairs),
                fingerprint,
                more,
                created,
                user,
                id,
            )
        except UNREADABLE as error:
            yield id, error
        else:
            yield id, row


def all_rows(database: Database, connection: Any) -> Iterator[Row]:
    """All rows that can be decoded, by id."""
    last = 0
    while found := list(read_rows(database, connection, after=last)):
        yield from (row for _, row in found if isinstance(row, Row))
        last = found[-1][0]


def find(database: Database, connection: Any, keys: Iterable[str], columns: str) -> Iterable[tuple]:
    """The columns (of ``found`` and ``systems``) of the rows that hold one of the keys."""
    query = f"SELECT {columns} {database.match}"
    return database.execute(connection, query, [database.wanted(sorted(keys))])


def insert_rows(database: Database, connection: Any, rows: Sequence[Row]) -> None:
    """Add rows; their ids are new ones."""
    encode, blob = database.ase.encode, database.ase.blob
    systems, species, names, texts, numbers = [], [], [], [], []
    for id, row in zip(database.next_ids(connection, len(rows)), rows, strict=True):
        systems.append(
            {
                "id": id,
                "unique_id": uuid.uuid4().hex,
                "ctime": row.created,
                "mtime": row.created,
                "username": row.user,
                "numbers": blob(row.numbers),
                "positions": blob(row.positions),
                "cell": blob(row.cell),
                "pbc": _PERIODIC,
                "calculator": row.calculator,
                "calculator_parameters": encode(row.fingerprint),
                "key_value_pairs": encode(row.pairs),
                "data": encode(row.data, binary=True),
                "natoms": len(row.numbers),
                "volume": float(abs(np.linalg.det(row.cell))),
                "mass": float(atomic_masses[row.numbers].sum()),
                "charge": 0.0,
            }
        )
        species += [(atomic_numbers[symbol], count, id) for symbol, count in row.counts.items()]
        names += [(name, id) for name in row.pairs]
        texts += [(name, value, id) for name, value in row.pairs.items() if isinstance(value, str)]
        numbers += [(name, value, id) for name, value in row.pairs.items() if not isinstance(value, str)]
    if not systems:
        return
    database.insert(connection, "systems", list(systems[0]), [tuple(system.values()) for system in systems])
    database.insert(connection, "species", ("Z", "n", "id"), species)
    database.insert(connection, "keys", ("key", "id"), names)
    database.insert(connection, "text_key_values", ("key", "value", "id"), texts)
    database.insert(connection, "number_key_values", ("key", "value", "id"), numbers)


def delete_rows(database: Database, connection: Any, ids: Sequence[int]) -> None:
    """Delete the rows with these ids."""
    if not ids:
        return
    some = ", ".join(map(str, ids))
    for table in (*_OF_A_ROW, "systems"):
        database.execute(connection, f"DELETE FROM {table} WHERE id IN ({some})")


def delete_upto(database: Database, connection: Any, last: int) -> None:
    """Delete the rows with ids up to ``last``."""
    for table in (*_OF_A_ROW, "systems"):
        database.execute(connection, f"DELETE FROM {table} WHERE id <= ?", [last])
