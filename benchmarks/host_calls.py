"""What the bridge costs: host calls, and time spent outside DFT, per 1,000 episodes and per distinct crystal.

A random policy on registered tasks at batch 1,024, through the real worker processes and a real store, with an engine
that answers at once. All wall time inside the host call then is the bridge's: duplicates, keys, look-ups, the way to
the workers and back, durable writes. Then the same episodes once more with a new bridge on the filled store.

    python -m benchmarks host-calls [--episodes 4096] [--batch 1024] [--workers N] [--tasks BandGap-C1-v0 ...]

The last line of the output is one JSON object; ``ms_per_distinct`` and ``host_calls_per_1000_episodes`` are those of
the worst task.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

import crystaljax
from crystaljax.dft_bridge import Bridge, Request
from crystaljax.dft_bridge.testing import FakeEngine

TASKS = ("BandGap-C1-v0", "BandGap-Mixed-v0")


def make_run(env: crystaljax.CrystalEnv, params: crystaljax.EnvParams, batch: int) -> Callable[[jax.Array], jax.Array]:
    """A compiled function: key to the rewards of one episode of a random policy in each of ``batch`` lanes."""

    def run(key: jax.Array) -> jax.Array:
        key, reset_key = jax.random.split(key)
        _, state = jax.vmap(env.reset, (0, None))(jax.random.split(reset_key, batch), params)

        def step(state: crystaljax.EnvState, key: jax.Array) -> tuple[crystaljax.EnvState, jax.Array]:
            action_key, step_key = jax.random.split(key)
            actions = jax.random.randint(action_key, (batch,), 0, env.num_actions)
            step_keys = jax.random.split(step_key, batch)
            _, state, reward, *_ = jax.vmap(env.step, (0, 0, 0, None))(step_keys, state, actions, params)
            return state, reward

        return jax.lax.scan(step, state, jax.random.split(key, env.horizon))[1]

    return jax.jit(run)


def measure(task: str, store: Path, batches: int, batch: int, workers: int | None) -> dict[str, float]:
    """Run the episodes with a new bridge on ``store``; seconds and counts of that."""
    with Bridge(FakeEngine(), store, workers) as bridge:
        env, params = crystaljax.make(task, evaluator=bridge, in_phase=True)
        run = make_run(env, params, batch).lower(jax.random.key(0)).compile()
        # Noble gases are in no vocabulary: these start the workers and are none of the crystals to come.
        skeleton = env.skeletons[0]
        gases = [
            Request.of(skeleton, [10 + 8 * (i % 2)] + [2 + i // 2] * (skeleton.n_sites - 1), "band_gap")
            for i in range(16)
        ]
        bridge.evaluate(gases)
        before = bridge.stats()
        start, start_cpu = time.perf_counter(), time.process_time()
        for index in range(batches):
            jax.block_until_ready(run(jax.random.key(index)))
        env.evaluator.check()
        seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        after = bridge.stats()
    spent = {phase: after.phases[phase] - before.phases.get(phase, 0.0) for phase in after.phases}
    return {
        "episodes": batches * batch,
        "host_calls": after.host_calls - before.host_calls,
        "distinct": after.distinct - before.distinct,
        "calls": after.calls - before.calls,
        "store_hits": after.store_hits - before.store_hits,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "host_seconds": sum(spent.values()),
        **{f"{phase}_seconds": value for phase, value in spent.items()},
    }


def report(title: str, facts: dict[str, float]) -> None:
    """Print one measurement."""
    thousands, distinct = facts["episodes"] / 1000, facts["distinct"]
    print(f"{title}: {facts['episodes']} episodes, {distinct} distinct crystals, {facts['calls']} calculations")
    print(
        f"  per 1,000 episodes: {facts['host_calls'] / thousands:.2f} host calls, "
        f"{facts['host_seconds'] / thousands:.3f} s in them, {facts['seconds'] / thousands:.3f} s in all"
    )
    print(
        f"  per distinct crystal: {1e3 * facts['host_seconds'] / distinct:.3f} ms in host calls "
        f"({1e3 * facts['cpu_seconds'] / distinct:.3f} ms CPU of the main process, environment included), of which"
    )
    meaning = {
        "duplicates": "duplicates, scatter",
        "keys": "keys",
        "lookup": "store look-up",
        "refusing": "engine's predicted failures",
        "submitting": "executor: submitting",
        "waiting": "executor: waiting for results",
        "writing": "store write, on disk",
    }
    for phase, words in meaning.items():
        print(f"    {1e3 * facts.get(f'{phase}_seconds', 0.0) / distinct:.4f} ms  {words}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    arguments = parser.parse_args()
    batches = max(1, arguments.episodes // arguments.batch)
    fresh, known = {}, {}
    for task in arguments.tasks:
        with tempfile.TemporaryDirectory() as folder:
            settings = (Path(folder, "results.db"), batches, arguments.batch, arguments.workers)
            fresh[task] = measure(task, *settings)
            report(f"{task}, empty store", fresh[task])
            known[task] = measure(task, *settings)
            report(f"{task}, filled store", known[task])

    def worst(facts: dict[str, dict[str, float]], top: str, bottom: str, scale: float) -> float:
        return round(max(scale * f[top] / f[bottom] for f in facts.values()), 4)

    print(
        json.dumps(
            {
                "ms_per_distinct": worst(fresh, "host_seconds", "calls", 1e3),
                "host_calls_per_1000_episodes": worst(fresh, "host_calls", "episodes", 1e3),
                "host_seconds_per_1000_episodes": worst(fresh, "host_seconds", "episodes", 1e3),
                "cpu_ms_per_distinct": worst(fresh, "cpu_seconds", "calls", 1e3),
                "ms_per_distinct_in_store": worst(known, "host_seconds", "distinct", 1e3),
            }
        )
    )


if __name__ == "__main__":
    main()
