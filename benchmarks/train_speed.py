"""Training steps per CPU second of our PPO, beside rejax' PPO on the same environment in the same run.

``python -m benchmarks train-speed`` (needs ``pip install 'crystaljax[benchmark]'``). The environment is the perovskite
task with rewards gathered from a table, on the device; rejax takes it through the five-tuple adapter. Both train the
same two-layer tanh MLPs for policy and value, with equal lanes, steps, minibatches and epochs, on one core, compiled
as a whole; rejax' evaluation is switched off. Times are CPU seconds of the process, so that a busy machine does not
change them much; the two are interleaved, and the best of each is kept.

The last line is one JSON object; ``ratio_to_rejax`` above 1 means that ours is faster.
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
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np

import crystaljax
from crystaljax.adapters import FiveTupleEnv
from crystaljax.agents.hyperparameters import PPOConfig
from crystaljax.agents.ppo import make_train
from crystaljax.elements import get_vocabulary

TASK = "BandGap-PerovskiteABX3-v0"
BATCHES = (64, 4096)
STEPS, MINIBATCHES, EPOCHS, LEARNING_RATE = 32, 2, 4, 2.5e-4
STEPS_PER_RUN = 2**19
"""Environment steps of one timed run."""


def table_evaluator(seed: int = 0) -> crystaljax.FunctionEvaluator:
    """Made-up band gaps of all 18^3 perovskites, gathered from a table."""
    vocabulary = get_vocabulary("small")
    gaps = jnp.asarray(np.random.default_rng(seed).exponential(2.0, (len(vocabulary),) * 3), jnp.float32)
    label = np.zeros(int(max(vocabulary.numbers)) + 1, np.int32)
    label[vocabulary.numbers[: len(vocabulary)]] = np.arange(len(vocabulary))
    label = jnp.asarray(label)

    def gap(numbers: jax.Array, skeleton: object) -> jax.Array:
        a, b, x = label[numbers[:3]]
        return gaps[a, b, x]

    return crystaljax.FunctionEvaluator(gap, "table: made-up band gaps")


def ours(env: crystaljax.CrystalEnv, params: object, batch: int, updates: int) -> Callable:
    """Our training as a function of a key."""
    config = PPOConfig(
        updates=updates,
        lanes=batch,
        steps=STEPS,
        minibatches=MINIBATCHES,
        epochs=EPOCHS,
        learning_rate=LEARNING_RATE,
    )
    return make_train(config, env, params)


def theirs(env: crystaljax.CrystalEnv, params: object, batch: int, updates: int) -> Callable:
    """rejax' training as a function of a key."""
    import rejax  # only for the comparison

    algorithm = rejax.get_algo("ppo").create(
        env=FiveTupleEnv(env),
        env_params=params,
        total_timesteps=batch * STEPS * updates,
        eval_freq=batch * STEPS * updates,
        num_envs=batch,
        num_steps=STEPS,
        num_epochs=EPOCHS,
        num_minibatches=MINIBATCHES,
        learning_rate=LEARNING_RATE,
        max_grad_norm=0.5,
        agent_kwargs={"activation": "tanh", "hidden_layer_sizes": (64, 64)},
        skip_initial_evaluation=True,
    )
    return algorithm.replace(eval_callback=lambda *_: jnp.float32(0.0)).train


def fastest(
    programs: dict[str, Callable], repetitions: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Seconds of the fastest run of each program (a function of a key); the programs take turns."""
    best = dict.fromkeys(programs, float("inf"))
    for repetition in range(repetitions):
        for name, program in programs.items():
            start = clock()
            jax.block_until_ready(program(jax.random.key(repetition)))
            best[name] = min(best[name], clock() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    repetitions = parser.parse_args().repetitions
    env, params = crystaljax.make(TASK, table_evaluator(), observation="flat")
    rates: dict[str, dict[str, int]] = {"ours": {}, "rejax": {}}
    for batch in BATCHES:
        updates = STEPS_PER_RUN // (batch * STEPS)
        programs = {
            name: jax.jit(make(env, params, batch, updates)).lower(jax.random.key(0)).compile()
            for name, make in (("ours", ours), ("rejax", theirs))
        }
        for name, seconds in fastest(programs, repetitions).items():
            rates[name][str(batch)] = round(updates * batch * STEPS / seconds)
        print(
            f"batch {batch}: " + ", ".join(f"{name} {rates[name][str(batch)]:,} steps/CPU s" for name in rates),
            flush=True,
        )
    ratios = {batch: round(rate / rates["rejax"][batch], 3) for batch, rate in rates["ours"].items()}
    print(
        json.dumps(
            {
                "ratio_to_rejax": ratios,
                "steps_per_cpu_s": rates,
                "task": TASK,
                "jax": jax.__version__,
                "rejax": metadata.version("rejax"),
            }
        )
    )


if __name__ == "__main__":
    main()
