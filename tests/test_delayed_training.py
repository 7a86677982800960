"""Training on rewards that come later: acting goes on, every reward finds its place, a resumed run is the same run."""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crystaljax
from crystaljax.agents.config import RunConfig
from crystaljax.agents.hyperparameters import (
    DQNConfig,
    GaussianProcessConfig,
    GeneticConfig,
    PPOConfig,
    RainbowConfig,
    RandomConfig,
    ReplayConfig,
    SACConfig,
)
from crystaljax.agents.ppo import make_ppo
from crystaljax.agents.replay import make_replay
from crystaljax.agents.rollout import Transition
from crystaljax.agents.runner import build_delayed_agent, sweep, train
from crystaljax.delayed import NO_TICKET, DelayedRewards
from crystaljax.dft_bridge import Bridge
from crystaljax.dft_bridge.accounting import Budget
from crystaljax.dft_bridge.delayed import Arrivals
from crystaljax.dft_bridge.testing import FakeEngine, fake_value
from crystaljax.evaluators import BoundEvaluator, Deferred
from crystaljax.status import Status

LANES, UPDATES = 4, 12
SMALL = {"lanes": LANES, "steps": 4, "start": 48, "batch": 8, "buffer": 400}
CONFIG = RunConfig(
    task="BandGap-RocksaltAB-v0",
    network="mlp",
    episodes=LANES * 2 * UPDATES,  # two episodes of two steps in each lane and update
    algorithm=DQNConfig(**SMALL, target_every=16),
    checkpoint_every=3,
    delayed=24,
)
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiles in half the time."""
COST = ("seconds", "waiting_seconds", "dft_calls", "cache_hits")


def lines(folder: Path, name: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in COST} for row in rows]


def inline(engine, folder, **options):
    return Bridge(engine, folder / "results.db", executor=ThreadPoolExecutor(1), **options)


# The buffer


@pytest.mark.parametrize("exponent", [0.0, 0.6], ids=["uniform", "prioritised"])
def test_no_stretch_is_drawn_before_its_reward_is_there_and_then_with_the_right_one(exponent):
    lanes, horizon, steps = 2, 3, 12
    config = ReplayConfig(lanes=lanes, steps=steps, start=12, buffer=48, batch=64, n_step=2, discount=0.5)
    replay = make_replay(config, exponent)
    time, lane = np.meshgrid(np.arange(steps), np.arange(lanes), indexing="ij")
    code = jnp.asarray(100 * lane + time, jnp.int32)
    done = jnp.asarray(time % horizon == horizon - 1)
    ticket = jnp.where(done, jnp.asarray(time // horizon * lanes + lane), NO_TICKET).astype(jnp.int32)
    zero = jnp.zeros(code.shape)
    one = jax.tree.map(lambda leaf: leaf[0, 0], Transition(code, code, zero, done, done, code + 1, ticket))
    buffer = replay.add(replay.init(one), Transition(code, code, zero, done, done, code + 1, ticket))
    assert not replay.ready(buffer), "eight rewards that two steps need each leave eight of 24 steps"

    def drawn(buffer):
        batch = jax.jit(replay.sample)(buffer, jax.random.key(0))
        return dict(zip(np.asarray(batch.action).tolist(), np.asarray(batch.reward).tolist(), strict=True))

    def needs(code):
        """The ticket that a stretch of two needs; None if its episode goes on after it."""
        step = code % 100 % horizon
        return code % 100 // horizon * lanes + code // 100 if step >= horizon - 2 else None

    assert {needs(code) for code in drawn(buffer)} == {None} and set(drawn(buffer).values()) == {0.0}
    # Out of order, with padding, and with one that has left the buffer.
    arrived = jnp.array([5, 0, NO_TICKET, 77, 3, 2], jnp.int32)
    buffer = jax.jit(replay.deliver)(buffer, arrived, jnp.array([0.5, 1.0, 9.0, 9.0, 0.3, 0.2]))
    assert replay.ready(buffer)
    rewards, found = {0: 1.0, 2: 0.2, 3: 0.3, 5: 0.5}, drawn(buffer)
    assert {needs(code) for code in found} == {None, 0, 2, 3, 5}
    for code, reward in found.items():
        last = code % 100 % horizon == horizon - 1
        expected = 0.0 if needs(code) is None else rewards[needs(code)] * (1.0 if last else 0.5)
        assert reward == pytest.approx(expected), code


# PPO, whose rollouts wait


def make_delayed_ppo(config):
    env, params = crystaljax.make("Density-RocksaltAB-v0", Deferred(), observation="flat")
    agent = make_ppo(config, DelayedRewards(env, config.lanes))
    return agent._replace(update=quick_jit(agent.update), deliver=quick_jit(agent.deliver)), params


def test_ppo_on_rewards_that_come_before_the_next_update_is_ppo():
    config = PPOConfig(updates=6, lanes=8, steps=6, minibatches=1, learning_rate=3e-3)
    env, params = crystaljax.make("Density-RocksaltAB-v0", "unrelaxed-density", observation="flat")
    blocking = make_ppo(config, env)
    delayed, _ = make_delayed_ppo(config)
    here, there = (agent.init(jax.random.key(3), params) for agent in (delayed, blocking))
    step, last_loss = quick_jit(blocking.update), None
    for update in range(config.updates):
        before = there.network
        there, losses, expected = step(there)
        here, late_losses, records = delayed.update(here)
        np.testing.assert_array_equal(records.elements, expected.elements)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), here.network, before)
        if update:
            assert late_losses["missing_rewards"] == 0
            assert late_losses["loss"] == pytest.approx(float(last_loss), abs=1e-4)
        last_loss = losses["loss"]
        here = delayed.deliver(here, records.ticket.reshape(-1), expected.reward.reshape(-1))


def test_a_reward_that_is_missing_counts_as_what_the_critic_expected():
    config = PPOConfig(lanes=4, steps=4, lag=2)
    agent, params = make_delayed_ppo(config)
    state, _, first = agent.update(agent.init(jax.random.key(0), params))
    state, losses, _ = agent.update(state)
    assert losses["learned"] == 0 == losses["loss"], "nothing is learned before a rollout has waited"
    tickets, expected = np.asarray(first.ticket), np.asarray(state.waiting.kept.value[0])
    half = np.where(np.arange(4)[:, None] < 2, tickets, NO_TICKET).reshape(-1)
    some = agent.deliver(state, half, jnp.full(16, 0.7))
    rest = np.where(np.arange(4)[:, None] >= 2, tickets, NO_TICKET).reshape(-1)
    (one, missing, _), (other, nothing, _) = (
        agent.update(state) for state in (some, agent.deliver(some, rest, expected.reshape(-1)))
    )
    assert missing["missing_rewards"] == 4 and nothing["missing_rewards"] == 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one.network, other.network)
    unmoved = jax.tree.map(np.array_equal, one.network, state.network)
    assert not all(jax.tree.leaves(unmoved)), "what has come teaches"


def test_what_was_learned_meanwhile_does_not_count_as_a_step_away_from_the_policy():
    agent, params = make_delayed_ppo(PPOConfig(lanes=4, steps=4, lag=3, minibatches=1, epochs=1, learning_rate=0.03))
    state, moved = agent.init(jax.random.key(0), params), []
    for _ in range(8):
        before = state.network
        state, losses, records = agent.update(state)
        state = agent.deliver(state, records.ticket.reshape(-1), records.elements[..., 0].reshape(-1) / 18)
        moved.append(not all(jax.tree.leaves(jax.tree.map(np.array_equal, before, state.network))))
        if moved[-1]:
            assert abs(float(losses["approx_kl"])) < 1e-6 and losses["clip_fraction"] == 0
    assert moved == [False] * 3 + [True] * 5


def test_ppo_learns_from_rewards_that_come_late_out_of_order_or_never():
    """The reward is the share of sites with one of the first six elements of 18."""
    config = PPOConfig(updates=60, lanes=16, steps=8, learning_rate=3e-3, lag=3)
    agent, params = make_delayed_ppo(config)
    state, random, waiting, means = agent.init(jax.random.key(0), params), np.random.default_rng(0), [], []
    for _ in range(config.updates):
        state, losses, records = agent.update(state)
        ended = np.asarray(records.finished)
        rewards = (np.asarray(records.elements)[ended] < 6).mean(axis=1)
        tickets = np.asarray(records.ticket)[ended]
        waiting += [pair for pair in zip(tickets.tolist(), rewards.tolist(), strict=True) if pair[0] % 10]
        means.append(rewards.mean())
        random.shuffle(waiting)
        come, waiting = waiting[: len(tickets)], waiting[len(tickets) :]
        come, waiting = come[len(come) // 3 :], waiting + come[: len(come) // 3]
        pad = [(NO_TICKET, 0.0)] * (len(tickets) - len(come))
        state = agent.deliver(state, *map(np.array, zip(*come, *pad, strict=True)))
    assert np.mean(means[:3]) < 0.5 and np.mean(means[-5:]) > 0.8
    assert losses["missing_rewards"] > 0


def test_every_reward_has_time_to_come_if_they_come_in_order(tmp_path):
    horizon, config = 2, dataclasses.replace(CONFIG, algorithm=PPOConfig(lanes=4, steps=3, minibatches=1))
    for delayed, lag in ((1, 2), (6, 3), (7, 3), (24, 5)):  # of three steps, 1.5 episodes in each of four lanes
        assert 4 * ((lag - 1) * 3 // horizon) >= delayed > 4 * ((lag - 2) * 3 // horizon)
        agent = build_delayed_agent(dataclasses.replace(config, delayed=delayed), Scripted())
        _, params = crystaljax.make(CONFIG.task, Deferred())
        shape = jax.eval_shape(agent.init, jax.random.key(0), params).waiting.steps.reward.shape
        assert shape == (lag, 3, 4)


# Runs


class Scripted:
    """Band gaps that come back after a while; when depends on the ticket and on how many were sent after it.

    So a run that is resumed sees the same order of arrival as one that never stopped. ``at(call)`` runs whenever
    crystals are sent.
    """

    def __init__(self, at=lambda call: None):
        self.at = at

    def bind(self, problem):
        return BoundEvaluator(lambda *_: (jnp.float32(0), jnp.int32(0)), lambda: None, "scripted")

    def delayed(self, env, target):
        return ScriptedEvaluation(env, target, self.at)


class ScriptedEvaluation:
    def __init__(self, env, target, at):
        self.env, self.target, self.at, self.calls = env, target, at, 0
        self.open, self.newest = {}, -1

    @property
    def outstanding(self):
        return len(self.open)

    def send(self, info):
        self.calls += 1
        self.at(self.calls)
        numbers = self.env.vocabulary.numbers[np.asarray(info["elements"])].reshape(-1, 2)
        self.open |= dict(zip(np.asarray(info["ticket"]).reshape(-1).tolist(), numbers, strict=True))
        self.open.pop(NO_TICKET, None)
        self.newest = max(self.newest, *self.open)

    def receive(self, wait=0.0):
        due = [ticket for ticket in self.open if self.newest - ticket >= ticket * 7 % 5 * LANES + LANES]
        if not due and wait:
            due = [min(self.open)]
        tickets = sorted(due, key=lambda ticket: ticket * 13 % 11)
        values = np.array([fake_value(self.open.pop(ticket)) for ticket in tickets], np.float32)[:, None]
        statuses = np.full(len(tickets), Status.OK, np.int32)
        rewards = np.asarray(self.env.objective.reward(values, statuses, np.float32(self.target)))
        return Arrivals(np.array(tickets, np.int32), values, statuses, rewards)


def crystals(folder):
    """Every episode of a run, whatever the order."""
    rows = lines(folder, "episodes.jsonl")
    return Counter((*row["elements"], row["status"], round(row["reward"], 5)) for row in rows)


class Patient(FakeEngine):
    """A :class:`FakeEngine` that finishes nothing before it may."""

    go = threading.Event()

    def compute(self, crystal, property_name):
        assert self.go.wait(120.0), "nobody went on acting"
        return super().compute(crystal, property_name)


def test_acting_goes_on_while_calculations_run(tmp_path):
    Patient.go.clear()
    over = threading.Event()

    def watch():
        path = tmp_path / "run" / "metrics.jsonl"
        while not (path.exists() and len(path.read_text().splitlines()) >= 3) and not over.wait(0.1):
            pass
        Patient.go.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with inline(Patient(), tmp_path) as bridge:
            result = train(CONFIG, bridge, tmp_path / "run")
    finally:
        over.set()
        watcher.join()
    rows = lines(tmp_path / "run", "metrics.jsonl")
    assert [(row["episodes"], row["outstanding"]) for row in rows[:3]] == [(0, 8), (0, 16), (0, 24)]
    assert max(row["outstanding"] for row in rows) <= CONFIG.delayed
    assert not result.interrupted and rows[-1]["episodes"] == CONFIG.episodes and not rows[-1]["outstanding"]


def test_the_replay_holds_what_it_holds_with_blocking_rewards(tmp_path):
    # Learning starts in the last update, so that both act alike.
    config = dataclasses.replace(CONFIG, algorithm=dataclasses.replace(CONFIG.algorithm, start=16 * UPDATES - 4))
    engine = FakeEngine(fail_element=6)
    with inline(engine, tmp_path) as bridge:
        blocking = train(dataclasses.replace(config, delayed=0), bridge, tmp_path / "blocking")
    with inline(engine, tmp_path / "run") as bridge:
        delayed = train(config, bridge, tmp_path / "run")
    here, there = (result.state.replay.experience for result in (delayed, blocking))
    assert (here.ticket == NO_TICKET).all() and there.ticket is None
    for name in ("observation", "action", "reward", "terminated", "done", "after"):
        np.testing.assert_allclose(getattr(here, name), getattr(there, name), rtol=1e-6, err_msg=name)
    assert (np.asarray(here.reward)[np.asarray(here.done)] != 0).all()
    assert crystals(tmp_path / "run") == crystals(tmp_path / "blocking")
    assert delayed.ledger.mean_reward == pytest.approx(blocking.ledger.mean_reward)
    assert {crystal.status for crystal in delayed.ledger.crystals} == {"OK", "NOT_CONVERGED"}


AGENTS = {
    "dqn": CONFIG.algorithm,
    "rainbow": RainbowConfig(**SMALL, target_every=16),
    "sac": SACConfig(**SMALL),
    "ppo": PPOConfig(lanes=LANES, steps=4),
    "gp": GaussianProcessConfig(lanes=LANES * 2),
}


@pytest.mark.parametrize("name", AGENTS)
def test_stopped_by_an_error_and_resumed_is_the_same_run(name, tmp_path):
    def fail(call):
        if call == 8:
            raise OSError("no space left on device")

    config = dataclasses.replace(CONFIG, algorithm=AGENTS[name])
    straight = train(config, Scripted(), tmp_path / "straight")
    rows = lines(tmp_path / "straight", "metrics.jsonl")
    assert 0 < rows[6]["episodes"] < rows[6]["env_steps"] / 2 and rows[6]["outstanding"] > 8
    if name == "gp":
        shown = [tuple(line["elements"]) for line in lines(tmp_path / "straight", "episodes.jsonl")]
        assert len(shown) == len({min(pair, pair[::-1]) for pair in shown}) == 96, "no crystal comes twice"
    else:
        assert rows[0]["loss"] is None and rows[-1]["loss"] is not None
    with pytest.raises(OSError, match="no space"):
        train(config, Scripted(fail), tmp_path / "run")
    assert len(lines(tmp_path / "run", "metrics.jsonl")) == 7, "the update that failed is not used"
    resumed = train(config, Scripted(), tmp_path / "run", resume=True)
    for file in ("metrics.jsonl", "episodes.jsonl", "tickets.jsonl"):
        assert lines(tmp_path / "run", file) == lines(tmp_path / "straight", file)
    states = [result.state.replace(key=jax.random.key_data(result.state.key)) for result in (resumed, straight)]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_spent_budget_ends_the_run_and_a_larger_one_goes_on_with_what_was_outstanding(tmp_path):
    engine = FakeEngine(log=str(tmp_path / "log"))
    with inline(engine, tmp_path, budget=Budget(max_calls=20)) as bridge:
        stopped = train(CONFIG, bridge, tmp_path / "run")
    assert stopped.interrupted and "20 of 20 DFT calls" in stopped.stopped
    rows = lines(tmp_path / "run", "metrics.jsonl")
    assert rows[-1]["outstanding"] > 0 and len(engine.calculations()) == 20
    valued = {crystal.formula for crystal in stopped.ledger.crystals}
    assert len(valued) == 20, "everything that was paid for is in the report"
    with inline(engine, tmp_path, budget=Budget(max_calls=20)) as bridge:
        again = train(CONFIG, bridge, tmp_path / "run", resume=True)
    assert again.stopped and again.updates <= stopped.updates + 1 and len(engine.calculations()) == 20
    with inline(engine, tmp_path, budget=Budget(max_calls=500)) as bridge:
        result = train(CONFIG, bridge, tmp_path / "run", resume=True)
    assert not result.interrupted and result.ledger.episodes == CONFIG.episodes
    assert set(crystal.status for crystal in result.ledger.crystals) == {"OK"}
    assert len(set(engine.calculations())) == len(engine.calculations()), "nothing is calculated twice"
    tickets = [ticket for row in lines(tmp_path / "run", "tickets.jsonl") for ticket in row["arrived"]]
    assert sorted(tickets) == list(range(CONFIG.episodes))


def test_random_search_designs_the_same_crystals_as_with_blocking_rewards(tmp_path):
    config = dataclasses.replace(CONFIG, algorithm=RandomConfig(lanes=LANES, steps=4))
    train(config, Scripted(), tmp_path / "delayed")
    with inline(FakeEngine(), tmp_path) as bridge:
        train(dataclasses.replace(config, delayed=0), bridge, tmp_path / "blocking")
    assert crystals(tmp_path / "delayed") == crystals(tmp_path / "blocking")


def test_settings_that_cannot_work_are_refused(tmp_path):
    def changed(**changes):
        return dataclasses.replace(CONFIG, **changes)

    with pytest.raises(ValueError, match="ga needs the rewards of all its crystals"):
        train(changed(algorithm=GeneticConfig(lanes=LANES)), Scripted(), tmp_path / "run")
    with pytest.raises(ValueError, match="lag is 0"):
        PPOConfig(lag=0)
    with pytest.raises(ValueError, match="answers at once"):
        train(changed(task="Density-RocksaltAB-v0"), "unrelaxed-density", tmp_path / "run")
    with pytest.raises(ValueError, match="enlarge buffer to 556"):
        train(changed(delayed=500), Scripted(), tmp_path / "run")
    with pytest.raises(ValueError, match="leave out delayed"):
        sweep(CONFIG, [10, 20], Scripted(), tmp_path / "run")
    with pytest.raises(ValueError, match="delayed is -1"):
        changed(delayed=-1)
    assert not (tmp_path / "run").exists()
