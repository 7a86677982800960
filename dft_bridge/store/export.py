"""Stores as text: one JSON object per line, for other programs (``pandas.read_json(file, lines=True)``) and for mail.

Import gives back the rows to the last digit. Only Python's JSON writes NaN, which a detail of a failure may be.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from crystaljax.dft_bridge.keys import KeyRing
from crystaljax.dft_bridge.store.merge import Merged
from crystaljax.dft_bridge.store.records import UNREADABLE, Row
from crystaljax.dft_bridge.store.schema import SCHEMA, parse
from crystaljax.dft_bridge.store.store import Store, StoreError

LONGEST_LINE = 1 << 22
"""Characters; a result of a crystal of :data:`~crystaljax.dft_bridge.store.records.MOST_SITES` has a tenth of it."""


def write_lines(rows: Iterable[Row], file: TextIO, version: int = SCHEMA) -> int:
    """Write rows that come from a store of some schema, with the caveats of their values; returns how many."""
    count = 0
    for row in rows:
        file.write(row.with_caveats().to_json(version) + "\n")
        count += 1
    return count


def read_file(store: Store, path: Path) -> Merged:
    """Merge the lines of a file into a store. A line that is no result is refused, with its number and the reason.

    Raises:
        StoreError: the file cannot be read, or none of its lines is a result.
    """
    refused = Merged()
    merged = store.merge(_lines(path, KeyRing(), refused))
    if refused.refused and not (merged.added or merged.known or merged.replaced or merged.refused):
        raise StoreError(f"{refused.problems[0]}; no line of {path} is a result, so nothing was imported")
    for problem in refused.problems:
        merged.refuse(problem)
    merged.refused += refused.refused - len(refused.problems)
    return merged


def _lines(path: Path, keys: KeyRing, refused: Merged) -> Iterator[Row]:
    """The rows of a file, under their present keys."""
    try:
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            for number in itertools.count(1):
                line = file.readline(LONGEST_LINE)
                if not line:
                    return
                try:
                    if len(line) == LONGEST_LINE and not line.endswith("\n"):
                        while (rest := file.readline(LONGEST_LINE)) and not rest.endswith("\n"):
                            pass
                        raise ValueError(f"it has {LONGEST_LINE} characters and more")
                    row = parse(line, keys)
                except UNREADABLE as error:
                    refused.refuse(f"line {number} of {path} is no result: {error}")
                    continue
                yield row
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error}") from error
