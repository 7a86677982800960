"""The training runner: what a run leaves behind, resuming it exactly, stopping it at any moment."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase.io import read as read_atoms

import crystaljax
from crystaljax import plugins, tables
from crystaljax.agents import config as configs
from crystaljax.agents.comparison import write_report
from crystaljax.agents.config import RunConfig
from crystaljax.agents.hyperparameters import (
    AnnealingConfig,
    BayesianConfig,
    DQNConfig,
    ExhaustiveConfig,
    GeneticConfig,
    HybridConfig,
    PPOConfig,
    RainbowConfig,
    RandomConfig,
    SACConfig,
)
from crystaljax.agents.ledger import Ledger, formula
from crystaljax.agents.runner import build_agent, build_env, sweep, train
from crystaljax.agents.runs import read_all
from crystaljax.evaluators import UNRELAXED_DENSITY, BoundEvaluator
from crystaljax.library import perovskite
from crystaljax.run_folder import read_best, read_sweep
from crystaljax.status import Status

CONFIG = RunConfig(
    task="Density-RocksaltAB-v0",
    engine="unrelaxed-density",
    network="mlp",
    episodes=6 * 8 * 3,
    algorithm=PPOConfig(lanes=8, steps=6, learning_rate=1e-2),
    checkpoint_every=2,
)
UPDATES = 6
TIMING = ("seconds", "waiting_seconds", "dft_calls", "cache_hits")


@dataclasses.dataclass
class Scripted:
    """Densities without DFT; ``at(call)`` runs whenever the runner checks for errors, before update ``call`` counts."""

    at: object

    def bind(self, problem):
        bound, calls = UNRELAXED_DENSITY.bind(problem), []

        def check():
            calls.append(None)
            self.at(len(calls))

        return bound._replace(check=check)


OWN = """
    import dataclasses
    from crystaljax.agents.hyperparameters import RandomConfig, RolloutConfig, SearchConfig

    class Making:
        def make(self, env, trunk=None):  # an update takes one episode of each lane
            return RandomConfig(lanes=self.lanes, steps=env.horizon).make(env, trunk)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Stepping(Making, RolloutConfig):
        '''An agent of a user's.'''

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Searching(Making, SearchConfig):
        '''An agent of a user's.'''
"""


@pytest.mark.parametrize(
    ("kind", "settings", "episodes", "message"),
    [
        ("Stepping", {"steps": 32}, 64, "1 updates of agent own complete 16 episodes .2 steps in 16 lanes each"),
        ("Stepping", {"steps": 1}, 64, "8 updates of agent own complete 128 episodes"),
        ("Stepping", {"steps": 2}, 64, None),
        ("Searching", {}, 60, None),
    ],
)
def test_updates_complete_the_episodes_of_a_run(offer, kind, settings, episodes, message):
    offer(plugins.AGENTS, "own", f"own_agents:{kind}", "own_agents", OWN)
    algorithm = configs.algorithm("own")(lanes=16, **settings)
    config = dataclasses.replace(CONFIG, algorithm=algorithm, episodes=episodes)
    env = build_env(config, "unrelaxed-density")[0]
    if message is None:
        assert build_agent(config, env).lanes == 16
        return
    with pytest.raises(ValueError, match=f"{message}.*the run has 64; let Stepping.updates_for"):
        build_agent(config, env)


class Blocking:
    """A bridge whose calculations last until they are cancelled, from the ``first`` host call on."""

    def __init__(self, first):
        self.first, self.calls, self.cancelled = first, 0, threading.Event()

    def bind(self, problem):
        def host(pending):
            if np.any(pending):
                self.calls += 1
                if self.calls >= self.first:
                    if not self.cancelled.is_set():
                        os.kill(os.getpid(), signal.SIGINT)  # somebody presses Ctrl-C
                    self.cancelled.wait(20.0)
                    return np.full(np.shape(pending), Status.CANCELLED, np.int32)
            return np.zeros(np.shape(pending), np.int32)

        def query(numbers, skeleton, pending):
            status = jax.pure_callback(host, jax.ShapeDtypeStruct((), jnp.int32), pending, vmap_method="broadcast_all")
            return numbers.sum().astype(jnp.float32) / 10.0, status

        return BoundEvaluator(query, lambda: None, "blocking")

    def stats(self):
        return None

    def cancel(self):
        self.cancelled.set()


def lines(folder, name, drop=()):
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in drop} for row in rows]


def assert_same_run(result, other):
    assert lines(result.folder, "metrics.jsonl", TIMING) == lines(other.folder, "metrics.jsonl", TIMING)
    assert lines(result.folder, "episodes.jsonl") == lines(other.folder, "episodes.jsonl")
    plain = [jax.random.key_data(x.state.key) for x in (result, other)]
    np.testing.assert_array_equal(*plain)
    without_key = [x.state.replace(key=None) for x in (result, other)]
    jax.tree.map(np.testing.assert_array_equal, *without_key)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run without any trouble."""
    return train(CONFIG, "unrelaxed-density", tmp_path_factory.mktemp("runs") / "straight")


