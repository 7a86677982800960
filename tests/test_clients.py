"""The environment in other people's hands: Gymnasium's tools, Stable-Baselines3, copies, pickles, JAX's switches."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
import time

import gymnasium
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import crystaljax
from crystaljax import FunctionEvaluator, Status, library, tasks
from crystaljax.adapters import FiveTupleEnv, GymnasiumEnv, GymnasiumVectorEnv
from crystaljax.dft_bridge import Bridge
from crystaljax.dft_bridge.testing import FakeEngine
from crystaljax.objectives import OBJECTIVES, Term
from crystaljax.properties import Property

DENSITY = "unrelaxed-density"
TASK = "Density-RocksaltAB-v0"


def from_hydrogen(numbers, skeleton):
    """A landscape that can be pickled; a third of all crystals have no value."""
    total = numbers.sum()
    return jnp.where(total % 3 == 0, jnp.nan, total.astype(jnp.float32) / skeleton.volume)


FAILING = FunctionEvaluator(from_hydrogen, "surrogate: made-up landscape")
LITHIUM = 0  # 3 + 3 electrons: no value


@pytest.fixture
def bridge(tmp_path):
    with Bridge(FakeEngine(fail_element=4), tmp_path / "results.db", workers=1) as bridge:
        yield bridge


# Gymnasium


def test_specs_say_how_long_an_episode_is_and_what_counts_as_solved() -> None:
    for task_id in crystaljax.registered_tasks():
        task, spec = tasks.task(task_id), gymnasium.spec(task_id)
        sites = max(skeleton.n_sites for skeleton in library.crystals(task.crystals))
        assert (spec.max_episode_steps, spec.reward_threshold) == (sites + 1, task.reward_threshold)
        objective = OBJECTIVES[task.property]
        near = jnp.float32(objective.target - objective.properties[0].tolerance)
        reward = float(objective.reward(near, jnp.int32(Status.OK), jnp.float32(objective.target)))
        assert reward - 2e-4 < spec.reward_threshold <= reward


def test_the_registered_limit_cuts_nothing_off() -> None:
    for options in ({}, {"mode": "site"}):
        env = gymnasium.make("Density-PerovskiteABX3-v0", evaluator=DENSITY, **options)
        env.reset(seed=0)
        ends = [env.step(0)[2:4] for _ in range(env.unwrapped.env.horizon)]
        assert ends[-1] == (True, False) and set(ends[:-1]) == {(False, False)}
    larger = library.crystals("C3")
    with pytest.raises(ValueError, match="take 8 steps.*GymnasiumEnv"):
        gymnasium.make(TASK, evaluator=DENSITY, skeletons=larger, mode="site")
    lanes = gymnasium.make_vec(TASK, num_envs=2, evaluator=DENSITY, skeletons=larger, mode="site")
    lanes.reset(seed=0)
    assert [lanes.step(np.zeros(2, int))[2].all() for _ in range(8)] == [False] * 7 + [True]
    lanes = gymnasium.make_vec(TASK, num_envs=2, evaluator=DENSITY, skeletons=larger, mode="site", max_episode_steps=4)
    lanes.reset(seed=0)
    assert [lanes.step(np.zeros(2, int))[3].all() for _ in range(4)] == [False] * 3 + [True]


def test_crystals_are_rendered() -> None:
    sodium, chlorine = crystaljax.elements.SMALL.indices(["Na", "Cl"])
    env = gymnasium.make(TASK, evaluator=DENSITY, render_mode="ansi")
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.unwrapped.render()
    env.reset(seed=0)
    assert env.render() == "RocksaltAB: _ _ (target 3 g/cm3)"
    env.step(sodium)
    assert "Na" in env.render() and "_" in env.render()
    env.step(chlorine)
    assert {"Na", "Cl"} <= set(env.render().split(":")[1].replace(",", "").split())
    assert "density 2.164 (target 3 g/cm3)" in env.render(), "the finished crystal, not the one that follows"
    failing = gymnasium.make("BandGap-RocksaltAB-v0", evaluator=FAILING, render_mode="ansi")
    failing.reset(seed=0)
    failing.step(LITHIUM)
    failing.step(LITHIUM)
    assert failing.render() == "RocksaltAB: Li Li, INVALID_RESULT (target 1.12 eV)"

    env = gymnasium.make(TASK, evaluator=DENSITY, render_mode="rgb_array")
    env.reset(seed=0)
    blank = env.render()
    env.step(sodium)
    picture = env.render()
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    assert picture.shape == blank.shape and (picture != blank).any() and np.ptp(blank) > 0

    lanes = gymnasium.make_vec(TASK, num_envs=2, evaluator=DENSITY, render_mode="ansi")
    lanes.reset(seed=0)
    lanes.step(np.array([sodium, chlorine]))
    lanes.step(np.array([chlorine, chlorine]))
    assert ["2.164" in text for text in lanes.render()] == [True, False]
    assert [text.count("Cl") for text in lanes.render()] == [1, 2]
    with pytest.raises(ValueError, match="unknown render_mode 'human': use one of ansi, rgb_array"):
        crystaljax.adapters.make_gymnasium(TASK, DENSITY, render_mode="human")
    with pytest.raises(ValueError, match="no render_mode was given"):
        lanes = GymnasiumVectorEnv(*crystaljax.make(TASK, DENSITY)[:1])
        lanes.reset()
        lanes.render()


@pytest.mark.filterwarnings("ignore:.*not within the optimal range.*", "ignore:.*Box.*")
def test_a_bridge_is_an_evaluator_like_any_other(bridge) -> None:
    env = gymnasium.make("BandGap-RocksaltAB-v0", evaluator=bridge)
    assert env.spec is not None and env.spec.kwargs["evaluator"] is bridge
    twin = copy.deepcopy(env)
    assert twin.unwrapped.env == env.unwrapped.env and copy.copy(bridge) is copy.deepcopy(bridge) is bridge
    results = []
    for one in (env, twin):
        one.reset(seed=4)
        results.append([one.step(action)[1] for action in (1, 15)])
    assert results[0] == results[1] and bridge.stats().calls == 1
    check_env(env.unwrapped)  # makes it anew from its spec, in both render modes
    with pytest.raises(TypeError, match="cannot be pickled.*by name"):
        pickle.dumps(env.unwrapped.env)


def test_seeds_of_lanes_may_be_left_open() -> None:
    lanes = gymnasium.make_vec("Density-C1-v0", num_envs=2, evaluator=DENSITY)
    seen = [lanes.reset(seed=[1, None])[0]["focus"] for _ in range(12)]
    first, second = np.array(seen).T
    assert len(set(first)) == 1 and len(set(second)) > 1
    assert first[0] == lanes.reset(seed=[1, 2])[0]["focus"][0]
    with pytest.raises(ValueError, match="3 seeds for 2 environments"):
        lanes.reset(seed=[1, None, 2])


def test_some_lanes_can_be_reset() -> None:
    lanes = gymnasium.make_vec("Density-C1-v0", num_envs=3, evaluator=DENSITY)
    mask = np.array([False, True, False])
    with pytest.raises(gymnasium.error.ResetNeeded):
        lanes.reset(options={"reset_mask": mask})
    lanes.reset(seed=0)
    before, *_ = lanes.step(np.array([1, 2, 3]))
    options = {"reset_mask": mask}
    after, _ = lanes.reset(seed=[7, 7, 7], options=options)
    assert options == {"reset_mask": mask}, "as it was given"
    blank = len(crystaljax.elements.SMALL)
    assert [(row != blank).sum() for row in after["elements"]] == [1, 0, 1]
    for name in after:
        assert np.array_equal(after[name][~mask], before[name][~mask]), name
    assert after["focus"][1] == lanes.reset(seed=[7, 7, 7])[0]["focus"][1]
    lanes.reset(seed=0)
    assert [lanes.step(np.zeros(3, int))[2].tolist() for _ in range(2)][-1] == [False] * 3
    lanes.reset(options=options)
    ends = [lanes.step(np.zeros(3, int))[2].tolist() for _ in range(5)]
    assert ends[2] == [True, False, True] and ends[4] == [False, True, False]
    for wrong in ([True], np.zeros(3, bool), np.array([0, 1, 2])):
        with pytest.raises(ValueError, match=r"reset_mask is .*bool \[3\]"):
            lanes.reset(options={"reset_mask": wrong})
    with pytest.raises(ValueError, match="one target"):
        lanes.reset(options={"reset_mask": mask, "target": 2.0})


IN_PROCESSES = """
    import time
    import gymnasium, numpy as np
    import crystaljax

    def make(**options):
        return gymnasium.make_vec("Density-RocksaltAB-v0", num_envs=1, evaluator="unrelaxed-density",
                                  vectorization_mode="async", **options)

    if __name__ == "__main__":
        start = time.perf_counter()
        envs = make()
        try:
            envs.reset(seed=3)
        except RuntimeError as error:
            assert "vector_kwargs={'context': 'spawn'}" in str(error), error
        else:
            raise AssertionError("JAX was started, then forked")
        assert time.perf_counter() - start < 60
        envs.close(terminate=True)

        envs = make(vector_kwargs={"context": "spawn"})
        envs.reset(seed=3)
        envs.step(np.array([1]))
        print(envs.step(np.array([15]))[1].item())
        envs.close()
