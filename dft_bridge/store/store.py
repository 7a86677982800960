"""Results by key, on whichever database."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from crystaljax.status import Status
from dft_bridge.engines.base import Result
from dft_bridge.keys import KeyRing
from dft_bridge.store import databases, schema
from dft_bridge.store.records import Record, Row, result_of
from dft_bridge.store.table import CHUNK, delete_rows, find, insert_rows, read_rows

PATH_VARIABLE = "CRYSTALJAX_STORE"
"""Environment variable that names the default store, a file or a URL."""
SAME_VALUE = 1e-6
"""Relative difference up to which two values of one key are one number, calculated on two machines."""


class StoreError(RuntimeError):
    """The store cannot be read or written; the message says why and what to do."""


def default_path() -> str:
    """``$CRYSTALJAX_STORE``, or ``crystaljax/results.db`` in the user's data folder."""
    data_home = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return os.environ.get(PATH_VARIABLE) or str(Path(data_home, "crystaljax", "results.db").expanduser())


@dataclasses.dataclass(frozen=True)
class Conflict:
    """Two different values under one key: an engine that is not deterministic, or a wrong fingerprint."""

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
        refused: rows whose key is not that of their crystal, property and settings: changed or damaged.
    """

    added: int = 0
    replaced: int = 0
    known: int = 0
    conflicts: list[Conflict] = dataclasses.field(default_factory=list)
    refused: int = 0


class Store:
    """Results by key. Thread-safe, and safe for several processes on one database."""

    def __init__(self, where: str | os.PathLike[str] | None = None, create: bool = True):
        """Nothing is opened before the first use.

        Args:
            where: path of an SQLite file or URL of a PostgreSQL database (``postgresql://user@host/name``), by default
                :func:`default_path`.
            create: make the file if there is none.

        Raises:
            StoreError: PostgreSQL needs a package that is missing; says which.
        """
        try:
            self.database = databases.connect(where or default_path())
        except ModuleNotFoundError as error:
            raise StoreError(str(error)) from error
        self._create = create
        self._lock = threading.Lock()
        self._ready = False

    @property
    def name(self) -> str:
        """Path or URL, without the password."""
        return self.database.name

    @property
    def path(self) -> Path | None:
        """The file; ``None`` on a server."""
        return getattr(self.database, "path", None)

    def open(self) -> None:
        """Create the store if there is none, bring an old one up to date.

        Raises:
            StoreError: it cannot be written, or is from a newer version.
        """
        with self.transaction(write=True):
            pass

    def read(self, keys: Iterable[str]) -> dict[str, Result]:
        """The results of those of the keys that are known."""
        with self.transaction() as connection:
            rows = find(self.database, connection, keys, "found.value, systems.key_value_pairs, systems.data")
        decode = self.database.decode
        return {key: result_of(decode(pairs), decode(data)) for key, pairs, data in rows}

    def write(self, records: Sequence[Record]) -> None:
        """Store the records in one transaction, durable on return; a key that is there already keeps its row."""
        distinct: dict[str, Record] = {}
        for record in records:
            distinct.setdefault(record.key, record)
        with self.transaction(write=True) as connection:
            for (key,) in find(self.database, connection, distinct, "found.value"):
                del distinct[key]
            insert_rows(self.database, connection, [Row.of(record) for record in distinct.values()])

    def __len__(self) -> int:
        with self.transaction() as connection:
            return self.database.execute(connection, "SELECT COUNT(*) FROM systems").fetchone()[0]

    def rows(self, data: bool = True) -> Iterator[Row]:
        """All rows, oldest first; ``data``: with their fingerprint, details, message and log.

        Reads only, also a store of an older version. Others may write meanwhile; their rows come last.
        """
        last = 0
        while True:
            with self.transaction(upgrade=False) as connection:
                if not last and not schema.version(self.database, connection):
                    return
                rows = list(read_rows(self.database, connection, after=last, data=data))
            if not rows:
                return
            yield from rows
            last = rows[-1].id

    def version(self) -> int:
        """The schema of the store as it is; 0 if it is empty."""
        with self.transaction(upgrade=False) as connection:
            return schema.version(self.database, connection)

    def merge(self, rows: Iterable[Row], version: int = schema.SCHEMA) -> Merged:
        """Take over rows of another store: no key twice, a success wins over a failure.

        In chunks, so that other processes come in between; repeating it after an interruption does no harm.

        Args:
            rows: as :meth:`rows` gives them.
            version: the schema they come from; older ones get their present key.
        """
        merged, keys = Merged(), KeyRing()
        chunk: dict[str, Row] = {}
        for row in rows:
            key = row.expected_key(keys)
            if version == schema.SCHEMA and key != row.key:
                merged.refused += 1
                continue
            row = row.with_key(key)
            if key in chunk or len(chunk) == CHUNK:
                self._merge(chunk, merged)
                chunk = {}
            chunk[key] = row
        self._merge(chunk, merged)
        return merged

    def _merge(self, theirs: dict[str, Row], merged: Merged) -> None:
        with self.transaction(write=True) as connection:
            found = find(self.database, connection, theirs, "found.value, systems.id, systems.key_value_pairs")
            ours = {key: (row_id, self.database.decode(pairs)) for key, row_id, pairs in found}
            better = [
                key for key, (_, pairs) in ours.items() if Status[pairs["status"]] != Status.OK == theirs[key].status
            ]
            delete_rows(self.database, connection, [ours[key][0] for key in better])
            new = [row for key, row in theirs.items() if key not in ours or key in better]
            insert_rows(self.database, connection, new)
        merged.replaced += len(better)
        merged.added += len(new) - len(better)
        merged.known += len(theirs) - len(new)
        for key, (_, pairs) in ours.items():
            row, value = theirs[key], pairs.get("value", math.nan)
            if abs(value - row.value) > SAME_VALUE * max(abs(value), abs(row.value)):
                merged.conflicts.append(Conflict(key, row.formula, row.property, value, row.value))

    @contextlib.contextmanager
    def transaction(self, write: bool = False, upgrade: bool = True) -> Iterator[Any]:
        """For this package: a transaction, the only one in this process; ``upgrade``: make or renew the store first."""
        with self._lock, self._explained():
            if not self._create and not self.database.exists():
                raise StoreError(f"there is no store {self.name}")
            if upgrade and not self._ready:
                self._make_ready()
            with self.database.transaction(write) as connection:
                yield connection

    def _make_ready(self) -> None:
        version = 0
        if self.database.exists():
            with self.database.transaction(write=False) as connection:
                version = schema.version(self.database, connection)
        if version == 0:
            self.database.create()
        if version < schema.SCHEMA:
            with self.database.transaction(write=True) as connection:
                schema.upgrade(self.database, connection)
        self._ready = True

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns errors of the database and of the file system into :class:`StoreError`."""
        elsewhere = f"or name another store (store=..., or the environment variable {PATH_VARIABLE})"
        try:
            yield
        except schema.NotAStore as error:
            raise StoreError(f"cannot use {self.name} as a store: {error}, {elsewhere}") from error
        except OSError as error:
            raise StoreError(f"cannot use the store {self.name}: {error}; make it usable, {elsewhere}") from error
        except Exception as error:
            advice = self.database.advice(error)
            if advice is None:
                raise
            raise StoreError(f"cannot use the store {self.name}: {advice}, {elsewhere}") from error
