"""How well a run did, by the same numbers for every agent: pure functions on its episodes.

What counts is the price of a result, so curves run over *distinct calculations*: the distinct crystals that a run has
had evaluated. A crystal that comes again costs nothing, and neither does one that the engine refuses beforehand. That
another run had it calculated already, in a shared store, does not count.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from crystaljax.agents.ledger import REFUSED, Episode


class Goal(NamedTuple):
    """What counts as a success: a value between two bounds, in the unit of the property, or within ``tolerance``."""

    low: float
    high: float
    tolerance: float

    def met(self, value: float) -> bool:
        """Whether a value counts."""
        return self.low - self.tolerance <= value <= self.high + self.tolerance

    def text(self, unit: str) -> str:
        """For people: ``within 0.25 eV of 1.12``."""
        if self.low == self.high:
            return f"within {self.tolerance:g} {unit} of {self.low:g}"
        bounds = [f"at least {self.low:g}"] * math.isfinite(self.low) + [f"at most {self.high:g}"] * math.isfinite(
            self.high
        )
        return f"{' and '.join(bounds)} {unit}, or within {self.tolerance:g} of that"


CONFIDENCE = 0.95
RESAMPLES = 2000
"""Bootstrap resamples of an interval."""


def calculations(episodes: Sequence[Episode]) -> np.ndarray:
    """int64 [E]: distinct calculations made up to and including each episode."""
    refused = {status.name for status in REFUSED}
    seen: set[int] = set()
    calculated = np.zeros(len(episodes), np.int64)
    for index, episode in enumerate(episodes):
        calculated[index] = episode.crystal not in seen and episode.status not in refused
        seen.add(episode.crystal)
    return np.cumsum(calculated)


def within(episodes: Sequence[Episode], budget: int) -> list[Episode]:
    """The episodes before the calculation that goes beyond a budget of distinct calculations."""
    return list(episodes[: np.searchsorted(calculations(episodes), budget, side="right")])


def best_reward(episodes: Sequence[Episode]) -> np.ndarray:
    """float64 [K]: the best reward of an episode so far, after 1 ... K distinct calculations."""
    counts = calculations(episodes)
    rewards = np.maximum.accumulate([episode.reward for episode in episodes])
    return rewards[np.searchsorted(counts, _upto(counts), side="right") - 1]


def mean_reward(episodes: Sequence[Episode], window: int) -> np.ndarray:
    """float64 [K]: the mean reward of the episodes of the last ``window`` of 1 ... K distinct calculations.

    Repeated and refused crystals are in it: that is what the policy does.
    """
    if window < 1:
        raise ValueError(f"a window of {window} calculations holds none; give at least 1")
    counts = calculations(episodes)
    sums = np.concatenate([[0.0], np.cumsum([episode.reward for episode in episodes])])
    last = np.searchsorted(counts, _upto(counts), side="right")
    first = np.searchsorted(counts, _upto(counts) - window, side="right")
    return (sums[last] - sums[first]) / (last - first)


def _upto(counts: np.ndarray) -> np.ndarray:
    """int64 [K]: 1 ... K, where K is the last of the counts."""
    return np.arange(1, (counts[-1] if len(counts) else 0) + 1)


def distinct(episodes: Sequence[Episode]) -> list[Episode]:
    """The first episode of each distinct crystal."""
    first: dict[int, Episode] = {}
    for episode in episodes:
        first.setdefault(episode.crystal, episode)
    return list(first.values())


def succeeded(episodes: Sequence[Episode], goals: Mapping[str, Goal]) -> list[Episode]:
    """The episodes whose crystal has every property within its goal."""
    return [e for e in episodes if e.values is not None and all(g.met(e.values[name]) for name, g in goals.items())]


def first_success(episodes: Sequence[Episode], goals: Mapping[str, Goal]) -> int | None:
    """Distinct calculations up to the first crystal within all goals, itself included; ``None`` if there is none."""
    found = succeeded(episodes, goals)
    return int(calculations(episodes)[episodes.index(found[0])]) if found else None


def uniqueness(episodes: Sequence[Episode]) -> float:
    """Distinct crystals per episode; NaN without episodes."""
    return _share(len(distinct(episodes)), len(episodes))


def diversity(crystals: Sequence[Episode]) -> float:
    """Mean distance of two crystals by composition, between 0 and 1; NaN for fewer than two crystals.

    The distance is the fraction of the atoms that one must exchange to make the composition of one that of the other:
    half the sum over elements of the differences of their atomic fractions. Where the atoms sit makes no difference.
    """
    count = len(crystals)
    if count < 2:
        return float("nan")
    elements = sorted({symbol for crystal in crystals for symbol in crystal.elements})
    fractions = np.zeros((count, len(elements)))
    for row, crystal in zip(fractions, crystals, strict=True):
        for symbol, amount in Counter(crystal.elements).items():
            row[elements.index(symbol)] = amount / len(crystal.elements)
    # The sum of |x_i - x_j| over pairs, in sorted order: x_i is subtracted from those after it, added to those before.
    weights = 2 * np.arange(count) - (count - 1)
    total = (weights[:, None] * np.sort(fractions, axis=0)).sum()
    return float(total / 2 / (count * (count - 1) / 2))


def novelty(crystals: Sequence[Episode], reference: Collection[str]) -> float:
    """Share of the crystals whose formula is not in a reference (:func:`crystaljax.agents.reference.read`); NaN for no
    crystals.

    A formula is all that is compared: another structure of a known formula is not novel.
    """
    return _share(sum(crystal.formula not in reference for crystal in crystals), len(crystals))


def plausibility(crystals: Sequence[Episode]) -> tuple[float, float]:
    """Shares of the crystals that are charge-neutral, and that are chemically plausible; NaN for no crystals.

    By the library smact (Davies et al., J. Open Source Softw. 4, 1361 (2019)), with its oxidation states from the ICSD:
    *neutral* if some assignment of oxidation states adds up to zero; *plausible* if one does in which every anion is
    more electronegative than every cation, or if the crystal is an alloy. Elements are both.

    Raises:
        ModuleNotFoundError: smact is not installed.
    """
    judged = [_neutral_and_plausible(crystal.formula) for crystal in crystals]
    neutral, plausible = (sum(column) for column in zip(*judged, strict=True)) if judged else (0, 0)
    return _share(neutral, len(crystals)), _share(plausible, len(crystals))


@functools.cache
def _neutral_and_plausible(formula: str) -> tuple[bool, bool]:
    from smact.screening import smact_validity

    return smact_validity(formula, use_pauling_test=False, include_alloys=False), smact_validity(formula)


def wall_seconds(updates: Sequence[Mapping[str, Any]]) -> float:
    """Wall time in s of the updates of a run (lines of ``metrics.jsonl``), compilation included."""
    return float(sum(line["seconds"] for line in updates))


def idle_share(updates: Sequence[Mapping[str, Any]]) -> float:
    """Share of the wall time in which the device waited for calculations; NaN if that was not written down.

    The device is the one of the policy; an engine on the same device may be using it meanwhile.
    """
    if not updates or any("waiting_seconds" not in line for line in updates):
        return float("nan")
    return _share(sum(line["waiting_seconds"] for line in updates), wall_seconds(updates))


def interquartile_mean(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """The mean without the lowest and the highest quarter, of whole values: of 10 seeds, 6 count; of 3, all do.

    As in Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice" (arXiv 2108.13264).
    """
    return stats.trim_mean(values, 0.25, axis=axis)


def interval(values: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % interval of the interquartile mean over the first axis, by the percentile bootstrap.

    Args:
        values: float [S, ...], one entry for each of S seeds.
        seed: of the resampling.

    Returns:
        Lower and upper ends, float [...]; NaN for a single seed, which tells nothing about others.
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        nothing = np.full(values.shape[1:], np.nan)
        return nothing, nothing
    found = stats.bootstrap(
        (values,),
        interquartile_mean,
        axis=0,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return found.confidence_interval.low, found.confidence_interval.high


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
