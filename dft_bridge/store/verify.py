"""Is everything in a store as it should be, and what can be saved if not."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

from crystaljax.dft_bridge.keys import KeyRing
from crystaljax.dft_bridge.store import schema
from crystaljax.dft_bridge.store.databases import INDEX
from crystaljax.dft_bridge.store.journal import checksum
from crystaljax.dft_bridge.store.records import UNREADABLE, Row
from crystaljax.dft_bridge.store.store import Store, StoreError
from crystaljax.dft_bridge.store.table import CHUNK, find, read_rows


@dataclasses.dataclass
class Findings:
    """What is wrong with a store.

    Attributes:
        version: its schema; 0 if it is empty or even that cannot be read.
        good: rows that can be read, make sense and have the key of their crystal, property and settings.
        problems: texts, one for each row or part that is wrong; empty for a sound store.
        only_in_journal: rows that the journal has and the database has not, or not as they were written.
    """

    version: int = 0
    good: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)
    only_in_journal: int = 0


def verify(store: Store) -> Findings:
    """Check every page and every row. Reads only; also a damaged store, as far as it can be read.

    Checked are SQLite's own integrity, that the keys are unique and belong to the crystal, property and settings of
    their rows, that values are finite exactly if the status is OK, that ASE's tables for searching agree, and that the
    rows are those of the journal, to the last digit.
    """
    findings = Findings()
    for _ in good_rows(store, findings):
        pass
    return findings


def good_rows(store: Store, findings: Findings, alone: bool = False) -> Iterator[Row]:
    """The rows worth keeping, of a damaged store too: those of the database, then what only its journal has.

    Everything else is noted in ``findings``, the version at once. Unless we are ``alone``, rows that others write
    meanwhile are left out: they are neither good nor missing.

    Raises:
        StoreError: there is no store, it is a newer one, or the database cannot be reached.
    """
    findings.version = _ask(store, findings, "the schema", lambda c: schema.version(store.database, c)) or 0
    findings.problems += _ask(store, findings, "a page", store.database.integrity) or []
    some = bool(findings.version or findings.problems)
    # Before the journal is read: others may write meanwhile, and what is committed by now the journal has.
    last = (_ask(store, findings, "the last row", _last_id(store)) or 0) if some else 0
    written = _written(store, findings)
    if some:
        if not _ask(store, findings, "the index of keys", lambda c: store.database.has(c, INDEX)):
            findings.problems.append("the index of keys is missing, so a key may be there twice")
        searched = {
            name: _ask(store, findings, f"ASE's table of the {name}s", _column(store, table, name))
            for table, name in (("text_key_values", "key"), ("number_key_values", "value"))
        }
        for row in _checked(store, last, searched, written, findings):
            findings.good += 1
            if written is not None and written.pop(row.key, None) is None:
                findings.problems.append(f"row {row.id} is not in the journal")
            yield row
    if written and some and not alone:
        for key in _newer(store, written, last):
            del written[key]
    if written:
        yield from _rows_of_journal(store, written, findings)


def _newer(store: Store, keys: Iterable[str], last: int) -> list[str]:
    """Those of the keys that the database has by now in rows above the id ``last``.

    A row stands in the journal before it is committed, so we wait for whoever is about to commit one.
    """

    def found() -> list[str]:
        with store.transaction(upgrade=False) as connection:
            rows = find(store.database, connection, keys, "found.value, systems.id")
            return [key for key, id in rows if id > last]

    try:
        with contextlib.suppress(StoreError), store.only_writer():
            return found()
        return found()  # of a file that we may not write to
    except StoreError:  # it is damaged where we look
        return []


def _written(store: Store, findings: Findings) -> dict[str, set[int]] | None:
    """Check sums of all that the journal has, by key; ``None`` without a journal."""
    journal = store.database.journal
    if journal is None or not journal.exists():
        return None
    written = defaultdict(set)
    for key, line in journal.entries(findings.problems):
        written[key].add(checksum(line))
    return dict(written)


def _rows_of_journal(store: Store, wanted: Container[str], findings: Findings) -> Iterator[Row]:
    """The rows with these keys as they were written last."""
    journal, keys = store.database.journal, KeyRing()
    latest = {key: line for key, line in journal.entries([]) if key in wanted}
    for line in latest.values():
        try:
            row = schema.parse(line, keys)
        except ValueError as error:
            findings.problems.append(f"a line of {journal.path.name}: {error}")
            continue
        findings.only_in_journal += 1
        yield row


def _checked(
    store: Store,
    last: int,
    searched: dict[str, dict[int, Any] | None],
    written: Mapping[str, set[int]] | None,
    findings: Findings,
) -> Iterator[Row]:
    """The good rows up to an id; ``searched``: what ASE's tables say of some pairs, by row; ``written``: see there."""
    keys, seen = KeyRing(), {}
    for start in range(0, last, CHUNK):
        for row in _readable(store, start, min(start + CHUNK, last), findings):
            try:
                row.check()
                if findings.version == schema.SCHEMA and row.expected_key(keys) != row.key:
                    raise ValueError("its key is not that of its crystal, property and settings")
                if row.key in seen:
                    raise ValueError(f"row {seen[row.key]} has the same key")
                for name, column in searched.items():
                    if column is not None and column.get(row.id) != row.pairs.get(name):
                        raise ValueError(f"ASE's tables say that its {name} is {column.get(row.id)}")
                if written and row.key in written and checksum(row.to_json(schema.SCHEMA)) not in written[row.key]:
                    raise ValueError("it is not what was written, says the journal")
            except UNREADABLE as error:
                findings.problems.append(f"row {row.id}: {error}")
                continue
            seen[row.key] = row.id
            yield row


def _ask(store: Store, findings: Findings, what: str, question: Callable[[Any], Any]) -> Any:
    """The answer to a question to a connection; ``None`` and a finding if damage prevents it."""
    try:
        with store.transaction(upgrade=False) as connection:
            return question(connection)
    except StoreError as error:
        if not store.database.damaged(error.__cause__):
            raise
        findings.problems.append(f"{what} cannot be read: {error.__cause__}")
        return None


def _column(store: Store, table: str, name: str) -> Callable[[Any], dict[int, Any]]:
    """A question for a key-value pair as ASE's tables for searching have it, by row."""
    query = f"SELECT id, value FROM {table} WHERE key=?"
    return lambda connection: dict(store.database.execute(connection, query, [name]).fetchall())


def _last_id(store: Store) -> Callable[[Any], int]:
    return lambda connection: store.database.execute(connection, "SELECT MAX(id) FROM systems").fetchone()[0]


def _readable(store: Store, after: int, upto: int, findings: Findings) -> list[Row]:
    """The rows of a range of ids, without those whose page or content is damaged."""
    try:
        with store.transaction(upgrade=False) as connection:
            found = list(read_rows(store.database, connection, after, upto))
    except (StoreError, *UNREADABLE) as error:
        if isinstance(error, StoreError) and not store.database.damaged(error.__cause__):
            raise
        if upto - after > 1:
            middle = (after + upto) // 2
            return _readable(store, after, middle, findings) + _readable(store, middle, upto, findings)
        findings.problems.append(f"row {upto} cannot be read: {error.__cause__ or error}")
        return []
    findings.problems += [f"row {id} cannot be read: {row}" for id, row in found if isinstance(row, Exception)]
    return [row for _, row in found if isinstance(row, Row)]
