"""The crystals of a run whose reward is still to come: sent away with tickets, entered as they come back.

``tickets.jsonl`` has a line for each update: what was sent, and which tickets had come back by the end of it. It says
what is outstanding at a checkpoint, and is the order of arrival on which, besides the seed, the run's numbers depend.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from crystaljax import files
from crystaljax.agents.base import Records
from crystaljax.agents.interrupt import POLL_SECONDS, Stop
from crystaljax.delayed import NO_TICKET
from crystaljax.env import CrystalEnv
from crystaljax.evaluators import BudgetSpent
from crystaljax.run_folder import TICKETS, RunFolderError, Tickets, keep_lines, read_lines
from crystaljax.status import Status

logger = logging.getLogger(__name__)


class Evaluation(Protocol):
    """What evaluates crystals meanwhile: a :class:`crystaljax.dft_bridge.delayed.DelayedEvaluation`."""

    outstanding: int

    def send(self, info: Mapping[str, Any]) -> int: ...

    def receive(self, wait: float | None = 0.0) -> Any: ...


def _sent(line: Tickets) -> dict[int, tuple[int, list[int]]]:
    """Skeleton and elements by ticket."""
    return {ticket: (skeleton, list(elements)) for ticket, skeleton, elements in line["sent"]}


def tickets_at(folder: Path, update: int, env: CrystalEnv) -> list[Tickets]:
    """The lines of ``tickets.jsonl`` up to the end of an update at which a run has a checkpoint.

    Raises:
        RunFolderError, FileRefused: a line is damaged or missing, or takes back a ticket that is not out; names it.
    """
    path = folder / TICKETS
    out: set[int] = set()
    lines = read_lines(path, Tickets)
    for number, line in enumerate(lines, start=1):
        new, back = _sent(line), line["arrived"]
        for skeleton, elements in new.values():
            fits = skeleton < len(env.skeletons) and len(elements) == env.max_sites
            if not fits or max(elements) > env.vocabulary.blank:
                raise RunFolderError(f"{path}, line {number} has crystals that are not of this run; restore the file")
        each_once = out.isdisjoint(new) and len(set(back)) == len(back) and out.union(new).issuperset(back)
        if line["update"] != number or not each_once:
            raise RunFolderError(
                f"{path}, line {number} does not go on from the lines before it: lines are missing or out of order, so "
                "restore the file from a copy"
            )
        out = out.union(new).difference(back)
    if len(lines) < update:
        raise RunFolderError(
            f"{path} has {len(lines)} of the {update} updates up to the last checkpoint; restore the file from a copy, "
            "or start the run anew in another folder"
        )
    return lines[:update]


class Outstanding:
    """Sends crystals to an evaluation and collects their rewards; at most ``limit`` are left between two updates."""

    def __init__(self, folder: Path, past: Sequence[Tickets], evaluation: Evaluation, limit: int, properties: int = 1):
        """Goes back to what :func:`tickets_at` has read: what was outstanding then is sent again.

        ``properties``: how many values a crystal has.
        """
        self.limit = limit
        self._properties = properties
        self.stopped = ""
        """Why nothing more is evaluated (a budget that is spent), for people."""
        self._evaluation = evaluation
        self._open: dict[int, tuple[int, list[int]]] = {}
        """Skeleton and elements by ticket."""
        self._sent: list[tuple[int, int, list[int]]] = []
        self._arrived: list[Any] = []
        for line in past:
            self._open |= _sent(line)
            for ticket in line["arrived"]:
                del self._open[ticket]
        keep_lines(folder / TICKETS, len(past))
        self._file = files.open_to_append(folder / TICKETS)
        if self._open:
            logger.info("%d crystals whose reward is still to come are sent again", len(self._open))
            self._send(self._open)

    def __len__(self) -> int:
        """Crystals whose reward has not come."""
        return len(self._open)

    def send(self, records: Records) -> None:
        """Have the crystals evaluated that were finished in a rollout."""
        tickets = np.asarray(records.ticket)
        where = tickets != NO_TICKET
        skeletons, elements = (np.asarray(leaf)[where].tolist() for leaf in (records.skeleton, records.elements))
        self._sent = list(zip(tickets[where].tolist(), skeletons, elements, strict=True))
        new = {ticket: (skeleton, labels) for ticket, skeleton, labels in self._sent}
        self._open |= new
        self._send(new)

    def wait(self, stop: Stop, waiting: Callable[[], None], all_of_them: bool = False) -> bool:
        """Wait until few enough are outstanding; false if that will not be, as evaluation or the run was stopped.

        Raises what else stops the evaluation, as :meth:`crystaljax.dft_bridge.bridge.Bridge.collect`.
        """
        while self._evaluation.outstanding > (0 if all_of_them or self.stopped else self.limit) and not stop.requested:
            self._receive(POLL_SECONDS)
            waiting()
        self._receive(0.0)
        arrived = sum(len(arrivals.tickets) for arrivals in self._arrived)
        # Whatever was cancelled stays open, so that it is sent again when the run is resumed.
        return not stop.requested and not self.stopped and self._evaluation.outstanding == len(self._open) - arrived

    def take(self) -> tuple[np.ndarray, Records]:
        """Tickets int32 [K] and records [1, K] of what has arrived since the last call, in the order of arrival."""
        arrived = [np.concatenate(leaves) for leaves in zip(*self._arrived, strict=True)] if self._arrived else None
        self._arrived = []
        nothing = np.zeros(0, "i4"), np.zeros((0, self._properties), "f4"), np.zeros(0, "i4"), np.zeros(0, "f4")
        tickets, values, statuses, rewards = arrived or nothing
        crystals = [self._open[ticket] for ticket in tickets.tolist()]
        skeletons = np.array([skeleton for skeleton, _ in crystals], np.int32)
        sites = max((len(labels) for _, labels in crystals), default=1)
        elements = np.array([labels for _, labels in crystals], np.int32).reshape(-1, sites)
        finished = np.ones(len(tickets), bool)
        leaves = (rewards, finished, values, statuses, elements, skeletons, tickets)
        return tickets, Records(*(leaf[None] for leaf in leaves))

    def write(self, update: int, tickets: np.ndarray) -> None:
        """An update is done, and these tickets have been taken in the course of it."""
        arrived = tickets.tolist()
        self._file.write(json.dumps({"update": update, "sent": self._sent, "arrived": arrived}) + "\n")
        self._file.flush()
        self._sent = []
        for ticket in arrived:
            del self._open[ticket]

    def sync(self) -> None:
        """Have everything on the disk, before a checkpoint that counts on it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()

    def _send(self, crystals: Mapping[int, tuple[int, list[int]]]) -> None:
        if not crystals:
            return
        skeletons, elements = zip(*crystals.values(), strict=True)
        info = {"ticket": np.array(list(crystals), np.int32), "skeleton": skeletons, "elements": elements}
        try:
            self._evaluation.send(info)
        except BudgetSpent as spent:  # what came of those before; these stay open
            self.stopped = str(spent)

    def _receive(self, wait: float) -> None:
        try:
            arrivals = self._evaluation.receive(wait)
        except BudgetSpent as spent:  # said once; what has finished comes with the next calls
            self.stopped = str(spent)
            return
        known = arrivals.statuses != Status.CANCELLED
        if known.any():
            self._arrived.append(type(arrivals)(*(leaf[known] for leaf in arrivals)))
