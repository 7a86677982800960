"""Bayesian optimisation on the value: the chemistry it knows, the model, and what it proposes."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase.data import atomic_numbers
from scipy import stats

import crystaljax
from crystaljax import objectives, tables
from crystaljax.agents import chemistry, designs
from crystaljax.agents import gaussian_process as gp
from crystaljax.agents import surrogate as model
from crystaljax.agents.base import whole_training
from crystaljax.agents.hyperparameters import GaussianProcessConfig, NeutralConfig
from crystaljax.delayed import NO_TICKET, DelayedRewards
from crystaljax.evaluators import Deferred
from crystaljax.status import Status

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
ROCKSALT = "BandGap-Rocksalt-Table-v0"


@pytest.fixture(scope="module")
def rocksalt():
    return crystaljax.make(ROCKSALT, observation="flat", in_phase=True, target=3.0)


def run(env, params, config, key=0):
    """The last state, and of the crystals that count identities, rewards, values and atomic numbers, in order."""
    agent = (gp.make_random_neutral if isinstance(config, NeutralConfig) else gp.make_gaussian_process)(config, env)
    state, _, records = quick_jit(whole_training(agent, config.updates, params))(jax.random.key(key))
    counts = np.asarray(records.finished).ravel()
    name = np.asarray(jax.vmap(partial(designs.identity, env))(state.designs))
    numbers = env.vocabulary.numbers[np.asarray(records.elements).reshape(-1, env.max_sites)]
    value = np.where(np.asarray(records.status) == Status.OK, np.asarray(records.values)[..., 0], np.nan)
    reward, value = (np.asarray(leaf).ravel()[counts] for leaf in (records.reward, value))
    return state, name[counts], reward, value, numbers[counts]


# Chemistry


def numbers(formula: str) -> np.ndarray:
    return np.array([[atomic_numbers[symbol] for symbol in formula.split()]])


@pytest.mark.parametrize("formula", ["Na Cl", "Ca F F", "K Mg F F F", "Li Li O", "Be O", "Na H", "S F F F F F F"])
def test_salts_are_neutral(formula):
    assert chemistry.is_neutral(numbers(formula)).all()


@pytest.mark.parametrize("formula", ["Na Na", "F F", "Na F F", "Mg Cl", "Ca O O", "K K F", "O F"])
def test_what_no_charges_balance_is_not_neutral(formula):
    assert not chemistry.is_neutral(numbers(formula)).any(), "OF would need an anion less electronegative than a cation"


def test_neutrality_is_that_of_every_choice_of_states_by_brute_force():
    cations, anions = chemistry.oxidation_states()
    negativity = chemistry.descriptors()[:, 0]

    def imbalance(crystal):
        elements, count = np.unique(crystal[crystal > 0], return_counts=True)
        charges = [
            [charge for table in (cations, anions) for charge in table[element] if charge != chemistry.NO_STATE]
            for element in elements
        ]
        best = np.inf
        for states in itertools.product(*charges):
            positive, negative = (negativity[elements[np.sign(states) == sign]] for sign in (1, -1))
            if not len(positive) or not len(negative) or positive.max() < negative.min():
                best = min(best, abs(np.dot(count, states)))
        return best

    vocabulary = crystaljax.elements.get_vocabulary("large")
    some = vocabulary.numbers[np.random.default_rng(0).integers(50, size=(300, 5))]
    some[::3, 4] = 0  # padding
    found = chemistry.charge_imbalance(some)
    # A single kind of ion is never balanced either way; its imbalance may differ by which of the two it is taken for.
    both = [len(np.unique(crystal[crystal > 0])) > 1 for crystal in some]
    neutral = np.array([imbalance(crystal) == 0 for crystal in some])
    np.testing.assert_array_equal(found[both] == 0, neutral[both])
    assert 20 < neutral.sum() < 150
    np.testing.assert_array_equal(chemistry.charge_imbalance(jnp.asarray(some), jnp), found)


def test_an_odd_number_of_electrons_is_what_the_engine_refuses():
    table = tables.load("band_gap-FluoriteAX2")
    labels = tables.labelings(table.skeleton, table.vocabulary)[0]
    np.testing.assert_array_equal(chemistry.is_odd(labels), table.statuses == Status.ODD_ELECTRONS)


def test_equal_crystals_have_equal_features_and_others_do_not():
    env, _ = crystaljax.make("Density-Mixed-v0", "unrelaxed-density")
    space = gp.Space(env)
    rng = np.random.default_rng(0)
    some = space.random(rng, 200)
    same = some.numbers.copy()
    for row, skeleton in enumerate(some.designs.skeleton):
        permutations = env.skeletons[skeleton].permutations
        sites = permutations.shape[1]
        same[row, :sites] = same[row, :sites][permutations[rng.integers(len(permutations))]]
    features = space.of(some)
    # Structures come with coordinates that are symmetric to some four decimals.
    np.testing.assert_allclose(space.features(some.designs.skeleton, same), features, atol=1e-3)
    assert len(np.unique(features.round(3), axis=0)) == len(np.unique(some.names))


# The model


@pytest.fixture(scope="module")
def small(rocksalt):
    """A space of 171 crystals, their features in the order of the table, and a kernel."""
    env, _ = rocksalt
    space, table = gp.Space(env), tables.load("band_gap-RocksaltAB")
    features = space.of(space.crystals(designs.Designs(*orbit_genes(env, table, range(len(table.entries))))))
    return space, features, model.CrystalKernel(space.features.slices, model.STARTS[0] + 0.1)


def test_the_gradient_of_the_kernel_is_its_derivative(small):
    _, features, kernel = small
    some = features[::12]
    value, gradient = kernel(some, eval_gradient=True)
    assert (np.linalg.eigvalsh(value) > 0).all()
    for place in range(8):
        shifted = kernel.theta + 1e-6 * (np.arange(8) == place)
        after = model.CrystalKernel(kernel.slices, shifted)(some)
        np.testing.assert_allclose((after - value) / 1e-6, gradient[..., place], atol=1e-4)


def test_the_process_is_the_exact_posterior(small):
    _, features, kernel = small
    seen, there = features[::6], features[1::7]
    targets = np.random.default_rng(0).normal(size=len(seen))
    process = model.Process.fit(seen, targets, kernel)
    inverse = np.linalg.inv(kernel(seen))
    cross = kernel(there, seen)
    mean = cross @ inverse @ targets
    covariance = kernel(there, there) - cross @ inverse @ cross.T
    joint, (marginal, deviation) = process.joint(there), process.marginals(there)
    np.testing.assert_allclose(joint.mean, mean, atol=1e-8)
    np.testing.assert_allclose(joint.covariance, covariance, atol=1e-8)
    np.testing.assert_allclose(marginal, mean, atol=1e-4)
    np.testing.assert_allclose(deviation, np.sqrt(np.diag(covariance)), atol=1e-4)


def test_what_is_outstanding_makes_certain_as_an_observation_would(small):
    _, features, kernel = small
    seen, there, row = features[::6], features[1::7], 5
    process = model.Process.fit(seen, np.zeros(len(seen)), kernel)
    before = process.joint(there)
    told = model.Process.fit(np.concatenate([seen, there[row : row + 1]]), np.zeros(len(seen) + 1), kernel)
    after = model.given(row, before.covariance, before.noise)
    np.testing.assert_allclose(after, told.joint(there).covariance, atol=1e-8)
    assert after[row, row] < 0.6 * before.covariance[row, row]


def test_hyperparameters_of_more_evidence_are_chosen(small):
    _, features, kernel = small
    seen = features[::2]
    targets = np.linalg.cholesky(kernel(seen)) @ np.random.default_rng(1).normal(size=len(seen))
    off = model.CrystalKernel(kernel.slices, kernel.theta + np.array([1, -1, 0.8, -0.8, 0.8, 0, -0.8, 1]))
    chosen = model.Process.fit(seen, targets, off, center=kernel.theta)
    assert chosen.evidence > model.Process.fit(seen, targets, off).evidence + 1
    assert (chosen.kernel.theta >= model.BOUNDS[:, 0]).all() and (chosen.kernel.theta <= model.BOUNDS[:, 1]).all()


def test_expectations_of_a_curve_are_those_of_quadrature():
    grid = np.linspace(-10.0, 20.0, model.GRID)
    curve = np.exp(-((5.0 - np.maximum(grid, 0.0)) ** 2))
    expected = model.Expectation(grid, np.maximum(curve - 0.6, 0.0))
    z, weight = np.linspace(-8, 8, 20001), stats.norm.pdf(np.linspace(-8, 8, 20001)) * 16 / 20000
    for mean, deviation in itertools.product((-1.0, 3.9, 5.0, 7.5), (0.02, 0.3, 1.0, 2.5)):
        value = np.maximum(np.exp(-((5.0 - np.maximum(mean + deviation * z, 0.0)) ** 2)) - 0.6, 0.0) @ weight
        assert expected(np.array([mean]), np.array([deviation]))[0] == pytest.approx(value, abs=4e-3)


def surrogate(space, features, values, rewards, **changes):
    grid = np.linspace(-6.0, 12.0, model.GRID)
    belief = model.Belief(features, values, space.features.slices, model.STARTS, True, point_mass=0.05, target=3.0)
    curve = np.exp(-((3.0 - np.maximum(grid, 0)) ** 2))
    options = {"best": float(rewards.max()), "mean_weight": 0.02} | changes
    return model.Surrogate([belief], model.Worth(grid, curve, dead=rewards[~belief.alive], **options))


def test_a_batch_begins_with_the_best_and_keeps_away_from_what_is_outstanding(small):
    space, features, _ = small
    table = tables.load("band_gap-RocksaltAB")
    known = np.flatnonzero(table.statuses == Status.OK)[::3]
    values = table.values[known]
    built = surrogate(space, features[known], values, np.exp(-((3.0 - values) ** 2)))
    others = np.setdiff1d(np.flatnonzero(table.statuses == Status.OK), known)
    chosen = built.batch(features[others], 12, features[:0])
    assert len(set(chosen)) == 12
    np.testing.assert_allclose(
        built.scores(features[others])[chosen[0]], built.scores(features[others]).max(), rtol=1e-3
    )
    outstanding = built.batch(features[others], 12, features[others[chosen[:3]]])
    assert outstanding[0] != chosen[0], "less is to be learned of what is to come"


def test_draws_estimate_what_the_table_knows():
    """Of one property both ways are there; of two that are certain, the reward is that of their values."""
    grid = np.linspace(-6.0, 12.0, model.GRID)
    curve = np.exp(-((3.0 - np.maximum(grid, 0)) ** 2))
    rng = np.random.default_rng(0)
    marginal = model.Marginal(rng.uniform(0, 1, 50), rng.uniform(0, 6, 50), rng.uniform(0.1, 1.5, 50))
    dead = np.array([-1.0, curve[np.searchsorted(grid, 0.0)], curve[np.searchsorted(grid, 0.0)], -1.0])
    exact = model.Worth(grid, curve, 0.4, 0.1, dead)([marginal])
    term = model.ScoreCurve(0, grid, curve)
    drawn = model.DrawnWorth(
        [term], objectives.parse("density=3").combined, 0.4, 0.1, -1.0, np.zeros(1), np.array([0.5])
    )([marginal])
    assert np.abs(drawn - exact).max() < 0.05 and stats.spearmanr(drawn, exact).statistic > 0.97
    sure = [model.Marginal(np.ones(3), np.array(mean), np.full(3, 1e-9)) for mean in ([3.0, 3.0, 2.0], [4.0, 6.0, 5.5])]
    terms = [term, model.ScoreCurve(1, grid, np.exp(-(np.maximum(grid - 5.0, 0.0) ** 2)))]
    for combine, expected in (("product", [1, np.exp(-2), np.exp(-1.5)]), ("sum", [1, (1 + 2 * np.exp(-1)) / 3, None])):
        combined = objectives.parse("band_gap=3", "density<=5*2", combine=combine).combined
        worth = model.DrawnWorth(terms, combined, 0.0, 0.0, -1.0, np.zeros(2), np.ones(2))(sure)
        for found, wanted in zip(worth, expected, strict=True):
            assert wanted is None or found == pytest.approx(wanted, abs=1e-4)


def test_values_beat_rewards_as_what_to_learn(small):
    """From a third of the crystals the model tells where good ones are among the others."""
    space, features, _ = small
    table = tables.load("band_gap-RocksaltAB")
    counted = np.flatnonzero(table.statuses == Status.OK)
    known, others = counted[::3], np.setdiff1d(counted, counted[::3])
    reward = np.exp(-((3.0 - table.values) ** 2))
    built = surrogate(space, features[known], table.values[known], reward[known], best=0.0)
    assert stats.spearmanr(built.scores(features[others]), reward[others]).statistic > 0.5


# The agent


def test_it_needs_fewer_calculations_than_random_search_over_neutral_formulas():
    """On densities of the rocksalt structure, 171 crystals of which few are as dense as this."""
    env, params = crystaljax.make("Density-Rocksalt-Table-v0", observation="flat", in_phase=True, target=6.0)
    best = [
        [run(env, params, settings, key)[2].max() for key in range(3)]
        for settings in (GaussianProcessConfig(updates=5, lanes=4), NeutralConfig(updates=5, lanes=4))
    ]
    assert np.mean(best[0]) > np.mean(best[1]) + 0.05 and min(best[0]) > 0.9, best


def test_it_models_every_property_of_an_objective():
    asked = ["band_gap=3+-0.5", "density=3+-0.5"]
    env, params = crystaljax.make("BandGap-Zincblende-Table-v0", objective=asked, observation="flat", in_phase=True)
    state, name, reward, _, _ = run(env, params, GaussianProcessConfig(updates=6, lanes=8))
    assert len(np.unique(name, axis=0)) == 48 and state.theta.shape == (2, 2, 8)
    assert reward.max() == pytest.approx(float(env.best_reward(params)), abs=1e-5), "of 171 crystals, after 48"
    with pytest.raises(ValueError, match="a prior teaches one property, not band_gap and density"):
        gp.make_gaussian_process(GaussianProcessConfig(prior="band_gap-RocksaltAB"), env)


def test_one_seed_one_result_and_seeds_can_be_mapped(rocksalt):
    env, params = rocksalt
    train = whole_training(gp.make_gaussian_process(GaussianProcessConfig(lanes=4), env), 4, params)
    both = quick_jit(jax.vmap(train))(jnp.stack([jax.random.key(3), jax.random.key(4)]))[2]
    single = quick_jit(train)(jax.random.key(4))[2]
    elements = np.asarray(both.elements)
    assert (elements[0] != elements[1]).any()
    np.testing.assert_array_equal(elements[1], np.asarray(single.elements))


@pytest.mark.parametrize("first", ["random", "neutral"])
def test_no_crystal_is_proposed_twice_nor_one_that_is_refused_once_one_was(first, rocksalt):
    env, params = rocksalt
    config = GaussianProcessConfig(updates=25, lanes=8, first_batch=first)  # 200 proposals for 171 crystals
    state, name, _, value, labels = run(env, params, config)
    assert len(name) == len(np.unique(name, axis=0)) == 171, "everything, once, and then nothing"
    odd = chemistry.is_odd(labels)
    met = np.flatnonzero(odd)[0] // 8 * 8 + 8  # the batch in which the first one is refused
    even_after = np.flatnonzero(~odd[met:])
    assert (np.diff(even_after) == 1).all() and even_after[0] == 0, "all others first"
    assert first == "random" or chemistry.is_neutral(labels[:8]).all()
    assert np.isfinite(value).sum() == 91


@pytest.mark.parametrize(
    ("task", "evaluator", "options"),
    [
        ("Density-C1-v0", "unrelaxed-density", {}),
        ("Density-Mixed-v0", "unrelaxed-density", {"target": 4.0}),
        ("Density-PerovskiteABX3-v0", "unrelaxed-density", {"vocabulary": "medium"}),
    ],
    ids=["sites", "several skeletons", "orbits"],
)
def test_it_works_on_one_and_several_skeletons_by_sites_and_by_orbits(task, evaluator, options, monkeypatch):
    monkeypatch.setattr(gp, "WALKERS", 6)
    monkeypatch.setattr(gp, "CLIMBS", 3)
    monkeypatch.setattr(gp, "NEIGHBOURS", 24)
    env, params = crystaljax.make(task, evaluator, in_phase=True, **options)
    config = GaussianProcessConfig(updates=3, lanes=4, listed=20_000)
    _, name, reward, _, _ = run(env, params, config)
    assert len(np.unique(name, axis=0)) == 12
    assert reward[4:].max() > reward[:4].max()


@pytest.mark.slow
def test_local_search_finds_what_enumeration_finds():
    env, _ = crystaljax.make("BandGap-Perovskite-Table-v0")
    table = tables.load("band_gap-PerovskiteABX3")
    listing, climbing = gp.Space(env), gp.Space(env, listed=10)
    assert climbing.everything is None and len(listing.everything) == 5832
    counted = np.flatnonzero(table.statuses == Status.OK)[::29]
    rows = listing.rows(climbing.crystals(designs.Designs(*orbit_genes(env, table, counted))).names)
    known, reward = listing.everything[rows], np.exp(-((3.0 - table.values[counted]) ** 2))
    config, ratios = GaussianProcessConfig(), []
    for space in (listing, climbing):
        built = surrogate(space, space.of(known), table.values[counted], reward)
        found, features = gp.shortlist(space, config, built, known, reward, 0, True)
        assert len(np.unique(found.names)) == len(found) and not np.isin(found.names, known.names).any()
        top = listing.everything[listing.rows(found.names[:16])]
        ratios.append(surrogate(listing, listing.of(known), table.values[counted], reward).scores(listing.of(top)))
    assert ratios[1].max() > 0.95 * ratios[0].max() and ratios[1].mean() > 0.8 * ratios[0].mean()


def orbit_genes(env, table, rows):
    """Genes and skeletons of entries of a table."""
    _, sites = np.unique(table.skeleton.orbits, return_index=True)
    genes = np.zeros((len(rows), env.max_sites), np.int32)
    for place, row in enumerate(rows):
        genes[place, : len(sites)] = env.vocabulary.indices([table.entries[row].elements[site] for site in sites])
    return genes, np.zeros(len(rows), np.int32)


def test_random_neutral_draws_every_neutral_formula_before_any_other(rocksalt):
    env, params = rocksalt
    _, name, _, _, labels = run(env, params, NeutralConfig(updates=22, lanes=8))
    assert len(name) == len(np.unique(name, axis=0)) == 171
    neutral = chemistry.is_neutral(labels)
    assert 30 < neutral.sum() < 100 and neutral[: neutral.sum()].all()
    other = run(env, params, NeutralConfig(updates=22, lanes=8), key=1)[4]
    assert (other != labels).any()


def test_outstanding_crystals_are_not_proposed_again_and_their_values_are_entered(rocksalt):
    env = DelayedRewards(crystaljax.make("BandGap-RocksaltAB-v0", Deferred(), in_phase=True)[0], 4)
    table_env, params = rocksalt
    agent = gp.make_gaussian_process(GaussianProcessConfig(updates=6, lanes=4), env)
    state, update, sent = agent.init(jax.random.key(0), params), quick_jit(agent.update), []
    for turn in range(6):
        state, _, records = update(state)
        assert (np.asarray(records.status) == Status.PENDING).all()
        np.testing.assert_array_equal(records.ticket[0], 4 * turn + np.arange(4))
        mine = designs.Designs(*(leaf[4 * turn : 4 * turn + 4] for leaf in state.designs))
        _, known = designs.evaluate(table_env, params, mine)
        sent.append((records.ticket[0], known))
        if turn > 1:  # two batches are always outstanding
            tickets, known = sent[turn - 2]
            tickets = np.where(np.arange(4) == 3, NO_TICKET, tickets)  # and one crystal never comes back
            state = agent.deliver(state, tickets, known.reward[0], known.values[0], known.status[0])
    name = np.asarray(jax.vmap(partial(designs.identity, table_env))(state.designs))
    assert len(np.unique(name, axis=0)) == 24
    came = np.arange(24) % 4 != 3
    came[16:] = False
    np.testing.assert_array_equal(np.asarray(state.status) != Status.PENDING, came)
    _, known = designs.evaluate(table_env, params, state.designs)
    np.testing.assert_array_equal(np.asarray(state.values)[came], np.asarray(known.values[0])[came])


def test_other_structures_teach_beforehand(rocksalt):
    env, params = rocksalt
    config = GaussianProcessConfig(updates=1, lanes=8, prior="band_gap-ZincblendeAB,band_gap-CsClAB")
    first = [run(env, params, dataclasses.replace(config, prior=prior), key=3)[3] for prior in (config.prior, "")]
    gaps = [np.nan_to_num(values) for values in first]
    assert np.exp(-((3.0 - gaps[0]) ** 2)).mean() > 2 * np.exp(-((3.0 - gaps[1]) ** 2)).mean()
    with pytest.raises(ValueError, match="density"):
        gp.read_prior("density-CsClAB", env)
    with pytest.raises(ValueError, match="leave it out"):
        gp.read_prior("band_gap-RocksaltAB", env)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="first_batch is 'sober'; give one of random, neutral"):
        GaussianProcessConfig(first_batch="sober")
    with pytest.raises(ValueError, match="shortlist is 0"):
        GaussianProcessConfig(shortlist=0)
