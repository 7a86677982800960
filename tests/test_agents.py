"""DQN, Rainbow and SAC: their arithmetic against slow references, what the buffer holds, and that all of them learn."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crystaljax
from crystaljax.agents import dqn, ppo, rainbow, sac
from crystaljax.agents.base import whole_training
from crystaljax.agents.config import algorithm
from crystaljax.agents.hyperparameters import (
    DECIDING,
    DQNConfig,
    PPOConfig,
    RainbowConfig,
    ReplayConfig,
    SACConfig,
)
from crystaljax.agents.networks import ActorCritic, Features, QValues
from crystaljax.agents.networks.mlp import MLP
from crystaljax.agents.networks.noisy import NOISE
from crystaljax.agents.replay import SMALLEST_PRIORITY, make_replay, n_step
from crystaljax.agents.rollout import Transition, first_lanes, rollout

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiles in half the time."""
QUICK = {"updates": 60, "start": 320, "learning_rate": 3e-3}
LEARNERS = {
    "dqn": (dqn, DQNConfig(**QUICK, target_every=64)),
    "rainbow": (rainbow, RainbowConfig(**QUICK, target_every=64)),
    "rainbow, noisy, C51": (rainbow, RainbowConfig(**QUICK, target_every=64, noisy=True, atoms=11, batch=32)),
    "sac": (sac, SACConfig(**QUICK, alpha=0.05, smoothing=0.02)),
}


@pytest.fixture(scope="module")
def problem():
    """Two sites with a density of its own for every pair of elements: solved by looking at the table."""
    numbers = crystaljax.elements.get_vocabulary("small").numbers[:18]
    label = jnp.zeros(120, jnp.int32).at[jnp.asarray(numbers)].set(jnp.arange(18))
    table = jnp.asarray(np.random.default_rng(0).uniform(0.0, 9.0, (18, 18)), jnp.float32)
    evaluator = crystaljax.FunctionEvaluator(lambda pair, _: table[label[pair[0]], label[pair[1]]], "table")
    return crystaljax.make("Density-RocksaltAB-v0", evaluator, observation="flat")


# What the buffer holds


def slow_n_step(stretch, discount):
    reward, weight = 0.0, 1.0
    for step in range(len(stretch.done)):
        reward += weight * stretch.reward[step]
        weight *= discount
        if stretch.done[step]:
            break
    return reward, 0.0 if stretch.terminated[step] else weight, stretch.after[step]


def test_n_step_returns_stop_at_episode_ends():
    random = np.random.default_rng(0)
    terminated, truncated = random.random((2, 50, 4)) < 0.25
    numbers = np.arange(200).reshape(50, 4)
    stretches = Transition(numbers, numbers, random.normal(size=(50, 4)), terminated, terminated | truncated, numbers)
    found = n_step(jax.tree.map(jnp.asarray, stretches), 0.9)
    for row in range(50):
        expected = slow_n_step(jax.tree.map(lambda leaf, row=row: leaf[row], stretches), 0.9)
        np.testing.assert_allclose([leaf[row] for leaf in found], expected, rtol=1e-5)


def jitted(replay):
    return replay._replace(**{name: quick_jit(getattr(replay, name)) for name in ("add", "sample", "set_errors")})


def numbered(lanes, times):
    """Transitions [T, L] that say in every field which they are; an episode of lane ``l`` ends at times ``3 n + l``."""
    time, lane = np.meshgrid(np.asarray(times), np.arange(lanes), indexing="ij")
    code = jnp.asarray(100 * lane + time, jnp.int32)
    done = jnp.asarray((time - lane) % 3 == 0)
    return Transition(code, code, code.astype(jnp.float32), done, done, code + 1)


@pytest.mark.parametrize("exponent", [0.0, 0.6], ids=["uniform", "prioritised"])
def test_drawn_steps_are_those_that_were_taken(exponent):
    config = ReplayConfig(lanes=4, steps=2, buffer=40, start=8, batch=512, n_step=3, discount=0.5, train_every=8)
    replay = jitted(make_replay(config, exponent))
    buffer = replay.init(jax.tree.map(lambda leaf: leaf[0, 0], numbered(4, [0])))
    for time in range(0, 30, 2):  # three times around
        assert bool(replay.ready(buffer)) == (time >= 3)
        buffer = replay.add(buffer, numbered(4, [time, time + 1]))
    batch = replay.sample(buffer, jax.random.key(0))
    np.testing.assert_array_equal(batch.observation, batch.action)
    lane, time = np.divmod(np.asarray(batch.action), 100)
    assert set(time) == set(range(20, 28)) and set(lane) == set(range(4)), "the last ten times, and whole stretches"
    left = (lane - time) % 3  # steps until the end of the episode
    np.testing.assert_array_equal(batch.after, batch.action + 1 + left)
    np.testing.assert_array_equal(batch.discount, 0.0)  # no episode is longer than a stretch
    expected = sum(np.where(k <= left, (batch.action + k) * 0.5**k, 0.0) for k in range(3))
    np.testing.assert_allclose(batch.reward, expected)


