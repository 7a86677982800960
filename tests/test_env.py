"""The environment: order of decisions, modes, padding, targets, keys."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crystaljax
from crystaljax import FunctionEvaluator, Status, library
from crystaljax.elements import SMALL

DENSITY = "unrelaxed-density"


def play(env, params, actions, key):
    """One episode from ``key``: observations seen before each action, and the last step's output."""
    observation, state = env.reset(key, params)
    seen = []
    for action in actions:
        seen.append(observation)
        observation, state, *rest = env.step(key, state, jnp.int32(action), params)
    return seen, rest


def test_focus_walks_breadth_first_from_the_start_site() -> None:
    env, params = crystaljax.make("Density-C3-v0", DENSITY)
    for seed in range(12):
        key = jax.random.key(seed)
        _, state = env.reset(key, params)
        seen, rest = play(env, params, range(8), key)
        order = env.skeletons[0].site_orders[int(state.start)]
        assert [int(o.focus) for o in seen] == order.tolist()
        for time, observation in enumerate(seen):
            assert np.flatnonzero(observation.focus_mask).tolist() == [order[time]]
            assert (np.asarray(observation.elements) != SMALL.blank).sum() == time
        assert np.asarray(rest[-1]["elements"])[order].tolist() == list(range(8))


def test_every_start_site_is_drawn() -> None:
    env, params = crystaljax.make("Density-C1-v0", DENSITY)
    starts = jax.vmap(lambda k: env.reset(k, params)[1].start)(jax.random.split(jax.random.key(0), 5000))
    counts = np.bincount(starts, minlength=5)
    # Five standard deviations of a fair draw: sqrt(5000 * 0.2 * 0.8) = 28.
    assert np.abs(counts - 1000).max() < 141


def test_reward_comes_only_at_the_end_and_is_the_density_of_the_cell() -> None:
    env, params = crystaljax.make("Density-RocksaltAB-v0", DENSITY)
    sodium, chlorine = SMALL.indices(["Na", "Cl"])
    _, state = env.reset(jax.random.key(0), params)
    _, state, reward, terminated, _, info = env.step(jax.random.key(0), state, sodium, params)
    assert (reward, terminated, info["value"]) == (0.0, False, 0.0)
    _, _, reward, terminated, _, info = env.step(jax.random.key(0), state, chlorine, params)
    # Rock salt: 58.44 g/mol x 4 / (5.63931 Å)^3, the experimental 2.16 g/cm3.
    assert float(info["value"]) == pytest.approx(2.164, abs=2e-3)
    assert float(reward) == pytest.approx(np.exp(-((3 - 2.164) ** 2) / 3), abs=2e-3)
    assert terminated


def test_orbit_mode_colours_whole_orbits() -> None:
    env, params = crystaljax.make("Density-PerovskiteABX3-v0", DENSITY)
    assert env.horizon == 3
    for seed in range(8):
        seen, rest = play(env, params, [0, 1, 2], jax.random.key(seed))
        final = np.asarray(rest[-1]["elements"])
        assert len(set(final[2:])) == 1
        assert sorted({final[0], final[1], final[2]}) == [0, 1, 2]
        assert sum(np.asarray(o.focus_mask).sum() for o in seen) == 5
        assert rest[1]  # terminated


def test_substitution_mode_starts_from_random_elements() -> None:
    env, params = crystaljax.make("Density-C2-v0", DENSITY, mode="substitution")
    starts = jax.vmap(lambda k: env.reset(k, params)[1].elements)(jax.random.split(jax.random.key(0), 3600))
    assert starts.min() == 0 and starts.max() == 17
    counts = np.bincount(np.asarray(starts).ravel(), minlength=18)
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(18000 / 18)
    seen, rest = play(env, params, [3] * 5, jax.random.key(1))
    assert np.asarray(rest[-1]["elements"]).tolist() == [3] * 5


@pytest.mark.parametrize("in_phase", [False, True])
def test_mixed_crystals_have_their_own_horizon_unless_in_phase(in_phase: bool) -> None:
    env, params = crystaljax.make("Density-Mixed-v0", DENSITY, in_phase=in_phase)
    sizes = [s.n_sites for s in env.skeletons]
    for seed in range(10):
        _, state = env.reset(jax.random.key(seed), params)
        size = sizes[int(state.skeleton)]
        lengths = 0
        terminated = False
        while not terminated:
            _, state, _, terminated, truncated, info = env.step(jax.random.key(seed), state, jnp.int32(1), params)
            assert not truncated
            lengths += 1
        assert lengths == (max(sizes) if in_phase else size)
        elements = np.asarray(info["elements"])
        assert (elements[:size] == 1).all() and (elements[size:] == SMALL.blank).all()


