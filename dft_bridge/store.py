"""The store: every calculation that was ever finished, failures included, in one ASE database file.

It is SQLite in ASE's own layout, so ``ase db results.db`` lists it and ``ase.db.connect`` reads it. A row holds the
crystal, key-value pairs (:data:`COLUMNS`) and, as ``data``, the fingerprint of the engine, the details of the
calculation and its message. What :meth:`Store.write` has written is on disk when it returns, and any number of
processes may use one file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sqlite3
import threading
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ase.db
import numpy as np
from ase.data import atomic_masses
from ase.db.core import bytes_to_object, now, object_to_bytes

from crystaljax.status import Status
from dft_bridge.engines.base import Crystal, Result

PATH_VARIABLE = "CRYSTALJAX_STORE"
"""Environment variable that names the default store."""
COLUMNS = ("formula", "property", "value", "status", "engine", "seconds", "key")
"""What is worth listing: ``ase db results.db -c formula,property,value,status,engine``. Failures have no value."""
BUSY_SECONDS = 60
"""How long to wait while another process writes."""
_PERIODIC = 1 + 2 + 4  # ASE's code for all three directions

# ASE indexes key-value pairs by name only. The value index makes a lookup one probe per key however large the file
# is; that it is unique makes SQLite itself refuse a key twice.
_INDEX = "CREATE UNIQUE INDEX IF NOT EXISTS crystaljax_key ON text_key_values(value) WHERE key='key'"
# Spelt out, since SQLite's planner would rather walk through all keys: CROSS JOIN keeps the order of the tables.
_MATCH = """
FROM json_each(?) AS wanted
CROSS JOIN text_key_values AS found INDEXED BY crystaljax_key ON found.key='key' AND found.value = wanted.value
"""
_EXISTING = "SELECT found.value" + _MATCH
_FIND = (
    "SELECT found.value, systems.key_value_pairs, systems.data" + _MATCH + "CROSS JOIN systems ON systems.id = found.id"
)

_ADVICE = {
    sqlite3.SQLITE_FULL: "the disk is full; free some space",
    sqlite3.SQLITE_READONLY: "it is read-only; make it writable",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; check its folder and permissions",
    sqlite3.SQLITE_NOTADB: "it is not a database; move it away",
    sqlite3.SQLITE_CORRUPT: "it is damaged; move it away or restore a copy",
    sqlite3.SQLITE_BUSY: f"another process has kept it locked for {BUSY_SECONDS} s; end that process",
}


class StoreError(RuntimeError):
    """The store cannot be read or written; the message says why and what to do."""


def default_path() -> Path:
    """``$CRYSTALJAX_STORE``, or ``crystaljax/results.db`` in the user's data folder."""
    if os.environ.get(PATH_VARIABLE):
        return Path(os.environ[PATH_VARIABLE])
    data_home = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data_home, "crystaljax", "results.db")


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished calculation.

    Attributes:
        key: see :mod:`dft_bridge.keys`.
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
        return {
            "fingerprint": dict(self.fingerprint),
            "details": self.result.details,
            "message": self.result.message,
        }


