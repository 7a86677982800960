"""The host loop of delayed rewards: crystals with tickets out, values with tickets back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from crystaljax.delayed import NO_TICKET
from crystaljax.dft_bridge.engines.base import Result, outcome_of
from crystaljax.dft_bridge.keys import Request
from crystaljax.dft_bridge.tickets import Answer
from crystaljax.env import CrystalEnv
from crystaljax.status import Status


class Arrivals(NamedTuple):
    """Answers in the order of their arrival, K of them; see :func:`crystaljax.delayed.fill`.

    Attributes:
        tickets: int32 [K].
        values: float32 [K, P], NaN where there is none.
        statuses: int32 [K].
        rewards: float32 [K], each for the target of its episode.
    """

    tickets: np.ndarray
    values: np.ndarray
    statuses: np.ndarray
    rewards: np.ndarray


class Submitting(Protocol):
    """What calculates while others go on: a :class:`crystaljax.dft_bridge.bridge.Bridge`."""

    def submit(self, requests: Sequence[Request], tickets: Iterable[int] | None = None) -> list[int]:
        """Ask for results, each by a ticket."""
        ...

    def collect(self, wait: float | None = 0.0) -> list[Answer]:
        """The answers that have arrived."""
        ...


class DelayedEvaluation:
    """Evaluates what the episodes of a :class:`crystaljax.delayed.DelayedRewards` have designed."""

    def __init__(self, bridge: Submitting, env: CrystalEnv, target: float | Sequence[float] | None = None):
        """The bridge stays yours to close.

        Args:
            bridge: what calculates.
            env: the environment, wrapped or not.
            target: of crystals that are sent without one (T of them, if the objective has several), by default the
                task's.
        """
        self._bridge, self._env = bridge, env
        self._properties = env.objective.names
        self._given = target
        self._target = np.asarray(env.objective.target if target is None else target, np.float32)
        self._targets: dict[int, np.ndarray] = {}
        self._arrived: dict[int, dict[int, Result]] = {}
        """By ticket, results by place of the property, until all of a crystal are there."""

    @property
    def outstanding(self) -> int:
        """How many answers have not been received."""
        return len(self._targets)

    def send(self, info: Mapping[str, Any]) -> int:
        """Submit the finished crystals of a step or a rollout; returns how many.

        Args:
            info: of ``DelayedRewards.step``, with any leading axes: ``ticket`` [...], ``elements`` [..., N],
                ``skeleton`` [...], and ``target`` [...] (or [..., T]) if it is there. Tickets must be new.

        Raises:
            ValueError: an episode aimed at another target than the one given for this evaluation.
            As :meth:`crystaljax.dft_bridge.bridge.Bridge.submit`.
        """
        tickets = np.asarray(info["ticket"]).reshape(-1)
        ended = np.flatnonzero(tickets != NO_TICKET)
        elements = np.asarray(info["elements"]).reshape(len(tickets), -1)[ended]
        skeletons = np.asarray(info["skeleton"]).reshape(-1)[ended]
        targets = self._targets_of(info, len(tickets), ended)
        sent, requests = tickets[ended].tolist(), []
        for labels, index in zip(self._env.vocabulary.numbers[elements], skeletons.tolist(), strict=True):
            skeleton = self._env.skeletons[index]
            requests += [Request.of(skeleton, labels[: skeleton.n_sites], name) for name in self._properties]
        # The bridge knows results of one property each.
        count = len(self._properties)
        self._bridge.submit(requests, [ticket * count + place for ticket in sent for place in range(count)])
        self._targets |= zip(sent, targets, strict=True)
        return len(sent)

    def _targets_of(self, info: Mapping[str, Any], count: int, ended: np.ndarray) -> np.ndarray:
        """float32 [K] or [K, T], what the episodes aimed at that have ended, out of ``count`` lanes."""
        shape = self._target.shape
        if "target" not in info:
            return np.broadcast_to(self._target, (len(ended), *shape))
        targets = np.asarray(info["target"], np.float32).reshape(-1, *shape)
        targets = np.broadcast_to(targets, (count, *shape))[ended]
        if self._given is not None and (targets != self._target).any():
            aims, own = (
                ", ".join(f"{target:g}" for target in sorted(set(some.ravel().tolist())))
                for some in (targets, self._target)
            )
            raise ValueError(
                f"episodes aimed at {aims}, the evaluation is for {own}; leave out its target, then each reward is for "
                "the target of its episode"
            )
        return targets

    def receive(self, wait: float | None = 0.0) -> Arrivals:
        """What has arrived; ``wait`` and what is raised as for :meth:`crystaljax.dft_bridge.bridge.Bridge.collect`."""
        finished = []
        count = len(self._properties)
        for answer in self._bridge.collect(wait):
            ticket, place = divmod(answer.ticket, count)
            results = self._arrived.setdefault(ticket, {})
            results[place] = answer.result
            if len(results) == count:
                del self._arrived[ticket]
                finished.append((ticket, outcome_of([results[place] for place in range(count)])))
        tickets = np.array([ticket for ticket, _ in finished], np.int32)
        statuses = np.array([outcome.status for _, outcome in finished], np.int32)
        values = np.array([outcome.values for _, outcome in finished], np.float32).reshape(-1, count)
        values = np.where((statuses == Status.OK)[:, None], values, np.float32(np.nan))
        targets = np.array([self._targets.pop(ticket, self._target) for ticket in tickets.tolist()], np.float32)
        rewards = np.asarray(self._env.objective.reward(values, statuses, targets.reshape(-1, *self._target.shape)))
        return Arrivals(tickets, values, statuses, rewards)