def test_priorities_differ_by_sample_and_follow_the_errors():
    config = ReplayConfig(lanes=2, steps=4, buffer=8, start=8, batch=4096, train_every=8)
    replay = jitted(make_replay(config, 0.6))
    buffer = replay.init(jax.tree.map(lambda leaf: leaf[0, 0], numbered(2, [0])))
    buffer = replay.add(buffer, numbered(2, range(4)))
    batch = replay.sample(buffer, jax.random.key(0))
    np.testing.assert_allclose(batch.probability, 1 / 8, rtol=1e-5)
    errors = jnp.where(batch.index % 2 == 0, 1.0, -1.0) * (batch.index + 1.0)
    batch = replay.sample(replay.set_errors(buffer, batch, errors), jax.random.key(1))
    wanted = (np.arange(8) + 1.0 + SMALLEST_PRIORITY) ** 0.6
    wanted /= wanted.sum()
    np.testing.assert_allclose(batch.probability, wanted[batch.index], rtol=1e-4)
    np.testing.assert_allclose(np.bincount(batch.index, minlength=8) / 4096, wanted, atol=0.002)
    uniform = make_replay(config)
    assert uniform.set_errors(buffer, batch, errors) is buffer


def test_observations_belong_to_their_actions_and_the_focus_advances(problem):
    env, params = problem
    lanes = first_lanes(env, params, jax.random.key(0), 8)
    draw = lambda key, seen: (jax.random.randint(key, (8,), 0, env.num_actions), ())  # noqa: E731
    _, steps, _, _ = rollout(env, params, lanes, jax.random.key(1), 6, draw)
    size = env.num_actions + 1
    before, after = (
        np.asarray(leaf)[..., : 2 * size].reshape(6, 8, 2, size) for leaf in (steps.observation, steps.after)
    )
    focus = np.asarray(steps.observation)[..., 2 * size : 2 * size + 2].argmax(axis=-1)
    decided = np.take_along_axis(after, focus[..., None, None], axis=2)[:, :, 0]
    np.testing.assert_array_equal(decided.argmax(axis=-1), steps.action)
    assert (np.take_along_axis(before, focus[..., None, None], axis=2)[:, :, 0, -1] == 1).all(), "it was blank"
    middle = ~np.asarray(steps.done)[:-1]
    assert (focus[1:] != focus[:-1])[middle].all()


# Rainbow's parts


def test_importance_weights_undo_the_priorities():
    probability = jnp.array([0.1, 0.2, 0.4, 0.0])
    np.testing.assert_allclose(rainbow.importance_weights(probability, 1.0), [1.0, 0.5, 0.25, 0.0], rtol=1e-6)
    np.testing.assert_allclose(rainbow.importance_weights(probability, 0.0), [1.0, 1.0, 1.0, 0.0])


def slow_project(atoms, probabilities, support):
    """The loop of Bellemare et al. 2017, algorithm 1."""
    result = np.zeros(len(support))
    for atom, probability in zip(np.clip(atoms, support[0], support[-1]), probabilities, strict=True):
        place = min((atom - support[0]) / (support[1] - support[0]), len(support) - 1.0)
        low, high = math.floor(place), math.ceil(place)
        result[low] += probability * (1.0 if low == high else high - place)
        result[high] += probability * (0.0 if low == high else place - low)
    return result


