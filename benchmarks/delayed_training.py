"""What acting on while crystals wait for their reward gains in time, and costs in what is learned.

    python -m benchmarks delayed-training [--agents ppo dqn rainbow sac] [--seeds 10 20 30] [--delayed 32]
        [--episodes 960] [--workers 8] [--sleep 0.2]

``Density-C1-v0`` (five decisions) for an engine that sleeps and then says the density of the unrelaxed cell, on worker
processes. How long it sleeps depends on the crystal and is spread like DFT: log-normally, one time in six more than
twice the median. Every agent trains with blocking rewards, where an update waits for the slowest of its 16 crystals,
and with ``--delayed``. *Busy* is the share of the workers' time that calculations fill. Times begin with the second
update, as the first one compiles. The settings are those of ``dft_agents.py``, but every update has one episode of each
lane, and the buffer is larger. All is random by the seed but the order of arrival.

The last line is one JSON object: by agent, the seconds per calculation with blocking rewards over those with delayed
ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from crystaljax.agents import config as configs
from crystaljax.agents.config import RunConfig
from crystaljax.agents.hyperparameters import AlgorithmConfig
from crystaljax.agents.runner import train
from crystaljax.dft_bridge import Bridge
from crystaljax.dft_bridge.engines.base import Crystal, Result
from crystaljax.dft_bridge.engines.checks import density_of, to_atoms
from crystaljax.dft_bridge.testing import FakeEngine
from crystaljax.status import Status

TASK, TARGET, LANES, DECISIONS = "Density-C1-v0", 9.0, 16, 5
SPREAD = 0.7
"""Standard deviation of the logarithm of the time that a calculation takes."""
REPLAY = {"learning_rate": 1e-3, "start": 320, "train_every": 2, "steps": DECISIONS, "lanes": LANES, "buffer": 4000}
EXPLORATION = {"exploration": 0.5, "target_every": 200}
PPO = {"steps": DECISIONS, "learning_rate": 1.5e-3, "epochs": 8, "entropy": 0.02, "target_kl": 0.05, "lanes": LANES}
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": PPO,
    "dqn": REPLAY | EXPLORATION,
    "rainbow": REPLAY | EXPLORATION,
    "sac": REPLAY | {"alpha": 0.05},
}


@dataclasses.dataclass(frozen=True)
class SleepingEngine(FakeEngine):
    """Sleeps, ``sleep`` seconds on average, and returns the density of the unrelaxed cell in g/cm3."""

    def seconds(self, numbers: np.ndarray) -> float:
        """How long it sleeps for a crystal."""
        draw = np.random.default_rng(zlib.crc32(np.sort(numbers).tobytes())).normal()
        return self.sleep * float(np.exp(SPREAD * draw - SPREAD**2 / 2))

    def compute(self, crystal: Crystal, property_name: str) -> Result:
        seconds = self.seconds(crystal.numbers)
        time.sleep(seconds)
        return Result(density_of(to_atoms(crystal)), Status.OK, seconds)


@dataclasses.dataclass(frozen=True)
class Training:
    """What became of a run.

    Attributes:
        seconds, calculations: from the second update on.
        busy: fraction of the workers' time in it that calculations took.
        best: best reward.
        mean, last: mean reward of all episodes, and of their last tenth.
    """

    seconds: float
    calculations: float
    busy: float
    best: float
    mean: float
    last: float


def run(algorithm: AlgorithmConfig, seed: int, delayed: int, options: argparse.Namespace) -> Training:
    """One training, with a store of its own."""
    config = RunConfig(
        task=TASK,
        target=TARGET,
        network="mlp",
        algorithm=algorithm,
        episodes=options.episodes,
        seed=seed,
        delayed=delayed,
        checkpoint_every=1000,
    )
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "run")
        with Bridge(SleepingEngine(sleep=options.sleep), Path(folder, "results.db"), options.workers) as bridge:
            result = train(config, bridge, place)
            slept = bridge.stats().core_seconds
        rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        seconds = sum(row["seconds"] for row in rows[1:])
        rewards = [json.loads(line)["reward"] for line in (place / "episodes.jsonl").read_text().splitlines()]
    calculations = rows[-1]["dft_calls"] - rows[0]["dft_calls"]
    busy = slept * calculations / rows[-1]["dft_calls"] / (seconds * options.workers)
    mean, last = float(np.mean(rewards)), float(np.mean(rewards[-len(rewards) // 10 :]))
    return Training(seconds, calculations, busy, result.ledger.best_reward, mean, last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 20, 30])
    parser.add_argument("--delayed", type=int, default=2 * LANES, help="crystals that may wait (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=960)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--sleep", type=float, default=0.2, help="mean seconds of a calculation (default: %(default)s)")
    options = parser.parse_args()
    ratios = {}
    columns = ["agent", "rewards", *(field.name for field in dataclasses.fields(Training))]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in options.agents:
        algorithm = configs.algorithm(name)(**SETTINGS[name])
        seconds = {}
        for delayed in (0, options.delayed):
            runs = [run(algorithm, seed, delayed, options) for seed in options.seeds]
            means = np.mean([dataclasses.astuple(run) for run in runs], axis=0)
            seconds[delayed] = means[0] / means[1]
            cells = [name, f"delayed {delayed}" if delayed else "blocking", *(f"{mean:.3f}" for mean in means)]
            print(f"| {' | '.join(cells)} |", flush=True)
        ratios[name] = round(float(seconds[0] / seconds[options.delayed]), 3)
    print(json.dumps({"blocking_over_delayed": ratios}))


if __name__ == "__main__":
    main()
