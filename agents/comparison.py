"""Runs side by side, as a page: curves over distinct calculations, metrics, crystals, costs and provenance.

Runs that differ by their seed only are one group, and numbers of a group are interquartile means over its seeds with
bootstrap intervals. Groups are compared if they solve the same problem with values from the same source, and after the
same number of distinct calculations.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from crystaljax import caveats, viewer
from crystaljax.agents import config as configs
from crystaljax.agents import metrics, page
from crystaljax.agents.config import RunConfig
from crystaljax.agents.ledger import Episode
from crystaljax.agents.metrics import Goal
from crystaljax.agents.runs import Run
from crystaljax.caveats import Caveat
from crystaljax.run_folder import aim_text, crystal_file, values_text, words

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")
"""Of groups; distinguishable by the colour-blind (Okabe and Ito)."""
POINTS = 200
"""Points at which a curve is drawn, at most."""
SHOWN_CRYSTALS = 5
"""Crystals of a group that are drawn."""
WINDOW = 0.1
"""Part of the compared calculations over whose episodes the mean reward is taken."""
ASIDE = ("seed", "checkpoint_every", *configs.MOVABLE)
"""Settings in which the runs of a group may differ."""
MISSING_SMACT = "Neutral and plausible crystals are counted with the extra [smact]: pip install 'crystaljax[smact]'."


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ by their seed only.

    Attributes:
        label: the agent, and what tells it from the other groups of its problem.
        runs: in order of their seeds.
    """

    label: str
    runs: list[Run]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What groups are compared on.

    Attributes:
        groups: in order of their labels.
        goals: what counts as a success, by property.
    """

    groups: list[Group]
    goals: dict[str, Goal]

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    @functools.cached_property
    def budget(self) -> int:
        """Distinct calculations after which groups are compared: as many as all runs have that have any."""
        made = [int(metrics.calculations(run.episodes)[-1]) for run in self.runs if run.episodes]
        return min((count for count in made if count), default=0)

    @property
    def window(self) -> int:
        """Distinct calculations over which the mean reward is taken."""
        return max(1, math.ceil(WINDOW * self.budget))


def write_report(
    runs: Sequence[Run], path: Path, *, known: Collection[str] | None = None, tolerance: float | None = None
) -> None:
    """Compare runs on a page.

    Args:
        runs: of any problems and agents; finished or not.
        path: HTML, or Markdown whose pictures and CIF files go into a folder beside it.
        known: reduced formulas of a reference (:func:`crystaljax.agents.reference.read`), for novelty.
        tolerance: distance from the target that counts as success, in the unit of the property; by default that of
            :mod:`crystaljax.properties`.

    Raises:
        ValueError: for a name of another kind, a seed that a group has twice, and a tolerance that is negative.
    """
    page.check_name(path)
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"a tolerance of {tolerance} is no distance from the target; give 0 or more")
    blocks: list[page.Block] = []
    for number, problem in enumerate(problems(runs, tolerance), start=1):
        blocks += _blocks(problem, known, f"{number}")
    page.write(path, "CrystalJAX report", blocks)


def problems(runs: Sequence[Run], tolerance: float | None = None) -> list[Problem]:
    """The groups of runs, by what they can be compared on; raises ``ValueError`` for a seed that a group has twice."""
    by_problem: dict[str, dict[RunConfig, list[Run]]] = {}
    for run in runs:
        by_problem.setdefault(_problem_key(run), {}).setdefault(_group_key(run), []).append(run)
    found = []
    for members in by_problem.values():
        groups = [Group(label, members[key]) for key, label in _labels(list(members)).items()]
        for group in groups:
            _refuse_twins(group)
            group.runs.sort(key=lambda run: run.config.seed)
        first = groups[0].runs[0]
        groups.sort(key=lambda group: group.label)
        found.append(Problem(groups, _goals(first, tolerance)))
    return found


def _goals(run: Run, tolerance: float | None) -> dict[str, Goal]:
    """What counts as a success; raises ``ValueError`` for one tolerance and several properties."""
    wanted = run.best["properties"]
    if tolerance is not None and len(wanted) > 1:
        raise ValueError(f"a tolerance of {tolerance:g} is for one property, not {', '.join(wanted)}; leave it out")
    found = {}
    for name, goal in wanted.items():
        low = -math.inf if goal["low"] is None else goal["low"]
        high = math.inf if goal["high"] is None else goal["high"]
        found[name] = Goal(low, high, goal["tolerance"] if tolerance is None else tolerance)
    return found


def _problem_key(run: Run) -> str:
    facts = {name: run.best[name] for name in ("task", "objective", "properties", "source", "fingerprint")}
    settings = [run.config.structures, run.config.vocabulary, run.config.mode]
    return json.dumps([facts, settings], sort_keys=True)


def _group_key(run: Run) -> RunConfig:
    """The settings of a run without those that may differ in a group."""
    aside = {name: getattr(RunConfig, name) for name in ASIDE}
    return dataclasses.replace(run.config, target=None, **aside)  # which the objective of the problem holds


def _labels(keys: list[RunConfig]) -> dict[RunConfig, str]:
    """A name for each group: agent, network if there are several, and how it differs from others of its agent."""
    flat = {key: _flat(key) for key in keys}
    several_networks = len({key.network for key in keys}) > 1
    found = {}
    for key in keys:
        rivals = [flat[other] for other in keys if flat[other]["agent"] == flat[key]["agent"]]
        differing = [name for name in flat[key] if any(rival[name] != flat[key][name] for rival in rivals)]
        network = [key.network] if several_networks else []
        rest = [f"{name}={flat[key][name]}" for name in differing if name != "network"]
        found[key] = ", ".join([flat[key]["agent"], *network, *rest])
    return found


def _flat(config: RunConfig) -> dict[str, Any]:
    table = configs.to_table(config)
    own = table["agent"]
    return {**{name: value for name, value in table.items() if name != own}, **table[own]}


def _refuse_twins(group: Group) -> None:
    seen: dict[int, Path] = {}
    for run in group.runs:
        if (twin := seen.setdefault(run.config.seed, run.folder)) != run.folder:
            raise ValueError(
                f"{twin} and {run.folder} have the same seed {run.config.seed} and the same settings, so they are one "
                "run; give one of them"
            )


def _blocks(problem: Problem, known: Collection[str] | None, number: str) -> list[page.Block]:
    """What the page says about a problem."""
    run = problem.runs[0]
    source = _source(run)
    blocks: list[page.Block] = [
        page.Heading(f"{run.best['task']}, {aim_text(run.best)}"),
        page.Text(f"Values: {source}."),
    ]
    if problem.budget:
        blocks += [page.Picture(f"{number}-curves", viewer.png(draw_curves(problem)), _curve_caption(problem))]
        blocks += [page.Heading("Metrics", 3), _metric_table(problem, known), page.Text(_metric_notes(problem, known))]
    else:
        blocks.append(page.Text("No run has calculated a crystal yet, so there is nothing to compare."))
    for index, group in enumerate(problem.groups, start=1):
        blocks += [page.Heading(f"Best crystals, {group.label}", 3), *_crystals(group, f"{number}-{index}")]
    blocks += [page.Heading("Runs", 3), _run_table(problem)]
    if any(run.accounting for run in problem.runs):
        blocks += [page.Heading("Calculations", 3), *_accounting(problem)]
    return [*blocks, page.Heading("Provenance", 3), *_provenance(problem)]


def _source(run: Run) -> str:
    """Where values come from, marked if it is not DFT."""
    mark = {"surrogate": " (surrogate: not DFT)", "no DFT": ""}.get(run.source, "")
    return run.best["source"] + mark


def _axis(run: Run) -> str:
    return {
        "DFT": "Distinct DFT calculations",
        "surrogate": "Distinct crystals evaluated (surrogate)",
        "no DFT": "Distinct crystals evaluated (no DFT)",
    }[run.source]


def draw_curves(problem: Problem) -> Figure:
    """Best and mean reward over distinct calculations: seeds thin, interquartile mean thick, its interval shaded."""
    run = problem.runs[0]
    figure = Figure(figsize=(11.0, 4.4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for group, colour in zip(problem.groups, COLOURS * len(problem.groups), strict=False):
        _draw_group(left, group, colour, metrics.best_reward)
        mean = functools.partial(metrics.mean_reward, window=problem.window)
        _draw_group(right, group, colour, mean)
    for axes, title in ((left, "Best reward so far"), (right, "Mean reward of an episode")):
        axes.axhline(run.best["best_reward"], color="0.6", lw=0.8, ls="--")
        axes.axvline(problem.budget, color="0.75", lw=0.8, ls=":")
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel(_axis(run))
        axes.set_ylabel("Reward (dimensionless)")
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(loc="best", edgecolor="none", fontsize=9)
    figure.supxlabel(viewer.plain(f"Values: {_source(run)}"), fontsize=8, color="0.35", x=0.99, ha="right")
    return figure


def _draw_group(axes: Axes, group: Group, colour: str, curve: Callable[[Sequence[Episode]], np.ndarray]) -> None:
    curves = [found for run in group.runs if len(found := curve(run.episodes))]
    if not curves:
        axes.plot([], [], color=colour, label=viewer.plain(f"{group.label} (no calculation yet)"))
        return
    for values in curves if len(curves) > 1 else ():
        axes.plot(*_thinned(np.arange(1, len(values) + 1), values), color=colour, lw=0.6, alpha=0.35)
    # As far as all seeds of the group reach, which may be beyond the budget of the comparison.
    shortest = min(map(len, curves))
    counts, values = _thinned(np.arange(1, shortest + 1), np.stack([c[:shortest] for c in curves], axis=-1))
    low, high = metrics.interval(values.T)
    axes.plot(counts, metrics.interquartile_mean(values, axis=1), color=colour, lw=2, label=viewer.plain(group.label))
    axes.fill_between(counts, low, high, color=colour, alpha=0.15, lw=0)


def _thinned(counts: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kept = np.unique(np.linspace(0, len(counts) - 1, min(POINTS, len(counts))).round().astype(int))
    return counts[kept], values[kept]


def _curve_caption(problem: Problem) -> str:
    seeds = sorted({len(group.runs) for group in problem.groups})
    band = "shaded: its 95 % bootstrap interval" if seeds[-1] > 1 else "one seed each, so there are no intervals"
    return (
        f"Thick: interquartile mean over seeds; {band}; thin: single seeds. The mean reward is that of the episodes of "
        f"the last {problem.window} calculations, repeated and refused crystals included. Dotted: the number of "
        f"calculations after which agents are compared, {problem.budget}. Dashed: the best reward there can be."
    )


def _metric_table(problem: Problem, known: Collection[str] | None) -> page.Table:
    columns = [_metrics_of(group, problem, known) for group in problem.groups]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return page.Table(["", *(group.label for group in problem.groups)], rows)


def _metrics_of(group: Group, problem: Problem, known: Collection[str] | None) -> dict[str, str]:
    """Metrics of a group after the calculations that all runs have, as text."""
    budget, goals = problem.budget, problem.goals
    counted = [run for run in group.runs if len(metrics.best_reward(run.episodes))]
    seen = [metrics.within(run.episodes, budget) for run in counted]
    found = [metrics.distinct(metrics.succeeded(episodes, goals)) for episodes in seen]
    firsts = [metrics.first_success(episodes, goals) for episodes in seen]
    reached = [first for first in firsts if first is not None]
    crystals = [metrics.distinct(episodes) for episodes in seen]

    def over(values: Sequence[float], digits: int = 3) -> str:
        return _with_interval(np.array(values, float), digits)

    rows = {
        "seeds": str(len(counted)),
        "best reward": over([metrics.best_reward(episodes)[-1] for episodes in seen]),
        "mean reward": over([metrics.mean_reward(episodes, problem.window)[-1] for episodes in seen]),
        "best reward, mean over calculations": over([metrics.best_reward(episodes).mean() for episodes in seen]),
        "successes (distinct crystals)": over([len(successes) for successes in found], 1),
        "success rate of episodes": over(
            [len(metrics.succeeded(e, goals)) / len(e) for e in seen],
        ),
        "calculations to the first success": f"{over(reached, 0)} in {len(reached)} of {len(seen)} seeds",
        "uniqueness": over([metrics.uniqueness(episodes) for episodes in seen]),
        "diversity": over([metrics.diversity(c) for c in crystals]),
        "diversity of successes": over([metrics.diversity(c) for c in found]),
    }
    if known is not None:
        rows["novelty"] = over([metrics.novelty(c, known) for c in crystals])
        rows["novelty of successes"] = over([metrics.novelty(c, known) for c in found])
    if _has_smact():
        for name, sets in (("", crystals), (" of successes", found)):
            judged = [metrics.plausibility(some) for some in sets]
            rows[f"charge-neutral{name}"] = over([neutral for neutral, _ in judged])
            rows[f"plausible{name}"] = over([plausible for _, plausible in judged])
    rows["wall time, s"] = over([metrics.wall_seconds(run.updates) for run in counted], 0)
    rows["share of it waiting for DFT"] = over([metrics.idle_share(run.updates) for run in counted])
    return rows


def _has_smact() -> bool:
    return importlib.util.find_spec("smact") is not None


def _with_interval(values: np.ndarray, digits: int) -> str:
    """The interquartile mean of the values that there are, and its interval; a dash for none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return "-"
    text = f"{metrics.interquartile_mean(values):.{digits}f}"
    low, high = metrics.interval(values)
    return text if np.isnan(low) else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def _metric_notes(problem: Problem, known: Collection[str] | None) -> str:
    wanted = problem.runs[0].best["properties"]
    success = ", ".join(f"a {words(name)} {goal.text(wanted[name]['unit'])}" for name, goal in problem.goals.items())
    return " ".join(
        [
            f"After {problem.budget} distinct calculations, but for the times, which are of whole runs (compilation "
            "included; runs of a sweep share theirs). Interquartile mean over seeds, and its 95 % bootstrap interval.",
            f"Success: {success}. Uniqueness: distinct crystals per "
            "episode. Diversity: mean distance of two distinct crystals, the fraction of atoms in which their "
            "compositions differ.",
            "Waiting: the policy's device is idle, unless the engine uses it too.",
            "Novelty: share of the distinct crystals whose formula is not in the reference, which has "
            f"{len(known)} formulas."
            if known is not None
            else "Novelty is counted against a list of known formulas: --reference FILE.",
            "Charge-neutral, and plausible (its anions more electronegative than its cations, or an alloy): by smact."
            if _has_smact()
            else MISSING_SMACT,
        ]
    )


