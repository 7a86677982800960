"""What learning is worth: every algorithm against random search, by the best reward after so many distinct evaluations.

``python -m benchmarks learning`` (``--quick`` for fewer seeds and a smaller budget; needs
``pip install 'crystaljax[benchmark]'``). The cost of a crystal is its calculation, so the horizontal axis counts
*distinct* crystals, up to symmetry, that need one: a crystal that comes again costs nothing, and neither does one that
an engine refuses beforehand (an odd number of electrons where the occupations are fixed). The *area* is the mean of the
best reward so far over the budget, from the reward's floor upwards: 0 for a Gaussian, failures included, and -5 for the
bulk modulus. An algorithm has several episodes per evaluation of the budget; if it has repeated itself so often that
they end first, its best reward stands.

All have the settings below, one each, for few evaluations; they are the same for every task and every seed. They were
chosen by the areas of the tuning seeds (``--tuning`` runs these, and writes no report); what is reported is of other
seeds, which had no part in any choice. Targets are chosen such that good crystals are rare (the table says how rare),
or random search would leave nothing to be found.

Numbers are interquartile means over seeds, intervals those of :func:`crystaljax.agents.metrics.interval`. Writes
``benchmarks/results/learning.md`` and a picture for each task. The last line is one JSON object;
``area_ratio_to_random`` above 1 means more than random search, geometric mean over the tasks.
"""

from __future__ import annotations

import os

# One core: XLA's own threads and any BLAS. Must be set before JAX is imported.
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import dataclasses
import enum
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crystaljax.agents import hyperparameters as settings
from crystaljax.agents.base import Records, whole_training
from crystaljax.agents.designs import evaluate, random_designs
from crystaljax.agents.ledger import REFUSED
from crystaljax.agents.metrics import interquartile_mean, interval
from crystaljax.env import CrystalEnv, EnvParams
from crystaljax.symmetry import canonical_numbers
from crystaljax.tasks import make

RESULTS = Path(__file__).parent / "results"
RANDOM = "random"
GOOD = 0.9
"""A good crystal's reward."""
POINTS = 200
"""Points of a curve that are drawn."""


class Version(enum.Enum):
    """What is run. No two have a seed in common: settings are chosen on the first, results come from the others."""

    TUNING = "tuning"
    QUICK = "quick"
    FULL = "full"

    @property
    def seeds(self) -> tuple[int, ...]:
        return {
            Version.TUNING: tuple(range(10, 310, 10)),
            Version.QUICK: tuple(range(1001, 1011)),
            Version.FULL: tuple(range(2001, 2101)),
        }[self]

    @property
    def suffix(self) -> str:
        """Of the names of its files."""
        return "" if self is Version.FULL else f"-{self.value}"


BREEDING = {"lanes": 4, "population": 6, "mutation": 0.2, "tournament": 2}
POLICY = {"learning_rate": 2e-3, "anneal": False, "epochs": 4}
REPLAY = {"lanes": 4, "steps": 5, "start": 16, "buffer": 4000, "train_every": 1}
VALUES = {**REPLAY, "learning_rate": 1e-3, "exploration": 0.05, "final_epsilon": 0.2, "target_every": 100}
ALGORITHMS: dict[str, settings.AlgorithmConfig] = {
    RANDOM: settings.RandomConfig(steps=10),
    "ga": settings.GeneticConfig(**BREEDING),
    "annealing": settings.AnnealingConfig(lanes=1, temperature=0.02),
    "hybrid": settings.HybridConfig(**BREEDING, **POLICY, seeding=0.25, entropy=0.03),
    "ppo": settings.PPOConfig(**POLICY, lanes=4, steps=5, minibatches=4, entropy=0.02),
    "dqn": settings.DQNConfig(**VALUES),
    "rainbow": settings.RainbowConfig(**VALUES),
    "sac": settings.SACConfig(**REPLAY, learning_rate=3e-3, n_step=5, alpha=0.1, smoothing=0.05),
    "bo": settings.BayesianConfig(startup=12),
}
"""The settings of all algorithms; what is not named has its default."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A task to compare on.

    Attributes:
        task: id.
        evaluator: where rewards come from.
        target: what makes good crystals rare.
        budget, quick_budget: distinct evaluations.
        seeds: how many of the full version's.
        episodes: per evaluation of the budget; more where many crystals come again or are refused, which is free.
    """

    task: str
    evaluator: str
    target: float | None
    budget: int
    quick_budget: int
    seeds: int
    episodes: float

    def budget_of(self, version: Version) -> int:
        return self.budget if version is Version.FULL else self.quick_budget

    def seeds_of(self, version: Version) -> tuple[int, ...]:
        return version.seeds[: self.seeds] if version is Version.FULL else version.seeds