"""


@pytest.mark.slow
def test_environments_in_processes_of_their_own(tmp_path) -> None:
    """A fork of a process in which JAX is at work must not wait for ever; a process that is spawned works."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(IN_PROCESSES))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    env, params = crystaljax.make(TASK, DENSITY)
    _, state = env.reset(jax.random.key(0), params)
    for action in (1, 15):
        _, state, reward, *_ = env.step(jax.random.key(0), state, action, params)
    assert float(done.stdout) == pytest.approx(float(reward))


def test_a_step_of_a_single_environment_is_cheap() -> None:
    """Ten times the time of CPU that a quiet machine takes, so that only a relapse fails."""
    env = gymnasium.make(TASK, evaluator=DENSITY, observation="flat")
    for count in (4, 100, 100, 100):
        start = time.process_time()
        for _ in range(count):
            env.reset()
            env.step(1)
            env.step(2)
        spent = time.process_time() - start
    assert spent / 100 < 3 * 2e-3


# Copies and equal environments


def test_a_second_environment_of_a_task_compiles_nothing() -> None:
    def play(env, params):
        observation, state = env.reset(jax.random.key(0), params)
        return jax.block_until_ready(env.step(jax.random.key(1), state, 3, params))

    options = {"evaluator": "table", "observation": "flat"}
    first, params = crystaljax.make("BandGap-Rocksalt-Table-v0", **options)
    one = play(first, params)
    compiled = crystaljax.CrystalEnv.step._cache_size(), crystaljax.CrystalEnv.reset._cache_size()
    for second in (crystaljax.make("BandGap-Rocksalt-Table-v0", **options)[0], copy.deepcopy(first)):
        assert second is not first and second == first and hash(second) == hash(first)
        assert FiveTupleEnv(second) == FiveTupleEnv(first)
        jax.tree.map(np.testing.assert_array_equal, one, play(second, params))
        assert compiled == (crystaljax.CrystalEnv.step._cache_size(), crystaljax.CrystalEnv.reset._cache_size())
    play(first, first.with_target(2.0))
    assert compiled[0] == crystaljax.CrystalEnv.step._cache_size(), "targets are traced"