def _crystals(group: Group, prefix: str) -> list[page.Block]:
    """Pictures of the best distinct crystals of a group, with CIF files."""
    entries = [(run, crystal) for run in group.runs for crystal in run.best["crystals"]]
    entries.sort(key=lambda entry: -entry[1]["reward"])
    best: dict[tuple[Any, ...], tuple[Run, dict[str, Any]]] = {}
    for run, crystal in entries:  # seeds find the same crystals
        best.setdefault((crystal["formula"], crystal["skeleton"], *crystal["values"].values()), (run, crystal))
    if not best:
        return [page.Text("No crystal has a value yet.")]
    shown = list(best.values())[:SHOWN_CRYSTALS]
    pictures = page.Pictures([_crystal(run, entry, f"{prefix}-{i}") for i, (run, entry) in enumerate(shown, start=1)])
    present = {caveat for _, entry in shown for caveat in caveats.parse(entry.get("caveats") or ())}
    return [pictures, *(page.Text(f"{caveat.name}: {caveat.value}") for caveat in Caveat if caveat in present)]


def _crystal(run: Run, entry: dict[str, Any], name: str) -> page.Picture:
    atoms = Atoms(entry["elements"], cell=entry["lattice"], scaled_positions=entry["frac_coords"], pbc=True)
    mark = " (surrogate)" if run.surrogate else ""
    codes = " ".join(caveats.names(caveats.parse(entry.get("caveats") or ())))
    caption = (
        f"{entry['formula']}: {values_text(run.best, entry, 3)}{mark}{codes and f' [{codes}]'}, "
        f"reward {entry['reward']:.3f}, seed {run.config.seed}"
    )
    picture = viewer.png(viewer.draw(atoms, figure_size=2.6))
    return page.Picture(f"{name}-{entry['formula']}", picture, caption, crystal_file(run.folder, entry))