def test_projection_of_distributions_is_that_of_the_paper():
    random = np.random.default_rng(0)
    support = np.linspace(-1.0, 1.0, 11)
    atoms = random.uniform(-1.5, 1.5, (20, 11))
    probabilities = random.dirichlet(np.ones(11), 20)
    found = rainbow.project(*map(jnp.asarray, (atoms, probabilities, support)))
    expected = [slow_project(*row, support) for row in zip(atoms, probabilities, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    inside = np.clip(atoms, -1.0, 1.0)
    np.testing.assert_allclose(found @ support, (inside * probabilities).sum(axis=1), atol=1e-5)


def test_the_mean_of_rainbows_advantages_is_per_state():
    network = QValues(MLP(), 5, dueling=True)
    states = jax.random.normal(jax.random.key(0), (7, 3))
    params = quick_jit(network.init)(jax.random.key(1), states[0])
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.3 * random.normal(size=leaf.shape).astype("f4"), params)
    apply = quick_jit(jax.vmap(network.apply, in_axes=(None, 0)))
    together = apply(params, states)
    heads = params["params"]
    without_advantage = {"params": {**heads, "advantage": jax.tree.map(jnp.zeros_like, heads["advantage"])}}
    value = apply(without_advantage, states)
    assert (np.ptp(together, axis=1) > 1e-3).all() and np.ptp(together.mean(axis=1)) > 1e-3
    np.testing.assert_allclose(together.mean(axis=1), value[:, 0], atol=1e-5)  # for each state, not over the batch


def test_noise_differs_by_key_and_is_absent_without_one():
    network = QValues(MLP(), 4, dueling=True, atoms=3, noisy=True)
    state = jnp.ones(3)
    params = quick_jit(network.init)(jax.random.key(0), state)
    apply = quick_jit(jax.vmap(lambda key: network.apply(params, state, rngs={NOISE: key})))
    draws = apply(jax.random.split(jax.random.key(1), 99))
    assert draws.shape == (99, 4, 3) and (np.std(draws, axis=0) > 1e-3).all()
    np.testing.assert_allclose(params["params"]["value"]["NoisyDense_0"]["kernel_size"], 0.5 / math.sqrt(3))
    still = jax.tree.map_with_path(
        lambda path, leaf: 0 * np.asarray(leaf) if "_size" in str(path[-1]) else leaf, params
    )
    without = quick_jit(lambda params: network.apply(params, state, rngs={NOISE: jax.random.key(2)}))(still)
    np.testing.assert_allclose(quick_jit(network.apply)(params, state), without, rtol=1e-5)


# SAC's parts


@pytest.mark.parametrize(("entropy", "sign"), [(2.0, 1.0), (1.0, -1.0)])
def test_temperature_falls_where_there_is_too_much_entropy(entropy, sign):
    slope = jax.grad(sac.alpha_loss)(jnp.log(0.2), entropy, 1.5)
    assert np.sign(slope) == sign, "gradient descent lowers the temperature if the slope is positive"


@pytest.mark.parametrize(("fraction", "rises"), [(0.99, True), (0.1, False)])
def test_the_target_entropy_is_a_fraction_of_the_largest_one(problem, fraction, rises):
    """A policy of 0.95 of the largest entropy is too orderly for a target of 0.99, and too random for one of 0.1."""
    env, params = problem
    config = SACConfig(tune=True, target_entropy=fraction, lanes=4, start=4, buffer=64, batch=8, learning_rate=1e-2)
    agent = sac.make_sac(config, env)
    state = quick_jit(agent.init)(jax.random.key(0), params)
    bias = state.network["params"]["policy"]["Dense_2"]["bias"].at[0].set(1.8)  # entropy 0.95 log 18
    state.network["params"]["policy"]["Dense_2"]["bias"] = bias
    state, losses, _ = quick_jit(agent.update)(state)
    assert 0.9 < float(losses["entropy"]) / math.log(18) < 0.98
    assert (float(jnp.exp(state.rest.log_alpha)) > config.alpha) == rises


# The loop


def test_nothing_is_learned_before_the_start_and_targets_follow_on_time(problem):
    env, params = problem
    config = DQNConfig(lanes=4, steps=4, start=32, buffer=64, batch=8, train_every=4, target_every=32)
    agent = dqn.make_dqn(config, env)
    update, states = quick_jit(agent.update), [quick_jit(agent.init)(jax.random.key(0), params)]
    for _ in range(5):
        with jax.debug_nans(True):
            state, losses, _ = update(states[-1])
        states.append(state)
        assert bool(losses["learned"]) == (len(states) >= 3), "the first 16 steps are not enough"
        assert (losses["loss"] > 0) == bool(losses["learned"])

    def equal(left, right):
        return all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (left, right)), strict=True))

    networks, targets = [s.network for s in states], [s.rest[0] for s in states]
    assert equal(networks[1], networks[0]) and not equal(networks[2], networks[1])
    # Four gradient steps an update, from the second one; eight of them between two copies.
    assert equal(targets[2], targets[0]) and equal(targets[3], networks[3]) and equal(targets[4], networks[3])
    assert equal(targets[5], networks[5])


