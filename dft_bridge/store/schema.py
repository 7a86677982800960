"""Versions of what a store holds, and how an old one becomes a new one.

The number stands in ASE's table ``information``. Version 1 had none: its keys depended on the axes and the origin that
described a crystal, its fingerprints were among the data, and there were no logs. Version 2 has the keys of
:mod:`crystaljax.dft_bridge.keys`, and fingerprints where ASE keeps the parameters of a calculator.
"""

from __future__ import annotations

import itertools
import json
import logging
from typing import Any

from crystaljax.dft_bridge.keys import KeyRing
from crystaljax.dft_bridge.store.databases import INDEX, Database
from crystaljax.dft_bridge.store.merge import Merged, chunks, merge_chunk
from crystaljax.dft_bridge.store.records import Row
from crystaljax.dft_bridge.store.table import CHUNK, delete_upto, read_rows

from crystaljax.errors import CrystalJAXError

logger = logging.getLogger(__name__)

SCHEMA = 2
_NAME = "crystaljax_schema"
_METADATA = {"title": "CrystalJAX results"}  # the heading of ASE's web view


class NotAStore(CrystalJAXError, ValueError):
    """The database holds something else, or what only a newer CrystalJAX reads; the message says what to do."""


def version(database: Database, connection: Any) -> int:
    """The version of a store; 0 if there is none yet.

    Raises:
        NotAStore: it is no store, or a newer one.
    """
    if not database.has(connection, "systems"):
        return 0
    query = f"SELECT value FROM information WHERE name='{_NAME}'"
    found = database.execute(connection, query).fetchone()
    if found is None:
        if database.has(connection, INDEX):
            return 1
        if database.execute(connection, "SELECT COUNT(*) FROM systems").fetchone()[0]:
            raise NotAStore("it is an ASE database of something else; give the store one of its own")
        return 0
    if int(found[0]) > SCHEMA:
        raise NotAStore(
            f"it has schema {found[0]}, which this CrystalJAX does not know (it knows {SCHEMA}): "
            "pip install --upgrade crystaljax"
        )
    return int(found[0])


def parse(line: str, keys: KeyRing) -> Row:
    """The row of a line of an export, under its present key.

    Raises:
        ValueError: the line is not one, is from a newer version, or was changed.
    """
    row, found = Row.from_json(line)
    if found > SCHEMA:
        raise ValueError(f"it has schema {found}, newer than {SCHEMA}: pip install --upgrade crystaljax")
    key = row.expected_key(keys)
    if found == SCHEMA and key != row.key:
        raise ValueError("its key belongs to another crystal, property or settings, so it was changed")
    return row.with_key(key)


def upgrade(database: Database, connection: Any) -> None:
    """Bring a store to the present version within a writing transaction; raises :class:`NotAStore`."""
    found = version(database, connection)
    if found == SCHEMA:
        return
    if found == 1:
        _from_version_1(database, connection)
    database.execute(connection, "DELETE FROM information WHERE name IN (?, 'metadata')", [_NAME])
    rows = [(_NAME, str(SCHEMA)), ("metadata", json.dumps(_METADATA))]
    database.insert(connection, "information", ("name", "value"), rows)


def _from_version_1(database: Database, connection: Any) -> None:
    """Write every row anew. Of those that turn out to be one crystal one stays, as in any merge."""
    keys, merged = KeyRing(), Merged()
    last = database.execute(connection, "SELECT MAX(id) FROM systems").fetchone()[0] or 0
    ranges = ((start, min(start + CHUNK, last)) for start in range(0, last, CHUNK))
    rows = itertools.chain.from_iterable(read_rows(database, connection, *ids) for ids in ranges)
    for chunk in chunks(row.with_key(row.expected_key(keys)) for row in rows):
        merge_chunk(database, connection, chunk, merged)
    delete_upto(database, connection, last)
    if last:
        logger.info(
            "store: new keys for %d results; %d that were there twice are gone, %d of them with another value",
            merged.added,
            merged.known + merged.replaced,
            len(merged.conflicts),
        )
