"""Versions of what a store holds, and how an old one becomes a new one.

The number stands in ASE's table ``information``. Version 1 had none: its keys depended on the axes and the origin that
described a crystal, its fingerprints were among the data, and there were no logs. Version 2 has the keys of
:mod:`crystaljax.dft_bridge.keys`, and fingerprints where ASE keeps the parameters of a calculator.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
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
        NotAStore: it is no store, a newer one, or holds programs, which none of ours does.
    """
    programs = database.programs(connection)
    if programs:
        raise NotAStore(
            f"it holds the {programs[0]!r:.80}, which runs when it is used and which no store has; do not use the "
            "file, or drop that with sqlite3"
        )
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
    number = str(found[0])
    if not re.fullmatch(r"[1-9]\d{0,8}", number, re.ASCII):
        raise NotAStore(f"its schema is {number!r:.40}, which no CrystalJAX has written; move it away")
    if int(number) > SCHEMA:
        raise NotAStore(
            f"it has schema {number}, which this CrystalJAX does not know (it knows {SCHEMA}): "
            "pip install --upgrade crystaljax"
        )
    return int(number)


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


def _sound(row: Row | Exception) -> Row:
    """The row; of one that cannot be decoded raises why it cannot be brought up to date."""
    if isinstance(row, Exception):
        raise NotAStore(f"a row of it cannot be read ({row}); `crystaljax store repair` drops such rows") from row
    return row


def _from_version_1(database: Database, connection: Any) -> None:
    """Write every row anew. Of those that turn out to be one crystal one stays, as in any merge."""
    keys, merged = KeyRing(), Merged()
    last = database.execute(connection, "SELECT MAX(id) FROM systems").fetchone()[0] or 0
    ranges = ((start, min(start + CHUNK, last)) for start in range(0, last, CHUNK))
    found = itertools.chain.from_iterable(read_rows(database, connection, *ids) for ids in ranges)
    rows = (_sound(row) for _, row in found)
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