def test_exploration_ends_on_time():
    config = DQNConfig(exploration=0.2, final_epsilon=0.05)
    found = [float(dqn.epsilon(jnp.float32(progress), config)) for progress in (0.0, 0.1, 0.2, 1.0)]
    np.testing.assert_allclose(found, [1.0, 0.525, 0.05, 0.05], rtol=1e-5)
    best = jnp.zeros(4000, jnp.int32)
    assert (np.asarray(dqn.explore(jax.random.key(0), best, 0.0, 18)) == 0).all()
    changed = np.asarray(dqn.explore(jax.random.key(0), best, 0.36, 18))
    assert abs((changed != 0).mean() - 0.36 * 17 / 18) < 0.03 and set(changed) == set(range(18))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (DQNConfig, {"batch": 0}, "at least 1"),
        (DQNConfig, {"exploration": 1.5}, "between 0 and 1"),
        (DQNConfig, {"train_every": 5}, "choose a divisor"),
        (SACConfig, {"lanes": 1024}, "enlarge buffer"),
        (SACConfig, {"start": 3000}, "lower lanes, steps or start"),
        (SACConfig, {"alpha": 0.0}, "not positive"),
    ],
)
def test_hyperparameters_that_cannot_work_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def test_a_training_that_ends_before_it_learns_is_refused(problem):
    with pytest.raises(ValueError, match="learning starts after 1000 steps"):
        dqn.make_dqn(DQNConfig(updates=10), problem[0])


# All of them


@pytest.fixture(scope="module")
def trained(request, problem):
    """Three seeds, vmapped."""
    env, params = problem
    module, config = LEARNERS[request.param]
    keys = jax.random.split(jax.random.key(10), 3)
    return module, config, keys, quick_jit(jax.vmap(module.make_train(config, env, params)))(keys)


SLOW_BUT_ONE = [name if name == "dqn" else pytest.param(name, marks=pytest.mark.slow) for name in LEARNERS]


@pytest.mark.parametrize("trained", SLOW_BUT_ONE, indirect=True)
def test_every_seed_beats_random_on_a_task_solved_exactly(problem, trained):
    *_, (_, losses, records) = trained
    finished, reward = (np.asarray(leaf)[:, -15:] for leaf in (records.finished, records.reward))
    learned = (reward * finished).sum(axis=(1, 2, 3)) / finished.sum(axis=(1, 2, 3))
    table = np.random.default_rng(0).uniform(0.0, 9.0, (18, 18))
    random = np.exp(-((table - 3.0) ** 2) / 3.0).mean()
    assert (learned > random + 0.3).all(), (learned, random)
    assert np.isfinite(losses["loss"][:, -1]).all()


@pytest.mark.parametrize("trained", SLOW_BUT_ONE[:2], indirect=True)
def test_seeds_vmapped_are_seeds_run_alone(problem, trained):
    env, params = problem
    module, config, keys, (_, _, together) = trained
    _, _, alone = quick_jit(module.make_train(config, env, params))(keys[1])
    # Sums are ordered differently in a batch, so later on a draw may fall on the other side.
    begun = config.start // (config.lanes * config.steps) + 3
    for name in ("elements", "reward", "finished"):
        mine, other = np.asarray(getattr(alone, name)), np.asarray(getattr(together, name))[1]
        np.testing.assert_allclose(mine[:begun], other[:begun], rtol=1e-5)


@pytest.mark.parametrize("name", LEARNERS)
def test_targets_can_be_vmapped(problem, name):
    env, params = problem
    module, config = LEARNERS[name]
    targets = params.replace(target=jnp.array([3.0, 5.0]))
    axes = (None, params.replace(target=0, max_steps_in_episode=None))
    train = jax.vmap(module.make_train(dataclasses.replace(config, updates=20), env, params), in_axes=axes)
    _, losses, records = jax.eval_shape(train, jax.random.key(0), targets)  # traces it; compiling takes long
    assert losses["loss"].shape == (2, 20) and records.reward.shape == (2, 20, 4, 16)


