"""What ``benchmarks/transfer.py`` works out for itself: a target for every episode, and the best crystal there is."""

from __future__ import annotations

import importlib
import os

import jax
import numpy as np
import pytest

import crystaljax


@pytest.fixture
def transfer(monkeypatch):
    """The benchmark as a module; its settings of threads do not outlive the test."""
    for name in ("XLA_FLAGS", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    return importlib.import_module("benchmarks.transfer")


def test_every_episode_has_a_target_that_it_sees_and_is_paid_for(transfer):
    env, params = crystaljax.make("Density-C1-v0", "unrelaxed-density")
    many, lanes = transfer.ManyTargets(env, 2.0, 4.0), 16
    observation, state = jax.vmap(many.reset, (0, None))(jax.random.split(jax.random.key(0), lanes), params)
    step = jax.jit(jax.vmap(many.step, (0, 0, 0, None)))
    action = np.arange(lanes, dtype=np.int32) % env.num_actions
    targets = []
    for key in jax.random.split(jax.random.key(1), 2 * env.horizon):
        targets.append(np.asarray(observation.target))
        observation, state, reward, finished, _, info = step(jax.random.split(key, lanes), state, action, params)
        paid = np.where(finished, env.objective.terms[0].score(info["value"], targets[-1]), 0.0)
        np.testing.assert_allclose(reward, paid, rtol=1e-5)
    targets = np.array(targets)
    first, second = targets[: env.horizon], targets[env.horizon :]
    assert (first == first[0]).all() and (second == second[0]).all() and (first[0] != second[0]).all()
    assert targets.min() >= 2 and targets.max() < 4 and len(np.unique(targets)) == 2 * lanes


def test_ppo_learns_with_a_target_for_every_episode(transfer):
    env, params = crystaljax.make("Density-C6-v0", "unrelaxed-density")
    many = transfer.ManyTargets(env, 2.0, 4.0)
    config = transfer.PPOConfig(lanes=4, steps=2 * env.horizon, updates=1, minibatches=1, epochs=1)
    agent = transfer.make_ppo(config, many, transfer.make_trunk(env))
    first = agent.init(jax.random.key(0), params)
    last, losses, _ = jax.jit(agent.update)(first)
    assert all(np.isfinite(loss) for loss in losses.values())
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), first.network, last.network)
    assert any(jax.tree.leaves(moved))


def test_the_best_reachable_reward_is_that_of_all_crystals(transfer):
    env, params = crystaljax.make(
        "Density-C6-v0", "unrelaxed-density", vocabulary=crystaljax.elements.Vocabulary("three", ("Li", "Ca", "Br"))
    )
    genes = np.stack(np.meshgrid(*[np.arange(3)] * 4), axis=-1).reshape(-1, 4).astype(np.int32)
    designs = transfer.Designs(genes, np.zeros(len(genes), np.int32))
    expected = transfer.rewards_of(env, params, designs).max(axis=1)
    np.testing.assert_allclose(transfer.reachable(env, params), expected, rtol=1e-6)


def test_the_share_of_the_way_is_none_for_random_designs_and_all_for_the_best(transfer):
    chance, best = np.array([[0.2, 0.4]]), np.array([[1.0, 0.8]])
    rewards = {"random designs": chance, "best reachable": best, "both": np.concatenate([chance, best])}
    np.testing.assert_allclose(transfer.closed(rewards, "both", np.array([True, True])), [0.0, 1.0])
