"""Rewards against their formulas, worked out by hand."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest

from crystaljax import rewards
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
    reward = rewards.objective(name).reward(jnp.float32(value), jnp.int32(Status.OK), jnp.float32(target))
    assert float(reward) == pytest.approx(expected, rel=1e-5)
    assert reward.dtype == jnp.float32


@pytest.mark.parametrize(("name", "failure"), [("band_gap", -1.0), ("density", -1.0), ("bulk_modulus", -5.0)])
@pytest.mark.parametrize("status", [s for s in Status if s != Status.OK])
def test_failures(name: str, failure: float, status: Status) -> None:
    objective = rewards.objective(name)
    assert objective.reward(jnp.float32(1.0), jnp.int32(status), jnp.float32(1.0)) == failure
    assert objective.reward(jnp.float32(jnp.nan), jnp.int32(Status.OK), jnp.float32(1.0)) == failure
    assert objective.reward(jnp.float32(jnp.inf), jnp.int32(Status.OK), jnp.float32(1.0)) == failure


@pytest.mark.parametrize("name", list(rewards.OBJECTIVES))
def test_best_reward_is_reached_at_the_target_only(name: str) -> None:
    objective = rewards.objective(name)
    values = jnp.linspace(0.01, 3.0 * objective.target, 301)
    reward = jax.vmap(objective.reward, (0, None, None))(values, jnp.int32(0), jnp.float32(objective.target))
    assert float(reward.max()) <= objective.best_reward
    assert float(values[reward.argmax()]) == pytest.approx(objective.target, rel=0.01)


def test_defaults_are_those_of_the_benchmark() -> None:
    targets = {name: (o.target, o.far_target) for name, o in rewards.OBJECTIVES.items()}
    assert targets == {"band_gap": (1.12, 2.0), "bulk_modulus": (300.0, 500.0), "density": (3.0, 5.0)}


def test_unknown_property() -> None:
    with pytest.raises(ValueError, match="band_gap"):
        rewards.objective("bandgap")
