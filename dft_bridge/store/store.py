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
from crystaljax.dft_bridge.store.journal import Added
from crystaljax.dft_bridge.store.merge import Merged, chunks, merge_chunk
from crystaljax.dft_bridge.store.records import UNREADABLE, Record, Row, result_of
from crystaljax.dft_bridge.store.table import all_rows, find, read_rows
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
        self._noted: tuple[str, Added] | None = None  # by the transaction that runs: its first key, its part

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
        """Store the records in one transaction, durable on return.

        A key that is there already keeps its row, but a failure gives way to a success.
        """
        rows: dict[str, Row] = {}
        for record in records:
            rows.setdefault(record.key, Row.of(record))
        with self.transaction(write=True) as connection:
            self._note(connection, merge_chunk(self.database, connection, rows, Merged()))

    def __len__(self) -> int:
        with self.transaction() as connection:
            return self.database.execute(connection, "SELECT COUNT(*) FROM systems").fetchone()[0]

    def rows(self, data: bool = True, problems: list[str] | None = None) -> Iterator[Row]:
        """All rows, oldest first; ``data``: with their fingerprint, details, message and log.

        Reads only, also a store of an older version. Others may write meanwhile; their rows come last. A row that makes
        no sense (:meth:`~crystaljax.dft_bridge.store.records.Row.check`) is left out, and named in ``problems``.

        Raises:
            StoreError: there is such a row, and no list for it; names the row.
        """
        last = 0
        while True:
            with self.transaction(upgrade=False) as connection:
                if not last and not schema.version(self.database, connection):
                    return
                found = list(read_rows(self.database, connection, after=last, data=data))
            if not found:
                return
            for id, row in found:
                try:
                    if isinstance(row, Exception):
                        raise row
                    row.check(data)
                except UNREADABLE as error:
                    problem = f"row {id} of {self.name} is no result ({str(error) or type(error).__name__})"
                    if problems is None:
                        raise StoreError(
                            f"{problem}; `crystaljax store verify` says more, `repair` drops it"
                        ) from error
                    problems.append(problem)
                    continue
                yield row
            last = found[-1][0]

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
                    row.check()
                    key = row.expected_key(keys)
                    if version == schema.SCHEMA and key != row.key:
                        raise ValueError("its key is not that of its crystal, property and settings")
                except UNREADABLE as error:  # no crystal, or what no result holds
                    merged.refuse(f"{f'row {row.id}: ' if row.id else ''}{error}")
                else:
                    yield row.with_key(key)

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
            self._noted = None
            try:
                with self.database.transaction(write) as connection:
                    yield connection
            except BaseException:
                self._take_back()
                raise

    @contextlib.contextmanager
    def only_writer(self) -> Iterator[bool]:
        """For this package: nobody writes to the store, see :meth:`~databases.Database.only_writer`."""
        with contextlib.ExitStack() as stack:
            with self._explained():
                if not self.database.exists():
                    raise StoreError(f"there is no store {self.name}")
                alone = stack.enter_context(self.database.only_writer())
            yield alone

    def _note(self, connection: Any, rows: Sequence[Row]) -> None:
        """Add rows that are about to be committed to the journal; a store that has none yet gets one with all rows."""
        journal = self.database.journal
        if journal is None or not rows:
            return
        if journal.exists():
            self._noted = rows[0].key, journal.append(rows, schema.SCHEMA)
        else:
            journal.create(all_rows(self.database, connection), schema.SCHEMA)
            self._noted = rows[0].key, Added(0, journal.size())

    def _take_back(self) -> None:
        """Remove from the journal what was noted in a transaction that failed after all: it would be noted again.

        Not what others may have noted since, nor what the database has in spite of its error.
        """
        if self._noted is None:
            return
        key, added = self._noted
        with contextlib.suppress(Exception), self.database.transaction(write=True) as connection:
            if not list(find(self.database, connection, [key], "found.value")):
                self.database.journal.take_back(added)

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