TRIALS = (
    Trial("Density-C1-v0", "unrelaxed-density", target=9.0, budget=600, quick_budget=300, seeds=30, episodes=1.5),
    Trial("Density-Rocksalt-Table-v0", "table", target=6.0, budget=40, quick_budget=40, seeds=100, episodes=8),
    Trial("BandGap-Rocksalt-Table-v0", "table", target=None, budget=40, quick_budget=40, seeds=100, episodes=8),
    Trial("BandGap-Fluorite-Table-v0", "table", target=4.0, budget=60, quick_budget=60, seeds=100, episodes=8),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """An algorithm on a task, S seeds.

    Attributes:
        best: float64 [S, budget], best reward so far after each distinct evaluation.
        evaluated: int [S], distinct evaluations until the episodes or the budget were over.
        seconds: of wall time for all seeds, compilation included.
    """

    best: np.ndarray
    evaluated: np.ndarray
    seconds: float

    @property
    def area(self) -> np.ndarray:
        """float64 [S]."""
        return self.best.mean(axis=1)


def floor(env: CrystalEnv) -> float:
    """The lowest reward of a crystal that has a value."""
    return env.objective.failure_reward if env.objective.names == ("bulk_modulus",) else 0.0


def distinct_evaluations(env: CrystalEnv, records: Records, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Which steps of a seed cost an evaluation: a mask [updates, T, L] of the records, and indices into what it picks.

    Crystals count in the order of update, step and lane, the first ``budget`` of them, unless they were refused without
    a calculation.
    """
    finished = np.asarray(records.finished) & ~np.isin(records.status, REFUSED)
    elements, skeletons = np.asarray(records.elements)[finished], np.asarray(records.skeleton)[finished]
    names = elements.copy()
    for index, skeleton in enumerate(env.skeletons):
        mine, sites = skeletons == index, skeleton.n_sites
        names[mine, :sites] = canonical_numbers(elements[mine, :sites], skeleton.permutations)
    first = np.unique(np.column_stack([names, skeletons]), axis=0, return_index=True)[1]
    return finished, np.sort(first)[:budget]


def best_so_far(env: CrystalEnv, records: Records, budget: int) -> tuple[np.ndarray, int]:
    """One seed's best reward after each distinct evaluation [budget], and how many there were."""
    finished, first = distinct_evaluations(env, records, budget)
    best = np.maximum.accumulate(np.maximum(np.asarray(records.reward)[finished][first], floor(env)))
    return np.concatenate([best, np.full(budget - len(first), best[-1])]) - floor(env), len(first)


def run(env: CrystalEnv, params: EnvParams, name: str, budget: int, episodes: float, seeds: Sequence[int]) -> Outcome:
    """An algorithm with all seeds as one program; ``episodes`` per evaluation of the budget."""
    config = ALGORITHMS[name]
    updates = config.updates_for(round(budget * episodes), env.horizon)
    config = dataclasses.replace(config, updates=updates)
    start = time.perf_counter()
    train = whole_training(config.make(env), updates, params)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    records = jax.device_get(jax.jit(jax.vmap(lambda key: train(key)[2]))(keys))
    env.evaluator.check()
    members = (jax.tree.map(lambda leaf, i=i: leaf[i], records) for i in range(len(seeds)))
    best, evaluated = zip(*(best_so_far(env, member, budget) for member in members), strict=True)
    return Outcome(np.stack(best), np.array(evaluated), time.perf_counter() - start)


def kept(path: Path | None, made_with: str, produce: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The arrays in a file, if they were made with this, or else those that are produced and then written to it."""
    if path is not None and path.exists():
        with np.load(path) as saved:
            if str(saved["made_with"]) == made_with:
                return {name: saved[name] for name in saved.files if name != "made_with"}
    arrays = produce()
    if path is not None:
        np.savez(path, **arrays, made_with=made_with)
    return arrays


def rarity(env: CrystalEnv, params: EnvParams, reward: float = GOOD, samples: int = 200_000) -> float:
    """Fraction of random labelings with at least that reward, estimated."""
    designs = random_designs(jax.random.key(0), env, samples)
    return float((jax.jit(lambda designs: evaluate(env, params, designs)[0])(designs) >= reward).mean())


def verdict(outcome: Outcome, baseline: Outcome) -> str:
    """Whether an algorithm beats random search, by the intervals of their areas."""
    mine, theirs = interval(outcome.area), interval(baseline.area)
    if mine[0] > theirs[1]:
        return "beats random"
    return "is beaten by random" if mine[1] < theirs[0] else "not told apart from random"


def ratio(outcome: Outcome, baseline: Outcome) -> float:
    """Of the areas, each the interquartile mean over seeds."""
    return float(interquartile_mean(outcome.area) / interquartile_mean(baseline.area))


def draw(path: Path, title: str, outcomes: dict[str, Outcome], ceiling: float) -> None:
    """The curves of all algorithms, interquartile mean and 95 % interval over the seeds, as a PNG."""
    from matplotlib.figure import Figure

    columns = 3
    others = [name for name in outcomes if name != RANDOM]
    rows = -(-len(others) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.5 * rows + 0.6), dpi=110, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, others, strict=False):
        for shown, colour in ((RANDOM, "0.45"), (name, "#0072b2")):
            budget = outcomes[shown].best.shape[1]
            drawn = np.unique(np.linspace(0, budget - 1, min(POINTS, budget)).round().astype(int))
            best = outcomes[shown].best[:, drawn]
            low, high = interval(best)
            axes.fill_between(drawn + 1, low, high, color=colour, alpha=0.25, lw=0)
            axes.plot(drawn + 1, interquartile_mean(best), color=colour, lw=1.8, label=shown)
        axes.axhline(ceiling, color="0.6", lw=0.8, ls="--")
        axes.set_title(f"{name}: {verdict(outcomes[name], outcomes[RANDOM])}", loc="left", fontsize=9)
        axes.legend(loc="lower right", edgecolor="none", fontsize=8)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(others) :]:
        axes.set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.supxlabel("Distinct crystals evaluated (count)", fontsize=10)
    figure.supylabel("Best reward so far above its floor", fontsize=10)
    figure.savefig(path)


def table(outcomes: dict[str, Outcome]) -> list[str]:
    """The lines of a Markdown table, the largest area first."""
    lines = [
        "| algorithm | area | 95 % interval | ratio to random | last best reward | distinct evaluations | |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, outcome in sorted(outcomes.items(), key=lambda item: -interquartile_mean(item[1].area)):
        low, high = interval(outcome.area)
        cells = (
            name,
            f"{interquartile_mean(outcome.area):.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{ratio(outcome, outcomes[RANDOM]):.2f}",
            f"{interquartile_mean(outcome.best[:, -1]):.3f}",
            f"{interquartile_mean(outcome.evaluated):.0f}",
            "" if name == RANDOM else verdict(outcome, outcomes[RANDOM]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def outcomes_of(
    trial: Trial, env: CrystalEnv, params: EnvParams, version: Version, names: Sequence[str], keep: Path | None
) -> dict[str, Outcome]:
    """Algorithms on a task, one after the other, with a line about each."""
    outcomes = {}
    budget, seeds = trial.budget_of(version), trial.seeds_of(version)
    for name in names:
        path = keep and keep / f"{trial.task}-{version.value}-{name}.npz"
        made_with = (
            f"{ALGORITHMS[name]}, {trial.episodes} episodes for each of {budget}, target {trial.target}, seeds {seeds}"
        )
        found = kept(path, made_with, lambda name=name: vars(run(env, params, name, budget, trial.episodes, seeds)))
        outcomes[name] = outcome = Outcome(found["best"], found["evaluated"], float(found["seconds"]))
        low, high = interval(outcome.area)
        print(
            f"{trial.task}: {name}, area {interquartile_mean(outcome.area):.3f} ({low:.3f} to {high:.3f}), "
            f"{interquartile_mean(outcome.evaluated):.0f} evaluations, {outcome.seconds:.0f} s",
            flush=True,
        )
    return outcomes


def compare(
    trial: Trial, version: Version, names: Sequence[str], keep: Path | None
) -> tuple[dict[str, Outcome], list[str]]:
    """Algorithms on a task, and of all of them the curves. Returns the outcomes and the lines of the report."""
    env, params = make(trial.task, trial.evaluator, target=trial.target, observation="flat", in_phase=True)
    budget = trial.budget_of(version)
    outcomes = outcomes_of(trial, env, params, version, names, keep)
    if names != list(ALGORITHMS) or version is Version.TUNING:
        return outcomes, []
    target = f"target {float(params.target):g} {env.objective.properties[0].unit}"
    picture = RESULTS / f"learning-{trial.task}{version.suffix}.png"
    draw(picture, f"{trial.task}, {target}", outcomes, env.objective.best_reward - floor(env))
    heading = [
        f"## {trial.task}, {target}, {budget} distinct evaluations, {len(trial.seeds_of(version))} seeds",
        "",
        f"Rewards: {env.evaluator.label}. {budget * trial.episodes:g} episodes. "
        f"Of random labelings, a fraction of {rarity(env, params):.1e} has a reward of at least {GOOD}.",
        "",
    ]
    return outcomes, [*heading, *table(outcomes), "", f"![curves]({picture.name})", ""]


def preamble(version: Version) -> list[str]:
    """The lines of the report before the tasks."""
    command = "python -m benchmarks learning" + " --quick" * (version is Version.QUICK)
    return [
        "# Learning against random search: interquartile means over seeds",
        "",
        f"`{command}`, seeds {spanned(version.seeds)}, of which each task has the first, as many as its heading "
        "says. Settings are in the script, the same for all tasks and seeds; "
        f"they were chosen with other seeds, {spanned(Version.TUNING.seeds)}, and the budgets of `--quick`.",
        "",
        "Area: mean of the best reward so far over the budget. All numbers are interquartile means over the seeds, "
        "intervals are bootstraps of it (95 %, percentile, over seeds). An algorithm beats random search if the "
        "intervals of the areas are disjoint. There are fewer distinct evaluations than the budget where an "
        "algorithm went on repeating itself until its episodes were over.",
        "",
    ]


def spanned(seeds: Sequence[int]) -> str:
    """Equally spaced whole numbers as text."""
    return f"{seeds[0]}, {seeds[1]} ... {seeds[-1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="fewer seeds, a smaller budget")
    which.add_argument("--tuning", action="store_true", help="the seeds that settings are chosen with; no report")
    parser.add_argument("--only", nargs="+", metavar="AGENT", default=list(ALGORITHMS), choices=list(ALGORITHMS))
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep outcomes here, and go on from those kept before")
    arguments = parser.parse_args()
    version = Version.QUICK if arguments.quick else Version.TUNING if arguments.tuning else Version.FULL
    names, keep = [name for name in ALGORITHMS if name in arguments.only], arguments.keep
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
    report = preamble(version)
    ratios: dict[str, list[float]] = {name: [] for name in names if name != RANDOM}
    for trial in TRIALS:
        outcomes, lines = compare(trial, version, names, keep)
        report += lines
        print("\n".join(lines), flush=True)
        for name in ratios if RANDOM in outcomes else ():
            ratios[name].append(ratio(outcomes[name], outcomes[RANDOM]))
    if names == list(ALGORITHMS) and version is not Version.TUNING:
        (RESULTS / f"learning{version.suffix}.md").write_text("\n".join(report))
    means = {name: round(float(np.exp(np.mean(np.log(values)))), 3) for name, values in ratios.items() if values}
    tasks = {name: [round(value, 3) for value in values] for name, values in ratios.items() if values}
    print(json.dumps({"area_ratio_to_random": means, "by_task": tasks, "tasks": [trial.task for trial in TRIALS]}))


if __name__ == "__main__":
    main()