class Store:
    """Results by key. Thread-safe, and safe for several processes on one file."""

    def __init__(self, path: str | os.PathLike[str] | None = None):
        """``path`` of the file, by default :func:`default_path`. Nothing is opened before the first use."""
        self.path = Path(path or default_path()).expanduser().absolute()
        self._lock = threading.Lock()
        self._database: Any = None

    def open(self) -> None:
        """Create the file if there is none, and raise :class:`StoreError` if it cannot be written."""
        with self._transaction():
            pass

    def read(self, keys: Iterable[str]) -> dict[str, Result]:
        """The results of those of the keys that are known."""
        with self._transaction(immediate=False) as connection:
            rows = connection.execute(_FIND, [json.dumps(list(keys))]).fetchall()
        return {key: _result(json.loads(pairs), bytes_to_object(data)) for key, pairs, data in rows}

    def write(self, records: Sequence[Record]) -> None:
        """Store the records in one transaction, durable on return; a key that is there already keeps its row."""
        with self._transaction() as connection:
            distinct = {record.key: record for record in reversed(records)}  # the first of equal keys
            for (key,) in connection.execute(_EXISTING, [json.dumps(list(distinct))]).fetchall():
                del distinct[key]
            _insert(connection, list(distinct.values()))

    def __len__(self) -> int:
        with self._transaction(immediate=False) as connection:
            return connection.execute("SELECT COUNT(*) FROM systems").fetchone()[0]

    @contextlib.contextmanager
    def _transaction(self, immediate: bool = True) -> Iterator[sqlite3.Connection]:
        """A transaction, the only one in this process; ``immediate``: the only writing one in any process."""
        with self._lock, self._explained():
            if self._database is None:
                self._database = self._connect()
            with self._database as database:
                database.connection.execute(f"PRAGMA busy_timeout={1000 * BUSY_SECONDS}")
                database.connection.execute("BEGIN IMMEDIATE" if immediate else "BEGIN")
                yield database.connection

    def _connect(self) -> Any:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # SQLite's own locks are enough; ASE's lock file would outlive a killed process.
        database = ase.db.connect(self.path, type="db", use_lock_file=False)
        with database:
            # Two processes may find no file at the same moment: the lock lets one create the tables.
            database.connection.execute(f"PRAGMA busy_timeout={1000 * BUSY_SECONDS}")
            database.connection.execute("BEGIN IMMEDIATE")
            with database.managed_connection() as connection:
                connection.execute(_INDEX)
        return database

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns errors of SQLite, ASE and the file system into :class:`StoreError`."""
        elsewhere = f"or name another file (store=..., or the environment variable {PATH_VARIABLE})"
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", -1)
            advice = _ADVICE.get(code & 0xFF, str(error)) if code >= 0 else str(error)
            raise StoreError(f"cannot use the store {self.path}: {advice}, {elsewhere}") from error
        except OSError as error:
            raise StoreError(f"cannot use the store {self.path}: {error}; make it usable, {elsewhere}") from error


def _insert(connection: sqlite3.Connection, records: Sequence[Record]) -> None:
    """Add rows in ASE's layout, all at once: a fifth of the time that ASE's own ``write`` takes row by row."""
    (last,) = connection.execute("SELECT COALESCE(MAX(id), 0) FROM systems").fetchone()
    time = now()
    systems, species, names, texts, numbers = [], [], [], [], []
    for row, record in enumerate(records, start=last + 1):
        crystal, pairs = record.crystal, record.pairs()
        elements = np.asarray(crystal.numbers, dtype="<i4")
        systems.append(
            {
                "id": row,
                "unique_id": uuid.uuid4().hex,
                "ctime": time,
                "mtime": time,
                "username": os.getenv("USER"),
                "numbers": elements.tobytes(),
                "positions": np.asarray(crystal.frac_coords @ crystal.lattice, dtype="<f8").tobytes(),
                "cell": np.asarray(crystal.lattice, dtype="<f8").tobytes(),
                "pbc": _PERIODIC,
                "key_value_pairs": json.dumps(pairs),
                "data": object_to_bytes(record.data()),
                "natoms": len(elements),
                "volume": float(abs(np.linalg.det(crystal.lattice))),
                "mass": float(atomic_masses[elements].sum()),
                "charge": 0.0,
            }
        )
        species += [(number, count, row) for number, count in Counter(elements.tolist()).items()]
        names += [(name, row) for name in pairs]
        texts += [(name, value, row) for name, value in pairs.items() if isinstance(value, str)]
        numbers += [(name, value, row) for name, value in pairs.items() if not isinstance(value, str)]
    if not systems:
        return
    columns = list(systems[0])
    marks = ", ".join(f":{column}" for column in columns)
    connection.executemany(f"INSERT INTO systems ({', '.join(columns)}) VALUES ({marks})", systems)
    connection.executemany("INSERT INTO species (Z, n, id) VALUES (?, ?, ?)", species)
    connection.executemany("INSERT INTO keys (key, id) VALUES (?, ?)", names)
    connection.executemany("INSERT INTO text_key_values (key, value, id) VALUES (?, ?, ?)", texts)
    connection.executemany("INSERT INTO number_key_values (key, value, id) VALUES (?, ?, ?)", numbers)


def _result(pairs: Mapping[str, Any], data: Mapping[str, Any]) -> Result:
    return Result(
        value=pairs.get("value", float("nan")),
        status=Status[pairs["status"]],
        seconds=pairs["seconds"],
        message=data["message"],
        details=dict(data["details"]),
    )
