"""What learning is worth: every algorithm against random search, by the best reward after so many distinct evaluations.

``python benchmarks/learning.py`` (``--quick`` for a smaller budget; needs ``pip install 'crystaljax[benchmark]'``). The
cost of a crystal is its calculation, so the horizontal axis counts *distinct* crystals, up to symmetry, that need one:
a crystal that comes again costs nothing, and neither does one that an engine refuses beforehand (an odd number of
electrons where the occupations are fixed). The *area* is the mean of the best reward so far over the budget, from the
reward's floor upwards: 0 for a Gaussian, failures included, and -5 for the bulk modulus. An algorithm has several
episodes per evaluation of the budget; if it has repeated itself so often that they end first, its best reward stands.

All have the settings below, one each, for few evaluations; they are the same for every task and every seed. Targets are
chosen such that good crystals are rare (the table says how rare), or random search would leave nothing to be found.

Writes ``benchmarks/results/learning.md`` and a picture for each task. The last line is one JSON object;
``area_ratio_to_random`` above 1 means more than random search, geometric mean over the tasks.
"""

from __future__ import annotations

import os

# One core: XLA's own threads and any BLAS. Must be set before JAX is imported.
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from agents import hyperparameters as settings
from agents.base import Records, whole_training
from agents.designs import evaluate, random_designs
from agents.ledger import REFUSED
from agents.runner import MAKERS
from crystaljax.env import CrystalEnv, EnvParams
from crystaljax.symmetry import canonical_numbers
from crystaljax.tasks import make

RESULTS = Path(__file__).parent / "results"
RANDOM = "random"
SEEDS = tuple(range(10, 110, 10))
GOOD = 0.9
"""A good crystal's reward."""
RESAMPLES = 10_000
"""Of the bootstrap."""

REPLAY = {"lanes": 8, "steps": 5, "start": 64, "buffer": 4000, "train_every": 1, "learning_rate": 1e-3}
ALGORITHMS: dict[str, settings.AlgorithmConfig] = {
    RANDOM: settings.RandomConfig(steps=10),
    "ga": settings.GeneticConfig(),
    "annealing": settings.AnnealingConfig(lanes=2, temperature=0.02),
    "hybrid": settings.HybridConfig(seeding=0.25, learning_rate=1e-3, anneal=False),
    "ppo": settings.PPOConfig(steps=5, learning_rate=3e-3, anneal=False, minibatches=4, epochs=8),
    "dqn": settings.DQNConfig(**REPLAY, exploration=0.15, target_every=100),
    "rainbow": settings.RainbowConfig(**REPLAY, exploration=0.15, target_every=100),
    "sac": settings.SACConfig(**REPLAY, alpha=0.02, smoothing=0.02),
    "bo": settings.BayesianConfig(),
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
        episodes: per evaluation of the budget; more where many crystals come again or are refused.
    """

    task: str
    evaluator: str
    target: float | None
    budget: int
    quick_budget: int
    episodes: float


TRIALS = (
    Trial("Density-C1-v0", "unrelaxed-density", target=9.0, budget=1000, quick_budget=300, episodes=1.5),
    Trial("BandGap-Rocksalt-Table-v0", "table", target=None, budget=40, quick_budget=40, episodes=4),
    Trial("BandGap-Fluorite-Table-v0", "table", target=4.0, budget=60, quick_budget=60, episodes=4),
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
    return env.objective.failure_reward if env.objective.property == "bulk_modulus" else 0.0


def best_so_far(env: CrystalEnv, records: Records, budget: int) -> tuple[np.ndarray, int]:
    """One seed's best reward after each distinct evaluation [budget], and how many there were.

    ``records`` have leaves [updates, T, L, ...]; crystals count in the order of update, step and lane, unless they were
    refused without a calculation.
    """
    finished = np.asarray(records.finished) & ~np.isin(records.status, REFUSED)
    elements, skeletons = np.asarray(records.elements)[finished], np.asarray(records.skeleton)[finished]
    names = elements.copy()
    for index, skeleton in enumerate(env.skeletons):
        mine, sites = skeletons == index, skeleton.n_sites
        names[mine, :sites] = canonical_numbers(elements[mine, :sites], skeleton.permutations)
    names = np.concatenate([names, skeletons[:, None]], axis=1)
    first = np.sort(np.unique(names, axis=0, return_index=True)[1])[:budget]
    best = np.maximum.accumulate(np.maximum(np.asarray(records.reward)[finished][first], floor(env)))
    return np.concatenate([best, np.full(budget - len(first), best[-1])]) - floor(env), len(first)


def run(env: CrystalEnv, params: EnvParams, name: str, budget: int, episodes: float, seeds: Sequence[int]) -> Outcome:
    """An algorithm with all seeds as one program; ``episodes`` per evaluation of the budget."""
    config = ALGORITHMS[name]
    updates = config.updates_for(round(budget * episodes), env.horizon)
    config = dataclasses.replace(config, updates=updates)
    start = time.perf_counter()
    train = whole_training(MAKERS[type(config)](config, env), updates, params)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    records = jax.device_get(jax.jit(jax.vmap(lambda key: train(key)[2]))(keys))
    env.evaluator.check()
    members = (jax.tree.map(lambda leaf, i=i: leaf[i], records) for i in range(len(seeds)))
    best, evaluated = zip(*(best_so_far(env, member, budget) for member in members), strict=True)
    return Outcome(np.stack(best), np.array(evaluated), time.perf_counter() - start)


def kept(path: Path | None, env: CrystalEnv, params: EnvParams, name: str, budget: int, episodes: float) -> Outcome:
    """The outcome in a file, or else that of a run, which is then written to it; without a file just that of a run."""
    if path is not None and path.exists():
        with np.load(path) as saved:
            return Outcome(saved["best"], saved["evaluated"], float(saved["seconds"]))
    outcome = run(env, params, name, budget, episodes, SEEDS)
    if path is not None:
        np.savez(path, **vars(outcome))
    return outcome


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of the mean over the first axis: bounds [...] for values [S, ...]."""
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5], axis=0)
    return low, high


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


