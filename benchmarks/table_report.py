"""How hard each task with a table is, exactly, and a picture of its landscape.

    python -m benchmarks table-report [--tolerance 0.01] [--pictures benchmarks/results/tables]

For every shipped table that has a reward, at its default target: how rewards are distributed over the assignments of
elements to orbits (what a random policy earns), how many crystals failed and why, how many are within the tolerance of
the best, and how long random search takes to find one of these. Everything is computed from the table, nothing is
sampled. Random search draws assignments uniformly, with replacement. If ``P`` is the probability of all of the best
together, it has seen another crystal ``c`` before them with probability ``p_c / (p_c + P)``, so it evaluates
``1 + sum_c p_c / (p_c + P)`` distinct crystals on average, in ``1 / P`` episodes.

Prints Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np

from crystaljax import tables
from crystaljax.objectives import OBJECTIVES, Objective
from crystaljax.status import Status
from crystaljax.tables import Table

QUANTILES = (0.5, 0.9, 0.99)


def rewards(table: Table, objective: Objective) -> np.ndarray:
    """float [E], of every entry at the default target."""
    return np.asarray(objective.reward(table.values, table.statuses, np.float32(objective.target)), float)


def probabilities(table: Table) -> np.ndarray:
    """float [E], of every entry, if elements are drawn uniformly for the orbits."""
    _, row = tables.labelings(table.skeleton, table.vocabulary)
    return np.bincount(row, minlength=len(table.entries)) / len(row)


def random_search(probabilities: np.ndarray, best: np.ndarray) -> tuple[float, float]:
    """Expected episodes and expected distinct crystals until one of the ``best`` (bool [E]) is drawn."""
    hit = probabilities[best].sum()
    others = probabilities[~best]
    return 1 / hit, 1 + (others / (others + hit)).sum()


def report(table: Table, objective: Objective, tolerance: float) -> list[str]:
    """The cells of the table's row."""
    _, row = tables.labelings(table.skeleton, table.vocabulary)
    earned = rewards(table, objective)
    best = earned >= earned.max() - tolerance
    episodes, distinct = random_search(probabilities(table), best)
    over_assignments = earned[row]
    failures = {s.name: int((table.statuses == s).sum()) for s in Status if s != Status.OK}
    top = table.entries[int(earned.argmax())]
    return [
        table.name,
        f"{len(earned)}",
        ", ".join(f"{count} {name}" for name, count in failures.items() if count) or "none",
        f"{over_assignments.mean():.3f}",
        " / ".join(f"{np.quantile(over_assignments, q):.3f}" for q in QUANTILES),
        f"{' '.join(top.elements)}, {top.value:.4g} {tables.UNITS[table.property]}: {earned.max():.4f}",
        f"{best.sum()}",
        f"{episodes:.0f}",
        f"{distinct:.0f}",
    ]


def draw(table: Table, objective: Objective, path: Path) -> None:
    """The reward of every assignment: first orbit down, second across; best over the others. Failures are grey."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    _, row = tables.labelings(table.skeleton, table.vocabulary)
    size = len(table.vocabulary)
    earned = np.where(table.statuses == Status.OK, rewards(table, objective), -np.inf)
    grid = earned[row].reshape(size, size, -1).max(axis=-1)
    figure, axes = pyplot.subplots(figsize=(4.4, 3.8), layout="constrained")
    colours = pyplot.get_cmap("viridis").with_extremes(bad="0.85")
    lowest = objective.failure_reward if objective.best_reward == 0.0 else 0.0
    picture = axes.imshow(np.ma.masked_invalid(grid), cmap=colours, vmin=lowest, vmax=objective.best_reward)
    for a, x in np.argwhere(grid == grid.max()):
        axes.plot(x, a, marker="o", markersize=7, markerfacecolor="none", markeredgecolor="red")
    axes.set_xticks(range(size), table.vocabulary.symbols, fontsize=6)
    axes.set_yticks(range(size), table.vocabulary.symbols, fontsize=6)
    axes.set_title(f"{table.name}, target {objective.target:g} {objective.properties[0].unit}", fontsize=8)
    figure.colorbar(picture, label="reward (grey: failed)")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tolerance", type=float, default=0.01, help="of the reward, for what counts as best")
    parser.add_argument("--pictures", type=Path, default=Path(__file__).parent / "results" / "tables")
    options = parser.parse_args()
    options.pictures.mkdir(parents=True, exist_ok=True)
    within = f"within {options.tolerance:g} of it"
    columns = "table", "crystals", "failed", "mean reward", "median / 90 % / 99 %", "best crystal", within
    columns += "episodes of random search", "distinct crystals of random search"
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in tables.shipped():
        table = tables.load(name)
        if table.property in OBJECTIVES:
            objective = OBJECTIVES[table.property]
            print("| " + " | ".join(report(table, objective, options.tolerance)) + " |")
            draw(table, objective, options.pictures / f"{name}.png")


if __name__ == "__main__":
    main()