def test_in_phase_and_own_horizon_reward_the_same_crystal_alike() -> None:
    rewards = []
    for in_phase in (False, True):
        env, params = crystaljax.make("Density-Mixed-v0", DENSITY, in_phase=in_phase)
        key = jax.random.key(5)
        _, state = env.reset(key, params)
        actions = [2, 5, 11, 3, 8, 9, 10, 4]
        for action in actions[: None if in_phase else env.skeletons[int(state.skeleton)].n_sites]:
            _, state, reward, *_ = env.step(key, state, jnp.int32(action), params)
        rewards.append(float(reward))
    assert rewards[0] == rewards[1]


def test_single_and_set_agree_on_the_same_skeleton() -> None:
    values = set()
    for skeletons in (library.benchmark("C4"), [library.benchmark("C4"), library.benchmark("C4")]):
        env, params = crystaljax.make_custom("density", skeletons, DENSITY)
        _, rest = play(env, params, [7] * 5, jax.random.key(3))
        values.add(float(rest[-1]["value"]))
    assert len(values) == 1


def test_vmap_over_targets() -> None:
    env, params = crystaljax.make("Density-RocksaltAB-v0", DENSITY)
    targets = jnp.array([1.0, 2.164, 5.0])
    many = params.replace(target=targets)
    axes = params.replace(target=0, max_steps_in_episode=None)
    key = jax.random.key(0)

    def reward(params):
        observation, state = env.reset(key, params)
        for action in SMALL.indices(["Na", "Cl"]):
            _, state, reward, *_ = env.step(key, state, action, params)
        return observation.target, reward

    seen, rewards = jax.vmap(reward, (axes,))(many)
    assert seen.tolist() == targets.tolist()
    assert rewards == pytest.approx(np.exp(-((np.asarray(targets) - 2.164) ** 2) / 3), abs=2e-3)


def test_failures_end_the_episode_with_the_failure_reward(landscape: FunctionEvaluator) -> None:
    env, params = crystaljax.make("BulkModulus-RocksaltAB-v0", landscape)
    lithium = SMALL.indices(["Li"])[0]  # 3 + 3 electrons: the landscape has no value there
    _, rest = play(env, params, [lithium, lithium], jax.random.key(0))
    reward, terminated, _, info = rest
    assert (float(reward), bool(terminated)) == (-5.0, True)
    assert int(info["status"]) == Status.INVALID_RESULT
    assert float(info["value"]) == 0.0, "a placeholder; the status says so"


def test_flat_observation_encodes_the_graph_one() -> None:
    graph_env, params = crystaljax.make("Density-Mixed-v0", DENSITY)
    flat_env, _ = crystaljax.make("Density-Mixed-v0", DENSITY, observation="flat")
    key = jax.random.key(2)
    graph, state = graph_env.reset(key, params)
    for action in range(3):
        graph, state, *_ = graph_env.step(key, state, jnp.int32(action), params)
    flat = np.asarray(flat_env.observe(key, state, None, params))
    sites, classes = flat_env.max_sites, 19
    one_hot = flat[: sites * classes].reshape(sites, classes)
    mask = np.asarray(graph.site_mask)
    assert (one_hot.argmax(1)[mask] == np.asarray(graph.elements)[mask]).all()
    assert (one_hot[mask].sum(1) == 1).all() and (one_hot[~mask] == 0).all()
    assert (flat[sites * classes : sites * (classes + 1)] == np.asarray(graph.focus_mask)).all()
    assert flat[-7:-1] == pytest.approx(np.asarray(graph.lattice) / [10, 10, 10, 180, 180, 180])
    assert flat[-1] == 1.0


def test_deep_copies_behave_the_same() -> None:
    env, params = crystaljax.make("Density-C1-v0", DENSITY)
    twin = copy.deepcopy(env)
    left, right = (play(e, params, [1, 2, 3, 4, 5], jax.random.key(0))[1] for e in (env, twin))
    assert float(left[0]) == float(right[0])


def test_x64_is_not_switched_on() -> None:
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "sites"}, "unknown mode"),
        ({"observation": "image"}, "unknown observation"),
        ({"vocabulary": "huge"}, "unknown vocabulary"),
        ({"evaluator": "oracle"}, "unknown evaluator"),
        ({"target": -1.0}, "target -1.0"),
        ({"target": float("nan")}, "target nan"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        crystaljax.make("Density-C1-v0", **{"evaluator": DENSITY, **options})


def test_density_without_dft_is_refused_for_other_properties() -> None:
    with pytest.raises(ValueError, match="computes density, not band_gap"):
        crystaljax.make("BandGap-C1-v0", DENSITY)


def test_vocabularies_are_nested_and_complete() -> None:
    from crystaljax.elements import LARGE, MEDIUM

    assert (len(SMALL), len(MEDIUM), len(LARGE)) == (18, 30, 50)
    assert LARGE.symbols[:30] == MEDIUM.symbols and MEDIUM.symbols[:18] == SMALL.symbols
    assert SMALL.numbers[-1] == 0
