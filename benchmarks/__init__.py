"""Benchmarks, each a module that runs on its own: ``python -m benchmarks`` lists them. Not installed."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The clone: where a benchmark must be started from, and its children are."""


def command(name: str, *arguments: str) -> list[str]:
    """A command that runs a benchmark in a process of its own, from :data:`ROOT`; ``name`` is that of its module."""
    return [sys.executable, "-m", f"benchmarks.{name}", *arguments]
