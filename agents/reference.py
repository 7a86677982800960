"""Formulas that are known already, from a file of the user's, such as an export of the Materials Project."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ase.formula import Formula

from crystaljax.errors import CrystalJAXError
from crystaljax.plain_data import shown

COLUMNS = ("formula_pretty", "pretty_formula", "formula")
"""Names of the column with the formula: of the Materials Project's API, of MP-20 and its older API, of its website."""
HELP = (
    "give a CSV file or a JSON list with a column formula_pretty, pretty_formula or formula, as the Materials Project "
    "exports it, or a text file with one formula in each line"
)

_CHARACTERS = 200
_ATOMS = 10**6


class FormulasError(CrystalJAXError, ValueError):
    """A file is not a list of formulas; the message names the place, and what the file may be."""


def read(path: Path) -> frozenset[str]:
    """The reduced formulas in a file, as :func:`crystaljax.agents.ledger.formula` writes them.

    The file is a CSV with a header that names one of ``COLUMNS``; JSON, a list of records with one of these keys, or of
    formulas, also under the key ``data``; or text with one formula in each line, ``#`` starting a comment. Capitals
    and spaces in the names of columns make no difference.

    Raises:
        FormulasError: for a file that is none of these, or holds no formula, or something in place of one, with its
            place.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormulasError(f"{path} is not text; {HELP}") from error
    entries = _of_json(text, path) if path.suffix.lower() == ".json" else _of_text(text, path)
    found = {_reduced(entry, f"{path}, {place}") for place, entry in entries}
    if not found:
        raise FormulasError(f"{path} holds no formula; {HELP}")
    return frozenset(found)


def _of_json(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormulasError(f"{path} is not JSON ({error}); {HELP}") from error
    entries = entries.get("data") if isinstance(entries, dict) else entries
    if not isinstance(entries, list):
        raise FormulasError(f"{path} is not a list of formulas; {HELP}")
    for number, entry in enumerate(entries, start=1):
        place = f"entry {number}"
        if isinstance(entry, dict):
            yield place, entry[_column(entry, f"{path}, {place}")]
        else:
            yield place, entry


def _of_text(text: str, path: Path) -> Iterator[tuple[str, str]]:
    lines = text.splitlines(keepends=True)
    try:
        header = next(csv.reader(lines[:1]), [])
    except csv.Error as error:
        raise FormulasError(f"{path}, line 1 is no line of a CSV file ({error}); {HELP}") from error
    if len(header) > 1 or any(_plain(name) in COLUMNS for name in header):
        reader = csv.DictReader(lines)
        column = _column(reader.fieldnames or (), f"{path}, line 1")
        try:
            for row in reader:
                yield f"line {reader.line_num}", row[column]
        except csv.Error as error:
            raise FormulasError(
                f"{path}, line {reader.line_num + 1} is no line of a CSV file ({error}); {HELP}"
            ) from error
        return
    for number, line in enumerate(lines, start=1):
        if formula := line.partition("#")[0].strip():
            yield f"line {number}", formula


def _column(names: Iterable[str], place: str) -> str:
    """The name of the column with the formula."""
    by_plain_name = {_plain(name): name for name in names}
    for column in COLUMNS:
        if column in by_plain_name:
            return by_plain_name[column]
    raise FormulasError(f"{place}: no column with formulas among {', '.join(by_plain_name)}; {HELP}")


def _plain(name: str) -> str:
    return re.sub(r"\W+", "_", name.strip().lower())


def _reduced(entry: Any, place: str) -> str:
    text = entry.strip() if isinstance(entry, str) else ""
    counts: dict[str, int] = {}
    if re.fullmatch(rf"[A-Za-z0-9()]{{1,{_CHARACTERS}}}", text):
        with contextlib.suppress(ValueError, RecursionError):
            counts = Formula(text, strict=True).count()
    # X is ASE's name of a site without an element.
    if not counts or "X" in counts or not all(0 < count <= _ATOMS for count in counts.values()):
        raise FormulasError(f"{place}: {shown(entry)} is not a formula such as KMgF3; {HELP}")
    return Formula.from_dict(counts).reduce()[0].format("metal")
