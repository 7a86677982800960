"""The files that a run appends to: ``metrics.jsonl``, ``episodes.jsonl`` and TensorBoard events."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from agents.ledger import Episode

METRICS, EPISODES, TENSORBOARD = "metrics.jsonl", "episodes.jsonl", "tensorboard"


def read_lines(path: Path, last_update: int) -> Iterator[dict[str, Any]]:
    """The lines of a JSONL file up to an update; whatever a killed run left behind after it is ignored."""
    if not path.exists():
        return
    with path.open() as file:
        for text in file:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # a line cut short; checkpoints are synced, so only unneeded ones are
                return
            if line["update"] > last_update:
                return
            yield line


def _truncate(path: Path, lines: list[dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(partial, path)


class Journal:
    """Appends to the files of a run folder, after cutting them back to an update."""

    def __init__(self, folder: Path, update: int):
        self.metrics = list(read_lines(folder / METRICS, update))
        self.past_episodes = list(read_lines(folder / EPISODES, update))
        _truncate(folder / METRICS, self.metrics)
        _truncate(folder / EPISODES, self.past_episodes)
        self._metrics_file = (folder / METRICS).open("a")
        self._episodes_file = (folder / EPISODES).open("a")
        self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=update + 1 if update else None)

    def write(self, metrics: dict[str, Any], episodes: list[Episode]) -> None:
        """Append the line of an update and those of its episodes."""
        self.metrics.append(metrics)
        self._metrics_file.write(json.dumps(metrics) + "\n")
        self._episodes_file.writelines(json.dumps(dataclasses.asdict(episode)) + "\n" for episode in episodes)
        for file in (self._metrics_file, self._episodes_file):
            file.flush()
        for name, value in metrics.items():
            if isinstance(value, int | float) and name != "update":
                self._board.add_scalar(name, value, metrics["update"])

    def sync(self) -> None:
        """Have everything on the disk, before a checkpoint that counts on it."""
        for file in (self._metrics_file, self._episodes_file):
            os.fsync(file.fileno())

    def close(self) -> None:
        self.sync()
        self._metrics_file.close()
        self._episodes_file.close()
        self._board.close()
