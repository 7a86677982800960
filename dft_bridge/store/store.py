"""Results by key, on whichever database."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from crystaljax.dft_bridge.engines.base import Result
from crystaljax.dft_bridge.keys import KeyRing
from crystaljax.dft_bridge.store import databases, schema
from crystaljax.dft_bridge.store.merge import Merged, chunks, merge_chunk
from crystaljax.dft_bridge.store.records import Record, Row, result_of
from crystaljax.dft_bridge.store.table import all_rows, find, insert_rows, read_rows

from crystaljax.errors import CrystalJAXError

logger = logging.getLogger(__name__)

PATH_VARIABLE = "CRYSTALJAX_STORE"
"""Environment variable that names the default store, a file or a URL."""


class StoreError(CrystalJAXError, RuntimeError):
    """The store cannot be read or written; the message says why and what to do."""


def default_path() -> str:
    """``$CRYSTALJAX_STORE``, or ``crystaljax/results.db`` in the user's data folder."""
    data_home = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return os.environ.get(PATH_VARIABLE) or str(Path(data_home, "crystaljax", "results.db").expanduser())


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
        decode = self.database.decode
        with self.transaction() as connection:
            rows = find(self.database, connection, keys, "found.value, systems.key_value_pairs, systems.data")
            return {key: result_of(decode(pairs), decode(data)) for key, pairs, data in rows}

    def write(self, records: Sequence[Record]) -> None:
        """Store the records in one transaction, durable on return; a key that is there already keeps its row."""
        distinct: dict[str, Record] = {}
        for record in records:
            distinct.setdefault(record.key, record)
        with self.transaction(write=True) as connection:
            for (key,) in list(find(self.database, connection, distinct, "found.value")):
                del distinct[key]
            rows = [Row.of(record) for record in distinct.values()]
            insert_rows(self.database, connection, rows)
            self._note(connection, rows)

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

        def renewed() -> Iterator[Row]:
            for row in rows:
                try:
                    key = row.expected_key(keys)
                except ValueError:  # no crystal
                    key = ""
                if key and (key == row.key or version < schema.SCHEMA):
                    yield row.with_key(key)
                else:
                    merged.refused += 1

        for chunk in chunks(renewed()):
            with self.transaction(write=True) as connection:
                self._note(connection, merge_chunk(self.database, connection, chunk, merged))
        return merged

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

    def _note(self, connection: Any, rows: Sequence[Row]) -> None:
        """Add rows that are about to be committed to the journal; a store that has none yet gets one with all rows."""
        journal = self.database.journal
        if journal is None or not rows:
            return
        if journal.exists():
            journal.append(rows, schema.SCHEMA)
        else:
            journal.create(all_rows(self.database, connection), schema.SCHEMA)

    def _make_ready(self) -> None:
        version = 0
        if self.database.exists():
            with self.database.transaction(write=False) as connection:
                version = schema.version(self.database, connection)
        if version == 0:
            self.database.create()
            journal = self.database.journal
            if journal is not None and journal.exists():
                logger.warning(
                    "store: %s is new, but %s has results of an earlier one; `crystaljax store repair` takes them over",
                    self.name,
                    journal.path.name,
                )
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
