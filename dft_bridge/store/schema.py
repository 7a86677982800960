"""Versions of what a store holds, and how an old one becomes a new one.

The number stands in ASE's table ``information``. Version 1 had none: its keys depended on the axes and the origin that
described a crystal, and its rows had no log. Version 2 has the keys of :mod:`dft_bridge.keys`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

from crystaljax.status import Status
from dft_bridge.keys import KeyRing
from dft_bridge.store.databases import INDEX, Database
from dft_bridge.store.records import Row
from dft_bridge.store.table import delete_rows, read_rows

logger = logging.getLogger(__name__)

SCHEMA = 2
_NAME = "crystaljax_schema"
_METADATA = {"title": "CrystalJAX results"}  # the heading of ASE's web view


class NotAStore(ValueError):
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


def upgrade(database: Database, connection: Any) -> None:
    """Bring a store to the present version within a writing transaction; raises :class:`NotAStore`."""
    found = version(database, connection)
    if found == SCHEMA:
        return
    if found == 1:
        _renew_keys(database, connection)
    database.execute(connection, "DELETE FROM information WHERE name IN (?, 'metadata')", [_NAME])
    rows = [(_NAME, str(SCHEMA)), ("metadata", json.dumps(_METADATA))]
    database.insert(connection, "information", ("name", "value"), rows)


def _renew_keys(database: Database, connection: Any) -> None:
    """Give every row its present key; of those that are one crystal the first success stays, or the first."""
    ring, last, doomed = KeyRing(), 0, []
    kept: dict[str, Row] = {}
    while rows := list(read_rows(database, connection, after=last)):
        last = rows[-1].id
        for row in rows:
            key = row.expected_key(ring)
            row = dataclasses.replace(row, data={})  # only the rest is needed below
            if key not in kept:
                kept[key] = row
            elif row.status == Status.OK != kept[key].status:
                doomed.append(kept[key].id)
                kept[key] = row
            else:
                doomed.append(row.id)
    delete_rows(database, connection, doomed)
    for key, row in kept.items():
        pairs = database.ase.encode(row.with_key(key).pairs)
        database.execute(connection, "UPDATE systems SET key_value_pairs=? WHERE id=?", [pairs, row.id])
        database.execute(connection, "UPDATE text_key_values SET value=? WHERE key='key' AND value=?", [key, row.key])
    if kept:
        logger.info("store: new keys for %d results; %d that were there twice are gone", len(kept), len(doomed))
