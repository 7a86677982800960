"""PPO: its arithmetic against slow references, and that it learns."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crystaljax
from crystaljax.agents.hyperparameters import PPOConfig, RandomConfig
from crystaljax.agents.ppo import Sample, advantages, loss, make_optimizer, make_ppo, make_train, shuffled
from crystaljax.agents.random_search import make_random_search

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiles in half the time."""
QUICK = PPOConfig(updates=40, lanes=16, steps=16, learning_rate=3e-3)


@pytest.fixture(scope="module")
def problem():
    return crystaljax.make("Density-RocksaltAB-v0", "unrelaxed-density", observation="flat", mode="site")


def slow_advantages(reward, value, next_value, terminated, done, discount, trace):
    """The sum of discounted errors, written as in the paper, one lane and step at a time."""
    steps, lanes = reward.shape
    result = np.zeros_like(reward)
    for lane in range(lanes):
        for start in range(steps):
            weight = 1.0
            for t in range(start, steps):
                bootstrap = 0.0 if terminated[t, lane] else next_value[t, lane]
                result[start, lane] += weight * (reward[t, lane] + discount * bootstrap - value[t, lane])
                if done[t, lane]:
                    break
                weight *= discount * trace
    return result


def test_advantages_are_those_of_the_definition():
    random = np.random.default_rng(0)
    reward, value, next_value = random.normal(size=(3, 20, 6))
    terminated, truncated = random.random((2, 20, 6)) < 0.2
    arguments = (reward, value, next_value, terminated, terminated | truncated, 0.9, 0.8)
    expected = slow_advantages(*arguments)
    found = advantages(*(jnp.asarray(a, jnp.float32) if i < 3 else a for i, a in enumerate(arguments)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def slow_loss(weights, batch, config):
    """The loss for a linear network in NumPy float64; ``weights`` [D, V + 1], the last column gives the value."""
    outputs = batch.observation @ weights
    logits, value = outputs[:, :-1], outputs[:, -1]
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    entropy = -(np.exp(log_probs) * log_probs).sum(axis=1).mean()
    ratio = np.exp(log_probs[np.arange(len(batch.action)), batch.action] - batch.log_prob)
    advantage = (batch.advantage - batch.advantage.mean()) / max(batch.advantage.std(), config.min_deviation)
    policy = np.minimum(ratio * advantage, np.clip(ratio, 1 - config.clip, 1 + config.clip) * advantage)
    near = np.clip(value, batch.value - config.clip, batch.value + config.clip)
    errors = np.maximum((value - batch.returns) ** 2, (near - batch.returns) ** 2)
    return -policy.mean() + config.value_weight * 0.5 * errors.mean() - config.entropy * entropy


def test_loss_and_gradient_are_those_of_a_slow_reference():
    random = np.random.default_rng(1)
    batch = Sample(
        observation=random.normal(size=(40, 5)),
        action=random.integers(0, 4, 40),
        log_prob=np.log(random.uniform(0.1, 0.5, 40)),
        value=random.normal(size=40),
        advantage=random.normal(size=40),
        returns=random.normal(size=40),
    )
    weights, config = random.normal(size=(5, 5)), PPOConfig()

    def linear(weights, observation):
        outputs = observation @ weights
        return outputs[:-1], outputs[-1]

    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.int32 if leaf.dtype == int else jnp.float32), batch)
    value, gradient = jax.value_and_grad(lambda w: loss(w, linear, single, config)[0])(jnp.asarray(weights))
    np.testing.assert_allclose(value, slow_loss(weights, batch, config), rtol=1e-5)
    for index in np.ndindex(*weights.shape):
        step = np.zeros_like(weights)
        step[index] = 1e-6
        slope = (slow_loss(weights + step, batch, config) - slow_loss(weights - step, batch, config)) / 2e-6
        np.testing.assert_allclose(gradient[index], slope, atol=2e-5)


def test_every_epoch_sees_each_sample_once_in_another_order():
    first, second = (np.asarray(shuffled(jax.random.key(seed), 24, 3)) for seed in (0, 1))
    assert first.shape == (3, 8) and (first != second).any()
    np.testing.assert_array_equal(np.sort(first.ravel()), np.arange(24))


def test_observations_of_every_rollout_belong_to_their_actions(problem):
    """In the first pass over the data the probability ratio is 1, unless an action got another observation."""
    env, params = problem
    agent = make_ppo(PPOConfig(lanes=4, steps=5, minibatches=1, epochs=1, learning_rate=0.1, anneal=False), env)
    update = quick_jit(agent.update)
    state = quick_jit(agent.init)(jax.random.key(0), params)
    for _ in range(4):
        state, losses, _ = update(state)
        assert abs(float(losses["approx_kl"])) < 1e-6 and float(losses["clip_fraction"]) == 0.0
    assert float(losses["entropy"]) < 2.85, "the policy has moved, or the test says nothing"


def test_learning_rate_falls_by_update_and_not_within():
    config = PPOConfig(updates=4, minibatches=2, epochs=3, learning_rate=1.0)
    optimizer = make_optimizer(config)
    params = jnp.zeros(3)
    state, sizes = optimizer.init(params), []
    for _ in range(4 * 6):
        change, state = optimizer.update(jnp.ones(3), state, params)
        sizes.append(float(-change[0]))
    np.testing.assert_allclose(sizes, np.repeat([1.0, 0.75, 0.5, 0.25], 6), rtol=1e-3)