def test_folder_holds_everything(straight):
    folder = straight.folder
    assert not straight.interrupted and straight.updates == straight.planned == UPDATES
    assert configs.load(folder)[0] == CONFIG
    metrics, episodes = lines(folder, "metrics.jsonl"), lines(folder, "episodes.jsonl")
    assert [row["update"] for row in metrics] == list(range(1, UPDATES + 1))
    assert metrics[-1]["episodes"] == len(episodes) == 144
    assert metrics[-1]["env_steps"] == UPDATES * 8 * 6
    assert metrics[-1]["distinct"] == len({episode["crystal"] for episode in episodes})
    for row in metrics:
        mine = [e["reward"] for e in episodes if e["update"] == row["update"]]
        np.testing.assert_allclose(row["mean_reward"], np.mean(mine))
    assert any(folder.glob("tensorboard/events*")) and (folder / "learning_curve.png").stat().st_size > 10_000


def test_best_crystals_are_distinct_and_say_where_they_come_from(straight):
    best = json.loads((straight.folder / "best.json").read_text())
    assert best["source"].startswith("on-device") and best["objective"] == "density=3"
    assert best["properties"] == {"density": {"unit": "g/cm3", "low": 3.0, "high": 3.0, "tolerance": 0.25}}
    rewards = [crystal["reward"] for crystal in best["crystals"]]
    assert len(rewards) == 10 and rewards == sorted(rewards, reverse=True)
    pairs = {frozenset(crystal["elements"]) for crystal in best["crystals"]}
    assert len(pairs) == 10, "LiF and FLi are the same crystal"
    for crystal in best["crystals"]:
        path = straight.folder / crystal["file"]
        atoms = read_atoms(path)
        density = atoms.get_masses().sum() / atoms.get_volume() / 0.602214076
        np.testing.assert_allclose(density, crystal["values"]["density"], rtol=1e-3)
        head = path.read_text().split("data_")[0]
        for fact in (
            f"density: {crystal['values']['density']:.6g} g/cm3",
            "status: OK",
            "objective: density=3",
            best["source"],
        ):
            assert f"# {fact}" in head or fact in head


def test_stopped_by_an_error_and_resumed_is_the_same_run(straight, tmp_path):
    def fail(call):
        if call == 4:
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        train(CONFIG, Scripted(fail), tmp_path / "run")
    assert len(lines(tmp_path / "run", "metrics.jsonl")) == 3, "the update that failed is not used"
    with pytest.raises(ValueError, match="holds a run already"):
        train(CONFIG, "unrelaxed-density", tmp_path / "run")
    assert_same_run(train(CONFIG, "unrelaxed-density", tmp_path / "run", resume=True), straight)


def test_ctrl_c_stops_after_the_update_and_resumes(straight, tmp_path):
    def interrupt(call):
        if call == 2:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = train(CONFIG, Scripted(interrupt), tmp_path / "run")
    assert stopped.interrupted and stopped.updates == 2
    assert (tmp_path / "run" / "best.json").exists(), "there are reports already"
    assert_same_run(train(CONFIG, "unrelaxed-density", tmp_path / "run", resume=True), straight)


