"""How a finished crystal gets its value.

An *evaluator* is bound to a problem (skeletons and properties) and yields a pure query that the environment calls
at every step; ``pending`` says whether the crystal is finished. The DFT evaluators live in ``dft_bridge``; here is
their protocol, and evaluators that never leave the accelerator.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from crystaljax import plugins, tables
from crystaljax.caveats import Caveat
from crystaljax.elements import Vocabulary, masses
from crystaljax.errors import CrystalJAXError
from crystaljax.skeleton import Skeleton, SkeletonTable, stack
from crystaljax.status import Status

AVOGADRO = 0.602214076
"""Avogadro's number in 1e24 / mol: g/mol per Å^3 becomes g/cm3 on division by it."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be evaluated: properties of labelings of these skeletons.

    Attributes:
        skeletons, properties: of what, and what, by name.
        vocabulary: the elements that labelings are made of; ``None`` if that is not known.
        by_orbit: whether all sites of a symmetry orbit always hold the same element.
    """

    skeletons: tuple[Skeleton, ...]
    properties: tuple[str, ...]
    vocabulary: Vocabulary | None = None
    by_orbit: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.properties, str):
            object.__setattr__(self, "properties", (self.properties,))

    @builtins.property
    def property(self) -> str:
        """The property, for an evaluator that knows one at a time; raises ``ValueError`` if there are several."""
        first, *others = self.properties
        if others:
            raise ValueError(f"this evaluator has one property at a time, not {' and '.join(self.properties)}")
        return first

    def refuse_others(self, known: Sequence[str], label: str) -> None:
        """Raise ``ValueError`` for a property that is not among those known."""
        for name in self.properties:
            if name not in known:
                raise ValueError(
                    f"evaluator '{label}' computes {', '.join(known)}, not {name}; choose another evaluator or task"
                )


class Outcome(NamedTuple):
    """What became of crystals: values float32 [..., P] in the order of the problem's properties (0 where there is none)
    and statuses int32 [...], ``OK`` if all values are there."""

    values: jax.Array | np.ndarray
    status: jax.Array | np.ndarray


class BoundEvaluator(NamedTuple):
    """An evaluator for one problem. Functions and arrays only, so that an environment stays copyable.

    Attributes:
        query: pure; (atomic numbers int32 [N], skeleton index int32 [], pending bool []) to an :class:`Outcome`, or to
            (values, status). Of one property the values may be float32 []. They mean something only where ``pending``
            and the status is ``Status.OK``.
        check: raises on the host, with its own type, what a query could not raise on the device (engine missing,
            disk full). Call it between compiled programs.
        label: where values come from, such as ``gpaw`` or ``surrogate: ...``; shown wherever values appear.
        landscape: all E outcomes there are, [E, P] and [E], where they are known; the environment then tells the
            regret.
        deferred: whether it evaluates nothing, so that every value comes later (:class:`Deferred`).
        caveats: on the host, of crystals that have a value, (atomic numbers int [N], index of the skeleton) each: what
            a reader must know of it, or ``None`` where that is not known. Left out by evaluators that know of none.
    """

    query: Callable[[jax.Array, jax.Array, jax.Array], Outcome | tuple[jax.Array, jax.Array]]
    check: Callable[[], None]
    label: str
    landscape: Outcome | None = None
    deferred: bool = False
    caveats: Callable[[Sequence[tuple[np.ndarray, int]]], list[tuple[Caveat, ...] | None]] | None = None


class Evaluator(Protocol):
    """Anything that can be bound to a problem.

    Environments that differ in nothing share their compiled programs, so evaluators must not be equal unless they do
    the same: a frozen dataclass is compared by its fields, any other object, and what cannot be hashed, is equal to
    itself only. One that holds a lock, a process or an open file should be its own copy (``__deepcopy__``).
    """

    def bind(self, problem: Problem) -> BoundEvaluator:
        """The evaluator for that problem; raises ``ValueError`` if it cannot compute a property."""
        ...


class BudgetSpent(CrystalJAXError, RuntimeError):
    """A run has used up the calculations it may pay for; the message says what was spent. What is known stays known."""


def _nothing_to_check() -> None:
    """On-device evaluators cannot fail behind the program's back."""


