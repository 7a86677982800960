"""What a run appends to: ``metrics.jsonl``, ``episodes.jsonl``, TensorBoard events and, if asked to, a tracker."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crystaljax.agents.ledger import Episode
from crystaljax.agents.tracking import Tracker
from tensorboardX import SummaryWriter

from crystaljax.files import replace_text

METRICS, EPISODES, TENSORBOARD = "metrics.jsonl", "episodes.jsonl", "tensorboard"


def read_lines(path: Path, last_update: float = math.inf) -> Iterator[dict[str, Any]]:
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


class Journal:
    """Appends to the files of a run folder, after cutting them back to an update."""

    def __init__(self, folder: Path, update: int, tracker: Tracker | None = None):
        self.metrics = list(read_lines(folder / METRICS, update))
        self.past_episodes = list(read_lines(folder / EPISODES, update))
        for name, lines in ((METRICS, self.metrics), (EPISODES, self.past_episodes)):
            replace_text(folder / name, "".join(json.dumps(line) + "\n" for line in lines))
        self._metrics_file = (folder / METRICS).open("a")
        self._episodes_file = (folder / EPISODES).open("a")
        self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=update + 1 if update else None)
        self._tracker = tracker

    def write(self, metrics: dict[str, Any], episodes: list[Episode]) -> None:
        """Append the line of an update and those of its episodes."""
        self.metrics.append(metrics)
        self._metrics_file.write(json.dumps(metrics) + "\n")
        self._episodes_file.writelines(json.dumps(dataclasses.asdict(episode)) + "\n" for episode in episodes)
        for file in (self._metrics_file, self._episodes_file):
            file.flush()
        update = metrics["update"]
        numbers = {name: x for name, x in metrics.items() if isinstance(x, int | float) and name != "update"}
        for name, number in numbers.items():
            self._board.add_scalar(name, number, update)
        if self._tracker is not None:
            self._tracker.write(numbers, update)

    def sync(self) -> None:
        """Have everything on the disk, before a checkpoint that counts on it."""
        for file in (self._metrics_file, self._episodes_file):
            os.fsync(file.fileno())

    def close(self) -> None:
        self.sync()
        self._metrics_file.close()
        self._episodes_file.close()
        self._board.close()
        if self._tracker is not None:
            self._tracker.close()
