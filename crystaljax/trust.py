"""What a file may ask for, and what only the person at the command line may: the one place where that is decided.

A run folder, a configuration file or a sweep is data, whoever wrote it. It may set numbers, names of tasks, and where
results are kept. What would make this machine run a program, import a module or take orders from another machine counts
only if the command line says it too.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from crystaljax.errors import CrystalJAXError


class NotTrusted(CrystalJAXError, ValueError):
    """A file names a program, a module or a machine that the command line does not; the message has the flags."""


def refuse_unasked(named: Mapping[str, Any], asked: Mapping[str, Any], source: str) -> None:
    """Refuse what the settings would run and nobody has asked for.

    Args:
        named: what would run, by the flag that asks for it, such as ``{"--engine": "ase:package.Class"}``; options of
            the engine as ``--engine-option NAME``.
        asked: the same of the command line alone.
        source: the file, for messages.

    Raises:
        NotTrusted: with the flags to repeat.
    """
    unasked = {flag: value for flag, value in named.items() if asked.get(flag) != value}
    if unasked:
        flags = " ".join(_repeated(flag, value) for flag, value in unasked.items())
        raise NotTrusted(
            f"{source} names what would run on this machine, and a file alone may not: if you know it and want it, say "
            f"so on the command line: {flags}"
        )


def _repeated(flag: str, value: Any) -> str:
    """The words of a command line that ask for something, without control characters."""
    flag, _, option = flag.partition(" ")
    if isinstance(value, Mapping):
        return " ".join(_repeated(f"{flag} {option}.{name}", entry) for name, entry in value.items())
    return f"{flag} {shlex.quote(f'{option}={json.dumps(value)}' if option else ascii(value)[1:-1])}"
