"""Rewards against their formulas, worked out by hand."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crystaljax
from crystaljax import objectives, tables
from crystaljax.status import Status


@pytest.mark.parametrize(
    ("name", "value", "target", "expected"),
    [
        ("band_gap", 1.12, 1.12, 1.0),
        ("band_gap", 0.0, 1.12, math.exp(-(1.12**2))),
        ("band_gap", -0.7, 1.12, math.exp(-(1.12**2))),  # a metal's negative gap counts as zero
        ("band_gap", 3.0, 2.0, math.exp(-1.0)),
        ("density", 3.0, 3.0, 1.0),
        ("density", 6.0, 3.0, math.exp(-3.0)),
        ("bulk_modulus", 300.0, 300.0, 0.0),
        ("bulk_modulus", 150.0, 300.0, -0.5),
        ("bulk_modulus", -400.0, 300.0, -7.0 / 3.0),
        ("bulk_modulus", 9000.0, 300.0, -5.0),
    ],
)
def test_formula(name: str, value: float, target: float, expected: float) -> None:
    reward = objectives.objective(name).reward(jnp.float32(value), jnp.int32(Status.OK), jnp.float32(target))
    assert float(reward) == pytest.approx(expected, rel=1e-5)
    assert reward.dtype == jnp.float32


@pytest.mark.parametrize(("name", "failure"), [("band_gap", -1.0), ("density", -1.0), ("bulk_modulus", -5.0)])
@pytest.mark.parametrize("status", [s for s in Status if s != Status.OK])
def test_failures(name: str, failure: float, status: Status) -> None:
    objective = objectives.objective(name)
    assert objective.reward(jnp.float32(1.0), jnp.int32(status), jnp.float32(1.0)) == failure
    assert objective.reward(jnp.float32(jnp.nan), jnp.int32(Status.OK), jnp.float32(1.0)) == failure
    assert objective.reward(jnp.float32(jnp.inf), jnp.int32(Status.OK), jnp.float32(1.0)) == failure


@pytest.mark.parametrize("name", list(objectives.OBJECTIVES))
def test_best_reward_is_reached_at_the_target_only(name: str) -> None:
    objective = objectives.objective(name)
    values = jnp.linspace(0.01, 3.0 * objective.target, 301)
    reward = jax.vmap(objective.reward, (0, None, None))(values, jnp.int32(0), jnp.float32(objective.target))
    assert float(reward.max()) <= objective.best_reward
    assert float(values[reward.argmax()]) == pytest.approx(objective.target, rel=0.01)


def test_defaults_are_those_of_the_benchmark() -> None:
    targets = {name: (o.target, *o.far_targets) for name, o in objectives.OBJECTIVES.items()}
    assert targets == {"band_gap": (1.12, 2.0), "bulk_modulus": (300.0, 500.0), "density": (3.0, 5.0)}


def test_unknown_property() -> None:
    with pytest.raises(ValueError, match="band_gap"):
        objectives.objective("bandgap")


# Objectives of one's own


def scores(text: str, values: list[float]) -> list[float]:
    asked = objectives.parse(text)
    return asked.reward(jnp.array(values), jnp.zeros(len(values), jnp.int32), jnp.array(asked.target)).tolist()


def test_terms_in_words_score_as_they_say() -> None:
    def fall(distance: float, width: float) -> float:
        return math.exp(-((distance / width) ** 2))

    assert scores("band_gap=1.34+-0.2", [1.34, 1.54, 0.0]) == pytest.approx([1.0, fall(0.2, 0.2), fall(1.34, 0.2)])
    assert scores("band_gap = 1.1 .. 1.6 +- 0.5", [1.1, 1.3, 1.6, 1.0, 2.1]) == pytest.approx(
        [1.0, 1.0, 1.0, fall(0.1, 0.5), fall(0.5, 0.5)]
    )
    assert scores("density<=5+-2", [0.1, 5.0, 6.0]) == pytest.approx([1.0, 1.0, fall(1.0, 2.0)])
    assert scores("bulk_modulus>=100", [300.0, 100.0, 50.0]) == pytest.approx([1.0, 1.0, fall(50.0, 100.0)])
    assert scores("density=3", [4.0]) == pytest.approx(scores("density=3+-1.7320508", [4.0])), "its scale"


@pytest.mark.parametrize("combine", ["product", "sum"])
def test_several_terms_make_one_reward(combine: str) -> None:
    asked = objectives.parse("band_gap=1+-0.5", "density<=5+-1*2", combine=combine)
    assert asked.names == ("band_gap", "density") and asked.target == (1.0, 5.0)
    values = jnp.array([[1.0, 4.0], [1.5, 6.0], [1.5, jnp.nan], [9.0, 9.0]])
    status = jnp.array([Status.OK, Status.OK, Status.OK, Status.TIMEOUT])
    found = asked.reward(values, status, jnp.array(asked.target))
    gap, dense = math.exp(-1.0), math.exp(-1.0)
    both = gap * dense**2 if combine == "product" else (gap + 2 * dense) / 3
    assert found.tolist() == pytest.approx([1.0, both, -1.0, -1.0]) and found.dtype == jnp.float32


def test_targets_are_traced_together_with_the_crystals() -> None:
    asked = objectives.parse("band_gap=1..2", "density<=5")
    targets = jnp.array([[1.0, 2.0, 5.0], [3.0, 4.0, 2.0]])
    values = jnp.array([[1.5, 4.0], [3.5, 3.0], [3.5, 1.0]])
    reward = jax.jit(jax.vmap(asked.reward, (None, None, 0)))(values, jnp.zeros(3, jnp.int32), targets)
    alone = [asked.with_targets(t).reward(values, jnp.zeros(3, jnp.int32), t) for t in targets]
    np.testing.assert_allclose(reward, jnp.stack(alone), rtol=1e-6)
    assert reward[0, 0] == 1.0 and reward[1, 2] == 1.0 and reward[1, 1] < 1.0
    with pytest.raises(ValueError, match="2 targets for .*which has 3"):
        asked.refuse_target([1.0, 2.0])
    with pytest.raises(ValueError, match="lowest value comes first"):
        asked.refuse_target([2.0, 1.0, 5.0])


@pytest.mark.parametrize(
    "terms",
    [("band_gap=1.12",), ("band_gap=1.12+-0.2*2", "density<=5"), ("bulk_modulus=50..90+-5",), ("density>=3.5",)],
)
def test_words_are_read_as_they_are_written(terms: tuple[str, ...]) -> None:
    asked = objectives.parse(*terms)
    assert asked.text() == " ".join(terms) and objectives.parse(*asked.text().split()) == asked


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (("band_gap",), "cannot be read; write NAME=VALUE"),
        (("band_gap=high",), "cannot be read"),
        (("band_gap<=1..2",), "a bound and a range"),
        (("bandgap=1",), "names no known property; they are band_gap, bulk_modulus, density"),
        (("band_gap=1+-0",), "width of 0; it must be positive"),
        (("band_gap=1*0",), "weight of band_gap is 0"),
        (("band_gap=-1",), r"lies between 0 and 30"),
        (("band_gap=2..1",), "lowest value comes first"),
        (("band_gap>=3", "band_gap<=2"), "no band_gap is at least 3 and at most 2"),
        (("band_gap=1", "band_gap=2"), "no band_gap is at least 2 and at most 1"),
        ((), "no terms"),
    ],
)
def test_what_cannot_be_asked_is_refused(terms: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objectives.parse(*terms)


def test_a_share_stands_alone() -> None:
    share = objectives.OBJECTIVES["bulk_modulus"].terms[0]
    with pytest.raises(ValueError, match="cannot be combined"):
        objectives.Objective((share, objectives.OBJECTIVES["density"].terms[0]))


# In an environment


def test_a_table_task_with_two_properties_knows_its_regret() -> None:
    asked = ("band_gap=3+-1", "density=3+-1")
    env, params = crystaljax.make("BandGap-Rocksalt-Table-v0", objective=asked)
    crystaljax.api_test(env)
    gap, density = (tables.load(f"{name}-RocksaltAB") for name in ("band_gap", "density"))
    expected = {}
    for one, other in zip(gap.entries, density.entries, strict=True):
        sound = one.value is not None and other.value is not None
        reward = math.exp(-((one.value - 3) ** 2) - (other.value - 3) ** 2) if sound else -1.0
        expected[one.elements] = reward, (one.value, other.value) if sound else None
    best = max(reward for reward, _ in expected.values())
    assert float(env.best_reward(params)) == pytest.approx(best, rel=1e-5) and env.name == "BandGap-Density-RocksaltAB"
    for elements, (reward, values) in list(expected.items())[::17]:
        _, state = env.reset(jax.random.key(0), params)
        for _ in elements:
            focus = int(env.observe(None, state, None, params).focus)
            action = int(env.vocabulary.indices([elements[focus]])[0])
            _, state, got, done, _, info = env.step(jax.random.key(1), state, action, params)
        assert done and float(got) == pytest.approx(reward, abs=1e-5)
        assert float(info["regret"]) == pytest.approx(best - reward, abs=1e-5) and "value" not in info
        if values is not None:
            assert (float(info["values"]["band_gap"]), float(info["values"]["density"])) == pytest.approx(values)


@pytest.mark.parametrize("observation", ["flat", "graph"])
def test_all_targets_are_seen_and_can_differ_by_lane(observation: str) -> None:
    env, params = crystaljax.make(
        "Density-PerovskiteABX3-v0",
        "unrelaxed-density",
        objective=["density>=2", "density<=6"],
        observation=observation,
    )
    crystaljax.api_test(env)
    targets = jnp.array([[1.0, 6.0], [3.0, 12.0]])
    lanes = jax.vmap(lambda t: env.default_params.replace(target=t))(targets)
    seen, state = jax.vmap(env.reset, (None, 0))(jax.random.key(0), lanes)
    shown = seen[:, -2:] * jnp.array([2.0, 6.0]) if observation == "flat" else seen.target
    np.testing.assert_allclose(shown, targets, rtol=1e-6)
    for action in (12, 12, 12):
        step = jax.vmap(env.step, (None, 0, None, 0))
        _, state, reward, _, _, info = step(jax.random.key(0), state, jnp.int32(action), lanes)
    density = info["values"]["density"][0]
    wanted = [math.exp(-(max(low - density, density - high, 0) ** 2) / 3) for low, high in targets.tolist()]
    assert reward.tolist() == pytest.approx(wanted, rel=1e-4)


def test_one_property_at_a_time_is_said_at_the_door() -> None:
    asked = ["band_gap=1", "density=3"]
    with pytest.raises(ValueError, match="computes density, not band_gap"):
        crystaljax.make("BandGap-C1-v0", "unrelaxed-density", objective=asked)
    alone = crystaljax.FunctionEvaluator(lambda numbers, skeleton: jnp.float32(1), "one")
    with pytest.raises(ValueError, match="one property at a time, not band_gap and density"):
        crystaljax.make("BandGap-C1-v0", alone, objective=asked)
    both = crystaljax.FunctionEvaluator(
        lambda numbers, skeleton: jnp.array([3.0, 1.0]), "made up", properties=("density", "band_gap")
    )
    env, params = crystaljax.make("BandGap-RocksaltAB-v0", both, objective=asked)
    _, state = env.reset(jax.random.key(0), params)
    for _ in range(2):
        _, state, reward, _, _, info = env.step(jax.random.key(0), state, 0, params)
    assert reward == 1.0 and (info["values"]["band_gap"], info["values"]["density"]) == (1.0, 3.0)


def test_a_property_of_ones_own() -> None:
    electrons = crystaljax.Property("electrons_per_atom", scale=2.0, tolerance=0.5, bounds=(0.0, 100.0))
    evaluator = crystaljax.FunctionEvaluator(lambda numbers, skeleton: numbers.sum() / 2.0, "count")
    term = crystaljax.Term(electrons, objectives.AtMost(2.0), (8.0,))
    env, params = crystaljax.make_custom(term, "AB_cF8_225_a_b", evaluator, mode="orbit")
    assert env.name == "ElectronsPerAtom-Custom" and electrons.heading == "Electrons per atom"
    with pytest.raises(ValueError, match="must be an identifier"):
        crystaljax.Property("band gap")