def test_environments_that_differ_are_not_equal(bridge) -> None:
    env = crystaljax.make(TASK, DENSITY)[0]
    same = FunctionEvaluator(from_hydrogen, "surrogate: made-up landscape")
    assert crystaljax.make(TASK, FAILING)[0] == crystaljax.make(TASK, same)[0]
    others = [
        crystaljax.make(TASK, FAILING)[0],
        crystaljax.make(TASK, FunctionEvaluator(lambda *crystal: jnp.float32(1), "one"))[0],
        crystaljax.make(TASK, FunctionEvaluator(lambda *crystal: jnp.float32(1), "one"))[0],
        crystaljax.make(TASK, DENSITY, observation="flat")[0],
        crystaljax.make(TASK, DENSITY, vocabulary="medium")[0],
        crystaljax.make(TASK, DENSITY, mode="site")[0],
        crystaljax.make(TASK, DENSITY, skeletons=library.zincblende())[0],
        gymnax.make(TASK, evaluator=DENSITY, target=2.0)[0],
        crystaljax.make("Density-CsCl-Table-v0", "table")[0],
    ]
    changed = copy.deepcopy(env)
    assert changed == env
    changed.objective = OBJECTIVES["band_gap"]
    mutable = type("Mutable", (), {"__eq__": lambda self, other: True, "bind": lambda self, p: FAILING.bind(p)})
    others += [changed, *(crystaljax.make(TASK, mutable())[0] for _ in range(2))]  # equal, but without a hash

    class Own(crystaljax.CrystalEnv):
        def __init__(self, bonus, *arguments, **options):
            self.bonus = bonus
            super().__init__(*arguments, **options)

    others += [Own(bonus, "density", library.rocksalt(), DENSITY) for bonus in (1, 2)]
    gaps = [crystaljax.make("BandGap-C1-v0", bridge)[0] for _ in range(2)]
    assert gaps[0] == gaps[1], "one bridge"
    with Bridge(FakeEngine(), bridge.store, workers=1) as another:
        others += [gaps[0], crystaljax.make("BandGap-C1-v0", another)[0]]
        for i, left in enumerate([env, *others]):
            for right in [env, *others][i + 1 :]:
                assert left != right


