"""How many calculations an agent needs: every algorithm on crystals that are all calculated already.

``python -m benchmarks sample-efficiency [--trials NAME ...] [--rows NAME ...] [--seeds N] [--fresh] [--tuning]`` (needs
``pip install 'crystaljax[benchmark]'``). A row is an algorithm, a trial a table of results with a target. What counts
is *distinct* crystals, up to symmetry, that need a calculation: a crystal that comes again costs nothing, and neither
does one that an engine refuses beforehand (an odd number of electrons). Batches are of 16.

*Area*: the mean over n = 1 ... N of the best reward after n evaluations, from the reward's floor upwards. *Success at
n*: a crystal within the tolerance of the target is among the first n. *Good crystals*: how many with a reward near the
best are among them. Means over seeds with 95 % intervals: bootstrap, for shares Wilson's.

The prior of the hyperparameters and the screen of formulas were chosen by the gaps of the tables of :data:`TUNING`;
rows of the learning agents have the settings of ``benchmarks/learning.py`` (tuned on other tables and seeds) at batches
of 16. Finished rows stay in ``benchmarks/results/sample-efficiency.json``, seed by seed and with the commit that made
them, and are not calculated again unless their settings change or with ``--fresh``. Writes
``benchmarks/results/sample-efficiency.md``. The last line is one JSON object, for perovskites at 5 eV.
"""

from __future__ import annotations

import os

# One core: XLA's own threads and any BLAS. Must be set before JAX is imported.
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}

import argparse
import dataclasses
import functools
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from benchmarks import learning
from crystaljax.agents import hyperparameters as settings
from crystaljax.agents.base import Records, whole_training
from crystaljax.agents.ledger import REFUSED
from crystaljax.env import CrystalEnv, EnvParams
from crystaljax.files import replace_text
from crystaljax.status import Status
from crystaljax.tasks import make

RESULTS = Path(__file__).parent / "results"
LANES = 16
SEEDS, TUNING_SEEDS = 5001, 10
"""The first of the reported seeds, and of those for tuning."""
RESAMPLES = 2000
PART = 5
"""Seeds of a row on the host after which it is saved."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A table and a target.

    Attributes:
        task, target: what to design.
        budgets: distinct evaluations after which success and good crystals are counted; the last one ends the run.
        tolerance: distance from the target that is a success, in the unit of the property.
        good: reward of a good crystal.
    """

    task: str
    target: float
    budgets: tuple[int, ...] = (30, 100, 300)
    tolerance: float = 0.1
    good: float = 0.9

    @property
    def name(self) -> str:
        return f"{self.task.removesuffix('-Table-v0')}-{self.target:g}"


TRIALS = (
    Trial("BandGap-Perovskite-Table-v0", 5.0),
    Trial("BandGap-Perovskite-Table-v0", 1.12),
    Trial("Density-Fluorite-Table-v0", 5.0, (30, 100)),
    Trial("BulkModulus-Fluorite-Table-v0", 150.0, (30, 100), tolerance=7.5, good=-0.1),
    Trial("Density-Rocksalt-Table-v0", 6.0, (30, 60)),
)
MAIN = TRIALS[0]
TUNING = (
    Trial("BandGap-Rocksalt-Table-v0", 3.0, (15, 30, 60)),
    Trial("BandGap-Zincblende-Table-v0", 2.0, (15, 30, 60)),
    Trial("BandGap-CsCl-Table-v0", 2.0, (15, 30, 60)),
    Trial("BandGap-Fluorite-Table-v0", 4.0, (30, 100)),
)
"""On these, and with other seeds, everything was chosen that was chosen."""


def in_batches(name: str, **changes: Any) -> settings.AlgorithmConfig:
    """The settings of ``benchmarks/learning.py`` at batches of 16."""
    return dataclasses.replace(learning.ALGORITHMS[name], lanes=LANES, **changes)


