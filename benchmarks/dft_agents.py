"""PPO, DQN, Rainbow and SAC on real DFT rewards, one results store, each run interrupted and resumed.

    python -m benchmarks dft-agents [--agents ppo dqn rainbow sac random ga] [--task BandGap-C2-v0] [--seeds 0]
        [--calculations 220] [--folder runs/dft-agents] [--store FILE] [--workers N] [--engine-option NAME=VALUE]

Every agent trains through the command line until it has spent its calculations (or its episodes); halfway it gets
Ctrl-C, and ``--resume`` goes on. The settings are for a few hundred calculations: larger steps than the defaults, and
replay that begins early. ``crystaljax report`` makes a page of the runs.

The table compares agents after the same number of distinct crystals with a calculation, as ``main_job.py`` does;
numbers are means over the seeds. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.main_job import summary
from crystaljax.agents import metrics
from crystaljax.agents.ledger import Episode
from crystaljax.agents.runs import read_all

EPISODES, LANES = 960, 16
REPLAY = "--learning-rate 1e-3 --start 320 --train-every 2".split()
EXPLORATION = "--exploration 0.5 --target-every 200".split()
SETTINGS = {
    "ppo": "--steps 5 --learning-rate 1.5e-3 --epochs 8 --entropy 0.02 --target-kl 0.05".split(),
    "dqn": [*REPLAY, *EXPLORATION],
    "rainbow": [*REPLAY, *EXPLORATION],
    "sac": [*REPLAY, "--alpha", "0.05"],
    "random": ["--steps", "5"],
    "ga": ["--population", "16"],
}
"""Flags of each agent."""


def episodes_of(folder: Path) -> int:
    """Episodes that a run has written so far."""
    path = folder / "episodes.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def train(command: list[str], folder: Path, interrupt_at: int | None = None) -> None:
    """Run the command line; Ctrl-C it after so many episodes. Raises ``CalledProcessError`` if it fails."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while interrupt_at is not None and process.poll() is None:
        if episodes_of(folder) >= interrupt_at:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(1.0)
    code = process.wait()
    if code not in (0, 130):  # 130: stopped by Ctrl-C
        raise subprocess.CalledProcessError(code, command)


def run(agent: str, seed: int, arguments: argparse.Namespace) -> list[Episode]:
    """Train one agent (or go on), with an interruption halfway, and read its episodes."""
    folder = arguments.folder / f"{agent}-{seed}"
    places = ["--max-dft-calls", str(arguments.calculations)]
    for flag in ("store", "workers"):
        if getattr(arguments, flag) is not None:
            places += [f"--{flag}", str(getattr(arguments, flag))]
    crystaljax = [sys.executable, "-m", "crystaljax.cli", "train"]
    resume = [*crystaljax, "--resume", "--run", str(folder), *places]
    start = time.perf_counter()
    if not (folder / "config.json").exists():
        fresh = [*crystaljax, "--task", arguments.task, "--agent", agent, "--episodes", str(EPISODES)]
        fresh += ["--lanes", str(LANES), "--seed", str(seed), "--run", str(folder)]
        fresh += [word for option in arguments.engine_option for word in ("--engine-option", option)]
        # Half of the calculations, if about every second crystal is refused for its electrons.
        train([*fresh, *SETTINGS[agent], *places], folder, interrupt_at=arguments.calculations)
    train(resume, folder)
    episodes = read_all([folder])[0].episodes
    print(
        f"{agent}, seed {seed}: {metrics.calculations(episodes)[-1]} distinct, {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    return episodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--task", default="BandGap-C2-v0")
    parser.add_argument("--calculations", type=int, default=220, help="that each run may pay for")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/dft-agents"))
    parser.add_argument("--store", type=Path, help="results store (default: the user's)")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--engine-option", action="append", default=[], metavar="NAME=VALUE", help="repeatable")
    arguments = parser.parse_args()
    runs = {agent: [run(agent, seed, arguments) for seed in arguments.seeds] for agent in arguments.agents}
    budget = min(int(metrics.calculations(episodes)[-1]) for members in runs.values() for episodes in members)
    rows = {agent: [summary(episodes, budget, 1.12) for episodes in members] for agent, members in runs.items()}
    table = {
        agent: {name: float(np.mean([row[name] for row in members])) for name in members[0]}
        for agent, members in rows.items()
    }
    columns = list(next(iter(table.values())))
    print(f"\nwithin {budget} distinct DFT calculations\n{'':>8}" + "".join(f"{name:>22}" for name in columns))
    for agent, row in table.items():
        print(f"{agent:>8}" + "".join(f"{row[name]:>22.3f}" for name in columns))
    print(json.dumps({"task": arguments.task, "budget": budget, "seeds": arguments.seeds, **table}))


if __name__ == "__main__":
    main()