@pytest.fixture(scope="module")
def trained(problem):
    """Three seeds, vmapped; only MLPs, to keep it quick."""
    env, params = problem
    keys = jax.random.split(jax.random.key(10), 3)
    return keys, quick_jit(jax.vmap(make_train(QUICK, env, params)))(keys)


def mean_reward(records, last_updates):
    finished, reward = (np.asarray(leaf)[:, -last_updates:] for leaf in (records.finished, records.reward))
    return (reward * finished).sum(axis=(1, 2, 3)) / finished.sum(axis=(1, 2, 3))


def test_ppo_beats_random_with_every_seed(problem, trained):
    env, params = problem
    agent = make_random_search(RandomConfig(lanes=64, steps=64), env)
    _, _, records = quick_jit(agent.update)(quick_jit(agent.init)(jax.random.key(0), params))
    random = float(records.reward.sum() / records.finished.sum())
    _, (_, _, records) = trained
    assert (mean_reward(records, 5) > random + 0.25).all(), (mean_reward(records, 5), random)


def test_records_are_the_episodes_that_were_played(problem, trained):
    env, params = problem
    _, (_, _, records) = trained
    finished = np.asarray(records.finished)
    assert finished.sum() == 3 * QUICK.updates * QUICK.lanes * QUICK.steps // env.horizon
    elements, value = np.asarray(records.elements)[finished], np.asarray(records.values)[finished, 0]
    assert (elements < env.num_actions).all()
    np.testing.assert_allclose(
        np.asarray(records.reward)[finished], np.exp(-((3.0 - value) ** 2) / 3.0), rtol=1e-4, atol=1e-6
    )


def test_seeds_vmapped_are_seeds_run_alone(problem, trained):
    env, params = problem
    keys, (_, _, together) = trained
    _, losses, alone = quick_jit(make_train(QUICK, env, params))(keys[1])
    # Sums are ordered differently in a batch, so after many updates a draw may fall on the other side.
    for name in ("elements", "reward", "finished"):
        mine, other = np.asarray(getattr(alone, name)), np.asarray(getattr(together, name))[1]
        np.testing.assert_allclose(mine[:5], other[:5], rtol=1e-5)
    assert np.isfinite(losses["loss"]).all()


def test_targets_can_be_vmapped(problem):
    env, params = problem
    config = PPOConfig(updates=2, lanes=4, steps=4)
    targets = params.replace(target=jnp.array([3.0, 5.0]))
    axes = (None, params.replace(target=0, max_steps_in_episode=None))
    state = quick_jit(jax.vmap(make_ppo(config, env).init, in_axes=axes))(jax.random.key(0), targets)
    np.testing.assert_allclose(state.lanes.observation[:, :, -1], np.repeat([[1.0], [5.0 / 3.0]], 4, axis=1), rtol=1e-6)
    train = jax.vmap(make_train(config, env, params), in_axes=axes)
    _, losses, records = jax.eval_shape(train, jax.random.key(0), targets)  # traces it; compiling takes long
    assert losses["loss"].shape == (2, 2) and records.reward.shape == (2, 2, 4, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lanes": 0}, "at least 1"),
        ({"learning_rate": 0.0}, "not positive"),
        ({"lanes": 3, "steps": 3}, "equal minibatches"),
    ],
)
def test_hyperparameters_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**settings)


def test_an_update_stops_once_the_policy_has_moved_far_enough() -> None:
    env, params = crystaljax.make("Density-RocksaltAB-v0", "unrelaxed-density", observation="flat")
    far = PPOConfig(updates=4, lanes=8, steps=4, learning_rate=0.03, epochs=8)
    moved = {}
    for limit in (None, 0.0, 0.01):
        agent = make_ppo(dataclasses.replace(far, target_kl=limit), env)
        before = quick_jit(agent.init)(jax.random.key(0), params)
        after, losses, _ = quick_jit(agent.update)(before)
        moved[limit] = float(losses["approx_kl"])
        assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (before.network, after.network)), strict=True))
    # Without a limit the later minibatches go on from where the first have led; with one they stay where it was passed.
    assert moved[0.01] < moved[None]


def test_equal_rewards_do_not_blow_noise_up_to_full_size() -> None:
    constant = crystaljax.FunctionEvaluator(lambda numbers, skeleton: 3.0 + 0 * skeleton.volume, "constant")
    env, params = crystaljax.make("Density-RocksaltAB-v0", constant, observation="flat")
    change = {}
    for floor in (1e-8, 0.3):
        config = PPOConfig(
            updates=4, lanes=8, steps=4, entropy=0.0, value_weight=0.0, discount=1.0, min_deviation=floor
        )
        agent = make_ppo(config, env)
        state = quick_jit(agent.init)(jax.random.key(0), params)
        change[floor] = float(quick_jit(agent.update)(state)[1]["policy_loss"])
    assert abs(change[0.3]) < abs(change[1e-8])