# What users do with them


SMALL_CONFIGS = {
    "ppo": {"target_kl": 0.1},
    "dqn": {"start": 32},
    "rainbow": {"start": 32},
    "sac": {"start": 32, "tune": True},
    "random": {},
    "ga": {},
    "annealing": {},
    "exhaustive": {"updates": 24},
    "hybrid": {},
    "bo": {},
}


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_agents_work_with_64_bits_enabled(problem, name):
    """Traced, as types that do not fit are found so; compiling takes long."""
    config = algorithm(name)(**{"updates": 4, **SMALL_CONFIGS[name]})
    with jax.enable_x64(True):
        env, params = crystaljax.make("Density-RocksaltAB-v0", "unrelaxed-density", observation="flat")
        agent = config.make(env)
        train = whole_training(agent, config.updates, params)
        _, _, records = jax.eval_shape(train, jax.random.key(0))
    assert records.elements.dtype == jnp.int32 and records.reward.dtype == jnp.float32


@pytest.mark.parametrize("name", ["ppo", "dqn", "rainbow", "sac", "annealing", "ga", "hybrid"])
def test_real_hyperparameters_can_be_vmapped(problem, name):
    env, params = problem
    kind, fixed = algorithm(name), {"updates": 4, **SMALL_CONFIGS[name]}
    given = {field.name: getattr(kind(**fixed), field.name) for field in dataclasses.fields(kind)}
    traced = {name: value for name, value in given.items() if type(value) is float and name not in DECIDING}
    assert traced

    def train(settings, key):
        agent = kind(**fixed | settings).make(env)
        return whole_training(agent, fixed["updates"], params)(key)[2].reward

    many = {name: jnp.full(3, value) for name, value in traced.items()}
    assert jax.eval_shape(jax.vmap(train, (0, None)), many, jax.random.key(0)).shape[:2] == (3, 4)
    for other in set(given) & {"lanes", "steps", "n_step", "priority_exponent", "seeding"}:
        with pytest.raises(TypeError, match=f"{other} decides what is compiled"):
            jax.eval_shape(jax.vmap(lambda x, other=other: kind(**{other: x}).lanes), jnp.ones(2))


@pytest.mark.slow
def test_each_learning_rate_learns_as_it_does_alone(problem):
    env, params = problem

    def train(learning_rate, discount):
        settings = {"learning_rate": learning_rate, "discount": discount}
        config = PPOConfig(updates=2, lanes=4, steps=4, epochs=1, minibatches=1, anneal=False, **settings)
        return ppo.make_train(config, env, params)(jax.random.key(0))[0].network

    rates, discounts = jnp.array([0.0, 1e-2, 1e-2]), jnp.array([0.9, 0.9, 0.5])
    together = quick_jit(jax.vmap(train))(rates, discounts)
    still, learned, other = (jax.tree.map(lambda leaf, i=i: leaf[i], together) for i in range(3))
    alone = quick_jit(partial(train, 1e-2, 0.9))()
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), learned, alone)
    kernels = [tree["params"]["policy"]["Dense_2"]["kernel"] for tree in (still, learned, other)]
    assert np.abs(kernels[1] - kernels[0]).max() > 1e-3 and np.abs(kernels[2] - kernels[1]).max() > 1e-4


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda x: x, r"trunk Own returned an array with arrays of shapes \(47,\); it must return .*Features"),
        (lambda x: Features(x, jnp.zeros((2, 3))), r"a Features with arrays of shapes \(47,\), \(2, 3\)"),
        (lambda x: None, "a NoneType with arrays of shapes none"),
    ],
)
@pytest.mark.parametrize("head", [ActorCritic, QValues])
def test_a_trunk_that_returns_something_else_is_told_what_to_return(problem, head, returned, message):
    class Own(MLP):
        def __call__(self, observation):
            return returned(observation)

    class Bare(nn.Module):
        def __call__(self, observation):
            return Features(jnp.zeros((0, 0)), observation)

    env, params = problem
    observation, _ = jax.eval_shape(env.reset, jax.random.key(0), params)
    with pytest.raises(TypeError, match=message):
        jax.eval_shape(head(Own(), 18).init, jax.random.key(0), observation)
    with pytest.raises(TypeError, match="trunk Bare has no head_layers"):
        jax.eval_shape(head(Bare(), 18).init, jax.random.key(0), observation)
