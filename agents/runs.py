"""Runs as they lie in their folders, finished, stopped or killed; for reports and comparisons."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from crystaljax.agents import accounting, report
from crystaljax.agents import config as configs
from crystaljax.agents.config import RunConfig
from crystaljax.agents.journal import EPISODES, METRICS, read_lines
from crystaljax.agents.ledger import Episode

SWEEP_FILE = "sweep.json"
"""What the folder of a sweep holds beside the folders of its runs."""


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
    updates: list[dict[str, Any]]
    best: dict[str, Any]
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


def sweep_seeds(folder: Path) -> list[int] | None:
    """The seeds of the sweep in a folder; ``None`` if there is none."""
    path = folder / SWEEP_FILE
    return json.loads(path.read_text())["seeds"] if path.exists() else None


def member_folder(folder: Path, seed: int) -> Path:
    """The folder of a run of a sweep."""
    return folder / f"seed-{seed}"


def members(folder: Path) -> list[Path]:
    """The folders of the runs of a sweep; of a run its own."""
    return [member_folder(folder, seed) for seed in sweep_seeds(folder) or ()] or [folder]


def read_all(folders: Iterable[Path]) -> list[Run]:
    """The runs in folders of runs and of sweeps, each once.

    Raises:
        ValueError: for a folder that is neither, with those in it that are.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        for member in members(folder):
            found.setdefault(member.resolve(), member)
    return [_read(member) for member in found.values()]


def _read(folder: Path) -> Run:
    config, _ = configs.load(folder)
    try:
        best = json.loads((folder / report.BEST_JSON).read_text())
        episodes = [Episode(**line | {"elements": tuple(line["elements"])}) for line in read_lines(folder / EPISODES)]
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no {report.BEST_JSON}: go on with the run: crystaljax train --resume --run {folder}"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder} holds files that this version cannot read ({error}); start the run anew") from error
    sweep = folder.parent if sweep_seeds(folder.parent) else folder
    return Run(folder, config, episodes, list(read_lines(folder / METRICS)), best, accounting.read(sweep), sweep)