@dataclasses.dataclass(frozen=True)
class Row:
    """An algorithm: its settings, and episodes for each evaluation (crystals may repeat, or be refused)."""

    config: settings.AlgorithmConfig
    episodes: float = 4.0


ROWS = {
    "random": Row(settings.RandomConfig(lanes=LANES, steps=3)),
    "random-neutral": Row(settings.NeutralConfig(lanes=LANES), 2.5),
    "ga": Row(in_batches("ga")),
    "ga-memory": Row(in_batches("ga", remember=True, screen=True, first_batch="neutral"), 2.5),
    "annealing": Row(in_batches("annealing")),
    "bo": Row(in_batches("bo"), 2.5),
    "ppo": Row(in_batches("ppo")),
    "dqn": Row(in_batches("dqn")),
    "rainbow": Row(in_batches("rainbow")),
    "sac": Row(in_batches("sac")),
    "gp-random": Row(settings.GaussianProcessConfig(lanes=LANES, first_batch="random"), 1.15),
    "gp": Row(settings.GaussianProcessConfig(lanes=LANES), 1.15),
}
ON_HOST = ("bo", "gp-random", "gp", "random-neutral")
"""Rows that ask the host at each update, so that their seeds run one after the other."""


def evaluated(env: CrystalEnv, records: Records, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and values of one seed's distinct evaluations, in their order, at most ``budget``.

    ``records`` have leaves [updates, T, L, ...].
    """
    finished, first = learning.distinct_evaluations(env, records, budget)
    value = np.where(np.asarray(records.status) == Status.OK, np.asarray(records.values)[..., 0], np.nan)
    return np.asarray(records.reward)[finished][first], value[finished][first]


def measured(env: CrystalEnv, trial: Trial, records: Records) -> dict[str, Any]:
    """What one seed achieved."""
    budget = trial.budgets[-1]
    reward, value = evaluated(env, records, budget)
    above = np.maximum.accumulate(np.maximum(reward, learning.floor(env))) - learning.floor(env)
    best = np.concatenate([above, np.full(budget - len(above), above[-1])])
    hit = np.abs(value - trial.target) <= trial.tolerance
    return {
        "area": round(float(best.mean()), 5),
        "success": [bool(hit[:n].any()) for n in trial.budgets],
        "good": [int((reward[:n] >= trial.good).sum()) for n in trial.budgets],
        "evaluated": len(reward),
    }


@functools.cache
def program(env: CrystalEnv, name: str, updates: int, count: int) -> Callable[..., Records]:
    """A row, compiled for so many seeds at a time; a function of their keys and of the environment's parameters."""
    config = dataclasses.replace(ROWS[name].config, updates=updates)
    train = whole_training(config.make(env), updates, env.default_params)
    keys = jnp.stack([jax.random.key(0)] * count)
    mapped = jax.jit(jax.vmap(lambda key, params: train(key, params)[2], in_axes=(0, None)))
    return mapped.lower(keys, jax.tree.map(jnp.asarray, env.default_params)).compile()


def run(env: CrystalEnv, params: EnvParams, trial: Trial, name: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """What each seed achieved, with CPU seconds per update (compilation aside)."""
    row = ROWS[name]
    updates = row.config.updates_for(round(trial.budgets[-1] * row.episodes) + 2 * LANES, env.horizon)
    groups = [[seed] for seed in seeds] if name in ON_HOST else [list(seeds)]
    params, outcomes = jax.tree.map(jnp.asarray, params), []
    for group in groups:
        keys = jnp.stack([jax.random.key(seed) for seed in group])
        compiled = program(env, name, updates, len(group))
        begin = time.process_time()
        records = jax.device_get(compiled(keys, params))
        spent = (time.process_time() - begin) / len(group) / updates
        for i, seed in enumerate(group):
            member = jax.tree.map(lambda leaf, i=i: leaf[i], records)
            outcomes.append({"seed": seed, **measured(env, trial, member), "cpu_s_per_round": round(spent, 5)})
    env.evaluator.check()
    return outcomes


def share_interval(hits: np.ndarray) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, from bools [S]."""
    found = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return found.low, found.high


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean of [S]."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    return tuple(np.percentile(values[drawn].mean(axis=1), [2.5, 97.5]))


def difference_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Bootstrap 95 % interval of the difference of two means over independent seeds."""
    rng = np.random.default_rng(0)
    means = [x[rng.integers(len(x), size=(RESAMPLES, len(x)))].mean(axis=1) for x in (first, second)]
    return tuple(np.percentile(means[0] - means[1], [2.5, 97.5]))


def with_interval(value: float, bounds: tuple[float, float], digits: int) -> str:
    return f"{value:.{digits}f} ({bounds[0]:.{digits}f} to {bounds[1]:.{digits}f})"


def table(trial: Trial, rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The lines of a trial's Markdown table, and how many more good crystals the model finds than the baseline."""
    heads = [f"success at {n}" for n in trial.budgets] + [f"good at {n}" for n in trial.budgets]
    lines = [f"| | area at {trial.budgets[-1]} | {' | '.join(heads)} | evaluations | seeds | CPU s per round |"]
    lines.append("|---|" + "---:|" * (len(heads) + 4))
    for name in (name for name in ROWS if name in rows):
        seeds = rows[name]
        area = np.array([one["area"] for one in seeds])
        cells = [with_interval(area.mean(), mean_interval(area), 3)]
        for place in range(len(trial.budgets)):
            hits = np.array([one["success"][place] for one in seeds])
            cells.append(with_interval(hits.mean(), share_interval(hits), 2))
        for place in range(len(trial.budgets)):
            good = np.array([one["good"][place] for one in seeds])
            cells.append(with_interval(good.mean(), mean_interval(good), 1))
        cells += [f"{np.mean([one['evaluated'] for one in seeds]):.0f}", str(len(seeds))]
        cells.append(f"{np.mean([one['cpu_s_per_round'] for one in seeds]):.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if {"gp", "random-neutral"} <= rows.keys() and 100 in trial.budgets:
        place = trial.budgets.index(100)
        mine, theirs = (np.array([one["good"][place] for one in rows[name]]) for name in ("gp", "random-neutral"))
        shown = with_interval(mine.mean() - theirs.mean(), difference_interval(mine, theirs), 1)
        lines += ["", f"Good crystals after 100 evaluations, gp less random-neutral: {shown}."]
    return lines


def report(kept: dict[str, Any]) -> str:
    """The page of results."""
    lines = [
        "# Sample efficiency",
        "",
        "Made by `python -m benchmarks sample-efficiency`; what the columns mean is said at the top of",
        "`benchmarks/sample_efficiency.py`. Means over seeds, 95 % intervals in brackets; batches of 16. Chosen on",
        "other tables (skeleton digests): "
        + ", ".join(f"{trial.name} (`{digest(trial)}`)" for trial in TUNING)
        + ", by the likelihood of their gaps.",
        "Perovskites are not untouched: the outline (two processes, improvement of the reward, neutral start) was",
        "found on them, and three widths of the prior and the meaning of neutral were compared there too, on seeds 100",
        "to 115.",
        "",
    ]
    for trial in TRIALS:
        rows = {name: kept[trial.name][name]["seeds"] for name in ROWS if name in kept.get(trial.name, {})}
        if rows:
            env, params = environment(trial)
            rewards = np.asarray(env.objective.reward(*env.evaluator.landscape, jnp.float32(trial.target)))
            values, statuses = map(np.asarray, env.evaluator.landscape)
            counted = ~np.isin(statuses, REFUSED)
            near = (statuses == Status.OK) & (np.abs(values - trial.target) <= trial.tolerance)
            lines += [
                f"## {trial.task}, target {trial.target:g} {env.objective.properties[0].unit}",
                "",
                f"{counted.sum():,} crystals that need a calculation; {near.sum()} within {trial.tolerance:g} "
                f"{env.objective.properties[0].unit} of the target, {(rewards >= trial.good).sum()} good ones (reward "
                f"at least {trial.good:g}). Skeleton `{digest(trial)}`.",
                "",
                *table(trial, rows),
                "",
                *[f"Not run yet: {', '.join([*(name for name in ROWS if name not in rows), 'dyna'])}.", ""],
            ]
    return "\n".join(lines)


def environment(trial: Trial) -> tuple[CrystalEnv, EnvParams]:
    """The environment of a trial, one for all of its task, and its parameters."""
    env = of_task(trial.task)
    return env, env.with_target(trial.target)


@functools.cache
def of_task(task: str) -> CrystalEnv:
    return make(task, observation="flat", in_phase=True)[0]


def digest(trial: Trial) -> str:
    """Of a trial's skeleton."""
    return environment(trial)[0].skeletons[0].digest


def commit() -> str:
    """The commit checked out, or nothing outside one."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def described(config: settings.AlgorithmConfig) -> str:
    """An algorithm's settings that are not the defaults."""
    chosen = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    }
    return f"{type(config).__name__} {chosen}"


def rows_of(kept: dict[str, Any], trial: Trial, name: str, seeds: Sequence[int], save: Callable[[], None], fresh: bool):
    """Run what is missing of a row, and keep it."""
    made_with = f"{described(ROWS[name].config)}, {ROWS[name].episodes} episodes, {trial}"
    rows = kept.setdefault(trial.name, {})
    if fresh or rows.get(name, {}).get("made_with") != made_with:
        rows[name] = {"made_with": made_with, "commit": commit(), "seeds": []}
    outcomes = rows[name]["seeds"]
    missing = [seed for seed in seeds if seed not in {one["seed"] for one in outcomes}]
    at_once = PART if name in ON_HOST else max(len(missing), 1)
    for start in range(0, len(missing), at_once):
        outcomes += run(*environment(trial), trial, name, missing[start : start + at_once])
        save()
    area, success, good, cpu = (
        np.array([one[key] for one in outcomes], float) for key in ("area", "success", "good", "cpu_s_per_round")
    )
    means = f"area {area.mean():.3f}, success {success.mean(axis=0).round(2)}, good {good.mean(axis=0).round(1)}"
    print(
        f"{trial.name}: {name}, {len(outcomes)} seeds, {means}, CPU {cpu.mean():.3f} s per round",
        flush=True,
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", nargs="+", metavar="NAME", help="such as BandGap-Perovskite-5 (default: all)")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--fresh", action="store_true", help="calculate again what is kept")
    parser.add_argument("--tuning", action="store_true", help="on the tuning tables and seeds; nothing is written")
    options = parser.parse_args()
    trials = TUNING if options.tuning else TRIALS
    first = TUNING_SEEDS if options.tuning else SEEDS
    path = RESULTS / "sample-efficiency.json"
    kept = json.loads(path.read_text()) if path.exists() and not options.tuning else {}

    def save() -> None:
        if not options.tuning:
            replace_text(path, json.dumps(kept, separators=(",", ":")).replace('{"seed"', '\n{"seed"') + "\n")

    for name in options.rows:
        for trial in trials:
            if options.trials is None or trial.name in options.trials:
                rows_of(kept, trial, name, range(first, first + options.seeds), save, options.fresh)
    if options.tuning:
        return
    (RESULTS / "sample-efficiency.md").write_text(report(kept))
    rows = {name: kept[MAIN.name][name]["seeds"] for name in ROWS if name in kept.get(MAIN.name, {})}
    place = MAIN.budgets.index(100)

    def means(value: Callable[[dict[str, Any]], float]) -> dict[str, float]:
        return {name: round(float(np.mean([value(one) for one in seeds])), 3) for name, seeds in rows.items()}

    print(
        json.dumps(
            {
                "success_at_100": means(lambda one: one["success"][place]),
                "area_at_300": means(lambda one: one["area"]),
                "good_at_100": means(lambda one: one["good"][place]),
            }
        )
    )


if __name__ == "__main__":
    main()
