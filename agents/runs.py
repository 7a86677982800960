"""Runs as they lie in their folders, finished, stopped or killed; for reports and comparisons."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from crystaljax.agents import config as configs
from crystaljax.agents.config import RunConfig
from crystaljax.agents.journal import read_history
from crystaljax.agents.ledger import Episode
from crystaljax.run_folder import BEST, Best, Metrics, RunFolderError, read_best, read_spent, read_sweep


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run has left so far.

    Attributes:
        folder: where it is.
        config: its settings.
        episodes: all of them, in order.
        updates: the lines of ``metrics.jsonl``, one for each update.
        best: what ``best.json`` says: target, unit, source of the values, and the best crystals at the last checkpoint.
        accounting: what calculations have cost, as :class:`crystaljax.dft_bridge.accounting.Stats` counts it; empty
            without DFT.
            That of a sweep is for all its runs.
        sweep: the folder of the sweep that it belongs to, else its own.
    """

    folder: Path
    config: RunConfig
    episodes: list[Episode]
    updates: list[Metrics]
    best: Best
    accounting: dict[str, Any]
    sweep: Path

    @property
    def finished(self) -> bool:
        """Whether it has designed all the crystals it was asked for."""
        return len(self.episodes) >= self.config.episodes

    @property
    def surrogate(self) -> bool:
        """Whether its values come from a model that stands in for DFT."""
        return self.best["source"].startswith("surrogate")

    @property
    def source(self) -> str:
        """Where its values come from, in a few words: ``DFT``, ``surrogate``, or ``no DFT`` (exact on the device)."""
        if self.surrogate:
            return "surrogate"
        return "DFT" if self.best["fingerprint"] else "no DFT"


def member_folder(folder: Path, seed: int) -> Path:
    """The folder of a run of a sweep."""
    return folder / f"seed-{seed}"


def members(folder: Path) -> list[Path]:
    """The folders of the runs of a sweep; of a run its own."""
    return [member_folder(folder, seed) for seed in read_sweep(folder) or ()] or [folder]


def read_all(folders: Iterable[Path]) -> list[Run]:
    """The runs in folders of runs and of sweeps, each once.

    Raises:
        RunFolderError, FileRefused: for a folder that is neither, with those in it that are, or for damaged files and
            links in it, with file and line.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        for member in members(folder):
            found.setdefault(member.resolve(), member)
    return [_read(member) for member in found.values()]


def _read(folder: Path) -> Run:
    config, _ = configs.load(folder)
    try:
        best = read_best(folder)
    except FileNotFoundError:
        raise RunFolderError(
            f"{folder} has no {BEST}: go on with the run: crystaljax train --resume --run {folder}"
        ) from None
    history = read_history(folder)
    sweep = folder.parent if folder in members(folder.parent) else folder
    return Run(folder, config, history.episodes, history.metrics, best, read_spent(sweep), sweep)
