"""A damaged store becomes a sound one: what is good of the database, and the rest from its journal."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

from crystaljax.dft_bridge.keys import KeyRing
from crystaljax.dft_bridge.store.store import Store, StoreError
from crystaljax.dft_bridge.store.verify import Findings, good_rows


def repair(store: Store) -> tuple[Findings, Path]:
    """Make the file of a store anew; the damaged one stays, under another name.

    A crash in the middle leaves the store as damaged as it was, to be repaired again.

    Returns:
        What was found, and where the damaged file is now.

    Raises:
        StoreError: there is no such file, it is on a server, its disk is full, or another process writes to it.
    """
    path, journal = store.path, store.database.journal
    if path is None or journal is None:
        raise StoreError(f"the server of {store.name} looks after its own pages; ask who runs it")
    new = Store(path.with_name(path.name + ".repaired"))
    try:
        _remove(new)
        before, findings, keys = journal.size(), Findings(), KeyRing()
        new.open()
        new.merge(row.with_key(row.expected_key(keys)) for row in good_rows(store, findings))  # of old ones, new keys
        if journal.size() != before:
            raise StoreError(f"another process writes to {store.name}; end it and repair again")
        kept = _free(path)
        shutil.copy2(path, kept)
        if new.database.journal.exists():
            new.database.journal.path.replace(journal.path)
        for file in _of_sqlite(path):  # SQLite would play an old one back into the new file
            file.unlink(missing_ok=True)
        new.path.replace(path)
    except OSError as error:
        raise StoreError(f"cannot repair {store.name}: {error}; it is as it was") from error
    finally:
        _remove(new)
    return findings, kept


def _free(path: Path) -> Path:
    """A name that no file has, for the damaged store."""
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
    return next(name for name in names if not name.exists())


def _of_sqlite(path: Path) -> list[Path]:
    """What SQLite keeps beside a file, or an interrupted process has left there."""
    return [path.with_name(path.name + suffix) for suffix in ("-journal", "-wal", "-shm")]


def _remove(store: Store) -> None:
    for file in (store.path, store.database.journal.path, *_of_sqlite(store.path)):
        file.unlink(missing_ok=True)
