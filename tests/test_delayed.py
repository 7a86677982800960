"""Delayed rewards: every answer finds its transition, in whatever order it comes."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crystaljax
from crystaljax import library
from crystaljax.delayed import NO_TICKET, DelayedRewards, fill
from crystaljax.dft_bridge import Bridge, Request
from crystaljax.dft_bridge.delayed import DelayedEvaluation
from crystaljax.dft_bridge.engines.base import EngineNotReady
from crystaljax.dft_bridge.testing import FakeEngine, fake_value
from crystaljax.evaluators import Deferred, FunctionEvaluator, unrelaxed_density
from crystaljax.status import Status

C1 = library.benchmark("C1")
LANES, STEPS, NEON = 8, 12, 10


def some(count, element=6):
    return [Request.of(C1, [element, 20 + i, 8, 8, 8], "band_gap") for i in range(count)]


def inline(engine, path, **options):
    return Bridge(engine, path, executor=ThreadPoolExecutor(1), **options)


# Tickets


def test_tickets_come_back_with_the_right_results(tmp_path):
    engine = FakeEngine(log=str(tmp_path / "log"), sleep=0.05)
    with inline(engine, tmp_path / "results.db") as bridge:
        start = time.perf_counter()
        tickets = bridge.submit([*some(4), *some(2)])
        assert time.perf_counter() - start < 0.2, "the agent goes on acting"
        assert tickets == list(range(6)) and bridge.outstanding == 6
        answers = bridge.collect(wait=None)
        assert bridge.outstanding == 0 and bridge.collect() == []
        by_ticket = dict(answers)
        assert [by_ticket[t].value for t in tickets] == [fake_value(r.numbers) for r in [*some(4), *some(2)]]
        assert bridge.submit(some(1), [77]) == [77] and bridge.collect()[0].ticket == 77, "known at once"
        assert bridge.submit(some(1)) == [78]
        with pytest.raises(ValueError, match="in use"):
            bridge.submit(some(1), [78])
    assert len(engine.calculations()) == 4


def test_blocking_and_delayed_requests_share_calculations(tmp_path):
    engine = FakeEngine(log=str(tmp_path / "log"), sleep=0.1)
    with inline(engine, tmp_path / "results.db") as bridge:
        bridge.submit(some(3))
        results = bridge.evaluate(some(3))
        assert [answer.result for answer in sorted(bridge.collect(wait=None))] == results
    assert len(engine.calculations()) == 3


def test_what_stops_calculations_is_raised_by_collect_and_the_tickets_come_back_cancelled(tmp_path):
    with inline(FakeEngine(unready_element=NEON), tmp_path / "results.db") as bridge:
        bridge.submit(some(1, NEON))
        with pytest.raises(EngineNotReady, match="vanished"):
            for _ in range(100):
                assert [a.result.status for a in bridge.collect(wait=0.1)] in ([], [Status.CANCELLED])
        bridge.collect()
        assert bridge.outstanding == 0 and bridge.evaluate(some(1))[0].status == Status.OK


def test_cancelled_tickets_come_back(tmp_path):
    engine = FakeEngine(sleep=0.2)
    with inline(engine, tmp_path / "results.db") as bridge:
        bridge.submit(some(5))
        bridge.cancel()
        statuses = {answer.result.status for answer in bridge.collect(wait=None)}
        assert Status.CANCELLED in statuses and bridge.outstanding == 0


# Environment and replay buffer


def rollout(env, params, seed=0):
    """(tickets, rewards, elements, skeletons), each [T, L], of random actions in all lanes, compiled."""

    def run(key):
        keys = jax.random.split(key, LANES)
        _, state = jax.vmap(env.reset, (0, None, 0))(keys, params, jnp.arange(LANES))

        def step(state, key):
            action_key, step_key = jax.random.split(key)
            actions = jax.random.randint(action_key, (LANES,), 0, env.num_actions)
            keys = jax.random.split(step_key, LANES)
            _, state, reward, *_, info = jax.vmap(env.step, (0, 0, 0, None))(keys, state, actions, params)
            return state, (reward, info)

        return jax.lax.scan(step, state, jax.random.split(key, STEPS))[1]

    return jax.jit(run)(jax.random.key(seed))


@pytest.fixture(scope="module")
def delayed():
    env, params = crystaljax.make("BandGap-C1-v0", evaluator=Deferred())
    return DelayedRewards(env, LANES), params


def test_tickets_are_given_once_and_only_at_the_end_of_episodes(delayed):
    env, params = delayed
    reward, info = rollout(env, params)
    tickets = np.asarray(info["ticket"])
    ended = np.asarray(info["terminated"])
    assert ended.sum() == LANES * (STEPS // 5) and ((tickets != NO_TICKET) == ended).all()
    assert sorted(tickets[ended]) == list(range(ended.sum())) and not np.asarray(reward).any()
    assert (np.asarray(info["status"])[ended] == Status.PENDING).all()


def test_rewards_reach_their_transitions_whatever_the_order_of_arrival(delayed, tmp_path):
    env, params = delayed
    reward, info = rollout(env, params)
    engine = FakeEngine(log=str(tmp_path / "log"), refuse_element=1, fail_element=6)
    with inline(engine, tmp_path / "results.db") as bridge:
        evaluation = DelayedEvaluation(bridge, env)
        assert evaluation.send(info) == np.asarray(info["terminated"]).sum()
        arrivals = evaluation.receive(wait=None)
    buffers = []
    for order in (np.arange(len(arrivals.tickets)), np.random.default_rng(0).permutation(len(arrivals.tickets))):
        tickets, rewards = info["ticket"].reshape(-1), reward.reshape(-1)
        for part in np.array_split(order, 3):
            tickets, rewards = fill(tickets, rewards, arrivals.tickets[part], arrivals.rewards[part])
        assert (tickets == NO_TICKET).all()
        buffers.append(np.asarray(rewards).reshape(STEPS, LANES))
    np.testing.assert_array_equal(*buffers)
    numbers = env.vocabulary.numbers[np.asarray(info["elements"])]
    for t, lane in np.argwhere(np.asarray(info["terminated"])):
        failed = 1 in numbers[t, lane] or 6 in numbers[t, lane]
        expected = -1.0 if failed else np.exp(-((1.12 - fake_value(numbers[t, lane])) ** 2))
        np.testing.assert_allclose(buffers[0][t, lane], expected, rtol=1e-5)
    assert not buffers[0][~np.asarray(info["terminated"])].any()


def test_answers_for_transitions_that_left_the_buffer_change_nothing():
    tickets, rewards = jnp.array([NO_TICKET, 7, 3]), jnp.array([0.5, 0.0, 0.0])
    filled = fill(tickets, rewards, jnp.array([9, NO_TICKET, 3]), jnp.array([0.9, 0.8, 0.3]))
    np.testing.assert_array_equal(filled[0], [NO_TICKET, 7, NO_TICKET])
    np.testing.assert_allclose(filled[1], [0.5, 0.0, 0.3])


@pytest.mark.parametrize("label", ["on-device", "delayed"])
def test_an_environment_that_evaluates_at_once_is_refused(label):
    """Whatever it is called, as names are free."""
    env, _ = crystaljax.make("Density-C1-v0", evaluator=FunctionEvaluator(unrelaxed_density, label))
    with pytest.raises(ValueError, match="at once.*Deferred"):
        DelayedRewards(env)
    later, _ = crystaljax.make("Density-C1-v0", evaluator=Deferred("gpaw, some day"))
    DelayedRewards(later)


def test_every_lane_gets_the_reward_of_its_own_target(delayed, tmp_path):
    """Under ``vmap`` over targets, as for a target-conditioned policy."""
    env, params = delayed
    targets = jnp.linspace(1.0, 4.0, LANES)
    lanes = jnp.arange(LANES)
    keys = jax.random.split(jax.random.key(5), LANES)
    by_lane = jax.vmap(lambda target: params.replace(target=target))(targets)

    def run(key, lane, own):
        state = env.reset(key, own, lane)[1]

        def step(state, key):
            action = jax.random.randint(key, (), 0, env.num_actions)
            _, state, *_, info = env.step(key, state, action, own)
            return state, info

        return jax.lax.scan(step, state, jax.random.split(key, 5))[1]

    info = jax.jit(jax.vmap(run))(keys, lanes, by_lane)
    engine = FakeEngine(refuse_element=1)
    with inline(engine, tmp_path / "results.db") as bridge:
        evaluation = DelayedEvaluation(bridge, env)
        assert evaluation.send(info) == LANES
        arrivals = evaluation.receive(wait=None)
        with pytest.raises(ValueError, match="aimed at 1, .*the evaluation is for 1.12; leave out its target"):
            DelayedEvaluation(bridge, env, 1.12).send(info)
        assert bridge.outstanding == 0
    order = np.argsort(arrivals.tickets)
    np.testing.assert_array_equal(arrivals.tickets[order], np.arange(LANES))
    valid = arrivals.statuses[order] == Status.OK
    expected = np.where(valid, np.exp(-((np.asarray(targets) - arrivals.values[order, 0]) ** 2)), -1.0)
    assert valid.sum() > 2
    np.testing.assert_allclose(arrivals.rewards[order], expected, rtol=1e-5)


def test_a_crystal_arrives_when_all_its_properties_have(tmp_path):
    asked = ["band_gap=1+-1", "density<=2+-1"]
    env, params = crystaljax.make("BandGap-C1-v0", evaluator=Deferred(), objective=asked)
    env = DelayedRewards(env, LANES)
    _, info = rollout(env, params)
    engine = FakeEngine(log=str(tmp_path / "log"), refuse_element=1)
    with inline(engine, tmp_path / "results.db") as bridge:
        evaluation = DelayedEvaluation(bridge, env)
        sent = evaluation.send(info)
        assert evaluation.outstanding == sent
        arrivals = evaluation.receive(wait=None)
        assert evaluation.outstanding == 0
    assert sorted(arrivals.tickets) == sorted(np.asarray(info["ticket"])[np.asarray(info["terminated"])])
    where = {int(ticket): place for place, ticket in np.ndenumerate(np.asarray(info["ticket"]))}
    for ticket, values, status, reward in zip(*arrivals, strict=True):
        numbers = env.vocabulary.numbers[np.asarray(info["elements"])[where[int(ticket)]]]
        if 1 in numbers:
            assert status == Status.ODD_ELECTRONS and reward == -1.0 and np.isnan(values).all()
            continue
        value = fake_value(numbers)  # the engine has one number for both
        np.testing.assert_allclose(values, [value, value], rtol=1e-6)
        expected = np.exp(-((1.0 - value) ** 2) - max(value - 2.0, 0.0) ** 2)
        np.testing.assert_allclose(reward, expected, rtol=1e-5)
    crystals = {str(numbers) for numbers in engine.calculations()}
    assert len(engine.calculations()) == 2 * len(crystals), "each property of each crystal once"
