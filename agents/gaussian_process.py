"""Bayesian optimisation on the value: what a model of the property expects to pay most is calculated next.

What is known is part of the train state. Each update hands it to the host, where the model of
:mod:`crystaljax.agents.surrogate` is fitted and asked for a batch: a pure function of the state, so that a run resumes
exactly and seeds can be mapped. No crystal is proposed twice, up to symmetry. Rewards may come later: what is
outstanding is treated as if it had come out as expected (GP-BUCB, Desautels et al. 2014). Tables of other structures
may teach the model beforehand, by what crystals have in common whatever their structure.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from crystaljax import tables
from crystaljax.agents.base import Agent, Records
from crystaljax.agents.chemistry import Features, is_neutral, is_odd
from crystaljax.agents.designs import Designs, evaluate
from crystaljax.agents.exhaustive import MOST_LABELINGS, list_designs
from crystaljax.agents.hyperparameters import GaussianProcessConfig, NeutralConfig, SearchConfig
from crystaljax.agents.ledger import REFUSED
from crystaljax.delayed import NO_TICKET, DelayedRewards
from crystaljax.env import CrystalEnv, EnvParams
from crystaljax.objectives import Objective
from crystaljax.status import Status
from crystaljax.symmetry import canonical_numbers, count_distinct

POINT_MASS = {"band_gap": 0.05}
"""Values up to here are those of crystals that have none worth the name: metals, eV."""
GROWTH = 1.25
"""Hyperparameters are chosen again when there is so many times as much data as the last time."""
MOST_DATA = 1500
"""Crystals that a process is conditioned on; beyond, the best ones and an even sample of the others."""
REFERENCE = 4096
"""Random crystals by which features are scaled where not all crystals are listed."""
WALKERS, CLIMBS, NEIGHBOURS = 32, 12, 128
"""Of the local search: starts, largest number of steps, and most neighbours that a step looks at."""
DRAWS = 200
"""Batches drawn to find new crystals before a search gives up."""


@struct.dataclass
class ProposerState:
    """Everything that the next update depends on; room for M crystals.

    Attributes:
        update: int32 [], updates done; each has added ``lanes`` crystals to the history.
        key: of the run; every draw follows from it and from the history.
        env_params: parameters of the environment.
        designs: crystals proposed so far, leaves [M, ...].
        values, status: float32 [M, P] and int32 [M], theirs; ``PENDING`` until they come, and where there is none.
        theta: float32 [P, 2, 8], hyperparameters of the model, and
        fitted: int32 [], the number of crystals by which they were chosen.
    """

    update: jax.Array
    key: jax.Array
    env_params: EnvParams
    designs: Designs
    values: jax.Array
    status: jax.Array
    theta: jax.Array
    fitted: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Crystals:
    """Crystals with what is needed to weigh them; leaves [D, ...] on the host."""

    designs: Designs
    numbers: np.ndarray
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: Any) -> Crystals:
        return Crystals(Designs(*(leaf[rows] for leaf in self.designs)), self.numbers[rows], self.names[rows])


class Space:
    """The crystals of an environment, on the host: all of them where they can be listed."""

    def __init__(self, env: CrystalEnv, listed: int = 100_000, prior: tuple[tables.Table, ...] = ()):
        by_orbit = env.mode == "orbit"
        self.skeletons, self.colours, self.sites = env.skeletons, env.num_actions, env.max_sites
        self.numbers = np.asarray(env.vocabulary.numbers)
        self.groups = [s.orbits if by_orbit else np.arange(s.n_sites) for s in env.skeletons]
        self.decisions = np.array([int(group.max()) + 1 for group in self.groups])
        self.everything: Crystals | None = None
        """All distinct crystals, if there are few enough."""
        labelings = [self.colours ** int(count) for count in self.decisions]
        if max(labelings) <= MOST_LABELINGS:
            distinct = [count_distinct(s.permutations, self.colours) for s in env.skeletons]
            if sum(min(pair) for pair in zip(labelings, distinct, strict=True)) <= listed:
                self.everything = self.crystals(list_designs(env))
                self.neutral = is_neutral(self.everything.numbers)
                self.odd = is_odd(self.everything.numbers)
                self._row = {name.tobytes(): row for row, name in enumerate(self.everything.names)}
        some = self.everything or self.random(np.random.default_rng(0), REFERENCE)
        self.features = Features(
            (*self.skeletons, *(table.skeleton for table in prior)), (some.designs.skeleton, some.numbers)
        )
        self._features_of_all = None if self.everything is None else self.features(some.designs.skeleton, some.numbers)

        self.prior_features, self.prior_values = self._read(prior)

    def _read(self, prior: tuple[tables.Table, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Features [n, F] and values [n] (NaN where there is none) of what tables tell."""
        features, values = [np.zeros((0, self.features.slices[-1].stop))], [np.zeros(0)]
        for index, table in enumerate(prior, start=len(self.skeletons)):
            numbers = tables.labelings(table.skeleton, table.vocabulary)[0]
            told = np.flatnonzero(~np.isin(table.statuses, REFUSED))
            features.append(self.features(np.full(len(told), index), numbers[told]))
            values.append(np.where(table.statuses == Status.OK, table.values, np.nan)[told])
        return np.concatenate(features), np.concatenate(values)

    def crystals(self, designs: Designs) -> Crystals:
        """Crystals [D] of designs; names [D] are equal for equal crystals."""
        genes, skeletons = (np.asarray(leaf) for leaf in designs)
        numbers = np.zeros((len(genes), self.sites), np.int32)
        canonical = np.zeros((len(genes), self.sites + 1), np.int32)
        canonical[:, -1] = skeletons
        for index, (skeleton, group) in enumerate(zip(self.skeletons, self.groups, strict=True)):
            mine = np.flatnonzero(skeletons == index)
            if len(mine):
                labels = self.numbers[genes[mine][:, group]]
                numbers[mine, : skeleton.n_sites] = labels
                canonical[mine, : skeleton.n_sites] = canonical_numbers(labels, skeleton.permutations)
        names = np.ascontiguousarray(canonical).view(np.dtype((np.void, canonical.dtype.itemsize * canonical.shape[1])))
        return Crystals(Designs(genes, skeletons), numbers, names[:, 0])

    def rows(self, names: np.ndarray) -> np.ndarray:
        """Where crystals [M] stand in the list of all, int [M]."""
        return np.array([self._row[name.tobytes()] for name in names], int)

    def of(self, crystals: Crystals) -> np.ndarray:
        """Features [D, F]."""
        if crystals is self.everything:
            return self._features_of_all
        if self.everything is not None:
            return self._features_of_all[self.rows(crystals.names)]
        return self.features(crystals.designs.skeleton, crystals.numbers)

    def random(self, rng: np.random.Generator, count: int) -> Crystals:
        """Every skeleton and every element with equal probability."""
        genes = rng.integers(self.colours, size=(count, self.sites), dtype=np.int32)
        return self.crystals(Designs(genes, rng.integers(len(self.skeletons), size=count, dtype=np.int32)))

    def neighbours(self, rng: np.random.Generator, crystals: Crystals) -> tuple[Crystals, np.ndarray]:
        """Crystals that differ by one decision, and the row of the one that each comes from."""
        genes, origin = [], []
        for row, (mine, skeleton) in enumerate(zip(*crystals.designs, strict=True)):
            places, shifts = np.divmod(np.arange(self.decisions[skeleton] * (self.colours - 1)), self.colours - 1)
            if len(places) > NEIGHBOURS:
                some = rng.choice(len(places), NEIGHBOURS, replace=False)
                places, shifts = places[some], shifts[some]
            changed = np.repeat(mine[None], len(places), axis=0)
            changed[np.arange(len(places)), places] = (mine[places] + shifts + 1) % self.colours
            genes.append(changed)
            origin += [row] * len(places)
        skeleton = crystals.designs.skeleton[origin]
        return self.crystals(Designs(np.concatenate(genes), skeleton)), np.array(origin)

    def draw(self, seed: int, known: np.ndarray, count: int, neutral: bool, even: bool) -> Crystals:
        """Up to ``count`` new crystals in random order: every neutral one before any other, if asked for.

        Args:
            seed: of the order.
            known: names [M] of crystals that are no longer new; what is drawn follows from these and the seed.
            even: leave out what has an odd number of electrons while there is anything else.
        """
        if self.everything is not None:
            order = np.random.default_rng(seed).permutation(len(self.everything))
            worse = (even & self.odd[order]) * 2 + (neutral & ~self.neutral[order])
            order = order[np.argsort(worse, kind="stable")]
            is_new = np.ones(len(order), bool)
            is_new[self.rows(known)] = False
            return self.everything[order[is_new[order]][:count]]
        rng = np.random.default_rng((seed, len(known)))
        kept: list[Crystals] = []
        names = known
        for attempt in range(DRAWS):
            some = self.random(rng, 16 * count)
            fits = ~np.isin(some.names, names)
            fits[np.setdiff1d(np.arange(len(some)), np.unique(some.names, return_index=True)[1])] = False
            if attempt < DRAWS // 2:  # where there is hardly any, others have to do
                fits &= (not neutral) | is_neutral(some.numbers)
                fits &= (not even) | ~is_odd(some.numbers)
            kept.append(some[np.flatnonzero(fits)])
            names = np.concatenate([names, kept[-1].names])
            if sum(map(len, kept)) >= count:
                break
        return joined(kept)[:count]


def joined(parts: list[Crystals]) -> Crystals:
    """One after the other."""
    designs = Designs(*(np.concatenate(leaves) for leaves in zip(*(part.designs for part in parts), strict=True)))
    return Crystals(
        designs, *(np.concatenate([getattr(part, name) for part in parts]) for name in ("numbers", "names"))
    )


def propose(
    space: Space, config: SearchConfig, objective: Objective, history: dict[str, Any], size: int
) -> tuple[Crystals, Any, int]:
    """The next crystals, at most ``size``, hyperparameters [P, 2, 8] and the data they were chosen by. On the host.

    Args:
        history: ``genes`` [M, N], ``skeleton``, ``values`` [M, P], ``status`` and ``reward`` [M] with ``count``
            crystals in it; ``grid`` [P, G], values of each property, and ``curve`` [..., G], rewards of the values of a
            single property, or scores of each term; ``target`` [P], ``seed``, ``theta`` and ``fitted``.
    """
    history = {name: np.asarray(leaf) for name, leaf in history.items()}
    count, seed = int(history["count"]), int(history["seed"])
    proposed = space.crystals(Designs(history["genes"][:count], history["skeleton"][:count]))
    values, status, reward = (history[name][:count] for name in ("values", "status", "reward"))
    theta, fitted = history["theta"].astype(float), int(history["fitted"])
    pending = status == Status.PENDING
    # An engine that refuses one odd number of electrons refuses all.
    even = bool((status == Status.ODD_ELECTRONS).any())
    values = np.where((status == Status.OK)[:, None], values, np.nan)
    point_mass = np.array([POINT_MASS.get(name, -np.inf) for name in objective.names])
    prior_values = space.prior_values.reshape(-1, len(point_mass))
    neutral = isinstance(config, NeutralConfig) or config.first_batch == "neutral"
    anything = (np.concatenate([prior_values, values]) > point_mass).any(axis=0).all()
    if isinstance(config, NeutralConfig) or not anything:
        even &= not isinstance(config, NeutralConfig)
        return space.draw(seed, proposed.names, size, neutral, even), theta, fitted

    from crystaljax.agents.surrogate import Belief, DrawnWorth, ScoreCurve, Surrogate, Worth

    told = np.flatnonzero(~pending & (status != Status.CANCELLED) & ((status != Status.ODD_ELECTRONS) | (not even)))
    best = float(reward[told].max(initial=objective.failure_reward))
    told = thinned(told, reward)
    learned = len(told) + len(prior_values)
    choose = learned >= GROWTH * fitted
    features = np.concatenate([space.prior_features, space.of(proposed[told])])
    known = np.concatenate([prior_values, values[told]])
    beliefs = [
        Belief(features, known[:, row], space.features.slices, theta[row], choose, point_mass[row], target)
        for row, target in enumerate(history["target"].tolist())
    ]
    grid, curve = (history[name].astype(float) for name in ("grid", "curve"))
    if len(beliefs) == 1:
        dead = reward[told][~beliefs[0].alive[len(prior_values) :]]
        worth = Worth(grid[0], curve[0], best, config.mean_weight, dead)
    else:
        curves = [ScoreCurve(row, grid[row], scores) for row, scores in zip(objective.rows, curve, strict=True)]
        dead = [known[~belief.alive, row] for row, belief in enumerate(beliefs)]
        worth = DrawnWorth(
            curves,
            objective.combined,
            best,
            config.mean_weight,
            objective.failure_reward,
            np.array([np.mean(some[np.isfinite(some)]) if np.isfinite(some).any() else 0.0 for some in dead]),
            np.array([np.mean(np.isnan(some)) if len(some) else 0.0 for some in dead]),
        )
    model = Surrogate(beliefs, worth)
    candidates, features = shortlist(space, config, model, proposed, reward, seed, even)
    chosen = model.batch(features, size, space.of(proposed[np.flatnonzero(pending)]))
    return candidates[chosen], model.theta, learned if choose else fitted


def thinned(told: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """Rows of at most ``MOST_DATA`` crystals: the best half, and an even sample of the others."""
    if len(told) <= MOST_DATA:
        return told
    order = told[np.argsort(-reward[told], kind="stable")]
    half = MOST_DATA // 2
    others = np.sort(order[half:])
    return np.sort(np.concatenate([order[:half], others[np.linspace(0, len(others) - 1, half).astype(int)]]))


def shortlist(
    space: Space, config: GaussianProcessConfig, model: Any, known: Crystals, reward: np.ndarray, seed: int, even: bool
) -> tuple[Crystals, np.ndarray]:
    """New crystals with the highest scores, at most ``config.shortlist``, and their features."""
    if space.everything is not None:
        new = np.ones(len(space.everything), bool)
        new[space.rows(known.names)] = False
        if even and (new & ~space.odd).any():
            new &= ~space.odd
        rows = np.flatnonzero(new)
        features = space.of(space.everything)[rows]
        best = np.argsort(-model.scores(features), kind="stable")[: config.shortlist]
        return space.everything[rows[best]], features[best]
    rng = np.random.default_rng((seed, len(known), 1))
    best = np.argsort(-reward, kind="stable")[: WALKERS // 2]
    drawn = space.draw(seed, known.names, WALKERS - len(best), config.first_batch == "neutral", even)
    walkers = joined([known[best], drawn])
    standing = model.scores(space.of(walkers))
    seen, scores = [walkers], [standing]
    for _ in range(CLIMBS):
        around, origin = space.neighbours(rng, walkers)
        if even:
            kept = np.flatnonzero(~is_odd(around.numbers))
            around, origin = around[kept], origin[kept]
        worth = model.scores(space.of(around))
        seen.append(around)
        scores.append(worth)
        order = np.lexsort((-worth, origin))
        first = order[np.unique(origin[order], return_index=True)[1]]
        better = worth[first] > standing[origin[first]]
        if not better.any():
            break
        walkers, standing = around[first[better]], worth[first[better]]
    everyone, worth = joined(seen), np.concatenate(scores)
    distinct = np.unique(everyone.names, return_index=True)[1]
    new = distinct[~np.isin(everyone.names[distinct], known.names)]
    if even:
        new = new[~is_odd(everyone.numbers[new])]
    found = everyone[new[np.argsort(-worth[new], kind="stable")[: config.shortlist]]]
    return found, space.of(found)


def make_proposer(config: SearchConfig, env: CrystalEnv | DelayedRewards) -> Agent:
    """An agent that proposes by :func:`propose`; rewards may come later."""
    room, lanes = config.updates * config.lanes, config.lanes
    if isinstance(config, GaussianProcessConfig):
        prior = tuple(read_prior(name, env) for name in filter(None, config.prior.split(",")))
        space = Space(env, config.listed, prior)
    else:
        space = Space(env)
    delayed = isinstance(env, DelayedRewards)
    objective = env.objective
    count_properties = len(objective.names)
    about = np.repeat(objective.rows, [len(term.targets) for term in objective.terms])  # of each target
    start = np.zeros((2, 8), np.float32)
    grid_size = 0
    if isinstance(config, GaussianProcessConfig):
        from crystaljax.agents.surrogate import GRID, STARTS

        start, grid_size = STARTS.astype(np.float32), GRID
    start = np.repeat(start[None], count_properties, axis=0)

    def init(key: jax.Array, env_params: EnvParams) -> ProposerState:
        designs = Designs(jnp.zeros((room, env.max_sites), jnp.int32), jnp.zeros(room, jnp.int32))
        return ProposerState(
            jnp.int32(0),
            key,
            jax.tree.map(jnp.asarray, env_params),
            designs,
            jnp.full((room, count_properties), jnp.nan, jnp.float32),
            jnp.full(room, Status.PENDING, jnp.int32),
            jnp.asarray(start),
            jnp.int32(0),
        )

    def ask(history: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        found, theta, fitted = propose(space, config, objective, history, lanes)
        genes, skeleton = np.zeros((lanes, space.sites), np.int32), np.zeros(lanes, np.int32)
        genes[: len(found)], skeleton[: len(found)] = found.designs
        if len(found):  # a batch that is not full is filled up with what does not count
            genes[len(found) :], skeleton[len(found) :] = genes[0], skeleton[0]
        return genes, skeleton, np.arange(lanes) < len(found), theta.astype(np.float32), np.int32(fitted)

    def update(state: ProposerState) -> tuple[ProposerState, dict[str, jax.Array], Records]:
        count = state.update * lanes
        aims = jnp.asarray(state.env_params.target, jnp.float32)
        answered = jnp.arange(room) < count
        valid = answered & (state.status == Status.OK)
        grids, targets = [], []
        for row in range(count_properties):
            wanted = jnp.ravel(aims)[about == row]
            value = state.values[:, row]
            low = jnp.minimum(jnp.where(valid, value, wanted.min()).min(), wanted.min())
            high = jnp.maximum(jnp.where(valid, value, wanted.max()).max(), wanted.max())
            span = jnp.maximum(high - low, jnp.abs(wanted).max() / 2)
            grids.append(jnp.linspace(low - span, high + span, max(grid_size, 2)))
            targets.append(wanted.mean())
        if count_properties == 1:
            curve = objective.reward(grids[0], jnp.full(grids[0].shape, Status.OK), aims)[None]
        else:
            curve = jnp.stack(objective.scores(jnp.stack(grids, axis=-1), aims))
        history = {
            "genes": state.designs.genes,
            "skeleton": state.designs.skeleton,
            "values": state.values,
            "status": state.status,
            "reward": objective.reward(state.values, state.status, aims),
            "count": count,
            "grid": jnp.stack(grids),
            "curve": curve,
            "target": jnp.stack(targets),
            "seed": jax.random.bits(state.key, (), jnp.uint32),
            "theta": state.theta,
            "fitted": state.fitted,
        }
        shapes = (
            jax.ShapeDtypeStruct((lanes, env.max_sites), jnp.int32),
            jax.ShapeDtypeStruct((lanes,), jnp.int32),
            jax.ShapeDtypeStruct((lanes,), jnp.bool_),
            jax.ShapeDtypeStruct(start.shape, jnp.float32),
            jax.ShapeDtypeStruct((), jnp.int32),
        )
        genes, skeleton, is_new, theta, fitted = jax.pure_callback(ask, shapes, history, vmap_method="sequential")
        designs = Designs(genes, skeleton)
        _, records = evaluate(env, state.env_params, designs)
        tickets = jnp.where(is_new, count + jnp.arange(lanes), NO_TICKET)
        records = records.replace(finished=records.finished & is_new, ticket=tickets[None] if delayed else None)

        def enter(old: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), count, axis=0)

        state = ProposerState(
            state.update + 1,
            state.key,
            state.env_params,
            jax.tree.map(enter, state.designs, designs),
            enter(state.values, records.values[0]),
            # Nothing is to be learned from a crystal that fills up a batch.
            enter(state.status, jnp.where(is_new, records.status[0], Status.CANCELLED)),
            theta,
            fitted,
        )
        return state, {"proposed": is_new.sum(dtype=jnp.float32)}, records

    def deliver(
        state: ProposerState, tickets: jax.Array, rewards: jax.Array, values: jax.Array, statuses: jax.Array
    ) -> ProposerState:
        del rewards
        rows = jnp.where(tickets == NO_TICKET, room, tickets)  # a ticket is the row of the history
        values, status = (
            old.at[rows].set(new.astype(old.dtype), mode="drop")
            for old, new in ((state.values, values), (state.status, statuses))
        )
        return state.replace(values=values, status=status)

    return Agent(init, update, env.horizon, lanes, deliver=deliver, needs_values=True)


def read_prior(name: str, env: CrystalEnv) -> tables.Table:
    """The table of that name, or in that file.

    Raises:
        ValueError: it is of another property, of a structure of the environment itself, or damaged.
    """
    if len(env.objective.names) > 1:
        raise ValueError(f"a prior teaches one property, not {' and '.join(env.objective.names)}; leave out prior")
    table = tables.load(name) if name in tables.shipped() else tables.read(name)
    if (table.property,) != env.objective.names:
        raise ValueError(
            f"prior {name} holds {table.property}, not {' and '.join(env.objective.names)}; give a table of that"
        )
    if table.skeleton.digest in {skeleton.digest for skeleton in env.skeletons}:
        raise ValueError(f"prior {name} is of a structure that is designed on; leave it out, its task has the answers")
    return table


def make_gaussian_process(config: GaussianProcessConfig, env: CrystalEnv | DelayedRewards, trunk: Any = None) -> Agent:
    """Bayesian optimisation on the value; needs no network.

    Raises:
        ModuleNotFoundError: without scikit-learn, which comes with the extra ``agents``.
    """
    import sklearn  # noqa: F401  (missed here rather than in the middle of a run)

    del trunk
    return make_proposer(config, env)


def make_random_neutral(config: NeutralConfig, env: CrystalEnv | DelayedRewards, trunk: Any = None) -> Agent:
    """Random search without repeats, neutral formulas first; needs no network."""
    del trunk
    return make_proposer(config, env)