@pytest.mark.parametrize("task_id, evaluator", [(TASK, FAILING), (TASK, DENSITY), ("BandGap-CsCl-Table-v0", None)])
def test_environments_can_be_pickled(task_id: str, evaluator) -> None:
    env, params = crystaljax.make(task_id, evaluator)
    twin, given = pickle.loads(pickle.dumps((env, params)))
    assert twin == env and given == params
    single = gymnasium.make(task_id, evaluator=evaluator)
    single.reset(seed=1)
    single.step(3)
    again = pickle.loads(pickle.dumps(single))
    lanes = gymnasium.make_vec(task_id, num_envs=2, evaluator=evaluator)
    lanes.reset(seed=1)
    lanes.step(np.array([3, 4]))
    lanes_again = pickle.loads(pickle.dumps(lanes))
    for _ in range(3):
        left, right = single.step(5), again.step(5)
        assert left[1:4] == right[1:4] and all(np.array_equal(left[0][k], right[0][k]) for k in left[0])
        if left[2]:
            left, right = single.reset()[0], again.reset()[0]
            assert all(np.array_equal(left[k], right[k]) for k in left)
        for left, right in zip(lanes.step(np.array([5, 6]))[1:4], lanes_again.step(np.array([5, 6]))[1:4], strict=True):
            assert np.array_equal(left, right)
    env.evaluator = FAILING.bind(crystaljax.evaluators.Problem(env.skeletons, "density"))
    with pytest.raises(TypeError, match="replaced after it was made"):
        pickle.dumps(env)


# Options and objectives


