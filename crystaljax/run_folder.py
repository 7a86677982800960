"""The files of a run folder, read: whoever wrote them, they are checked data before anything is done with them.

A damaged file is never mended here and never half used. Files to which a run appends may end in a line that was cut
short when the run was killed, and that line alone is left out; anything else that is wrong is refused with its line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict, TypeVar

import numpy as np
import orjson

from crystaljax import files
from crystaljax.errors import CrystalJAXError
from crystaljax.plain_data import WrongData, at_least, shown, typed
from crystaljax.status import Status

CONFIG, SWEEP, ACCOUNTING, TRACKER = "config.json", "sweep.json", "accounting.json", "wandb.json"
METRICS, EPISODES, TICKETS = "metrics.jsonl", "episodes.jsonl", "tickets.jsonl"
BEST, CRYSTALS, CURVE = "best.json", "best", "learning_curve.png"
CHECKPOINTS, TENSORBOARD = "checkpoints", "tensorboard"
OWN = (
    *(CONFIG, SWEEP, ACCOUNTING, TRACKER, METRICS, EPISODES, TICKETS),
    *(BEST, CRYSTALS, CURVE, CHECKPOINTS, TENSORBOARD),
)
"""Every name that a run or a sweep writes in its folder."""
LARGEST_SEED = 2**32 - 1
"""Random keys are made of 32 bits: a larger seed would be the same as a smaller one."""

T = TypeVar("T")
_DOCUMENT_BYTES = 64 << 20
_SITES = 1000
_CELL = 1000.0
"""Å; no cell of a run is longer."""
_THINNEST = 0.1
"""Å between opposite faces of a cell, at least."""
_FORMULA = r"(?:[A-Z][a-z]?\d{0,6}){1,40}"


class RunFolderError(CrystalJAXError, ValueError):
    """A file of a run is damaged, missing or not what a run writes; the message names it, its line, and what to do."""


# What the values of the files must be


def _symbols(value: list[str] | tuple[str, ...]) -> str:
    from ase.data import atomic_numbers  # not needed for help, and slow to load

    unknown = [symbol for symbol in value if symbol == "X" or symbol not in atomic_numbers]
    if unknown:
        return f"{shown(unknown[0])} among its entries; each must be the symbol of an element"
    return "" if 1 <= len(value) <= _SITES else f"{len(value)} elements; it must be 1 to {_SITES}"


def _formula(value: str) -> str:
    return "" if re.fullmatch(_FORMULA, value) else f"{shown(value)}; it must be a formula such as KMgF3"


def _status(value: str) -> str:
    return "" if value in Status.__members__ else f"{shown(value)}; it must be one of {', '.join(Status.__members__)}"


def _seed(value: int) -> str:
    return "" if 0 <= value <= LARGEST_SEED else f"{shown(value)}; a seed must lie between 0 and {LARGEST_SEED}"


Count = Annotated[int, at_least(0)]
Ordinal = Annotated[int, at_least(1)]
Amount = Annotated[float, at_least(0)]
Symbols = Annotated[tuple[str, ...], _symbols]
Formula = Annotated[str, _formula]
StatusName = Annotated[str, _status]
Values = dict[str, float] | None
"""Of the properties of a crystal, by name."""
Seed = Annotated[int, _seed]
Vector = tuple[float, float, float]


class BestCrystal(TypedDict):
    """An entry of ``best.json``; ``file`` is the CIF file, relative to the folder."""

    rank: Ordinal
    file: str
    formula: Formula
    elements: Annotated[list[str], _symbols]
    values: dict[str, float]
    caveats: NotRequired[list[str] | None]
    status: StatusName
    reward: float
    episode: Count
    skeleton: str
    lattice: tuple[Vector, Vector, Vector]
    frac_coords: list[Vector]


class Goals(TypedDict):
    """What a run asks of a property: the lowest and the highest value, ``None`` for no bound, and the tolerance."""

    unit: str
    low: float | None
    high: float | None
    tolerance: Amount


class Best(TypedDict):
    """``best.json``: what was asked for, where values come from, and the best crystals after ``updates`` updates."""

    task: str
    objective: str
    properties: dict[str, Goals]
    best_reward: float
    source: str
    fingerprint: dict[str, Any]
    updates: NotRequired[Count]
    crystals: list[BestCrystal]


class Metrics(TypedDict):
    """A line of ``metrics.jsonl``; it has the losses of the algorithm besides."""

    update: Ordinal
    episodes: Count
    mean_reward: float | None
    best_reward: float | None
    distinct: Count
    refused: Count
    seconds: Amount
    waiting_seconds: NotRequired[Amount]


class Tickets(TypedDict):
    """A line of ``tickets.jsonl``: crystals sent in an update (ticket, skeleton, elements), and tickets taken back."""

    update: Ordinal
    sent: list[tuple[Count, Count, tuple[Count, ...]]]
    arrived: list[Count]


class Spent(TypedDict):
    """``accounting.json``: what :class:`crystaljax.dft_bridge.accounting.Stats` counts."""

    requests: Count
    distinct: Count
    batch_hits: Count
    memory_hits: Count
    shared: Count
    store_hits: Count
    refused: Count
    calls: Count
    failures: dict[str, Count]
    core_seconds: Amount
    queue_seconds: Amount
    waiting_seconds: Amount


class _Sweep(TypedDict):
    seeds: list[Seed]


class _Tracked(TypedDict):
    id: str


# Reading


def read_document(path: Path, kind: Any) -> Any:
    """The JSON file as that type (see :mod:`crystaljax.plain_data`).

    Raises:
        FileNotFoundError: there is none.
        FileRefused: a link, a pipe, a folder ... has its name.
        RunFolderError: it is damaged, or not what a run writes.
    """
    try:
        return typed(orjson.loads(files.read_bytes(path, _DOCUMENT_BYTES)), kind)
    except orjson.JSONDecodeError as error:
        raise RunFolderError(f"{path} is damaged: it is not JSON ({error}); {_RESTORE}") from error
    except WrongData as error:
        raise RunFolderError(f"{path} is not what a run writes: {error}; {_RESTORE}") from error


_RESTORE = "restore it from a copy, or start the run anew in another folder, where the store has its calculations"


def read_lines(path: Path, kind: type[T]) -> list[T]:
    """The lines of a JSONL file, one value each; none if there is no such file. A last line cut short is left out.

    Raises:
        FileRefused: a link, a pipe, a folder ... has its name.
        RunFolderError: a line is damaged, or not what a run writes.
    """
    try:
        *lines, rest = files.read_bytes(path, largest=files.LARGEST).split(b"\n")
    except FileNotFoundError:
        return []
    found = [_line(text, kind, f"{path}, line {number}") for number, text in enumerate(lines, start=1)]
    try:  # whatever stands after the last end of a line
        orjson.loads(rest)
    except orjson.JSONDecodeError:
        return found
    return [*found, _line(rest, kind, f"{path}, line {len(lines) + 1}")]


def _line(text: bytes, kind: type[T], place: str) -> T:
    try:
        return typed(orjson.loads(text), kind)
    except orjson.JSONDecodeError as error:
        raise RunFolderError(f"{place} is damaged: it is not JSON ({error}); {_RESTORE}") from error
    except WrongData as error:
        raise RunFolderError(f"{place} is not what a run writes: {error}; {_RESTORE}") from error


def keep_lines(path: Path, count: int) -> None:
    """Leave the first lines of a JSONL file, and make it if it is not there; the old file or the new one is there."""
    before = files.read_bytes(path) if path.exists() else None
    kept = b"".join(line.rstrip(b"\n") + b"\n" for line in (before or b"").split(b"\n")[:count])
    if kept != before:
        files.replace_bytes(path, kept)


def read_best(folder: Path) -> Best:
    """What ``best.json`` of a run says; errors as of :func:`read_document`."""
    path = folder / BEST
    best: Best = read_document(path, Best)
    for number, crystal in enumerate(best["crystals"]):
        if problem := _misshapen(crystal, best["properties"]):
            raise RunFolderError(f"{path} is not what a run writes: crystals[{number}]{problem}; {_RESTORE}")
    return best


def _misshapen(crystal: BestCrystal, properties: Collection[str]) -> str:
    """What is wrong between the values of an entry."""
    if not re.fullmatch(rf"{CRYSTALS}/\d\d_{crystal['formula']}\.cif", crystal["file"]):
        return f".file is {shown(crystal['file'])}; it must be {CRYSTALS}/NN_{crystal['formula']}.cif"
    if set(crystal["values"]) != set(properties):
        return f".values has {', '.join(crystal['values'])}; the run is for {', '.join(properties)}"
    if len(crystal["frac_coords"]) != len(crystal["elements"]):
        return f" has {len(crystal['elements'])} elements on {len(crystal['frac_coords'])} sites"
    lattice = np.array(crystal["lattice"])
    if np.abs(lattice).max() > _CELL or np.abs(crystal["frac_coords"]).max() > _CELL:
        return f" has a cell or sites beyond {_CELL:g}"
    areas = np.linalg.norm(np.cross(lattice[[1, 2, 0]], lattice[[2, 0, 1]]), axis=1)
    if not abs(np.linalg.det(lattice)) >= _THINNEST * areas.max() > 0:
        return f".lattice is flat: opposite faces must be {_THINNEST} Å apart"
    return ""


def aim_text(best: Best) -> str:
    """What a run asks for, for people: ``target 1.12 eV``, or its objective in words."""
    if len(best["properties"]) == 1:
        (only,) = best["properties"].values()
        if only["low"] is not None and only["low"] == only["high"]:
            return f"target {only['low']:g} {only['unit']}".rstrip()
    return best["objective"]


def words(name: str) -> str:
    """The name of a property within a sentence: ``band gap``."""
    return name.replace("_", " ")


def values_text(best: Best, crystal: BestCrystal, digits: int) -> str:
    """The values of a crystal for people: ``band gap 1.12 eV, density 3.45 g/cm3``."""
    told = []
    for name, goal in best["properties"].items():
        told.append(f"{words(name)} {crystal['values'][name]:.{digits}f} {goal['unit']}".rstrip())
    return ", ".join(told)


def crystal_file(folder: Path, entry: BestCrystal) -> tuple[str, str] | None:
    """Name and text of the CIF file of an entry of ``best.json``; ``None`` if it is not there.

    Raises:
        FileRefused: the file, or its folder, is a link, or not a text file.
    """
    files.refuse_link(folder / CRYSTALS)
    path = folder / CRYSTALS / entry["file"].rpartition("/")[2]
    try:
        return path.name, files.read_text(path, _DOCUMENT_BYTES)
    except FileNotFoundError:
        return None


def read_sweep(folder: Path) -> list[int] | None:
    """The seeds of the sweep in a folder; ``None`` if there is none."""
    try:
        seeds = read_document(folder / SWEEP, _Sweep)["seeds"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not seeds or len(set(seeds)) < len(seeds):
        raise RunFolderError(f"{folder / SWEEP} must have one seed or more, each once; {_RESTORE}")
    return seeds


def read_spent(folder: Path) -> dict[str, Any]:
    """What the runs in a folder have spent on calculations; empty if that was not written down."""
    try:
        return dict(read_document(folder / ACCOUNTING, Spent))
    except FileNotFoundError:
        return {}


def read_tracker(folder: Path) -> str | None:
    """The id of a run in Weights & Biases; ``None`` if it has none."""
    try:
        return read_document(folder / TRACKER, _Tracked)["id"]
    except FileNotFoundError:
        return None


# Writing


def refuse_taken(folder: Path) -> None:
    """Raise ``RunFolderError`` if a folder holds something that has a name which a new run would write."""
    taken = [name for name in OWN if os.path.lexists(folder / name)]
    if CONFIG in taken or SWEEP in taken:
        raise RunFolderError(f"{folder} holds a run already: resume it, or choose another folder")
    if taken:
        raise RunFolderError(f"{folder} has {', '.join(taken)}, which a run would overwrite; choose another folder")
