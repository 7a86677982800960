"""The host loop of delayed rewards: crystals with tickets out, values with tickets back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from crystaljax.delayed import NO_TICKET
from crystaljax.dft_bridge.keys import Request
from crystaljax.dft_bridge.tickets import Answer
from crystaljax.env import CrystalEnv
from crystaljax.status import Status


class Arrivals(NamedTuple):
    """Answers in the order of their arrival, K of them; see :func:`crystaljax.delayed.fill`.

    Attributes:
        tickets: int32 [K].
        values: float32 [K], NaN where there is none.
        statuses: int32 [K].
        rewards: float32 [K], each for the target of its episode.
    """

    tickets: np.ndarray
    values: np.ndarray
    statuses: np.ndarray
    rewards: np.ndarray


class Submitting(Protocol):
    """What calculates while others go on: a :class:`crystaljax.dft_bridge.bridge.Bridge`."""

    @property
    def outstanding(self) -> int:
        """How many answers have not been collected."""
        ...

    def submit(self, requests: Sequence[Request], tickets: Iterable[int] | None = None) -> list[int]:
        """Ask for results, each by a ticket."""
        ...

    def collect(self, wait: float | None = 0.0) -> list[Answer]:
        """The answers that have arrived."""
        ...


class DelayedEvaluation:
    """Evaluates what the episodes of a :class:`crystaljax.delayed.DelayedRewards` have designed."""

    def __init__(self, bridge: Submitting, env: CrystalEnv, target: float | None = None):
        """The bridge stays yours to close.

        Args:
            bridge: what calculates.
            env: the environment, wrapped or not.
            target: of crystals that are sent without one, by default the task's.
        """
        self._bridge, self._env = bridge, env
        self._given = target
        self._target = np.float32(env.objective.target if target is None else target)
        self._targets: dict[int, np.float32] = {}

    @property
    def outstanding(self) -> int:
        """How many answers have not been received."""
        return self._bridge.outstanding

    def send(self, info: Mapping[str, Any]) -> int:
        """Submit the finished crystals of a step or a rollout; returns how many.

        Args:
            info: of ``DelayedRewards.step``, with any leading axes: ``ticket`` [...], ``elements`` [..., N],
                ``skeleton`` [...], and ``target`` [...] if it is there. Tickets must be new.

        Raises:
            ValueError: an episode aimed at another target than the one given for this evaluation.
            As :meth:`crystaljax.dft_bridge.bridge.Bridge.submit`.
        """
        tickets = np.asarray(info["ticket"]).reshape(-1)
        ended = np.flatnonzero(tickets != NO_TICKET)
        elements = np.asarray(info["elements"]).reshape(len(tickets), -1)[ended]
        skeletons = np.asarray(info["skeleton"]).reshape(-1)[ended]
        targets = self._targets_of(info, len(tickets), ended)
        requests = []
        for labels, index in zip(self._env.vocabulary.numbers[elements], skeletons.tolist(), strict=True):
            skeleton = self._env.skeletons[index]
            requests.append(Request.of(skeleton, labels[: skeleton.n_sites], self._env.objective.property))
        self._bridge.submit(requests, tickets[ended].tolist())
        self._targets |= zip(tickets[ended].tolist(), targets, strict=True)
        return len(requests)

    def _targets_of(self, info: Mapping[str, Any], count: int, ended: np.ndarray) -> np.ndarray:
        """float32, what the episodes aimed at that have ended, out of ``count`` lanes."""
        if "target" not in info:
            return np.full(len(ended), self._target)
        targets = np.broadcast_to(np.asarray(info["target"], np.float32).reshape(-1), count)[ended]
        if self._given is not None and (targets != self._target).any():
            aims = ", ".join(f"{target:g}" for target in sorted(set(targets.tolist())))
            raise ValueError(
                f"episodes aimed at {aims}, the evaluation is for {self._given:g}; leave out its target, then each "
                "reward is for the target of its episode"
            )
        return targets

    def receive(self, wait: float | None = 0.0) -> Arrivals:
        """What has arrived; ``wait`` and what is raised as for :meth:`crystaljax.dft_bridge.bridge.Bridge.collect`."""
        answers = self._bridge.collect(wait)
        tickets = np.array([answer.ticket for answer in answers], np.int32)
        statuses = np.array([answer.result.status for answer in answers], np.int32)
        values = np.array([answer.result.value for answer in answers], np.float32)
        values = np.where(statuses == Status.OK, values, np.float32(np.nan))
        targets = np.array([self._targets.pop(ticket, self._target) for ticket in tickets.tolist()], np.float32)
        rewards = np.asarray(self._env.objective.reward(values, statuses, targets))
        return Arrivals(tickets, values, statuses, rewards)
