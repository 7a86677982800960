"""Metrics against numbers worked out by hand, and against slower ways to get them."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crystaljax.agents import metrics, reference
from crystaljax.agents.ledger import Episode, formula


def episode(crystal, reward, value=None, elements="Na Cl", status=None):
    """An episode; without a value the calculation failed, with the status REFUSED there was none."""
    status = {"REFUSED": "ODD_ELECTRONS", None: "NOT_CONVERGED" if value is None else "OK"}.get(status, status)
    symbols = tuple(elements.split())
    return Episode(
        0, 1, crystal, formula(symbols), symbols, 0, None if value is None else {"band_gap": value}, status, reward
    )


# Refused; calculated (1); again; failed (2), costs a calculation; calculated (3); refused again; calculated (4).
RUN = [
    episode(0, -1.0, status="REFUSED"),
    episode(1, 0.25, 2.0),
    episode(1, 0.25, 2.0),
    episode(2, -1.0, elements="K Cl"),
    episode(3, 0.75, 1.0, elements="Li F"),
    episode(0, -1.0, status="REFUSED"),
    episode(4, 0.5, 1.2, elements="Li Li O"),
]


def test_only_new_crystals_that_are_calculated_count():
    assert metrics.calculations(RUN).tolist() == [0, 1, 1, 2, 3, 3, 4]
    assert metrics.calculations([]).tolist() == []
    assert [len(metrics.within(RUN, budget)) for budget in range(6)] == [1, 3, 4, 6, 7, 7]


def test_curves_run_over_calculations():
    assert metrics.best_reward(RUN).tolist() == [0.25, 0.25, 0.75, 0.75]
    np.testing.assert_allclose(metrics.mean_reward(RUN, 1), [0.25, -1.0, (0.75 - 1.0) / 2, 0.5])
    # Two calculations at a time; the first window reaches back to the beginning, so the first refusal is in it.
    expected = [-0.5 / 3, -0.5 / 3, -1.25 / 3, 0.25 / 3]
    np.testing.assert_allclose(metrics.mean_reward(RUN, 2), expected)
    for nothing in ([], RUN[:1]):
        assert len(metrics.best_reward(nothing)) == len(metrics.mean_reward(nothing, 3)) == 0
    with pytest.raises(ValueError, match="at least 1"):
        metrics.mean_reward(RUN, 0)


def test_a_failure_is_the_best_so_far_if_there_is_nothing_else():
    assert metrics.best_reward([episode(0, -1.0), episode(1, -0.5, 9.0)]).tolist() == [-1.0, -0.5]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.floats(-1, 1)), min_size=1, max_size=30), st.integers(1, 8))
def test_curves_agree_with_their_definitions(pairs, window):
    run = [episode(crystal, reward, status="REFUSED" if crystal == 0 else None) for crystal, reward in pairs]
    counts = metrics.calculations(run)
    for k in range(1, counts[-1] + 1):
        assert metrics.best_reward(run)[k - 1] == max(e.reward for e, n in zip(run, counts, strict=True) if n <= k)
        inside = [e.reward for e, n in zip(run, counts, strict=True) if k - window < n <= k]
        assert metrics.mean_reward(run, window)[k - 1] == pytest.approx(np.mean(inside), abs=1e-12)


def test_successes_are_within_tolerance_and_distinct_ones_are_counted_once():
    assert [e.crystal for e in metrics.distinct(RUN)] == [0, 1, 2, 3, 4]
    assert metrics.distinct(RUN)[1] is RUN[1], "the first of its crystal"

    def near(target, tolerance):
        return {"band_gap": metrics.Goal(target, target, tolerance)}

    assert [e.crystal for e in metrics.succeeded(RUN, near(1.1, 0.11))] == [3, 4]
    assert metrics.first_success(RUN, near(1.1, 0.11)) == 3 and metrics.first_success(RUN, near(1.2, 0.05)) == 4
    assert metrics.first_success(RUN, near(5.0, 0.1)) is None, "a failure has no value"
    assert metrics.succeeded([episode(0, 0.5, 2.0)], near(1.75, 0.25)), "the bound is inside"


def test_a_success_meets_every_goal():
    goals = {"band_gap": metrics.Goal(1.0, 1.5, 0.25), "density": metrics.Goal(-np.inf, 5.0, 0.1)}
    values = [(1.25, 3.0), (0.75, 5.1), (0.5, 3.0), (1.25, 5.2), (1.75, -4.0), (2.0, 4.0)]
    run = [
        dataclasses.replace(episode(i, 0.5, 1.0), values={"density": density, "band_gap": gap})
        for i, (gap, density) in enumerate(values)
    ]
    assert [e.crystal for e in metrics.succeeded(run, goals)] == [0, 1, 4]
    assert goals["density"].text("g/cm3") == "at most 5 g/cm3, or within 0.1 of that"


def test_uniqueness():
    assert metrics.uniqueness(RUN) == 5 / 7 and np.isnan(metrics.uniqueness([]))


def test_diversity_is_the_mean_distance_of_compositions():
    salt, potash, lithia = (episode(0, 0, elements=text) for text in ("Na Cl", "K Cl", "Li Li O"))
    assert metrics.diversity([salt, potash]) == 0.5, "one atom of two is exchanged"
    assert metrics.diversity([salt, lithia]) == pytest.approx(1.0) and metrics.diversity([salt, salt]) == 0.0
    assert metrics.diversity([salt, potash, lithia]) == pytest.approx((0.5 + 1.0 + 1.0) / 3)
    assert metrics.diversity([salt, episode(0, 0, elements="Cl Na Na Cl")]) == 0.0, "a larger cell"
    assert np.isnan(metrics.diversity([salt]))


def test_diversity_of_many_agrees_with_pairs():
    draws = np.random.default_rng(0).choice(["Li", "Na", "O", "F"], (20, 5))
    crystals = [episode(0, 0, elements=" ".join(row)) for row in draws]

    def distance(one, other):
        fractions = [np.array([list(c.elements).count(s) / 5 for s in ("Li", "Na", "O", "F")]) for c in (one, other)]
        return np.abs(fractions[0] - fractions[1]).sum() / 2

    pairs = [distance(*pair) for pair in itertools.combinations(crystals, 2)]
    assert metrics.diversity(crystals) == pytest.approx(np.mean(pairs))


def test_plausibility_by_smact():
    pytest.importorskip("smact", reason="extra [smact]")
    salt = episode(0, 0, elements="Na Cl")
    assert metrics.plausibility([salt, salt]) == (1.0, 1.0)
    assert metrics.plausibility([episode(0, 0, elements="Na Na Cl")]) == (0.0, 0.0), "Na2Cl has a charge"
    assert metrics.plausibility([episode(0, 0, elements="Cu Au")])[1] == 1.0, "an alloy"
    perovskite, odd = (episode(0, 0, elements=text) for text in ("K Mg F F F", "K K Mg F F"))
    assert metrics.plausibility([perovskite, odd, perovskite, odd]) == (0.5, 0.5)
    hydride = metrics.plausibility([episode(0, 0, elements="H H H Cl")])
    assert hydride == (1.0, 0.0), "neutral only if chlorine is the cation"
    assert all(np.isnan(metrics.plausibility([])))


def test_idle_share_is_time_waited_over_wall_time():
    updates = [{"seconds": 4.0, "waiting_seconds": 3.0}, {"seconds": 1.0, "waiting_seconds": 0.0}]
    assert metrics.wall_seconds(updates) == 5.0 and metrics.idle_share(updates) == 0.6
    assert np.isnan(metrics.idle_share([{"seconds": 1.0}])) and np.isnan(metrics.idle_share([]))


def test_interquartile_mean_leaves_out_whole_seeds():
    assert metrics.interquartile_mean(np.array([0.0, 1.0, 2.0, 100.0])) == 1.5
    assert metrics.interquartile_mean(np.array([0.0, 1.0, 5.0])) == 2.0, "of three none is left out"
    np.testing.assert_allclose(metrics.interquartile_mean(np.arange(8.0).reshape(4, 2)), [3.0, 4.0])


def test_intervals_are_reproducible_cover_and_shrink():
    rng = np.random.default_rng(3)
    draws = rng.normal(2.0, 1.0, (300, 10))  # 300 experiments of ten seeds
    low, high = metrics.interval(draws.T)
    assert low.shape == (300,) and (low < metrics.interquartile_mean(draws.T)).all()
    covered = ((low < 2.0) & (2.0 < high)).mean()
    assert 0.80 < covered < 0.98, "nominally 0.95; the percentile bootstrap of ten is somewhat short of it"
    again = metrics.interval(draws.T)
    np.testing.assert_array_equal(low, again[0])
    assert (metrics.interval(draws.T, seed=1)[0] != low).any()
    many = metrics.interval(rng.normal(2.0, 1.0, (160, 20)))
    assert (many[1] - many[0]).mean() < 0.4 * (high - low).mean(), "as one over the root of the number"
    assert np.isnan(metrics.interval(np.ones((1, 4)))).all(), "one seed tells nothing about others"


# Reference formulas

WRITTEN = {
    "mp.csv": 'material_id,formula_pretty,band_gap\nmp-1,"MgO",4.5\nmp-2,Ca(OH)2,3.7\n',
    "mp20.csv": ',material_id,pretty_formula,cif\n0,mp-1,MgO,"data\n_cell 1\n"\n1,mp-2,CaH2O2,x\n',
    "website.csv": "\ufeffMaterial ID,Formula,Volume\nmp-1,MgO,1\nmp-2,H2CaO2,2\n",
    "column.csv": "formula_pretty\nMgO\nCaO2H2\n",
    "api.json": json.dumps([{"formula_pretty": "MgO", "material_id": "mp-1"}, {"formula_pretty": "Ca(HO)2"}]),
    "response.json": json.dumps({"data": [{"pretty_formula": "Mg2O2"}, {"pretty_formula": "Ca(HO)2"}]}),
    "list.json": json.dumps(["MgO", "Ca(HO)2"]),
    "lines.txt": "# what is known\nMgO\n\n  Ca(OH)2  # slaked lime\n",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_reference_formulas_are_read_however_they_are_written(name, tmp_path):
    path = tmp_path / name
    path.write_text(WRITTEN[name], encoding="utf-8")
    assert reference.read(path) == {"MgO", "CaH2O2"}


def test_novelty_compares_reduced_formulas():
    known = frozenset({"MgO", "KMgF3"})
    crystals = [episode(0, 0, elements=text) for text in ("O Mg", "Mg Mg O O", "F K F Mg F", "Na Cl")]
    assert metrics.novelty(crystals, known) == 0.25
    assert metrics.novelty(crystals, frozenset()) == 1.0 and np.isnan(metrics.novelty([], known))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "material_id,energy\nmp-1,2\n", r"a.csv, line 1: no column with formulas among material_id, energy"),
        ("a.csv", "formula_pretty,x\nMgO,1\n,2\n", r"a.csv, line 3: '' is not a formula"),
        ("a.csv", "x,formula_pretty\n1,MgO\n2\n", r"a.csv, line 3: None is not a formula"),
        ("a.txt", "MgO\nXyO\n", r"a.txt, line 2: 'XyO' is not a formula such as KMgF3; give a CSV file"),
        ("a.txt", "MgO\nLi0.5O\n", "line 2: 'Li0.5O'"),
        ("a.txt", "X\n", "'X' is not a formula"),
        ("a.txt", "# nothing\n", "holds no formula"),
        ("a.csv", "formula_pretty\n", "holds no formula"),
        ("a.json", "{", "is not JSON"),
        ("a.json", '{"meta": 1}', "is not a list of formulas"),
        ("a.json", '[{"id": 1}]', "entry 1: no column with formulas among id"),
        ("a.json", "[1.5]", "entry 1: 1.5 is not a formula"),
        ("a.txt", "H" + "9" * 190, "line 1: 'H999"),
        ("a.txt", "H1000001", "'H1000001' is not a formula"),
        ("a.txt", "(" * 90 + "H" + ")9" * 90, "line 1: "),
        ("a.txt", "H" * 100_000, "line 1: "),
        ("a.txt", "H0", "'H0' is not a formula"),
        ("a.csv", "formula,x\nMgO,1\nMgO," + "x" * 140_000, "line 3 is no line of a CSV file"),
        ("a.json", "[" * 100_000, "is not JSON"),
    ],
)
def test_what_is_no_reference_is_refused_with_its_place(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        reference.read(tmp_path / name)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not text"):
        reference.read(tmp_path / "binary.csv")
