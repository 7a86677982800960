"""The journal of a store in a file: every row that was ever written, one line each, in a text file beside it.

In a database one damaged page can take many rows, since pages point to each other. Here a damaged byte takes the line
it is in. Lines are only ever added, before the database commits their rows, so what the database has the journal has
too; each is a line of an export (:mod:`crystaljax.dft_bridge.store.export`) with a check sum.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from crystaljax.dft_bridge.store.records import Row

SUFFIX = ".jsonl"
_SUM = ',"crc32":"'
_BLOCK = 1 << 16


def checksum(line: str) -> int:
    """Of a line of an export."""
    return zlib.crc32(line.encode())


class Added(NamedTuple):
    """The bytes of a journal from ``start`` to ``end``."""

    start: int
    end: int


class Journal:
    """The lines beside a store. One process at a time adds to it: the one that has the store's lock for writing."""

    def __init__(self, store: Path):
        """``store``: path of the database."""
        self.path = store.with_name(store.name + SUFFIX)

    def exists(self) -> bool:
        return self.path.exists()

    def size(self) -> int:
        """Bytes; 0 if there is none."""
        return self.path.stat().st_size if self.exists() else 0

    def create(self, rows: Iterable[Row], schema: int) -> None:
        """Make the journal with these rows, whole or not at all; raises as :meth:`append`."""
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            partial.unlink(missing_ok=True)
            with open(partial, "xb", buffering=0) as file:  # never through a link that somebody has put there
                _write(file, rows, schema)
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def append(self, rows: Iterable[Row], schema: int) -> Added:
        """Add rows; they are on disk when this returns, and nothing of them is there if it raises.

        Returns:
            Where they are, for :meth:`take_back`.

        Raises:
            OSError: the file cannot be written.
        """
        with open(self.path, "r+b", buffering=0) as file:
            end = _end_of_last_line(file.fileno())  # before what a process wrote that was killed meanwhile
            try:
                file.truncate(end)
                file.seek(end)
                _write(file, rows, schema)
                return Added(end, file.tell())
            except BaseException:
                os.truncate(self.path, end)
                raise

    def take_back(self, added: Added) -> None:
        """Remove what was added last, unless more was added since. With the store's lock, as :meth:`append`."""
        if self.size() != added.end:
            return
        if added.start:
            os.truncate(self.path, added.start)
        else:
            self.path.unlink()  # it was made for what is not there

    def entries(self, problems: list[str]) -> Iterator[tuple[str, str]]:
        """Key and line, as an export has it, of all lines that are whole; of others a text is added to ``problems``.

        Raises:
            OSError: the file cannot be read.
        """
        with open(self.path, encoding="utf-8", errors="replace", newline="\n") as file:
            for number, signed in enumerate(file, start=1):
                if not signed.endswith("\n"):
                    return  # another process is writing it
                start, _, found = signed.rpartition(_SUM)
                line = start + "}"
                if found == f'{checksum(line):08x}"}}\n':
                    yield json.loads(line)["key"], line
                else:
                    problems.append(f"line {number} of {self.path.name} is damaged")


def _write(file: FileIO, rows: Iterable[Row], schema: int) -> None:
    for row in rows:
        left = memoryview(_signed(row.to_json(schema)).encode())
        while left:
            left = left[file.write(left) :]
    os.fsync(file.fileno())


def _signed(line: str) -> str:
    """The line of the journal for a line of an export, itself a JSON object."""
    return f'{line[:-1]}{_SUM}{checksum(line):08x}"}}\n'


def _end_of_last_line(descriptor: int) -> int:
    end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - _BLOCK)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
