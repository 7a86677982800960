"""Stores as text: one JSON object per line, for other programs (``pandas.read_json(file, lines=True)``) and for mail.

Import gives back the rows to the last digit. Only Python's JSON writes NaN, which a detail of a failure may be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from crystaljax.dft_bridge.keys import KeyRing
from crystaljax.dft_bridge.store.merge import Merged
from crystaljax.dft_bridge.store.records import Row
from crystaljax.dft_bridge.store.schema import SCHEMA, parse
from crystaljax.dft_bridge.store.store import Store, StoreError


def write_lines(rows: Iterable[Row], file: TextIO, version: int = SCHEMA) -> int:
    """Write rows that come from a store of some schema; returns how many."""
    count = 0
    for row in rows:
        file.write(row.to_json(version) + "\n")
        count += 1
    return count


def read_file(store: Store, path: Path) -> Merged:
    """Merge the lines of a file into a store. One line that makes no sense, and nothing is taken over.

    Raises:
        StoreError: the file cannot be read or has such a line; says which and why.
    """
    keys = KeyRing()
    for _ in _lines(path, keys):
        pass
    return store.merge(_lines(path, keys))


def _lines(path: Path, keys: KeyRing) -> Iterator[Row]:
    """The rows of a file, under their present keys."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = parse(line, keys)
                except ValueError as error:
                    raise StoreError(f"line {number} of {path} is no result: {error}; nothing was imported") from error
                yield row
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error}") from error
