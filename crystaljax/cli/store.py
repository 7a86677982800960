"""The commands ``crystaljax store ...``: look into results stores, copy, merge and check them."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from crystaljax.cli.exit_codes import PROBLEMS

if TYPE_CHECKING:
    from crystaljax.dft_bridge.store.merge import Merged

SHOWN = 20
"""Problems and conflicts that are printed one by one."""

EXAMPLES = """examples:
  crystaljax store stats
  crystaljax store query --property band_gap --elements Ca,O --min 1 --max 1.3
  crystaljax store query --status NOT_CONVERGED --json > failures.jsonl
  crystaljax store export results.jsonl
  crystaljax store merge laptop.db cluster.db --store postgresql://me@server/results
  crystaljax store verify --store results.db
  crystaljax store repair --store results.db
"""


def add_commands(commands: Any) -> None:
    """Add ``store`` and what belongs to it to the parser of the command line."""
    store = commands.add_parser(
        "store",
        help="look into, copy, merge and check results stores",
        description="Look into, copy, merge and check stores of results.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = store.add_subparsers(required=True, metavar="ACTION")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--store",
        metavar="FILE|URL",
        help="SQLite file or postgresql://user@host/database (default: $CRYSTALJAX_STORE, or the user's own store)",
    )

    def add(name: str, command: Any, text: str, more: str = "") -> argparse.ArgumentParser:
        description = f"{text[0].upper()}{text[1:]}. {more}"
        action = actions.add_parser(name, help=text, description=description, parents=[common])
        action.set_defaults(command=command)
        return action

    stats = add("stats", _stats, "count results and core-seconds by property, engine and status")
    stats.add_argument("--json", action="store_true", help="one JSON object instead of a table")

    query = add("query", _query, "list results", "Conditions are combined: a result must meet all of them.")
    query.add_argument("--property", dest="property_name", metavar="NAME", help="band_gap, bulk_modulus or density")
    query.add_argument("--formula", help="such as CaTiO3; also cells of several formula units")
    query.add_argument("--elements", metavar="A,B", default="", help="results that contain all of these elements")
    query.add_argument("--min", dest="minimum", type=float, metavar="X", help="values of at least X (eV, GPa, g/cm3)")
    query.add_argument("--max", dest="maximum", type=float, metavar="X", help="values of at most X")
    query.add_argument("--status", help="OK, or the reason why there is no value, such as NOT_CONVERGED")
    query.add_argument("--engine", metavar="TEXT", help="part of the engine's label, such as planewave or fast")
    query.add_argument("--limit", type=int, metavar="N", help="at most N results")
    query.add_argument("--json", action="store_true", help="JSON lines with everything, as `store export` writes them")

    export = add("export", _export, "write all results as JSON lines", "`store import` reads them, to the last digit.")
    export.add_argument("file", metavar="FILE", help="file to write, which must not exist; - for standard output")

    load = add(
        "import",
        _import,
        "take over the results in a file of JSON lines",
        "The file may come from anybody: a line whose key does not belong to its crystal, property and settings, or "
        "that is no plain data, is named and left out (exit code 1). Nothing tells whether its value is true.",
    )
    load.add_argument("file", metavar="FILE", type=Path, help="file that `store export` or `store query --json` wrote")

    merge = add(
        "merge",
        _merge,
        "take over the results of other stores",
        "No result is stored twice, a success replaces a failure, and the other stores stay as they are.",
    )
    merge.add_argument("sources", metavar="SOURCE", nargs="+", help="file or URL of a store to read")

    add(
        "verify",
        _verify,
        "check every page and every row",
        "Keys must belong to crystal, property and settings and be there once, values must be finite, and rows must be "
        "those of the journal. Changes nothing.",
    )
    add(
        "repair",
        _repair,
        "make a damaged store anew",
        "From what is good of the file and from its journal (FILE.jsonl). The damaged file is kept under another name. "
        "Runs on this machine that use the store may go on: they wait. End those of other hosts before.",
    )


def _stats(store: str | None, json: bool) -> int:
    import dataclasses
    from json import dumps

    from crystaljax.dft_bridge.store.query import tally

    opened, problems = _open(store), []
    tallies = tally(opened.rows(data=False, problems=problems))
    results, seconds = sum(t.results for t in tallies), sum(t.core_seconds for t in tallies)
    with _standard_output():
        if json:
            groups = [dataclasses.asdict(t) for t in tallies]
            print(dumps({"store": opened.name, "results": results, "core_seconds": seconds, "groups": groups}))
            return _left_out(problems)
        header = ("property", "engine", "status", "results", "core-seconds")
        lines = [(t.property, t.engine, t.status, str(t.results), f"{t.core_seconds:.1f}") for t in tallies]
        _print_table(header, lines)
        values = sum(t.results for t in tallies if t.status == "OK")
        print(f"{opened.name}: {results} results, {values} with a value; {seconds / 3600:.2f} core-hours")
    return _left_out(problems)


def _query(store: str | None, json: bool, limit: int | None, elements: str, **conditions: Any) -> int:
    from crystaljax.caveats import NONE, Caveat
    from crystaljax.dft_bridge.store.export import write_lines
    from crystaljax.dft_bridge.store.query import Query

    if limit is not None and limit < 1:
        raise ValueError(f"--limit is {limit}; give at least 1")
    query = Query(elements=tuple(filter(None, elements.replace(" ", "").split(","))), **conditions)
    opened, problems = _open(store), []
    # Old rows have what caveats follow from in their data.
    rows = itertools.islice(query.select(opened.rows(problems=problems)), limit)
    with _standard_output() as out:
        if json:
            write_lines(rows, out, opened.version())
            return _left_out(problems)
        header = ("id", "formula", "property", "value", "status", "engine", "seconds", "caveats")
        lines = [
            (
                str(row.id),
                row.formula,
                row.property,
                f"{row.value:.6g}" if row.status.name == "OK" else "-",
                row.status.name,
                row.pairs["engine"],
                f"{row.pairs['seconds']:.1f}",
                row.pairs.get("caveats", "").replace(NONE, ""),
            )
            for row in (row.with_caveats() for row in rows)
        ]
        _print_table(header, lines)
        print(f"{len(lines)} results")
        for caveat in Caveat:
            if any(caveat.name in line[-1].split() for line in lines):
                print(f"{caveat.name}: {caveat.value}")
    return _left_out(problems)


def _export(store: str | None, file: str) -> int:
    if file != "-" and os.path.lexists(file):
        raise ValueError(f"{file} exists; delete it or give another name")
    from crystaljax.dft_bridge.store.export import write_lines

    opened, problems = _open(store), []
    with _standard_output() if file == "-" else _new_file(Path(file)) as out:
        count = write_lines(opened.rows(problems=problems), out, opened.version())
        out.flush()  # a reader that has left early is noticed here, before anything is said about all results
        print(f"{count} results written to {file}", file=sys.stderr)
    return _left_out(problems)


def _import(store: str | None, file: Path) -> int:
    from crystaljax.dft_bridge.store import Store
    from crystaljax.dft_bridge.store.export import read_file

    target = Store(store)
    merged = read_file(target, file)
    _print_merged(merged, str(file), target.name)
    return PROBLEMS if merged.refused else 0


def _merge(store: str | None, sources: Sequence[str]) -> int:
    from crystaljax.dft_bridge.store import Store

    target = Store(store)
    opened = [_open(source) for source in sources]
    versions = [source.version() for source in opened]  # a missing one is noticed before anything is merged
    refused = 0
    for source, version in zip(opened, versions, strict=True):
        problems: list[str] = []
        merged = target.merge(source.rows(problems=problems), version)
        for problem in problems:
            merged.refuse(problem)
        _print_merged(merged, source.name, target.name)
        refused += merged.refused
    return PROBLEMS if refused else 0


def _verify(store: str | None) -> int:
    from crystaljax.dft_bridge.store.verify import verify

    opened = _open(store)
    findings = verify(opened)
    _print_problems(findings.problems)
    print(f"{opened.name}: schema {findings.version}, {findings.good} good results, {len(findings.problems)} problems")
    if findings.only_in_journal:
        print(f"{findings.only_in_journal} more results are in the journal {opened.database.journal.path.name}")
    if findings.problems or findings.only_in_journal:
        where = f" --store {opened.name}" if store else ""
        print(f"To make it anew from what is good and the journal: crystaljax store repair{where}", file=sys.stderr)
    return PROBLEMS if findings.problems else 0


def _repair(store: str | None) -> int:
    from crystaljax.dft_bridge.store.repair import repair

    opened = _open(store)
    findings, damaged = repair(opened)
    _print_problems(findings.problems)
    print(
        f"{opened.name}: {findings.good} results from the file, {findings.only_in_journal} from its journal; "
        f"the damaged file is {damaged}"
    )
    return 0


def _open(store: str | None) -> Any:
    """A store to look into: one that is missing is an error, not a new file."""
    from crystaljax.dft_bridge.store import Store

    return Store(store, create=False)


def _print_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Columns side by side, numbers to the right; plain text that other programs can cut."""
    lines = [[_printable(text) for text in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    for line in (header, *lines):
        cells = [
            text.rjust(width) if name in ("id", "value", "results", "seconds", "core-seconds") else text.ljust(width)
            for name, text, width in zip(header, line, widths, strict=True)
        ]
        print("  ".join(cells).rstrip())


def _left_out(problems: Sequence[str]) -> int:
    """The exit code of a command that left out these rows; says so."""
    _print_problems(problems)
    return PROBLEMS if problems else 0


def _printable(text: str) -> str:
    """A text of somebody else as a terminal shows it, and not as what it would do to the terminal."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _print_problems(problems: Sequence[str]) -> None:
    for problem in problems[:SHOWN]:
        print(_printable(problem), file=sys.stderr)
    if len(problems) > SHOWN:
        print(f"... and {len(problems) - SHOWN} more", file=sys.stderr)


def _print_merged(merged: Merged, source: str, target: str) -> None:
    conflicts = merged.conflicts
    _print_problems(
        [f"conflict: {c.formula} {c.property} is {c.ours:g} here, {c.theirs:g} there; not changed" for c in conflicts]
    )
    _print_problems(merged.problems)
    refused = f", refused: {merged.refused}" if merged.refused else ""
    print(
        f"{source} -> {target}: new: {merged.added}, failures replaced by a success: {merged.replaced}, "
        f"known already: {merged.known} (with another value: {len(conflicts)}){refused}"
    )


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[TextIO]:
    """A file that appears under its name when it is complete."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "x", encoding="utf-8") as file:
            yield file
        try:
            os.link(part, path)  # unlike a renaming this never takes the place of a file
        except FileExistsError:
            raise ValueError(f"{path} exists; delete it or give another name") from None
        except OSError:  # a file system without links
            part.rename(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _standard_output() -> Iterator[TextIO]:
    """Standard output whose reader may leave early, as ``head`` does: then the rest is not written."""
    try:
        yield sys.stdout
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes
