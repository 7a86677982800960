"""Every registered task keeps the promises of the interface, through every door."""

from __future__ import annotations

import copy
import subprocess
import sys

import gymnasium
import gymnax
import jax
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import crystaljax
from crystaljax import FunctionEvaluator, registered_tasks
from crystaljax.adapters import FiveTupleEnv
from crystaljax.properties import PROPERTIES
from crystaljax.tasks import TABLE_NAMES, TABLES

SAMPLE = ("BandGap-C1-v0", "Density-Mixed-v0", "BulkModulus-PerovskiteABX3-v0")


def test_the_ids() -> None:
    ids = registered_tasks()
    crystals = [*(f"C{i}" for i in range(1, 8)), "Mixed", "Five", "PerovskiteABX3", "RocksaltAB"]
    with_engine = [f"{p}-{c}-v0" for p in ("BandGap", "BulkModulus", "Density") for c in crystals]
    with_table = [f"{PROPERTIES[p].prefix}-{TABLE_NAMES[c]}-Table-v0" for p in TABLES for c in TABLES[p]]
    assert sorted(ids) == sorted(with_engine + with_table)


@pytest.mark.parametrize("task_id", [task_id for task_id in registered_tasks() if "Table" not in task_id])
def test_api(task_id: str, landscape: FunctionEvaluator) -> None:
    env, params = crystaljax.make(task_id, landscape)
    crystaljax.api_test(env, params)


@pytest.mark.parametrize(
    "options", [{"observation": "flat"}, {"mode": "substitution"}, {"in_phase": True}, {"vocabulary": "large"}]
)
def test_api_with_options(options: dict, landscape: FunctionEvaluator) -> None:
    env, params = crystaljax.make("BandGap-Mixed-v0", landscape, **options)
    crystaljax.api_test(env, params)


def test_api_test_notices_a_broken_environment(landscape: FunctionEvaluator) -> None:
    env, params = crystaljax.make("BandGap-RocksaltAB-v0", landscape)

    class Drifting(type(env)):
        def step(self, key, state, action, params=None):
            observation, state, *rest = super().step(key, state, action, params)
            return observation, state.replace(time=state.time.astype("float32")), *rest

    env.__class__ = Drifting
    with pytest.raises(AssertionError, match="shapes or dtypes"):
        crystaljax.api_test(env, params)


@pytest.mark.parametrize("task_id", SAMPLE)
def test_gymnax_registry(task_id: str, landscape: FunctionEvaluator) -> None:
    env, params = gymnax.make(task_id, evaluator=landscape)
    assert env.name == task_id
    observation, state = env.reset(jax.random.key(0), params)
    assert len(env.step(jax.random.key(0), state, 0, params)) == 6


@pytest.mark.parametrize("first", ["crystaljax", "gymnax, gymnasium"])
def test_registries_know_the_ids_in_any_order_of_imports(first: str) -> None:
    second = "gymnax, gymnasium" if first == "crystaljax" else "crystaljax"
    code = (
        f"import {first}\nimport {second}\nimport crystaljax, gymnax, gymnasium\n"
        "assert set(crystaljax.registered_tasks()) <= set(gymnax.registered_envs)\n"
        "assert set(crystaljax.registered_tasks()) <= set(gymnasium.registry)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_is_light() -> None:
    heavy = ("jax", "gymnax", "torch", "matplotlib", "gpaw", "pymatgen")
    code = f"import sys, crystaljax; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("observation", ["flat", "graph"])
@pytest.mark.parametrize("task_id", SAMPLE)
@pytest.mark.filterwarnings("ignore:.*not within the optimal range.*", "ignore:.*Box.*")
def test_gymnasium_checker(task_id: str, observation: str, landscape: FunctionEvaluator) -> None:
    env = gymnasium.make(task_id, evaluator=landscape, observation=observation)
    check_env(env.unwrapped, skip_render_check=True)


def test_gymnasium_refuses_illegal_actions_and_early_steps(landscape: FunctionEvaluator) -> None:
    env = gymnasium.make("BandGap-C1-v0", evaluator=landscape).unwrapped
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(0)
    env.reset(seed=0)
    for action in (-1, 18, 0.5):
        with pytest.raises(ValueError, match=r"integer in \[0, 18\)"):
            env.step(action)


def test_gymnasium_episode_is_reproducible_and_target_can_change(landscape: FunctionEvaluator) -> None:
    env = gymnasium.make("BandGap-C1-v0", evaluator=landscape)

    def episode(**options):
        env.reset(seed=7, **options)
        return [env.step(action)[1] for action in (1, 2, 3, 4, 6)][-1]

    first = episode()
    assert episode() == first
    assert episode(options={"target": 2.0}) != first


@pytest.mark.parametrize("observation", ["flat", "graph"])
def test_gymnasium_vector_environment(observation: str, landscape: FunctionEvaluator) -> None:
    envs = gymnasium.make_vec("BandGap-C1-v0", num_envs=3, evaluator=landscape, observation=observation)
    first, _ = envs.reset(seed=3)
    assert envs.observation_space.contains(first)
    envs.action_space.seed(0)
    for step in range(11):
        observations, rewards, terminated, truncated, infos = envs.step(envs.action_space.sample())
        assert envs.observation_space.contains(observations)
        assert terminated.all() == (step % 5 == 4) and not truncated.any()
        assert (infos["_final_obs"] == terminated).all()
        assert rewards.shape == (3,) and (rewards[~terminated] == 0).all()
    again, _ = envs.reset(seed=3)
    left, right = (first, again) if observation == "flat" else (first["focus"], again["focus"])
    assert np.array_equal(left, right)
    with pytest.raises(ValueError, match="integers"):
        envs.step(np.array([0, 1, 18]))


def test_gymnasium_vector_lanes_equal_the_native_environment(landscape: FunctionEvaluator) -> None:
    envs = gymnasium.make_vec("BandGap-RocksaltAB-v0", num_envs=2, evaluator=landscape)
    envs.reset(seed=[4, 5])
    envs.step(np.array([1, 2]))
    _, rewards, *_ = envs.step(np.array([3, 6]))
    env, params = crystaljax.make("BandGap-RocksaltAB-v0", landscape)
    for seed, actions, expected in ((4, (1, 3), rewards[0]), (5, (2, 6), rewards[1])):
        _, state = env.reset(jax.random.key(seed), params)
        for action in actions:
            _, state, reward, *_ = env.step(jax.random.key(seed), state, action, params)
        assert float(reward) == expected


def test_five_tuple_adapter_is_deep_copyable(landscape: FunctionEvaluator) -> None:
    env, params = crystaljax.make("BandGap-RocksaltAB-v0", landscape)
    old = copy.deepcopy(FiveTupleEnv(env))
    assert old.num_actions == 18
    _, state = old.reset(jax.random.key(0), params)
    for time in range(2):
        observation, state, reward, done, info = old.step(jax.random.key(0), state, time + 1, params)
        assert done == (time == 1)
    _, six, *_ = env.reset(jax.random.key(0), params), env.reset(jax.random.key(0), params)[1]
    expected = env.step(jax.random.key(0), env.step(jax.random.key(0), six, 1, params)[1], 2, params)[2]
    assert float(reward) == float(expected)


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="BandGap-C1-v0"):
        crystaljax.make("bandgap-c1")
