"""The crystals of a run: every episode, and the distinct crystals among them."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from ase import formula as formulas

from crystaljax.agents.base import Records
from crystaljax.elements import Vocabulary
from crystaljax.run_folder import Count, Formula, Ordinal, StatusName, Symbols, Values
from crystaljax.skeleton import Skeleton
from crystaljax.status import Status
from crystaljax.symmetry import canonical_numbers

REFUSED = (Status.ODD_ELECTRONS, Status.ATOMS_TOO_CLOSE, Status.UNSUPPORTED_ELEMENT)
"""Outcomes that an engine predicts without a calculation."""


def formula(symbols: Iterable[str]) -> str:
    """The reduced formula, in the usual order of elements: ``KMgF3``."""
    return formulas.Formula("".join(symbols)).reduce()[0].format("metal")


@dataclasses.dataclass(frozen=True)
class Episode:
    """One finished crystal.

    Attributes:
        episode: number of the episode, from 0.
        update: update in which it ended, from 1.
        crystal: number of the distinct crystal, from 0; episodes that designed equivalent crystals share it.
        formula: reduced formula.
        elements: chemical symbol of each site of the skeleton.
        skeleton: index into the environment's skeletons.
        values: properties by name, in their units; ``None`` if a calculation failed.
        status: name of the outcome.
        reward: as the agent saw it.
    """

    episode: Count
    update: Ordinal
    crystal: Count
    formula: Formula
    elements: Symbols
    skeleton: Count
    values: Values
    status: StatusName
    reward: float


class Ledger:
    """Counts episodes and distinct crystals. Built again from its episodes, it is the same."""

    def __init__(self, skeletons: tuple[Skeleton, ...], vocabulary: Vocabulary, properties: tuple[str, ...]):
        self.skeletons = skeletons
        self.vocabulary = vocabulary
        self.properties = properties
        """Names of what crystals are evaluated for."""
        self.episodes = 0
        self.statuses: Counter[str] = Counter()
        self.crystals: list[Episode] = []
        """The first episode of each distinct crystal."""
        self._total_reward = 0.0
        self._index: dict[tuple[str, tuple[int, ...]], int] = {}

    @property
    def refused(self) -> int:
        """Distinct crystals that needed no calculation."""
        names = {status.name for status in REFUSED}
        return sum(crystal.status in names for crystal in self.crystals)

    @property
    def mean_reward(self) -> float:
        """Over all episodes."""
        return self._total_reward / max(self.episodes, 1)

    @property
    def best_reward(self) -> float | None:
        return max((crystal.reward for crystal in self.crystals), default=None)

    def best(self, count: int) -> list[Episode]:
        """The distinct crystals with the highest rewards among those with a value; the earlier one first if equal."""
        valued = [crystal for crystal in self.crystals if crystal.values is not None]
        return sorted(valued, key=lambda crystal: (-crystal.reward, crystal.crystal))[:count]

    def add_records(self, records: Records, update: int) -> list[Episode]:
        """Enter the episodes that ended in a rollout, in order of time and lane, and return them."""
        host = jax.tree.map(np.asarray, records)
        entered = []
        for where in np.argwhere(host.finished):
            step, lane = map(int, where)
            values, status = host.values[step, lane].tolist(), Status(int(host.status[step, lane]))
            sound = status == Status.OK and all(map(math.isfinite, values))
            entered.append(
                self._enter(
                    update=update,
                    labels=host.elements[step, lane],
                    skeleton=int(host.skeleton[step, lane]),
                    values=dict(zip(self.properties, values, strict=True)) if sound else None,
                    status=status.name,
                    reward=float(host.reward[step, lane]),
                )
            )
        return entered

    def add_line(self, line: Mapping[str, Any]) -> Episode:
        """Enter an episode read back from a file; raises ``ValueError`` if it cannot be one of this run."""
        skeleton, elements = line["skeleton"], list(line["elements"])
        if skeleton >= len(self.skeletons) or len(elements) != self.skeletons[skeleton].n_sites:
            raise ValueError(f"the run has no skeleton {skeleton} of {len(elements)} sites")
        if line["values"] is not None and set(line["values"]) != set(self.properties):
            raise ValueError(f"it has {', '.join(line['values'])}, and the run is for {', '.join(self.properties)}")
        return self._enter(
            update=line["update"],
            labels=self.vocabulary.indices(elements),
            skeleton=skeleton,
            values=line["values"],
            status=line["status"],
            reward=line["reward"],
        )

    def _enter(
        self,
        update: int,
        labels: np.ndarray,
        skeleton: int,
        values: dict[str, float] | None,
        status: str,
        reward: float,
    ) -> Episode:
        labels = labels[: self.skeletons[skeleton].n_sites]
        key = self._key(labels, skeleton)
        is_new = key not in self._index
        crystal = self._index.setdefault(key, len(self.crystals))
        symbols = tuple(self.vocabulary.symbols[label] for label in labels)
        episode = Episode(self.episodes, update, crystal, formula(symbols), symbols, skeleton, values, status, reward)
        self.episodes += 1
        self.statuses[status] += 1
        self._total_reward += reward
        if is_new:
            self.crystals.append(episode)
        return episode

    def _key(self, labels: np.ndarray, skeleton: int) -> tuple[str, tuple[int, ...]]:
        """Skeleton digest and atomic numbers in canonical form: equal for equivalent crystals."""
        numbers = self.vocabulary.numbers[labels]
        canonical = canonical_numbers(numbers, self.skeletons[skeleton].permutations)
        return self.skeletons[skeleton].digest, tuple(canonical.tolist())
