"""How a finished crystal gets its value.

An *evaluator* is bound to a problem (skeletons and a property) and yields a pure query that the environment calls
at every step; ``pending`` says whether the crystal is finished. The DFT evaluators live in ``dft_bridge``; here is
their protocol, and evaluators that never leave the accelerator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from crystaljax.elements import masses
from crystaljax.skeleton import Skeleton, SkeletonTable, stack
from crystaljax.status import Status

AVOGADRO = 0.602214076
"""Avogadro's number in 1e24 / mol: g/mol per Å^3 becomes g/cm3 on division by it."""
ENTRY_POINTS = "crystaljax.evaluators"
"""Entry-point group under which packages offer evaluators by name (``dft_bridge`` offers its engines)."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be evaluated: a property of labelings of these skeletons."""

    skeletons: tuple[Skeleton, ...]
    property: str


class BoundEvaluator(NamedTuple):
    """An evaluator for one problem. Functions only, so that an environment stays copyable.

    Attributes:
        query: pure; (atomic numbers int32 [N], skeleton index int32 [], pending bool []) to (value float32 [],
            status int32 []). The value means something only where ``pending`` and the status is ``Status.OK``.
        check: raises on the host, with its own type, what a query could not raise on the device (engine missing,
            disk full). Call it between compiled programs.
        label: where values come from, such as ``gpaw`` or ``surrogate: ...``; shown wherever values appear.
    """

    query: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    check: Callable[[], None]
    label: str


class Evaluator(Protocol):
    """Anything that can be bound to a problem."""

    def bind(self, problem: Problem) -> BoundEvaluator:
        """The evaluator for that problem; raises ``ValueError`` if it cannot compute the property."""


class BudgetSpent(RuntimeError):
    """A run has used up the calculations it may pay for; the message says what was spent. What is known stays known."""


def _nothing_to_check() -> None:
    """On-device evaluators cannot fail behind the program's back."""


@dataclasses.dataclass(frozen=True)
class FunctionEvaluator:
    """Evaluates with a pure JAX function of yours: a surrogate model, a table, a test landscape.

    Attributes:
        function: (atomic numbers int32 [N], skeleton row :class:`SkeletonTable`) to a float32 scalar, in the unit of
            the property; a value that is not finite counts as failure. Runs at every step, on the device.
        label: shown wherever its values appear; begin it with ``surrogate`` if it stands in for DFT.
        properties: the properties it may be asked for; ``None`` allows all.
    """

    function: Callable[[jax.Array, SkeletonTable], jax.Array]
    label: str
    properties: tuple[str, ...] | None = None

    def bind(self, problem: Problem) -> BoundEvaluator:
        if self.properties is not None and problem.property not in self.properties:
            raise ValueError(
                f"evaluator '{self.label}' computes {', '.join(self.properties)}, not {problem.property}; "
                "choose another evaluator or task"
            )
        table = stack(problem.skeletons)

        def query(numbers: jax.Array, skeleton: jax.Array, pending: jax.Array) -> tuple[jax.Array, jax.Array]:
            del pending  # a few flops are cheaper than a branch
            value = self.function(numbers, table.row(skeleton)).astype(jnp.float32)
            valid = jnp.isfinite(value)
            return value, jnp.where(valid, Status.OK, Status.INVALID_RESULT).astype(jnp.int32)

        return BoundEvaluator(query, _nothing_to_check, self.label)


def unrelaxed_density(numbers: jax.Array, skeleton: SkeletonTable) -> jax.Array:
    """Density of the cell as it is: sum of atomic masses over the volume, in g/cm3."""
    return jnp.asarray(masses())[numbers].sum() / (skeleton.volume * AVOGADRO)


UNRELAXED_DENSITY = FunctionEvaluator(
    unrelaxed_density, "on-device: density of the unrelaxed cell, no DFT", properties=("density",)
)
"""The density without DFT: exact for the given cell, not what a relaxation would give."""


@dataclasses.dataclass(frozen=True)
class Deferred:
    """Evaluates nothing: every finished crystal is ``Status.PENDING``. For :class:`crystaljax.delayed.DelayedRewards`.

    Attributes:
        label: where the values will come from.
    """

    label: str = "delayed"

    def bind(self, problem: Problem) -> BoundEvaluator:
        del problem

        def query(numbers: jax.Array, skeleton: jax.Array, pending: jax.Array) -> tuple[jax.Array, jax.Array]:
            del numbers, skeleton
            return jnp.float32(0), jnp.where(pending, Status.PENDING, Status.OK).astype(jnp.int32)

        return BoundEvaluator(query, _nothing_to_check, self.label)


_BUILT_IN: dict[str, Evaluator] = {"unrelaxed-density": UNRELAXED_DENSITY}


def available() -> list[str]:
    """Names that :func:`evaluator` accepts: the built-in ones and those of installed packages."""
    return sorted([*_BUILT_IN, *(point.name for point in metadata.entry_points(group=ENTRY_POINTS))])


def evaluator(choice: str | Evaluator | None) -> Evaluator:
    """The evaluator of that name, or the one given; ``None`` is the default DFT engine.

    Raises:
        ValueError: for an unknown name, with the known ones.
    """
    name = "default" if choice is None else choice
    if not isinstance(name, str):
        return name
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    for point in metadata.entry_points(group=ENTRY_POINTS):
        if point.name == name:
            return point.load()()
    raise ValueError(f"unknown evaluator {name!r}: use one of {available()} or an object with bind(problem)")


def bind(choice: str | Evaluator | None, skeletons: Sequence[Skeleton], property_name: str) -> BoundEvaluator:
    """Resolve an evaluator by name and bind it."""
    return evaluator(choice).bind(Problem(tuple(skeletons), property_name))