def test_ctrl_c_during_a_calculation_discards_the_update(tmp_path):
    bridge = Blocking(first=5)  # three batches an update: in the second one
    stopped = train(CONFIG, bridge, tmp_path / "run")
    assert bridge.cancelled.is_set()
    assert stopped.interrupted and stopped.updates == 1
    assert all(episode["status"] == "OK" for episode in lines(tmp_path / "run", "episodes.jsonl"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "as it was before"


def test_killed_and_resumed_is_the_same_run(straight, tmp_path):
    program = f"""
import os, signal
from crystaljax.agents.config import RunConfig
from crystaljax.agents.runner import train
from tests.test_runner import CONFIG, Scripted
train(CONFIG, Scripted(lambda call: call == 6 and os.kill(os.getpid(), signal.SIGKILL)), {str(tmp_path / "run")!r})
"""
    root = os.path.dirname(os.path.dirname(__file__))
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert len(lines(tmp_path / "run", "metrics.jsonl")) == 5, "one update more than the checkpoint"
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert len(best["crystals"]) == 10, "those of the checkpoint, so that a killed run can be shown"
    with (tmp_path / "run" / "episodes.jsonl").open("a") as file:
        file.write('{"episode": 9')  # a line cut short
    assert_same_run(train(CONFIG, "unrelaxed-density", tmp_path / "run", resume=True), straight)


def test_resume_refuses_another_run(straight):
    with pytest.raises(ValueError, match="keeps its own"):
        train(dataclasses.replace(CONFIG, seed=20), "unrelaxed-density", straight.folder, resume=True)
    with pytest.raises(ValueError, match="not the folder of a run"):
        train(CONFIG, "unrelaxed-density", straight.folder / "best", resume=True)


def test_random_search_runs_on_mixed_crystals(tmp_path):
    algorithm = RandomConfig(lanes=5, steps=8)
    config = RunConfig(task="Density-Mixed-v0", engine="unrelaxed-density", algorithm=algorithm, episodes=20)
    result = train(config, "unrelaxed-density", tmp_path / "run")
    assert result.ledger.episodes == 20 and result.updates == 4
    sites = {result.env.skeletons[c.skeleton].n_sites == len(c.elements) for c in result.ledger.crystals}
    assert sites == {True}, "padding is not part of a crystal"


def test_ledger_counts_equivalent_crystals_once():
    vocabulary = crystaljax.elements.get_vocabulary("small")
    ledger = Ledger((perovskite(),), vocabulary, ("band_gap",))
    common = {"update": 1, "skeleton": 0, "values": None, "reward": -1.0}
    ledger.add_line({**common, "elements": ["K", "Mg", "F", "O", "O"], "status": "ODD_ELECTRONS"})
    ledger.add_line({**common, "elements": ["K", "Mg", "O", "O", "F"], "status": "ODD_ELECTRONS"})
    ledger.add_line(
        {**common, "elements": ["K", "Mg", "F", "F", "F"], "status": "OK", "values": {"band_gap": 5.0}, "reward": 0.5}
    )
    assert (ledger.episodes, len(ledger.crystals), ledger.refused) == (3, 2, 1)
    assert [crystal.formula for crystal in ledger.best(10)] == ["KMgF3"]
    assert ledger.best_reward == 0.5 and ledger.mean_reward == pytest.approx(-0.5)
    assert formula(["Na", "Na", "Cl", "Cl"]) == "NaCl"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "one of the two"),
        ({"structures": ("a.cif",)}, "need a property"),
        ({"task": "Density-C1-v0", "episodes": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**settings)


def test_updates_complete_the_episodes_asked_for():
    config = RunConfig(task="x", episodes=100, algorithm=PPOConfig(lanes=16, steps=32))
    assert config.updates(horizon=3) == 1 and config.updates(horizon=5) == 2


ALGORITHMS = {
    "dqn": DQNConfig(lanes=8, steps=6, start=96, batch=16, target_every=48),
    "rainbow": RainbowConfig(lanes=8, steps=6, start=96, batch=16, target_every=48),
    "sac": SACConfig(lanes=8, steps=6, start=96, batch=16, tune=True),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_resumes_exactly(name, tmp_path):
    config = dataclasses.replace(CONFIG, algorithm=ALGORITHMS[name])

    def interrupt(call):
        if call == 4:  # it has begun to learn
            os.kill(os.getpid(), signal.SIGINT)

    straight = train(config, "unrelaxed-density", tmp_path / "straight")
    assert train(config, Scripted(interrupt), tmp_path / "run").updates == 4
    assert_same_run(train(config, "unrelaxed-density", tmp_path / "run", resume=True), straight)
    assert configs.load(tmp_path / "run")[0] == config
    losses = [row["loss"] for row in lines(tmp_path / "run", "metrics.jsonl")]
    assert losses[0] is None and None not in losses[2:], "nothing is learned until the buffer has its first steps"


SEARCHES = {
    "ga": GeneticConfig(lanes=32),
    "annealing": AnnealingConfig(lanes=32),
    "bo": BayesianConfig(lanes=32),
    "exhaustive": ExhaustiveConfig(lanes=32),
    "hybrid": HybridConfig(lanes=32, clone_steps=20, epochs=2),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_resumes_exactly(name, tmp_path):
    config = dataclasses.replace(CONFIG, algorithm=SEARCHES[name], episodes=171)

    def interrupt(call):
        if call == 4:  # of six; the policy of the hybrid has begun to act
            os.kill(os.getpid(), signal.SIGINT)

    straight = train(config, "unrelaxed-density", tmp_path / "straight")
    assert train(config, Scripted(interrupt), tmp_path / "run").updates == 4
    assert_same_run(train(config, "unrelaxed-density", tmp_path / "run", resume=True), straight)
    assert configs.load(tmp_path / "run")[0] == config
    if name == "exhaustive":
        assert straight.ledger.episodes == len(straight.ledger.crystals) == 171


def test_a_sweep_is_its_runs_and_resumes_exactly(straight, tmp_path):
    def interrupt(call):
        if call == 3:
            os.kill(os.getpid(), signal.SIGINT)

    seeds = [20, CONFIG.seed]
    whole = sweep(CONFIG, seeds, "unrelaxed-density", tmp_path / "whole")
    assert [result.folder.name for result in whole] == ["seed-20", "seed-10"]
    assert configs.load(tmp_path / "whole" / "seed-20")[0] == dataclasses.replace(CONFIG, seed=20)
    alone, among = (lines(result.folder, "episodes.jsonl") for result in (straight, whole[1]))
    first = [episode["elements"] for episode in alone if episode["update"] <= 2]
    assert first == [episode["elements"] for episode in among[: len(first)]]
    assert among != lines(whole[0].folder, "episodes.jsonl")

    stopped = sweep(CONFIG, seeds, Scripted(interrupt), tmp_path / "run")
    assert [result.updates for result in stopped] == [3, 3]
    shutil.rmtree(tmp_path / "run" / "seed-20" / "checkpoints" / "3")  # it crashed between the two checkpoints
    resumed = sweep(CONFIG, read_sweep(tmp_path / "run"), "unrelaxed-density", tmp_path / "run", resume=True)
    for one, other in zip(resumed, whole, strict=True):
        assert_same_run(one, other)


def test_sweeps_that_cannot_be_are_refused(straight, tmp_path):
    with pytest.raises(ValueError, match="give each seed once"):
        sweep(CONFIG, [10, 10], "unrelaxed-density", tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run already"):
        sweep(CONFIG, [10, 20], "unrelaxed-density", straight.folder)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"agent": "genetic"}, "unknown agent 'genetic': use one of annealing, bo, dqn, .*sac"),
        ({"epochs": 8}, r"f.toml: unknown key 'epochs'; known keys are task, .*episodes"),
        ({"dqn": {"clip": 0.2}}, r"f.toml, table \[dqn\]: unknown key 'clip'; known keys are lanes, .*buffer"),
        ({"ppo": {"updates": 5}}, "unknown key 'updates'"),
        ({"ppo": {"lanes": "16"}}, r"f.toml, table \[ppo\]: lanes is '16'; it must be a whole number"),
        ({"ppo": {"anneal": 1}}, "it must be true or false"),
        ({"structures": "NaCl.cif", "task": ""}, "structures is 'NaCl.cif'"),
        ({"ppo": 3}, "must be a table"),
        ({"sac": {"lanes": 0}}, "lanes is 0"),
    ],
)
def test_tables_that_cannot_be_are_refused(table, message):
    with pytest.raises(ValueError, match=message):
        configs.from_table({"task": "Density-C1-v0", **table}, "f.toml")


def test_a_table_of_settings_is_read_back():
    rainbow = RunConfig(task="x", target=2, algorithm=RainbowConfig(noisy=True, learning_rate=1e-3), seed=5)
    assert configs.from_table(json.loads(json.dumps(configs.to_table(rainbow))), "here") == rainbow
    table = {"task": "x", "ppo": {"clip": 1}, "sac": {"alpha": 0.1}}
    assert configs.from_table(table, "here").algorithm == PPOConfig(clip=1.0)
    assert configs.from_table({**table, "agent": "sac"}, "here").algorithm == SACConfig(alpha=0.1)


def test_every_setting_is_described_and_shared_ones_agree():
    kinds = {}
    for kind in (RunConfig, *configs.algorithms().values()):
        texts = configs.descriptions(kind)
        for name, type_ in configs.settings(kind).items():
            assert texts[name], f"{kind.__name__}.{name}"
            assert kinds.setdefault(name, type_) == type_, f"{name} has two types"
    assert not set(configs.hyperparameters()) & set(configs.settings(RunConfig)), "a flag sets one thing"


def test_runs_of_earlier_versions_say_so(tmp_path):
    (tmp_path / "config.json").write_text('{"task": "Density-C1-v0", "lanes": 16, "agent": "ppo", "skeletons": []}')
    with pytest.raises(ValueError, match="this version can read.*unknown key 'lanes'.*start the run anew"):
        configs.load(tmp_path)


def test_a_run_for_two_properties_is_resumed_and_reported(tmp_path):
    asked = ("band_gap=3", "density<=4+-1*2")
    config = RunConfig(
        task="BandGap-Rocksalt-Table-v0",
        objective=asked,
        network="mlp",
        algorithm=PPOConfig(lanes=8, steps=2),
        episodes=48,
        checkpoint_every=2,
    )
    whole = train(config, "table", tmp_path / "whole")
    assert not whole.interrupted
    best = read_best(tmp_path / "whole")
    assert best["objective"] == " ".join(asked) and best["task"] == "BandGap-Density-RocksaltAB"
    assert best["properties"]["density"] == {"unit": "g/cm3", "low": None, "high": 4.0, "tolerance": 0.25}
    tables_of = {name: tables.load(f"{name}-RocksaltAB") for name in ("band_gap", "density")}
    for crystal in best["crystals"]:
        for name, table in tables_of.items():
            assert crystal["values"][name] == pytest.approx(table.entry(crystal["elements"]).value, rel=1e-6)
        gap, density = crystal["values"].values()
        assert crystal["reward"] == pytest.approx(np.exp(-((gap - 3) ** 2) - 2 * max(density - 4, 0) ** 2), rel=1e-4)
    cif = (tmp_path / "whole" / best["crystals"][0]["file"]).read_text()
    assert "# band_gap: " in cif and "# density: " in cif and f"# objective: {best['objective']}" in cif
    with pytest.raises(ValueError, match="the settings are not those of the run"):
        other = dataclasses.replace(config, objective=("band_gap=3",))
        train(other, "table", tmp_path / "whole", resume=True)
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert all({"mean_band_gap", "mean_density"} <= json.loads(line).keys() for line in lines)
    report = tmp_path / "report.md"
    write_report(read_all([tmp_path / "whole"]), report)
    text = report.read_text()
    assert "a band gap within 0.25 eV of 3" in text and "a density at most 4 g/cm3" in text
