"""What a run appends to: ``metrics.jsonl``, ``episodes.jsonl``, TensorBoard events and, if asked to, a tracker."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from crystaljax import files
from crystaljax.agents.ledger import Episode
from crystaljax.agents.tracking import Tracker
from crystaljax.run_folder import EPISODES, METRICS, TENSORBOARD, Metrics, RunFolderError, keep_lines, read_lines

_LINES_MISSING = "lines are missing or out of order, so restore the file from a copy"


@dataclasses.dataclass(frozen=True)
class History:
    """What a run has appended.

    Attributes:
        metrics: one line for each update.
        episodes: all of them, in order.
    """

    metrics: list[Metrics]
    episodes: list[Episode]


def read_history(folder: Path) -> History:
    """What a run has appended so far, but for a last line that was cut short.

    Raises:
        RunFolderError, FileRefused: a line is damaged or missing, or a file is none of a run's; names file and line.
    """
    history = History(read_lines(folder / METRICS, Metrics), read_lines(folder / EPISODES, Episode))
    for number, line in enumerate(history.metrics, start=1):
        if line["update"] != number:
            raise RunFolderError(f"{folder / METRICS}, line {number} is of update {line['update']}; {_LINES_MISSING}")
    last = 1
    for number, episode in enumerate(history.episodes, start=1):
        if episode.episode != number - 1 or episode.update < last:
            what = f"episode {episode.episode} of update {episode.update}"
            raise RunFolderError(f"{folder / EPISODES}, line {number} is {what}; {_LINES_MISSING}")
        last = episode.update
    return history


def history_at(folder: Path, update: int) -> History:
    """What a run had appended by the end of an update at which it has a checkpoint; errors as of :func:`read_history`.

    What comes after it is left out: the run makes it again.
    """
    history = read_history(folder)
    metrics = history.metrics[:update]
    episodes = [episode for episode in history.episodes if episode.update <= update]
    expected = metrics[-1]["episodes"] if metrics else 0
    for name, found, wanted, what in (
        (METRICS, len(metrics), update, "updates"),
        (EPISODES, len(episodes), expected, "episodes"),
    ):
        if found != wanted:
            raise RunFolderError(
                f"{folder / name} has {found} of the {wanted} {what} up to the checkpoint of update {update}; restore "
                "the file from a copy, or start the run anew in another folder"
            )
    return History(metrics, episodes)


class Journal:
    """Appends to the files of a run folder, after cutting them back to a history."""

    def __init__(self, folder: Path, history: History, tracker: Tracker | None = None):
        self.metrics: list[Any] = list(history.metrics)
        keep_lines(folder / METRICS, len(history.metrics))
        keep_lines(folder / EPISODES, len(history.episodes))
        self._metrics_file = files.open_to_append(folder / METRICS)
        self._episodes_file = files.open_to_append(folder / EPISODES)
        update = len(history.metrics)
        board = files.make_folder(folder / TENSORBOARD)
        self._board = SummaryWriter(str(board), purge_step=update + 1 if update else None)
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
