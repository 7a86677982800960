"""What is spent is counted, and no more is spent than allowed."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from crystaljax import library
from crystaljax.agents.config import RunConfig
from crystaljax.agents.hyperparameters import RandomConfig
from crystaljax.agents.runner import train
from crystaljax.dft_bridge import Bridge, Budget, Limits, Request, Store
from crystaljax.dft_bridge.store import StoreError
from crystaljax.dft_bridge.testing import FakeEngine
from crystaljax.evaluators import BudgetSpent
from crystaljax.status import Status

C1 = library.benchmark("C1")


def some(count, element=6):
    return [Request.of(C1, [element, 20 + i, 8, 8, 8], "band_gap") for i in range(count)]


def inline(engine, path, **options):
    return Bridge(engine, path, executor=ThreadPoolExecutor(1), **options)


def test_a_budget_of_calls_is_kept_exactly_and_counts_over_runs(tmp_path):
    path = tmp_path / "results.db"
    engine = FakeEngine(log=str(tmp_path / "log"))
    with inline(engine, path, budget=Budget(max_calls=7)) as bridge:
        with pytest.raises(BudgetSpent, match="7 of 7 DFT calls"):
            bridge.evaluate(some(20))
        assert bridge.stats().calls == len(engine.calculations()) == len(Store(path)) == 7
        assert len(bridge.evaluate(some(7))) == 7, "what is known stays known"
        summary = bridge.stats().summary()
    with inline(engine, path, budget=Budget(max_calls=12)) as bridge:
        bridge.carry_on(summary)
        with pytest.raises(BudgetSpent, match="12 of 12"):
            bridge.evaluate(some(20))
        assert len(engine.calculations()) == 12
    with inline(engine, path, budget=Budget(max_calls=20)) as bridge:
        assert len(bridge.evaluate(some(20))) == 20


def test_a_budget_of_core_hours_ends_soon_after_it_is_spent(tmp_path):
    engine = FakeEngine(log=str(tmp_path / "log"), burn=0.05)
    with Bridge(engine, tmp_path / "results.db", 1, budget=Budget(max_core_hours=0.5 / 3600)) as bridge:
        with pytest.raises(BudgetSpent, match="core-hours"):
            bridge.evaluate(some(40))
        assert 0.3 < bridge.stats().core_seconds < 1.0 and bridge.stats().calls < 40


def test_the_account_adds_up(tmp_path):
    engine = FakeEngine(refuse_element=1, fail_element=2, sleep=0.02)
    with inline(engine, tmp_path / "results.db") as bridge:
        bridge.evaluate([*some(6), *some(2), *some(1, 1), *some(3, 2)])
        bridge.evaluate(some(8))
        stats = bridge.stats()
    assert (stats.requests, stats.distinct, stats.batch_hits) == (20, 18, 2)
    assert stats.memory_hits + stats.shared + stats.store_hits + stats.refused + stats.calls == stats.distinct
    assert (stats.memory_hits, stats.refused, stats.calls, stats.failures) == (6, 1, 11, {"NOT_CONVERGED": 3})
    assert 0.02 * sum(range(9)) * 0.8 < stats.queue_seconds, "each of nine jobs waits for those before it"
    twice = stats.summary()
    with inline(engine, tmp_path / "other.db") as bridge:
        bridge.carry_on(twice)
        bridge.carry_on(twice)
        assert (bridge.stats().calls, bridge.stats().failures) == (22, {"NOT_CONVERGED": 6})


def test_results_that_could_not_be_written_are_written_later(tmp_path, monkeypatch):
    engine = FakeEngine(log=str(tmp_path / "log"))
    with inline(engine, tmp_path / "results.db") as bridge:
        bridge.evaluate(some(1))
        write = bridge.store.write

        def full(records):
            raise StoreError("the disk is full")

        monkeypatch.setattr(bridge.store, "write", full)
        with pytest.raises(StoreError, match="full"):
            bridge.evaluate(some(3))
        monkeypatch.setattr(bridge.store, "write", write)
        assert [r.status for r in bridge.evaluate(some(3))] == [Status.OK] * 3
    assert len(Store(tmp_path / "results.db")) == 3 and len(engine.calculations()) <= 4


RANDOM = RandomConfig(lanes=4, steps=2)
RUN = RunConfig(task="BandGap-RocksaltAB-v0", algorithm=RANDOM, episodes=24, checkpoint_every=100)


def test_a_run_stops_when_its_budget_is_spent_and_goes_on_with_a_larger_one(tmp_path):
    engine = FakeEngine(log=str(tmp_path / "log"))
    with inline(engine, tmp_path / "straight.db") as bridge:
        straight = train(RUN, bridge, tmp_path / "straight")
        needed = bridge.stats().calls
    budget = needed // 2
    with inline(engine, tmp_path / "results.db", budget=Budget(max_calls=budget)) as bridge:
        stopped = train(RUN, bridge, tmp_path / "run")
        assert stopped.interrupted and f"{budget} of {budget} DFT calls" in stopped.stopped
        assert 0 < stopped.updates < stopped.planned
    accounting = json.loads((tmp_path / "run" / "accounting.json").read_text())
    assert accounting["calls"] == budget and accounting["requests"] > 0
    more = dataclasses.replace(RUN, max_dft_calls=1000)
    with inline(engine, tmp_path / "results.db", budget=Budget(max_calls=1000)) as bridge:
        resumed = train(more, bridge, tmp_path / "run", resume=True)
        assert bridge.stats().calls == needed, "counted over both parts"
    assert not resumed.interrupted and resumed.stopped == ""
    episodes = [(folder / "episodes.jsonl").read_text() for folder in (straight.folder, resumed.folder)]
    assert episodes[0] == episodes[1]


# Limits


def test_limits_are_checked_at_the_door(tmp_path):
    for wrong in ({"timeout": 0.0}, {"memory": -1.0}, {"retries": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Limits(**wrong)
    with pytest.raises(ValueError, match="max_calls"):
        Budget(max_calls=-1)
    with pytest.raises(ValueError, match="limits"):
        inline(FakeEngine(), tmp_path / "results.db", limits=Limits(timeout=3.0))
    with pytest.raises(ValueError, match="one of them"):
        inline(FakeEngine(), tmp_path / "results.db", workers=2)


def test_a_failure_of_limits_is_kept_for_these_and_tried_again_under_others(tmp_path):
    engine, path = FakeEngine(log=str(tmp_path / "log"), sleep=1.0), tmp_path / "results.db"
    with Bridge(engine, path, 1, limits=Limits(timeout=0.3, retries=0)) as bridge:
        assert bridge.evaluate(some(1))[0].status == Status.TIMEOUT
    with Bridge(engine, path, 1, limits=Limits(timeout=0.3, retries=0)) as bridge:
        again = bridge.evaluate(some(1))[0]
        assert again.status == Status.TIMEOUT and bridge.stats().store_hits == 1
        assert again.details["limits"] == {"timeout": 0.3, "memory": None, "retries": 0}
    with Bridge(engine, path, 1, limits=Limits(timeout=30.0)) as bridge:
        assert bridge.evaluate(some(1))[0].status == Status.OK
    with Bridge(engine, path, 1, limits=Limits(timeout=10.0)) as bridge:
        assert bridge.evaluate(some(1))[0].status == Status.OK and bridge.stats().store_hits == 1
    # On a busy machine the first is stopped before it has begun: its time includes the start of its worker.
    assert len(engine.calculations()) in (1, 2) and len(Store(path)) == 2
