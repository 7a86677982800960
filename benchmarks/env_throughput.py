"""Environment steps per CPU second, beside gymnax CartPole in the same run.

``python -m benchmarks env-throughput`` runs a random policy with auto-reset for CrystalJAX's C1 (flat and graph
observation) and CartPole, at several batch sizes, on one CPU core. Every leaf of every observation is consumed (summed
into the result). Times are CPU seconds of the process, so a busy machine does not change them. The repetitions of the
environments are interleaved and the best of each is kept.

The last line is one JSON object; ``steps_per_cpu_s`` and ``ratio_to_cartpole`` are those of the flat observation.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    # One core: XLA's own threads and any BLAS. Must be set before JAX is imported.
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import argparse
import json
import time
from collections.abc import Callable

import gymnax
import jax
import jax.numpy as jnp

import crystaljax

BATCHES = (1, 64, 1024, 8192, 65536)
STEPS_PER_RUN = 2**21
"""Environment steps of one timed run at large batches; small batches run fewer, for the same time."""
REPETITIONS = 5


def build(env, params, batch: int, length: int) -> tuple[Callable, tuple]:
    """A compiled rollout of ``length`` steps over ``batch`` lanes, and its arguments."""
    actions = env.action_space(params).n

    def rollout(key: jax.Array) -> jax.Array:
        key, reset_key = jax.random.split(key)
        observation, state = jax.vmap(env.reset, (0, None))(jax.random.split(reset_key, batch), params)

        def step(carry, _):
            key, state, total = carry
            key, action_key, step_key = jax.random.split(key, 3)
            action = jax.random.randint(action_key, (batch,), 0, actions)
            observation, state, reward, _, _, _ = jax.vmap(env.step, (0, 0, 0, None))(
                jax.random.split(step_key, batch), state, action, params
            )
            consumed = sum(jnp.sum(leaf, dtype=jnp.float32) for leaf in jax.tree.leaves(observation))
            return (key, state, total + consumed + reward.sum()), None

        return jax.lax.scan(step, (key, state, jnp.float32(0)), None, length=length)[0][2]

    return jax.jit(rollout), (jax.random.key(0),)


def state_bytes(env, params) -> int:
    """Bytes of state and observation that one lane holds between steps."""
    shapes = jax.eval_shape(env.reset, jax.random.key(0), params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="Density-C1-v0")
    parser.add_argument("--quick", action="store_true", help="batch 8192 only, fewer repetitions")
    arguments = parser.parse_args()
    batches = (8192,) if arguments.quick else BATCHES
    repetitions = 2 if arguments.quick else REPETITIONS

    environments = {
        "flat": crystaljax.make(arguments.task, "unrelaxed-density", observation="flat"),
        "graph": crystaljax.make(arguments.task, "unrelaxed-density", observation="graph"),
        "cartpole": gymnax.make("CartPole-v1"),
    }
    rates: dict[str, dict[str, float]] = {name: {} for name in environments}
    compile_s: dict[str, float] = {}
    print(f"{'batch':>7} " + "".join(f"{name + ' steps/CPU s':>24}" for name in environments))
    for batch in batches:
        length = max(16, min(STEPS_PER_RUN // batch, 20_000))
        programs = {}
        for name, (env, params) in environments.items():
            rollout, inputs = build(env, params, batch, length)
            start = time.perf_counter()
            programs[name] = rollout.lower(*inputs).compile()
            compile_s[name] = round(time.perf_counter() - start, 3)
            programs[name](*inputs).block_until_ready()
        best = dict.fromkeys(programs, float("inf"))
        for repetition in range(repetitions):
            for name, program in programs.items():
                start = time.process_time()
                program(jax.random.key(repetition)).block_until_ready()
                best[name] = min(best[name], time.process_time() - start)
        for name in programs:
            rates[name][str(batch)] = round(batch * length / best[name])
        print(f"{batch:>7} " + "".join(f"{rates[name][str(batch)]:>24,}" for name in environments), flush=True)

    def ratios(name: str) -> dict[str, float]:
        return {batch: round(rate / rates["cartpole"][batch], 3) for batch, rate in rates[name].items()}

    print(
        json.dumps(
            {
                "steps_per_cpu_s": rates["flat"],
                "ratio_to_cartpole": ratios("flat"),
                "graph_steps_per_cpu_s": rates["graph"],
                "graph_ratio_to_cartpole": ratios("graph"),
                "compile_s": compile_s["flat"],
                "bytes_per_env": state_bytes(*environments["flat"]),
                "graph_bytes_per_env": state_bytes(*environments["graph"]),
                "jax": jax.__version__,
                "task": arguments.task,
            }
        )
    )


if __name__ == "__main__":
    main()
