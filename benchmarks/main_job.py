"""Does the README's main job learn? PPO against random search on real DFT rewards, at equal numbers of calculations.

``python -m benchmarks main-job`` runs the README's training (task, engine, hyperparameters) and a random search, for
each seed, on one results store, so a second run recomputes nothing. All comparisons are at the same number of
*distinct crystals calculated*: crystals refused without a calculation (an odd number of electrons) cost nothing, and
repeated ones neither.

Per agent and seed it prints the mean reward of all episodes and of the last quarter of the budget, the mean reward of
the distinct crystals calculated, the best reward, and how many distinct crystals came within 0.25 eV of the target.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

import numpy as np

from crystaljax.agents import config, metrics
from crystaljax.agents.hyperparameters import RandomConfig
from crystaljax.agents.ledger import Episode
from crystaljax.agents.runner import train
from crystaljax.agents.runs import read_all
from crystaljax.dft_bridge import open_bridge
from crystaljax.properties import BAND_GAP

MAIN_JOB = config.from_table(config.read_toml(config.find("perovskite")), "perovskite")
"""The settings of the README's command."""
TOLERANCE = BAND_GAP.tolerance
"""eV around the target that counts as found."""


def summary(episodes: list[Episode], budget: int, target: float) -> dict[str, float]:
    """What a run achieved within ``budget`` distinct calculations."""
    spent = metrics.within(episodes, budget)
    counts = metrics.calculations(spent)
    first = np.diff(counts, prepend=0) > 0
    rewards = np.array([episode.reward for episode in spent])
    return {
        "mean_reward": float(rewards.mean()),
        "last_quarter_reward": float(rewards[counts > 0.75 * budget].mean()),
        "calculated_reward": float(rewards[first].mean()),
        "best_reward": float(rewards.max()),
        "found": len(metrics.distinct(metrics.succeeded(spent, {"band_gap": metrics.Goal(target, target, TOLERANCE)}))),
    }


def run(agent: str, engine: str, seed: int, folder: Path, store: Path | None, episodes: int) -> list[Episode]:
    """Train (or go on training) and read the episodes."""
    algorithm = RandomConfig(steps=MAIN_JOB.algorithm.steps) if agent == "random" else MAIN_JOB.algorithm
    settings = dataclasses.replace(MAIN_JOB, algorithm=algorithm, engine=engine, seed=seed, episodes=episodes)
    target = folder / f"{agent}-{engine}-{episodes}-{seed}"
    start = time.perf_counter()
    with open_bridge(settings.engine, settings.preset, store=store) as bridge:
        train(settings, bridge, target, resume=(target / "config.json").exists())
        calls = bridge.stats().calls
    print(f"{agent}, seed {seed}: {calls} calculations, {time.perf_counter() - start:.0f} s", flush=True)
    return read_all([target])[0].episodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default=MAIN_JOB.engine, help="DFT engine")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 20, 30])
    parser.add_argument("--episodes", type=int, default=MAIN_JOB.episodes, help="of PPO")
    parser.add_argument("--random-episodes", type=int, default=640)
    parser.add_argument("--folder", type=Path, default=Path("runs/main-job"))
    parser.add_argument("--store", type=Path, help="results store (default: the user's)")
    arguments = parser.parse_args()
    runs = {
        (agent, seed): run(agent, arguments.engine, seed, arguments.folder, arguments.store, episodes)
        for seed in arguments.seeds
        for agent, episodes in (("ppo", arguments.episodes), ("random", arguments.random_episodes))
    }
    budget = min(int(metrics.calculations(episodes)[-1]) for episodes in runs.values())
    table = {key: summary(episodes, budget, 1.12) for key, episodes in runs.items()}
    columns = list(next(iter(table.values())))
    print(f"\nwithin {budget} distinct DFT calculations\n{'':>12}" + "".join(f"{name:>22}" for name in columns))
    for (agent, seed), row in table.items():
        print(f"{agent:>8} {seed:>3}" + "".join(f"{row[name]:>22.3f}" for name in columns))

    def mean(agent: str, name: str) -> float:
        return round(float(np.mean([row[name] for (a, _), row in table.items() if a == agent])), 4)

    print(
        json.dumps(
            {
                "engine": arguments.engine,
                "budget": budget,
                "seeds": arguments.seeds,
                **{agent: {name: mean(agent, name) for name in columns} for agent in ("ppo", "random")},
                "cores": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
