"""What a task asks for, and the reward of every crystal, in one place.

An objective has terms. Each scores one property of a crystal against numbers that are traced, its *targets*, and the
scores are combined. The tasks of CrystalGym (arXiv 2509.23156) have one term each; ``t`` is its target, ``v``
the value:

=============  ======================================  ==========
property       reward                                  on failure
=============  ======================================  ==========
band gap       ``exp(-(t - v)^2)``, v >= 0, eV         -1
density        ``exp(-(t - v)^2 / 3)``, g/cm3          -1
bulk modulus   ``-|t - v| / t``, at least -5, GPa      -5
=============  ======================================  ==========

Objectives of your own are written as in ``parse("band_gap=1.34+-0.2", "density<=5")``, or made of :class:`Term`.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import itertools
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crystaljax.properties import (
    BAND_GAP,
    BULK_MODULUS,
    COMBINE,
    DENSITY,
    Property,
    known_properties,
    property_of,
)
from crystaljax.status import Status

MAX_TARGET_RATIO = 10.0
"""Largest target, in units of the default one, unless a term says otherwise."""
BULK_MODULUS_FLOOR = -5.0
"""The lowest reward of the bulk-modulus task, also its reward on failure."""

Score = Callable[..., jax.Array]
"""(value, targets ...) to a score, all float32 of one shape. Between 0 and 1 where there are several terms."""


def _falling(distance: jax.Array, width: float) -> jax.Array:
    """``exp(-(distance / width)^2)``, 1 for distances that are not positive."""
    return jnp.exp(-jnp.square(jnp.maximum(distance, 0.0)) / width**2)


@dataclasses.dataclass(frozen=True)
class Near:
    """``exp(-((value - target) / width)^2)``; values below ``lowest`` count as it (metals have a gap of zero)."""

    width: float
    lowest: float = -math.inf

    def __call__(self, value: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.exp(-jnp.square(target - jnp.maximum(value, self.lowest)) / self.width**2)


@dataclasses.dataclass(frozen=True)
class Within:
    """1 between a lowest and a highest target, ``exp(-(distance / width)^2)`` outside."""

    width: float

    def __call__(self, value: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        return _falling(jnp.maximum(low - value, value - high), self.width)


@dataclasses.dataclass(frozen=True)
class AtMost:
    """1 up to the target, ``exp(-(excess / width)^2)`` above."""

    width: float

    def __call__(self, value: jax.Array, target: jax.Array) -> jax.Array:
        return _falling(value - target, self.width)


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """1 from the target on, ``exp(-(lack / width)^2)`` below."""

    width: float

    def __call__(self, value: jax.Array, target: jax.Array) -> jax.Array:
        return _falling(target - value, self.width)


@dataclasses.dataclass(frozen=True)
class Share:
    """``-|target - value| / target``, at least ``floor``: 0 at best, so it stands alone in its objective."""

    floor: float

    def __call__(self, value: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.maximum(-jnp.abs(target - value) / target, self.floor)


@dataclasses.dataclass(frozen=True)
class Term:
    """A property, how its value is scored, and against what.

    Attributes:
        property: which; a name will do.
        score: one of the shapes above, or a JAX function of yours of a value and the targets.
        targets: the default ones, as many as ``score`` takes, in the unit of the property.
        weight: of the term among others: an exponent in a product, a factor in a weighted mean.
        reach: lowest and highest target that make sense. By default up to ten times the default target, on its side of
            zero and zero left out; -10 to 10 around a default target of 0.
    """

    property: Property
    score: Score
    targets: tuple[float, ...]
    weight: float = 1.0
    reach: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "property", property_of(self.property))
        object.__setattr__(self, "targets", tuple(map(float, self.targets)))
        if not self.targets or not all(map(math.isfinite, self.targets)):
            raise ValueError(f"the targets of {self.property.name} are {self.targets}; give one finite number or more")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"the weight of {self.property.name} is {self.weight}; it must be positive")

    @builtins.property  # "property" is a field here
    def scale(self) -> tuple[float, ...]:
        """Sizes of usual targets, positive: networks and flat observations see targets in units of them."""
        return tuple(abs(target) or 1.0 for target in self.targets)

    @builtins.property  # "property" is a field here
    def ranges(self) -> tuple[tuple[float, float], ...]:
        """Lowest and highest sensible number for each target."""
        if self.reach is not None:
            return (self.reach,) * len(self.targets)
        far = [MAX_TARGET_RATIO * scale for scale in self.scale]
        return tuple(
            (-most if target <= 0 else 0.0, most if target >= 0 else 0.0)
            for target, most in zip(self.targets, far, strict=True)
        )

    @builtins.property  # "property" is a field here
    def goal(self) -> tuple[float, float]:
        """Lowest and highest value that the default targets ask for."""
        if isinstance(self.score, AtMost):
            return -math.inf, self.targets[0]
        if isinstance(self.score, AtLeast):
            return self.targets[0], math.inf
        return min(self.targets), max(self.targets)

    def refuse_targets(self, targets: Sequence[float]) -> None:
        """Raise ``ValueError`` for targets that make no sense."""
        for target, default, (low, high) in zip(targets, self.targets, self.ranges, strict=True):
            zero_too = self.reach is not None or default == 0
            if low <= target <= high and (zero_too or target != 0):  # false for NaN
                continue
            left, right = ("(" if low == 0 and not zero_too else "["), (")" if high == 0 and not zero_too else "]")
            unit = f" {self.property.unit}" if self.property.unit else ""
            raise ValueError(
                f"target {target}{unit} outside {left}{low:g}, {high:g}{right}; choose one inside, or a Term with "
                "another reach=(lowest, highest)"
            )
        if isinstance(self.score, Within) and targets[0] > targets[1]:
            raise ValueError(
                f"{self.property.name} between {targets[0]} and {targets[1]}: the lowest value comes first"
            )

    def text(self) -> str:
        """As :func:`parse` reads it, where it can be written so."""
        name, weight = self.property.name, "" if self.weight == 1.0 else f"*{self.weight:g}"
        first, width = f"{self.targets[0]:g}", ""
        if isinstance(self.score, (Near, Within, AtMost, AtLeast)) and self.score.width != self.property.scale:
            width = f"+-{self.score.width:g}"
        if isinstance(self.score, Within):
            return f"{name}={first}..{self.targets[1]:g}{width}{weight}"
        sign = "<=" if isinstance(self.score, AtMost) else ">=" if isinstance(self.score, AtLeast) else "="
        return f"{name}{sign}{first}{width}{weight}"


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a task asks for. T targets in all, P properties.

    Attributes:
        terms: one or several; several score between 0 and 1.
        combine: ``product`` of the scores, each to the power of its weight, or ``sum``, their weighted mean.
        failure_reward: reward of a crystal that has no valid value of a property.
        best_reward: the supremum of the reward.
        far_targets: of a benchmark, those that it calls out of distribution.
    """

    terms: tuple[Term, ...]
    combine: str = "product"
    failure_reward: float = -1.0
    best_reward: float = 1.0
    far_targets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", (self.terms,) if isinstance(self.terms, Term) else tuple(self.terms))
        if not self.terms:
            raise ValueError("an objective has no terms; give one or more")
        if self.combine not in COMBINE:
            raise ValueError(f"the terms are combined by {self.combine!r}; choose {' or '.join(COMBINE)}")
        if len(self.terms) > 1 and any(isinstance(term.score, Share) for term in self.terms):
            raise ValueError("a Share is not between 0 and 1, so it cannot be combined; use Near, Within ...")
        self._refuse_contradiction()

    def _refuse_contradiction(self) -> None:
        for wanted in self.properties:
            low, high = self.goal(wanted)
            if low > high:
                raise ValueError(f"no {wanted.name} is at least {low:g} and at most {high:g}; change one of its terms")

    @functools.cached_property
    def properties(self) -> tuple[Property, ...]:
        """Each once, in the order of the terms."""
        return tuple(dict.fromkeys(term.property for term in self.terms))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the properties."""
        return tuple(wanted.name for wanted in self.properties)

    @property
    def targets(self) -> tuple[float, ...]:
        """The default ones of all terms, one after the other."""
        return tuple(target for term in self.terms for target in term.targets)

    @functools.cached_property
    def places(self) -> tuple[slice, ...]:
        """Where the targets of each term are among all T."""
        ends = list(itertools.accumulate(len(term.targets) for term in self.terms))
        return tuple(slice(end - len(term.targets), end) for term, end in zip(self.terms, ends, strict=True))

    @functools.cached_property
    def rows(self) -> tuple[int, ...]:
        """Which of the properties each term is about."""
        return tuple(self.properties.index(term.property) for term in self.terms)

    @property
    def target(self) -> float | tuple[float, ...]:
        """The default target; of several, all of them."""
        return one_or_all(self.targets)

    @property
    def scale(self) -> float | tuple[float, ...]:
        """Sizes of usual targets, as :attr:`target`."""
        return one_or_all(tuple(scale for term in self.terms for scale in term.scale))

    @property
    def target_range(self) -> tuple[float, float]:
        """Lowest and highest of all targets."""
        lowest, highest = zip(*(reach for term in self.terms for reach in term.ranges), strict=True)
        return min(lowest), max(highest)

    def goal(self, wanted: Property) -> tuple[float, float]:
        """Lowest and highest value of a property that the default targets of its terms ask for."""
        goals = [term.goal for term in self.terms if term.property == wanted]
        return max(goal[0] for goal in goals), min(goal[1] for goal in goals)

    def with_targets(self, target: float | Sequence[float] | np.ndarray | jax.Array) -> Objective:
        """The same with other default targets, as many as it has."""
        given, pairs = np.ravel(np.asarray(target, float)).tolist(), zip(self.terms, self.places, strict=True)
        terms = tuple(dataclasses.replace(term, targets=tuple(given[place])) for term, place in pairs)
        return dataclasses.replace(self, terms=terms)

    def refuse_target(self, target: float | Sequence[float]) -> None:
        """Raise ``ValueError`` for a target, or for targets, that make no sense."""
        given = np.ravel(np.asarray(target, float)).tolist()
        if len(given) != len(self.targets):
            raise ValueError(f"{len(given)} targets for {self.text()}, which has {len(self.targets)}; give each")
        for term, place in zip(self.terms, self.places, strict=True):
            term.refuse_targets(given[place])

    def reward(
        self,
        values: jax.Array | np.ndarray,
        status: jax.Array | np.ndarray,
        target: jax.Array | np.ndarray | float | Sequence[float],
    ) -> jax.Array:
        """Reward of evaluated crystals: float32, shape of ``status``.

        A status other than ``Status.OK`` and a value that is not finite earn the reward of a failure.

        Args:
            values: [..., P]; of one property also [...].
            status: int32 [...], of all values together.
            target: [..., T]; [...] for a single one. Leading axes broadcast.
        """
        values, target = jnp.asarray(values), jnp.asarray(target)
        values = values[..., None] if values.ndim == jnp.ndim(status) else values
        target = target[..., None] if len(self.targets) == 1 else target
        valid = (status == Status.OK) & jnp.isfinite(values).all(axis=-1)
        scores = self.scores(jnp.where(valid[..., None], values, 0.0), target)
        return jnp.where(valid, self.combined(scores), self.failure_reward).astype(jnp.float32)

    def scores(self, values: jax.Array, targets: jax.Array) -> list[jax.Array]:
        """Of each term, for sound values [..., P] and targets [..., T]; leading axes broadcast."""
        own = (jnp.moveaxis(targets[..., place], -1, 0) for place in self.places)
        return [t.score(values[..., row], *aims) for t, row, aims in zip(self.terms, self.rows, own, strict=True)]

    def combined(self, scores: Sequence[Any]) -> Any:
        """The reward of sound scores, one for each term: arrays of JAX or of NumPy."""
        weights = [term.weight for term in self.terms]
        if len(scores) == 1:
            return scores[0]
        if self.combine == "product":
            powers = [score if weight == 1.0 else score**weight for score, weight in zip(scores, weights, strict=True)]
            return functools.reduce(operator.mul, powers)
        shares = [score * (weight / sum(weights)) for score, weight in zip(scores, weights, strict=True)]
        return functools.reduce(operator.add, shares)

    @property
    def title(self) -> str:
        """For people: ``target 1.12 eV``, or all terms."""
        only = self.terms[0]
        if len(self.targets) == 1 and isinstance(only.score, Near | Share):
            return f"target {only.targets[0]:g} {only.property.unit}".rstrip()
        return self.text()

    def text(self) -> str:
        """For :func:`parse`, where the terms can be written so."""
        return " ".join(term.text() for term in self.terms)


def one_or_all(numbers: tuple[float, ...]) -> float | tuple[float, ...]:
    """A single number as itself."""
    return numbers[0] if len(numbers) == 1 else numbers


def _of_task(wanted: Property, score: Score, target: float, far: float, failure: float, best: float) -> Objective:
    return Objective((Term(wanted, score, (target,)),), "product", failure, best, (far,))


OBJECTIVES = {
    "band_gap": _of_task(BAND_GAP, Near(1.0, lowest=0.0), 1.12, 2.0, -1.0, 1.0),
    "bulk_modulus": _of_task(BULK_MODULUS, Share(BULK_MODULUS_FLOOR), 300.0, 500.0, BULK_MODULUS_FLOOR, 0.0),
    "density": _of_task(DENSITY, Near(DENSITY.scale), 3.0, 5.0, -1.0, 1.0),
}
"""Of the registered tasks, by property."""


def objective(choice: str | Objective | Term | Sequence[str | Term]) -> Objective:
    """The objective of a task by its property, one in words (:func:`parse`), terms, or the one given.

    Raises:
        ValueError: for an unknown property, and for words that cannot be read.
    """
    if isinstance(choice, Objective):
        return choice
    if isinstance(choice, str) and choice in OBJECTIVES:
        return OBJECTIVES[choice]
    if isinstance(choice, str) and choice.isidentifier():
        raise ValueError(
            f"unknown property {choice!r}: use one of {sorted(OBJECTIVES)}, an objective such as "
            f"'{choice}=1.0', or an Objective"
        )
    parts = (choice,) if isinstance(choice, str | Term) else tuple(choice)
    return Objective(tuple(part if isinstance(part, Term) else _term(part) for part in parts))


_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_TERM = re.compile(
    rf"\s*(?P<name>\w+)\s*(?P<sign><=|>=|=)\s*(?P<first>{_NUMBER})(?:\s*\.\.\s*(?P<last>{_NUMBER}))?"
    rf"(?:\s*\+-\s*(?P<width>{_NUMBER}))?(?:\s*\*\s*(?P<weight>{_NUMBER}))?\s*"
)
_FORMS = "NAME=VALUE+-WIDTH, NAME=LOW..HIGH, NAME<=VALUE or NAME>=VALUE, with *WEIGHT if terms differ in weight"


def parse(*terms: str, combine: str = "product") -> Objective:
    """The objective of terms in words.

    ``band_gap=1.34+-0.2`` is near a target, 0.2 eV the width of its Gaussian; ``band_gap=1.1..1.6`` inside a range;
    ``density<=5`` and ``bulk_modulus>=100`` are bounds on one side. Without ``+-`` the width is the scale of the
    property. ``*2`` at the end is the weight.

    Raises:
        ValueError: a term cannot be read, names an unknown property, or contradicts another.
    """
    return Objective(tuple(map(_term, terms)), combine)


def _term(text: str) -> Term:
    found = _TERM.fullmatch(text)
    if found is None:
        raise ValueError(f"the objective {text!r} cannot be read; write {_FORMS}")
    if found["name"] not in known_properties():
        raise ValueError(f"the objective {text!r} names no known property; they are {', '.join(known_properties())}")
    wanted, sign, first = property_of(found["name"]), found["sign"], float(found["first"])
    width, weight = float(found["width"] or wanted.scale), float(found["weight"] or 1.0)
    if not 0 < width < math.inf:
        raise ValueError(f"the objective {text!r} has a width of {width:g}; it must be positive")
    if found["last"] is not None:
        if sign != "=":
            raise ValueError(f"the objective {text!r} has a bound and a range; write {_FORMS}")
        score: Score = Within(width)
        targets: tuple[float, ...] = (first, float(found["last"]))
    else:
        score = {"=": Near(width, wanted.bounds[0]), "<=": AtMost(width), ">=": AtLeast(width)}[sign]
        targets = (first,)
    term = Term(wanted, score, targets, weight, wanted.bounds if all(map(math.isfinite, wanted.bounds)) else None)
    try:
        term.refuse_targets(targets)
    except ValueError as error:
        low, high = wanted.bounds
        raise ValueError(f"the objective {text!r}: {wanted.name} lies between {low:g} and {high:g}; {error}") from None
    return term