@dataclasses.dataclass(frozen=True)
class FunctionEvaluator:
    """Evaluates with a pure JAX function of yours: a surrogate model, a table, a test landscape.

    Attributes:
        function: (atomic numbers int32 [N], skeleton row :class:`SkeletonTable`) to a float32 scalar, in the unit of
            the property, or to one for each of ``properties``; a value that is not finite counts as failure. Runs at
            every step, on the device.
        label: shown wherever its values appear; begin it with ``surrogate`` if it stands in for DFT.
        properties: names of what it computes, in the order of its values; ``None``: a scalar of any property.
    """

    function: Callable[[jax.Array, SkeletonTable], jax.Array]
    label: str
    properties: tuple[str, ...] | None = None

    def bind(self, problem: Problem) -> BoundEvaluator:
        known = (problem.property,) if self.properties is None else self.properties
        problem.refuse_others(known, self.label)
        places = np.array([known.index(name) for name in problem.properties])
        table = stack(problem.skeletons)

        def query(numbers: jax.Array, skeleton: jax.Array, pending: jax.Array) -> Outcome:
            del pending  # a few flops are cheaper than a branch
            values = jnp.asarray(self.function(numbers, table.row(skeleton))).astype(jnp.float32)
            values = values.reshape(len(known))[places]
            valid = jnp.isfinite(values)
            status = jnp.where(valid.all(), Status.OK, Status.INVALID_RESULT).astype(jnp.int32)
            return Outcome(jnp.where(valid, values, 0.0), status)

        return BoundEvaluator(query, _nothing_to_check, self.label)


def unrelaxed_density(numbers: jax.Array, skeleton: SkeletonTable) -> jax.Array:
    """Density of the cell as it is: sum of atomic masses over the volume, in g/cm3."""
    return jnp.asarray(masses())[numbers].sum() / (skeleton.volume * AVOGADRO)


UNRELAXED_DENSITY = FunctionEvaluator(
    unrelaxed_density, "on-device: density of the unrelaxed cell, no DFT", properties=("density",)
)
"""The density without DFT: exact for the given cell, not what a relaxation would give."""


@dataclasses.dataclass(frozen=True)
class TableEvaluator:
    """Looks values up in tables: exact, on the device, one gather a query. Symmetric labelings share an entry.

    Attributes:
        table: the results of every crystal of a skeleton over a vocabulary, or several tables of that skeleton, one for
            each property; ``None`` takes those that the package ships for the problem.
    """

    table: tables.Table | tuple[tables.Table, ...] | None = None

    def bind(self, problem: Problem) -> BoundEvaluator:
        """The evaluator; raises :class:`crystaljax.tables.TableError` for a problem that the tables do not fit."""
        given = (self.table,) if isinstance(self.table, tables.Table) else self.table
        found = tuple(_table_of(name, problem, given) for name in problem.properties)
        for table in found:
            _refuse_misfit(table, problem)
        first = found[0]
        if any(table.vocabulary.symbols != first.vocabulary.symbols for table in found):
            raise tables.TableError(f"tables {', '.join(t.name for t in found)} hold other elements; give tables alike")
        row = tables.labelings(first.skeleton, first.vocabulary)[1]
        # The first failure of a crystal is that of the crystal.
        statuses = functools.reduce(lambda old, new: np.where(old == Status.OK, new, old), (t.statuses for t in found))
        values = np.stack([table.values for table in found], axis=-1)
        landscape = Outcome(
            np.where((statuses == Status.OK)[:, None], values, 0.0).astype(np.float32), np.asarray(statuses, np.int32)
        )
        # The site that stands for each orbit, and the place value of its element in the index of a labeling.
        _, sites = np.unique(first.skeleton.orbits, return_index=True)
        size = len(first.vocabulary)
        weights = np.asarray(size ** np.arange(len(sites))[::-1], np.int32)
        index = np.zeros(first.vocabulary.numbers.max() + 1, np.int32)
        index[first.vocabulary.numbers[:size]] = np.arange(size)

        def query(numbers: jax.Array, skeleton: jax.Array, pending: jax.Array) -> Outcome:
            del skeleton, pending
            entry = jnp.asarray(row)[(jnp.asarray(index)[numbers[sites]] * weights).sum(dtype=jnp.int32)]
            return Outcome(jnp.asarray(landscape.values)[entry], jnp.asarray(landscape.status)[entry])

        def caveats(crystals: Sequence[tuple[np.ndarray, int]]) -> list[tuple[Caveat, ...] | None]:
            symbols = [tables.symbols_of(numbers) for numbers, _ in crystals]
            return [joined([table.caveats(table.entry(names)) for table in found]) for names in symbols]

        return BoundEvaluator(query, _nothing_to_check, _joined_label(found), landscape, caveats=caveats)


def joined(known: Sequence[tuple[Caveat, ...] | None]) -> tuple[Caveat, ...] | None:
    """The caveats of several values of a crystal, each once; ``None`` if those of one are not known."""
    if any(some is None for some in known):
        return None
    return tuple(caveat for caveat in Caveat if any(caveat in (some or ()) for some in known))


def _joined_label(found: Sequence[tables.Table]) -> str:
    return "; ".join(dict.fromkeys(table.label for table in found))


def _table_of(name: str, problem: Problem, given: Sequence[tables.Table] | None) -> tables.Table:
    """The table of a property, of those given or else shipped; raises :class:`crystaljax.tables.TableError`."""
    if given is None:
        return shipped_table(problem, name)
    for table in given:
        if table.property == name:
            return table
    held = ", ".join(f"{table.name} holds {table.property}" for table in given)
    raise tables.TableError(f"table {held}, not {name}; choose another table or task")