def _run_table(problem: Problem) -> page.Table:
    rows = []
    for group in problem.groups:
        for run in group.runs:
            counts = metrics.calculations(run.episodes)
            crystals = metrics.distinct(run.episodes)
            best = max((e.reward for e in run.episodes), default=math.nan)
            rows.append(
                [
                    str(run.folder),
                    group.label,
                    str(run.config.seed),
                    "finished" if run.finished else f"stopped after {len(run.updates)} updates",
                    f"{len(run.episodes)} of {run.config.episodes}",
                    str(len(crystals)),
                    str(counts[-1] if len(counts) else 0),
                    f"{best:.3f}",
                ]
            )
    header = ["folder", "agent", "seed", "state", "episodes", "distinct", "calculated", "best reward"]
    return page.Table(header, rows)


def _accounting(problem: Problem) -> list[page.Block]:
    """What calculations have cost, by run or sweep."""
    rows = []
    for folder, spent in {run.sweep: run.accounting for run in problem.runs if run.accounting}.items():
        failures = ", ".join(f"{count} {name}" for name, count in sorted(spent["failures"].items())) or "0"
        hits = spent["batch_hits"] + spent["memory_hits"] + spent["shared"]
        counts = [spent["requests"], hits, spent["store_hits"], spent["refused"], spent["calls"]]
        hours = [f"{spent[name] / 3600:.3f}" for name in ("core_seconds", "queue_seconds", "waiting_seconds")]
        rows.append([str(folder), *map(str, counts), failures, *hours])
    header = "folder, requests, repeated, from the store, refused, calculations, failed, core-hours, hours queued"
    note = (
        "Calculations are those that these runs paid for; repeated crystals, and those that the store held, cost none. "
        "Hours queued are summed over jobs, hours waited are wall time."
    )
    return [page.Table([*header.split(", "), "hours waited"], rows), page.Text(note)]


def _provenance(problem: Problem) -> list[page.Block]:
    """Engine, settings, pseudopotentials, and the settings of every group."""
    run = problem.runs[0]
    fingerprint = run.best["fingerprint"]
    rows = [["source", _source(run)]]
    rows += [[name, json.dumps(value)] for name, value in sorted(fingerprint.items()) if len(json.dumps(value)) <= 80]
    blocks: list[page.Block] = [page.Table(["what", "value"], rows)]
    if fingerprint:
        blocks.append(page.Folded("everything that can change a number", json.dumps(fingerprint, indent=2)))
    for group in problem.groups:
        table = {name: value for name, value in configs.to_table(group.runs[0].config).items() if name != "seed"}
        seeds = [run.config.seed for run in group.runs]
        title = f"settings of {group.label}, seeds {' '.join(map(str, seeds))}"
        blocks.append(page.Folded(title, json.dumps(table, indent=2)))
    return blocks