def test_gymnax_takes_a_target() -> None:
    env, params = gymnax.make(TASK, evaluator=DENSITY, target=2.0)
    assert params.target == 2.0 == env.default_params.target
    observation, _ = env.reset(jax.random.key(0))
    assert float(observation.target) == 2.0
    with pytest.raises(ValueError, match=r"target 31.0 g/cm3 outside \(0, 30\]"):
        gymnax.make(TASK, evaluator=DENSITY, target=31.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"obs": "flat"}, "no option 'obs'; did you mean 'observation'.*vocabulary, mode"),
        ({"horizon": 3}, "no option 'horizon'"),
        ({"evaluator": ("planewave",)}, "give what is in it: 'planewave'"),
        ({"evaluator": from_hydrogen}, "FunctionEvaluator"),
        ({"evaluator": FakeEngine()}, "an engine needs a bridge"),
        ({"evaluator": crystaljax.TableEvaluator}, r"an instance of it: TableEvaluator\(...\)"),
        ({"evaluator": 3}, "one of .*'planewave'"),
    ],
)
def test_what_cannot_be_given_is_refused_with_what_can(options: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        crystaljax.make("Density-C1-v0", **{"evaluator": DENSITY, **options})


def closeness(value, target):
    return jnp.exp(-jnp.square(value - target))


@pytest.mark.parametrize("observation", ["flat", "graph"])
@pytest.mark.parametrize(
    ("target", "inside", "outside", "bounds"),
    [
        (-1.0, [-10.0, -0.3], [0.0, 0.5, -10.5, float("nan")], r"\[-10, 0\)"),
        (0.0, [0.0, -10.0, 10.0], [10.5], r"\[-10, 10\]"),
        (2.0, [20.0, 0.1], [0.0, -1.0, 21.0], r"\(0, 20\]"),
    ],
)
def test_targets_may_be_negative_or_zero(target, inside, outside, bounds, observation) -> None:
    objective = Term(Property("energy", "eV"), closeness, (target,))
    energy = FunctionEvaluator(lambda numbers, skeleton: -numbers.sum() / 20.0, "surrogate: energy")
    env = crystaljax.CrystalEnv(objective, library.rocksalt(), energy, observation=observation)
    space = GymnasiumEnv(env).observation_space
    for one in (target, *inside):
        single = GymnasiumEnv(env, env.with_target(one))
        seen = single.reset(seed=0)[0]
        assert seen in space
        shown, scale = (seen[-1], abs(target) or 1.0) if observation == "flat" else (seen["target"][0], 1.0)
        assert shown == pytest.approx(one / scale), "a target keeps its sign"
        assert np.isfinite([single.step(1)[1], single.step(2)[1]]).all()
    for one in outside:
        with pytest.raises(ValueError, match=f"outside {bounds}.*reach="):
            env.with_target(one)


def test_an_objective_can_say_which_targets_make_sense() -> None:
    objective = Term(Property("energy", "eV"), closeness, (0.5,), reach=(-2.0, 1.0))
    energy = FunctionEvaluator(lambda numbers, skeleton: -numbers.sum() / 20.0, "surrogate: energy")
    env = crystaljax.CrystalEnv(objective, library.rocksalt(), energy, observation="flat")
    for one in (-2.0, 0.0, 1.0):
        single = GymnasiumEnv(env, env.with_target(one))
        assert single.reset(seed=0)[0] in single.observation_space
    with pytest.raises(ValueError, match=r"target 1.5 eV outside \[-2, 1\]"):
        env.with_target(1.5)


# JAX's switches


def all_steps(env, params):
    """Two episodes of two steps in four lanes: Li Li fails in one landscape, Na Be by its electrons in a table."""
    keys = jax.random.split(jax.random.key(0), 4)
    _, state = jax.vmap(env.reset, (0, None))(keys, params)
    actions = jnp.array([[LITHIUM, 1, 2, 3], [LITHIUM, 4, 5, 6]] * env.horizon, jnp.int32)

    def step(state, action):
        observation, state, *rest = jax.vmap(env.step, (0, 0, 0, None))(keys, state, action, params)
        return state, (observation, *rest)

    return jax.lax.scan(step, state, actions)[1]


@pytest.mark.parametrize(("evaluator", "observation"), [("function", "flat"), ("table", "graph"), ("bridge", "flat")])
def test_a_failed_crystal_has_finite_placeholders_and_strict_types_do(evaluator, observation, request) -> None:
    chosen = {"function": FAILING, "table": "table", "bridge": "bridge"}[evaluator]
    chosen = request.getfixturevalue("bridge") if chosen == "bridge" else chosen
    task_id = "BandGap-Rocksalt-Table-v0" if evaluator == "table" else "BandGap-RocksaltAB-v0"
    env, params = crystaljax.make(task_id, chosen, observation=observation)
    with jax.debug_nans(True), jax.numpy_dtype_promotion("strict"):
        _, reward, *_, info = jax.jit(lambda: all_steps(env, params))()
    env.evaluator.check()
    status, value = np.asarray(info["status"])[-1], np.asarray(info["value"])[-1]
    assert (status != Status.OK).any() and (value[status != Status.OK] == 0).all()
    assert (np.asarray(reward)[-1][status != Status.OK] == -1).all()


# Stable-Baselines3


@pytest.fixture(scope="module")
def sb3():
    pytest.importorskip("stable_baselines3", reason="pip install 'crystaljax[sb3]'")
    import stable_baselines3

    return stable_baselines3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_stable_baselines_trains_on_graph_observations_of_single_environments(sb3) -> None:
    from stable_baselines3.common.env_checker import check_env as check
    from stable_baselines3.common.vec_env import DummyVecEnv

    check(gymnasium.make("Density-Mixed-v0", evaluator=DENSITY).unwrapped)
    envs = DummyVecEnv([lambda: gymnasium.make("Density-Mixed-v0", evaluator=DENSITY)] * 2)
    model = sb3.PPO("MultiInputPolicy", envs, n_steps=16, batch_size=16, n_epochs=1, device="cpu", seed=0)
    model.learn(64)
    action, _ = model.predict(envs.reset(), deterministic=True)
    assert action.shape == (2,)
    # One input for every category of a site, none for what a single skeleton leaves no choice of but itself.
    single = sb3.PPO("MultiInputPolicy", gymnasium.make(TASK, evaluator=DENSITY), n_steps=8, batch_size=8, device="cpu")
    single.learn(8)


@pytest.mark.parametrize("observation", ["flat", "graph"])
def test_the_adapter_for_stable_baselines_is_the_vector_environment(sb3, observation) -> None:
    from stable_baselines3.common.vec_env import VecMonitor

    from crystaljax.stable_baselines import StableBaselinesVecEnv

    env, params = crystaljax.make("Density-C1-v0", DENSITY, observation=observation)
    envs, lanes = StableBaselinesVecEnv(env, 3, params), GymnasiumVectorEnv(env, 3, params)
    envs.seed(5)
    mine, theirs = envs.reset(), lanes.reset(seed=[5, 6, 7])[0]

    def equal(left, right):
        assert left.keys() == right.keys() if isinstance(left, dict) else True
        jax.tree.map(np.testing.assert_array_equal, left, right)

    equal(mine, theirs)
    for step in range(5):
        actions = np.array([step, 2, 3])
        mine, rewards, done, infos = envs.step(actions)
        theirs, their_rewards, *_, told = lanes.step(actions)
        equal(mine, theirs)
        np.testing.assert_array_equal(rewards, their_rewards)
        assert done.tolist() == [step == 4] * 3 and [bool(info) for info in infos] == done.tolist()
    rewards += 1.0  # a learner does this
    for lane, info in enumerate(infos):
        final = told["final_obs"]
        equal(
            info["terminal_observation"],
            {k: v[lane] for k, v in final.items()} if observation == "graph" else final[lane],
        )
        assert info["value"] == told["value"][lane] and info["TimeLimit.truncated"] is False
    with pytest.raises(AttributeError, match="share one program"):
        envs.env_method("reset")
    assert envs.get_attr("num_envs", [0, 1]) == [3, 3] and envs.env_is_wrapped(VecMonitor) == [False] * 3
    cut = StableBaselinesVecEnv(env, 2, params.replace(max_steps_in_episode=2))
    cut.reset()
    cut.step(np.array([1, 2]))
    *_, done, infos = cut.step(np.array([1, 2]))
    assert done.all() and all(info["TimeLimit.truncated"] for info in infos)

    monitored = VecMonitor(envs)
    policy = "MultiInputPolicy" if observation == "graph" else "MlpPolicy"
    model = sb3.PPO(policy, monitored, n_steps=10, batch_size=30, n_epochs=1, device="cpu", seed=0)
    model.learn(60)
    assert {episode["l"] for episode in model.ep_info_buffer} == {5}


def test_stable_baselines_learns_through_the_adapter(sb3) -> None:
    """Two sites: the mean reward of random crystals is 0.45, that of the best 1.0."""
    from stable_baselines3.common.evaluation import evaluate_policy

    from crystaljax.stable_baselines import StableBaselinesVecEnv

    env, params = crystaljax.make(TASK, DENSITY, observation="flat")
    envs = StableBaselinesVecEnv(env, 32, params)
    model = sb3.PPO(
        "MlpPolicy", envs, n_steps=8, batch_size=64, n_epochs=4, learning_rate=3e-3, device="cpu", seed=0, ent_coef=0.0
    )
    before = evaluate_policy(model, envs, 64, deterministic=False, warn=False)[0]
    model.learn(32 * 8 * 20)
    after = evaluate_policy(model, envs, 64, deterministic=False, warn=False)[0]
    assert after > before + 0.2, (before, after)


def test_gymnasium_env_is_what_gymnasium_makes() -> None:
    env = gymnasium.make(TASK, evaluator=DENSITY)
    assert isinstance(env.unwrapped, GymnasiumEnv)
    space = env.observation_space
    assert isinstance(space["focus"], gymnasium.spaces.Discrete) and space["target"].shape == (1,)
    assert space["skeleton"].n == 1 and space["elements"].nvec.tolist() == [19, 19]