def shipped_table(problem: Problem, property_name: str | None = None) -> tables.Table:
    """The table that the package ships for a property of a problem, by default its only one.

    Raises:
        crystaljax.tables.TableError: it has none.
    """
    wanted = problem.property if property_name is None else property_name
    digests = {skeleton.digest for skeleton in problem.skeletons}
    for name in tables.shipped():
        if name.startswith(f"{wanted}-"):
            table = tables.load(name)
            if digests == {table.skeleton.digest}:
                return table
    names = ", ".join(skeleton.name for skeleton in problem.skeletons)
    raise tables.TableError(
        f"the package has no table of {wanted} for {names}, only {', '.join(tables.shipped()) or 'none'}; "
        "choose a task with a table, or make one: python -m benchmarks make-tables"
    )


def _refuse_misfit(table: tables.Table, problem: Problem) -> None:
    """Raise ``TableError`` unless the table holds every labeling of the problem."""
    for skeleton in problem.skeletons:
        if skeleton.digest != table.skeleton.digest:
            raise tables.TableError(
                f"table {table.name} is for the cell and sites of {table.skeleton.name} ({table.skeleton.source}), "
                f"which {skeleton.name} does not have (lengths in Å, angles: {skeleton.parameters.round(4).tolist()}, "
                f"not {table.skeleton.parameters.round(4).tolist()}); design crystals on crystaljax.library.PROTOTYPES"
            )
    elements = table.vocabulary.symbols
    outside = [s for s in (problem.vocabulary.symbols if problem.vocabulary else ()) if s not in elements]
    if problem.vocabulary is None or outside:
        asked = f"{' '.join(outside)} of vocabulary {problem.vocabulary.name}" if problem.vocabulary else "any"
        raise tables.TableError(
            f"table {table.name} holds the elements {' '.join(elements)}, not {asked}; "
            f"use vocabulary {table.vocabulary.name!r}"
        )
    orbits = int(table.skeleton.orbits.max()) + 1
    if not problem.by_orbit and orbits < table.skeleton.n_sites:
        raise tables.TableError(
            f"table {table.name} has one element on each of the {orbits} orbits of {table.skeleton.n_sites} sites; "
            "use mode='orbit'"
        )


@dataclasses.dataclass(frozen=True)
class Deferred:
    """Evaluates nothing: every finished crystal is ``Status.PENDING``. For :class:`crystaljax.delayed.DelayedRewards`.

    Attributes:
        label: where the values will come from.
    """

    label: str = "delayed"

    def bind(self, problem: Problem) -> BoundEvaluator:
        count = len(problem.properties)

        def query(numbers: jax.Array, skeleton: jax.Array, pending: jax.Array) -> Outcome:
            del numbers, skeleton
            return Outcome(
                jnp.zeros(count, jnp.float32), jnp.where(pending, Status.PENDING, Status.OK).astype(jnp.int32)
            )

        return BoundEvaluator(query, _nothing_to_check, self.label, deferred=True)


_BUILT_IN: dict[str, Evaluator] = {"table": TableEvaluator(), "unrelaxed-density": UNRELAXED_DENSITY}


def available() -> list[str]:
    """Names that :func:`evaluator` accepts: the built-in ones and those of installed packages."""
    return sorted([*_BUILT_IN, *plugins.offered(plugins.EVALUATORS)])


def evaluator(choice: str | Evaluator | None) -> Evaluator:
    """The evaluator of that name, or the one given; ``None`` is the default DFT engine.

    Raises:
        ValueError: for an unknown name, with the known ones.
        TypeError: for something that cannot be bound to a problem.
    """
    name = "default" if choice is None else choice
    if not isinstance(name, str):
        if isinstance(name, type) or not callable(getattr(name, "bind", None)):
            raise TypeError(f"evaluator is {name!r}; {_advice(name)}")
        return name
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    offers = plugins.offered(plugins.EVALUATORS)
    if name in offers:
        return offers[name].load()()
    raise ValueError(f"unknown evaluator {name!r}: use one of {available()} or an object with bind(problem)")


def _advice(choice: object) -> str:
    """What to give in place of something that is no evaluator."""
    if isinstance(choice, type) and callable(getattr(choice, "bind", None)):
        return f"give an instance of it: {choice.__name__}(...)"
    if isinstance(choice, list | tuple) and len(choice) == 1:
        return f"give what is in it: {choice[0]!r}"
    if callable(getattr(choice, "compute", None)):
        return "an engine needs a bridge: crystaljax.dft_bridge.Bridge(engine)"
    if callable(choice):
        return "wrap a function in crystaljax.FunctionEvaluator(function, label)"
    return f"give one of {available()}, or an object with bind(problem)"
