"""Time limits must hold whatever happens to the clock of the day."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import crystaljax.dft_bridge

FOLDER = Path(crystaljax.dft_bridge.__file__).parent
SOURCES = sorted(path for path in FOLDER.rglob("*.py") if path.stem != "testing")  # whose engines tell the time
OF_THE_DAY = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("date", "today")}
"""Clocks that somebody may set; ``time.monotonic`` and ``time.perf_counter`` go on."""


def clocks(text: str) -> set[tuple[str, str]]:
    """The attributes of modules that a source uses."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
    owners = [(node, node.value) for node in nodes]
    return {(getattr(owner, "attr", getattr(owner, "id", "")), node.attr) for node, owner in owners}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_nothing_follows_the_clock_of_the_day(source):
    assert not clocks(source.read_text()) & OF_THE_DAY
    assert "from time import time" not in source.read_text()


def test_a_clock_of_the_day_is_found():
    assert clocks("import time\nprint(time.time())") & OF_THE_DAY
    assert clocks("import datetime\ndatetime.datetime.now()") & OF_THE_DAY
