"""PPO on a task with an exact table: the whole training is one compiled program that never calls the host.

    python -m benchmarks table-env [--task BandGap-Rocksalt-Table-v0] [--seeds 20] [--updates 100]

Two questions. *How fast*: 4,096 lanes, every seed a run of one compiled program; steps of the environment per second,
learning included, of the fastest run (so that a busy machine changes it little) and per CPU second of the median one;
the host callbacks that the compiled program holds, so none means no host call; and the regret of the greedy policy at
the end, from every start site. *How many calculations it would have taken*: 4,096 lanes see all crystals at once, so
PPO is run with 8 lanes too, and the distinct crystals it has evaluated when it meets the best one are counted,
beside the exact expectation for random search.

Settings are those of the reference but for the learning rate, the entropy bonus (advantages are normalised, so it falls
off by itself as the policy settles) and, with episodes of two decisions, no discount. The last line is one JSON object;
``final_regret`` and ``distinct_crystals`` are medians over the seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import jax
import numpy as np

import crystaljax
from benchmarks.table_report import probabilities, random_search, rewards
from crystaljax import tables
from crystaljax.agents.base import Agent, Records
from crystaljax.agents.evaluation import make_designer
from crystaljax.agents.hyperparameters import PPOConfig
from crystaljax.agents.ppo import make_ppo, make_train
from crystaljax.evaluators import Problem, shipped_table

LANES, FEW_LANES = 4096, 8
FEW_EPISODES = 1600
TOLERANCE = 1e-6
"""Of the reward, for what counts as the best crystal."""


def config(env: crystaljax.CrystalEnv, lanes: int, updates: int) -> PPOConfig:
    """One episode of every lane per update."""
    return PPOConfig(
        lanes=lanes,
        steps=env.horizon,
        updates=updates,
        minibatches=4,
        learning_rate=1e-3,
        entropy=0.3,
        discount=1.0,
        trace=1.0,
    )


def callbacks(compiled: object) -> int:
    """How often a compiled program's text names a call to the host."""
    text = compiled.as_text()
    return sum(text.count(name) for name in ("python_cpu_callback", "python_gpu_callback", "SendToHost", "outfeed"))


def greedy_regret(env: crystaljax.CrystalEnv, params: crystaljax.EnvParams, agent: Agent) -> Callable[..., jax.Array]:
    """A function of network parameters: the largest regret of the greedy policy over 32 draws of the start site."""
    design = make_designer(env, agent.policy, 32)

    def regret(network: object) -> jax.Array:
        found = design(jax.random.key(0), network, params)
        return env.best_reward(params) - found.reward.min(where=found.finished, initial=np.inf)

    return jax.jit(regret)


def distinct_until_best(records: Records, row: np.ndarray, sites: np.ndarray, best: float, size: int) -> int | None:
    """Distinct crystals evaluated up to the first of the best, in the order of updates and lanes; ``None`` if never.

    Args:
        row: int32 [V^G], entry of each assignment, and
        sites: int [G], a site of each orbit: see :func:`crystaljax.tables.labelings`.
        size: V.
    """
    finished = np.asarray(records.finished)
    elements = np.asarray(records.elements)[finished][:, sites]
    entries = row[elements @ (size ** np.arange(len(sites))[::-1])]
    hits = np.flatnonzero(np.asarray(records.reward)[finished] >= best - TOLERANCE)
    return len(np.unique(entries[: hits[0] + 1])) if len(hits) else None


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="BandGap-Rocksalt-Table-v0")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--updates", type=int, default=100)
    options = parser.parse_args()
    env, params = crystaljax.make(options.task, observation="flat")
    problem = Problem(env.skeletons, env.objective.names, env.vocabulary, by_orbit=True)
    table, best = shipped_table(problem), float(env.best_reward(params))
    _, row = tables.labelings(table.skeleton, table.vocabulary)
    _, sites = np.unique(table.skeleton.orbits, return_index=True)

    many = config(env, LANES, options.updates)
    program = jax.jit(make_train(many, env, params)).lower(jax.random.key(0)).compile()
    regret = greedy_regret(env, params, make_ppo(many, env))
    steps, regrets, walls, cpus = LANES * many.steps * many.updates, [], [], []
    for seed in range(options.seeds):
        wall, cpu = time.perf_counter(), time.process_time()
        state, _, _ = jax.block_until_ready(program(jax.random.key(seed)))
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        regrets.append(float(regret(state.network)))
        print(f"seed {seed}: {steps / walls[-1]:,.0f} steps/s, regret {regrets[-1]:.6f}", flush=True)

    few = jax.jit(jax.vmap(make_train(config(env, FEW_LANES, FEW_EPISODES // FEW_LANES), env, params)))
    _, _, records = few(jax.vmap(jax.random.key)(np.arange(options.seeds)))
    counts = [
        distinct_until_best(jax.tree.map(lambda leaf, i=i: leaf[i], records), row, sites, best, env.num_actions)
        for i in range(options.seeds)
    ]
    reached = [count for count in counts if count is not None]
    _, expected = random_search(probabilities(table), rewards(table, env.objective) >= best - TOLERANCE)
    print(f"{FEW_LANES} lanes, distinct crystals until the best: {counts}")
    print(
        json.dumps(
            {
                "steps_per_s": round(steps / min(walls)),
                "host_calls": callbacks(program),
                "final_regret": float(np.median(regrets)),
                "seeds_with_regret_0": sum(value < TOLERANCE for value in regrets),
                "seeds": options.seeds,
                "steps_per_cpu_s": round(steps / float(np.median(cpus))),
                "episodes": many.lanes * many.updates,
                "distinct_crystals": float(np.median(reached)) if reached else None,
                "seeds_that_met_the_best": len(reached),
                "distinct_crystals_of_random_search": round(float(expected), 1),
                "task": options.task,
            }
        )
    )


if __name__ == "__main__":
    main()
