"""The two databases a store may live in: an SQLite file and a PostgreSQL database, both in ASE's layout.

ASE's own code makes the tables, and decodes and encodes cells; statements are ours, since ASE writes row by row.
"""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

import ase.db
import orjson

from crystaljax.dft_bridge.store.journal import Journal
from crystaljax.urls import passwords, without_password

BUSY_SECONDS = 60
"""How long to wait while another process writes."""

# ASE indexes key-value pairs by name only. The value index makes a lookup one probe per key however large the table
# is; that it is unique makes the database itself refuse a key twice.
INDEX = "crystaljax_key"
_CREATE_INDEX = f"CREATE UNIQUE INDEX IF NOT EXISTS {INDEX} ON text_key_values(value) WHERE key='key'"
_PG_LOCK = 0x63727973  # any number that all of us share


class Database(Protocol):
    """What a store needs of a database. Nothing is opened before the first use; errors are the driver's own.

    Attributes:
        name: file or URL, fit to be shown.
        journal: what to write every row to before it is committed; ``None`` if the database itself survives damage.
        ase: ASE's object for the same database, which encodes and decodes cells.
        match: ``FROM ...`` of the rows ``found`` of ``text_key_values`` that hold one of the keys ``wanted``; one
            parameter, see :meth:`wanted`.
    """

    name: str
    journal: Journal | None
    ase: Any
    match: str

    def exists(self) -> bool:
        """Whether there is a file or server to connect to."""

    def create(self) -> None:
        """Make the tables and the index of keys where they are missing; several processes may do so at once."""

    @contextlib.contextmanager
    def transaction(self, write: bool) -> Iterator[Any]:
        """A connection, committed at the end or rolled back by an exception; ``write``: the only writing one."""

    @contextlib.contextmanager
    def only_writer(self) -> Iterator[bool]:
        """Nobody else writes meanwhile; nor do we, but to files. ``False`` if there is no way to see to it."""

    def execute(self, connection: Any, statement: str, arguments: Sequence[Any] = ()) -> Any:
        """The cursor of a statement, with ``?`` for each argument."""

    def insert(self, connection: Any, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Add rows to a table."""

    def next_ids(self, connection: Any, count: int) -> Sequence[int]:
        """Ids for new rows; none is given twice, also after its row was deleted."""

    def has(self, connection: Any, name: str) -> bool:
        """Whether there is a table or index of this name."""

    def programs(self, connection: Any) -> list[str]:
        """What of a file of somebody else would run when it is read or written, such as ``trigger x``."""

    def wanted(self, keys: Sequence[str]) -> Any:
        """The keys as the parameter of ``match``."""

    def decode(self, data: Any) -> Any:
        """The JSON object that ASE keeps in the column ``key_value_pairs`` or ``data``."""

    def integrity(self, connection: Any) -> list[str]:
        """What the database itself finds wrong with its pages."""

    def damaged(self, error: BaseException | None) -> bool:
        """Whether an error says that a part of the database cannot be read, and another part may be."""

    def advice(self, error: Exception) -> str | None:
        """What is wrong and what to do, for people; ``None`` if the error is not this database's."""


class Sqlite:
    """An SQLite file."""

    # Spelt out, since SQLite's planner would rather walk through all keys: CROSS JOIN keeps the order of the tables.
    match = (
        "FROM json_each(?) AS wanted CROSS JOIN text_key_values AS found INDEXED BY crystaljax_key "
        "ON found.key='key' AND found.value = wanted.value CROSS JOIN systems ON systems.id = found.id"
    )
    _advice = {
        sqlite3.SQLITE_FULL: "the disk is full; free some space",
        sqlite3.SQLITE_READONLY: "it is read-only; make it writable",
        sqlite3.SQLITE_CANTOPEN: "it cannot be opened; check its folder and permissions",
        sqlite3.SQLITE_NOTADB: "it is not a database; move it away",
        sqlite3.SQLITE_CORRUPT: "it is damaged; end its runs; `crystaljax store repair` makes it anew from its journal",
        sqlite3.SQLITE_BUSY: f"another process has kept it locked for {BUSY_SECONDS} s; end that process",
        sqlite3.SQLITE_IOERR: "reading or writing failed; check the disk and that its file system can lock files",
        sqlite3.SQLITE_PROTOCOL: "its file system does not lock files properly; move it to another one",
    }

    def __init__(self, path: Path):
        self.path = path
        self.name = str(path)
        self.journal = Journal(path)
        # SQLite's own locks are enough; ASE's lock file would outlive a killed process.
        self.ase = ase.db.connect(path, type="db", use_lock_file=False)

    def exists(self) -> bool:
        return self.path.exists()

    def create(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.ase:
            connection = self.ase.connection
            connection.execute(f"PRAGMA busy_timeout={1000 * BUSY_SECONDS}")
            # Two processes may find no file at the same moment: the lock lets one create the tables.
            connection.execute("BEGIN IMMEDIATE")
            with self.ase.managed_connection():
                connection.execute(_CREATE_INDEX)

    @contextlib.contextmanager
    def transaction(self, write: bool) -> Iterator[sqlite3.Connection]:
        connection = self._begun(write)
        with contextlib.closing(connection):
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # SQLite itself rolls back when the disk is full
                    connection.execute("ROLLBACK")
                raise

    def _begun(self, write: bool, renew: bool = True) -> sqlite3.Connection:
        """A connection in a transaction; a writing one has the lock of the file that has our name by then.

        ``renew``: also see to it that it has no write-ahead log, which breaks on shared folders.

        While we waited for the lock its owner may have put a repaired file in its place (:meth:`only_writer`). What is
        then written to the old one would be lost.
        """
        while True:
            before = self._identity()
            connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
            try:
                connection.execute("PRAGMA trusted_schema=OFF")  # the file may come from anybody
                # Durable also when the power fails right after a commit, on any file system.
                connection.execute("PRAGMA synchronous=EXTRA")
                if write and renew:
                    connection.execute("PRAGMA journal_mode=DELETE")
                connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                if not write or self._identity() == before:
                    return connection
            except BaseException:
                connection.close()
                raise
            connection.close()

    @contextlib.contextmanager
    def only_writer(self) -> Iterator[bool]:
        """As :meth:`Database.only_writer`; not even to a file that is put in this one's place.

        ``False``: the file is so damaged that it cannot be locked; then nobody can write to it, either.
        """
        try:
            connection = self._begun(write=True, renew=False)
        except sqlite3.Error as error:
            if not self.damaged(error):
                raise
            yield False
            return
        with contextlib.closing(connection):
            yield True  # closing rolls back: there is nothing to commit

    def _identity(self) -> tuple[int, int] | None:
        with contextlib.suppress(FileNotFoundError):
            found = self.path.stat()
            return found.st_dev, found.st_ino
        return None

    def execute(self, connection: sqlite3.Connection, statement: str, arguments: Sequence[Any] = ()) -> sqlite3.Cursor:
        return connection.execute(statement, arguments)

    def insert(self, connection: sqlite3.Connection, table: str, columns: Sequence[str], rows: Sequence[Any]) -> None:
        marks = ", ".join("?" * len(columns))
        connection.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", rows)

    def next_ids(self, connection: sqlite3.Connection, count: int) -> range:
        last = connection.execute("SELECT seq FROM sqlite_sequence WHERE name='systems'").fetchone()
        first = (last[0] if last else 0) + 1
        return range(first, first + count)

    def has(self, connection: sqlite3.Connection, name: str) -> bool:
        return bool(connection.execute("SELECT COUNT(*) FROM sqlite_master WHERE name=?", [name]).fetchone()[0])

    def programs(self, connection: sqlite3.Connection) -> list[str]:
        query = (
            "SELECT type || ' ' || name FROM sqlite_master WHERE type IN ('trigger', 'view') "
            "OR (type = 'table' AND sql LIKE 'CREATE VIRTUAL%') ORDER BY rowid"
        )
        return [name for (name,) in connection.execute(query)]

    def wanted(self, keys: Sequence[str]) -> str:
        return json.dumps(list(keys))

    def decode(self, data: str | bytes) -> Any:
        # ASE's binary form is JSON behind the arrays, behind its own offset: 8 if there are none. orjson takes a tenth
        # of the time, but knows no NaN.
        if isinstance(data, bytes) and int.from_bytes(data[:8], "little") != 8:
            return self.ase.decode(data)
        try:
            return orjson.loads(data[8:] if isinstance(data, bytes) else data)
        except orjson.JSONDecodeError:
            return self.ase.decode(data)

    def integrity(self, connection: sqlite3.Connection) -> list[str]:
        found = [problem for (problem,) in connection.execute("PRAGMA integrity_check(20)")]
        return [] if found == ["ok"] else found

    def damaged(self, error: BaseException | None) -> bool:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF  # none for text that is not UTF-8
        # Random bytes at the beginning of a store; any other file that is no database has no journal.
        headless = code == sqlite3.SQLITE_NOTADB and self.journal.exists()
        return isinstance(error, sqlite3.Error) and (code == sqlite3.SQLITE_CORRUPT or headless)

    def advice(self, error: Exception) -> str | None:
        if not isinstance(error, sqlite3.Error):
            return None
        code = getattr(error, "sqlite_errorcode", -1)
        if self.damaged(error):
            code = sqlite3.SQLITE_CORRUPT
        return self._advice.get(code & 0xFF, str(error)) if code >= 0 else str(error)


class Postgres:
    """A PostgreSQL database."""

    journal = None

    match = (
        "FROM text_key_values AS found JOIN systems ON systems.id = found.id "
        "WHERE found.key='key' AND found.value = ANY(?)"
    )
    _advice = {
        "53": "the server is out of disk, memory or connections; free some",
        "42501": "this user may not use its tables; ask for the rights",
        "25006": "it is read-only; connect to the primary server",
        "55P03": f"another process has kept it locked for {BUSY_SECONDS} s; end that process",
    }

    def __init__(self, url: str):
        self.name, self._url = without_password(url, "***"), url
        try:
            import psycopg2.extras

            self.ase = ase.db.connect(url)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"the store {self.name} needs {error.name}: pip install 'crystaljax[postgres]'", name=error.name
            ) from error
        self._driver = psycopg2

    def exists(self) -> bool:
        return True

    def create(self) -> None:
        with self.transaction(write=True) as connection:  # its lock lets one process create the tables
            with self.ase.managed_connection():
                pass
            self.execute(connection, _CREATE_INDEX)

    @contextlib.contextmanager
    def transaction(self, write: bool) -> Iterator[Any]:
        connection = self._driver.connect(self._url)
        self._driver.extras.register_default_jsonb(connection, loads=orjson.loads)
        with contextlib.closing(connection), connection:
            self.execute(connection, f"SET LOCAL lock_timeout = '{BUSY_SECONDS}s'")
            if write:
                self.execute(connection, f"SELECT pg_advisory_xact_lock({_PG_LOCK})")
            yield connection

    @contextlib.contextmanager
    def only_writer(self) -> Iterator[bool]:
        with self.transaction(write=True):
            yield True

    def execute(self, connection: Any, statement: str, arguments: Sequence[Any] = ()) -> Any:
        cursor = connection.cursor()
        cursor.execute(statement.replace("?", "%s"), arguments)
        return cursor

    def insert(self, connection: Any, table: str, columns: Sequence[str], rows: Sequence[Any]) -> None:
        statement = f"INSERT INTO {table} ({', '.join(columns)}) VALUES %s"
        with connection.cursor() as cursor:
            self._driver.extras.execute_values(cursor, statement, rows, page_size=1000)

    def next_ids(self, connection: Any, count: int) -> list[int]:
        ids = self.execute(connection, "SELECT nextval('systems_id_seq') FROM generate_series(1, ?)", [count])
        return [id for (id,) in ids.fetchall()]

    def has(self, connection: Any, name: str) -> bool:
        return self.execute(connection, "SELECT to_regclass(?)", [name]).fetchone()[0] is not None

    def programs(self, connection: Any) -> list[str]:
        return []  # they are the server's, not a file's

    def wanted(self, keys: Sequence[str]) -> list[str]:
        return list(keys)

    def decode(self, data: Any) -> Any:
        return self.ase.decode(data)

    def integrity(self, connection: Any) -> list[str]:
        return []  # the server looks after its own pages

    def damaged(self, error: BaseException | None) -> bool:
        return False

    def advice(self, error: Exception) -> str | None:
        if not isinstance(error, self._driver.Error):
            return None
        code = error.pgcode or ""
        known = [text for start, text in self._advice.items() if code.startswith(start)]
        reason = " ".join(str(error).split())
        for password in passwords(self._url):  # libpq quotes a URL that it cannot read
            reason = reason.replace(password, "***").replace(unquote(password), "***")
        if "no password supplied" in reason:
            return f"it needs a password: set PGPASSWORD, or write it into ~/.pgpass ({reason})"
        return f"{known[0]} ({reason})" if known else f"{reason}; check the URL and that the server runs"


def connect(where: str | Path) -> Database:
    """The database at a path or URL; raises ``ModuleNotFoundError`` with the fix if a package is missing."""
    if re.match(r"postgres(ql)?://", str(where)):
        return Postgres(str(where))
    return Sqlite(Path(where).expanduser().absolute())
