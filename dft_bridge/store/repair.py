"""A damaged store becomes a sound one: what is good of the database, and the rest from its journal."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from crystaljax.dft_bridge.keys import KeyRing
from crystaljax.dft_bridge.store.store import Store, StoreError
from crystaljax.dft_bridge.store.verify import Findings, good_rows


def repair(store: Store) -> tuple[Findings, Path]:
    """Make the file of a store anew; the damaged one stays, under another name.

    Who writes to the store meanwhile waits, and then writes to the new file. A crash in the middle leaves the store as
    damaged as it was, to be repaired again.

    Returns:
        What was found, and where the damaged file is now.

    Raises:
        StoreError: there is no such file, it is on a server, its disk is full, or another process keeps it locked.
    """
    path, journal = store.path, store.database.journal
    if path is None or journal is None:
        raise StoreError(f"the server of {store.name} looks after its own pages; ask who runs it")
    if not path.exists():
        raise StoreError(f"there is no store {store.name}")
    try:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent))
            damaged, alone = stack.enter_context(_locked(store))
            before = _identity(os.fstat(damaged.fileno())), journal.size()
            new, findings, keys = Store(Path(folder, path.name)), Findings(), KeyRing()
            new.open()
            good = good_rows(store, findings, alone)
            new.merge(row.with_key(row.expected_key(keys)) for row in good)  # of old ones, new keys
            if before != (_identity(path.stat()), journal.size()):
                raise StoreError(f"another process has changed {store.name}; end it and repair again")
            kept = _copied(damaged, path)
            shutil.copymode(path, new.path)
            if new.database.journal.exists():
                new.database.journal.path.replace(journal.path)
            for file in _of_sqlite(path):  # SQLite would play an old one back into the new file
                file.unlink(missing_ok=True)
            new.path.replace(path)
    except OSError as error:
        raise StoreError(f"cannot repair {store.name}: {error}; it is as it was") from error
    return findings, kept


@contextlib.contextmanager
def _locked(store: Store) -> Iterator[tuple[BinaryIO, bool]]:
    """The file of a store, to be read, and whether nobody else can write to it meanwhile."""
    while True:
        # Closed after the lock is given back: to close a file gives up all locks that a process has on it.
        with open(store.path, "rb") as file, store.only_writer() as alone:
            if _identity(os.fstat(file.fileno())) == _identity(store.path.stat()):
                yield file, alone
                return
            # Another process has repaired it while we waited.


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _copied(damaged: BinaryIO, path: Path) -> Path:
    """A copy of the damaged store, under a name that no file has."""
    for number in itertools.count():
        with contextlib.suppress(FileExistsError):
            name = path.with_name(f"{path.name}.damaged{number or ''}")
            with open(name, "xb") as copy:
                shutil.copyfileobj(damaged, copy)
            shutil.copystat(path, name)
            return name
    raise AssertionError


def _of_sqlite(path: Path) -> list[Path]:
    """What SQLite keeps beside a file, or an interrupted process has left there."""
    return [path.with_name(path.name + suffix) for suffix in ("-journal", "-wal", "-shm")]