def draw(path: Path, title: str, outcomes: dict[str, Outcome], ceiling: float) -> None:
    """The curves of all algorithms, mean and 95 % interval over the seeds, as a PNG."""
    from matplotlib.figure import Figure

    columns = 3
    others = [name for name in outcomes if name != RANDOM]
    rows = -(-len(others) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.5 * rows + 0.6), dpi=110, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, others, strict=False):
        for shown, colour in ((RANDOM, "0.45"), (name, "#0072b2")):
            best = outcomes[shown].best
            count = np.arange(1, best.shape[1] + 1)
            low, high = interval(best)
            axes.fill_between(count, low, high, color=colour, alpha=0.25, lw=0)
            axes.plot(count, best.mean(axis=0), color=colour, lw=1.8, label=shown)
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
    baseline = outcomes[RANDOM]
    lines = [
        "| algorithm | area | 95 % interval | ratio to random | last best reward | distinct evaluations | |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, outcome in sorted(outcomes.items(), key=lambda item: -item[1].area.mean()):
        low, high = interval(outcome.area)
        cells = (
            name,
            f"{outcome.area.mean():.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{outcome.area.mean() / baseline.area.mean():.2f}",
            f"{outcome.best[:, -1].mean():.3f}",
            f"{outcome.evaluated.mean():.0f}",
            "" if name == RANDOM else verdict(outcome, baseline),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def outcomes_of(
    trial: Trial, env: CrystalEnv, params: EnvParams, budget: int, names: Sequence[str], keep: Path | None
) -> dict[str, Outcome]:
    """Algorithms on a task, one after the other, with a line about each."""
    outcomes = {}
    for name in names:
        path = keep and keep / f"{trial.task}-{budget}-{name}.npz"
        outcomes[name] = kept(path, env, params, name, budget, trial.episodes)
        low, high = interval(outcomes[name].area)
        print(
            f"{trial.task}: {name}, area {outcomes[name].area.mean():.3f} ({low:.3f} to {high:.3f}), "
            f"{outcomes[name].evaluated.mean():.0f} evaluations, {outcomes[name].seconds:.0f} s",
            flush=True,
        )
    return outcomes


def compare(trial: Trial, quick: bool, names: Sequence[str], keep: Path | None) -> tuple[dict[str, Outcome], list[str]]:
    """Algorithms on a task, and of all of them the curves. Returns the outcomes and the lines of the report."""
    env, params = make(trial.task, trial.evaluator, target=trial.target, observation="flat", in_phase=True)
    budget = trial.quick_budget if quick else trial.budget
    outcomes = outcomes_of(trial, env, params, budget, names, keep)
    if RANDOM not in names:
        return outcomes, []
    target = f"target {float(params.target):g} {env.objective.unit}"
    picture = RESULTS / f"learning-{trial.task}{'-quick' if quick else ''}.png"
    draw(picture, f"{trial.task}, {target}", outcomes, env.objective.best_reward - floor(env))
    heading = [
        f"## {trial.task}, {target}, {budget} distinct evaluations, {len(SEEDS)} seeds",
        "",
        f"Rewards: {env.evaluator.label}. {budget * trial.episodes:g} episodes. "
        f"Of random labelings, a fraction of {rarity(env, params):.1e} has a reward of at least {GOOD}.",
        "",
    ]
    return outcomes, [*heading, *table(outcomes), "", f"![curves]({picture.name})", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller budget")
    parser.add_argument("--only", nargs="+", metavar="AGENT", default=list(ALGORITHMS), choices=list(ALGORITHMS))
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep outcomes here, and go on from those kept before")
    arguments = parser.parse_args()
    names, keep = [name for name in ALGORITHMS if name in arguments.only], arguments.keep
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/learning.py" + " --quick" * arguments.quick
    report = [
        "# Learning against random search",
        "",
        f"`{command}`, seeds {', '.join(map(str, SEEDS))}. Area: mean of the best reward so far over the budget, mean "
        "over the seeds; its 95 % interval is a bootstrap over the seeds. An algorithm beats random search if the "
        "intervals are disjoint. Settings are in the script, the same for all tasks and seeds.",
        "",
    ]
    ratios: dict[str, list[float]] = {name: [] for name in names if name != RANDOM}
    for trial in TRIALS:
        outcomes, lines = compare(trial, arguments.quick, names, keep)
        report += lines
        print("\n".join(lines), flush=True)
        for name in ratios if RANDOM in outcomes else ():
            ratios[name].append(outcomes[name].area.mean() / outcomes[RANDOM].area.mean())
    if names == list(ALGORITHMS):
        (RESULTS / f"learning{'-quick' if arguments.quick else ''}.md").write_text("\n".join(report))
    means = {name: round(float(np.exp(np.mean(np.log(values)))), 3) for name, values in ratios.items() if values}
    tasks = {name: [round(float(value), 3) for value in values] for name, values in ratios.items() if values}
    print(json.dumps({"area_ratio_to_random": means, "by_task": tasks, "tasks": [trial.task for trial in TRIALS]}))


if __name__ == "__main__":
    main()
