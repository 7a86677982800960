"""What carries over: pre-trained weights as the first policy, and a policy of mixed crystals where it never trained.

``python -m benchmarks transfer`` (``--quick`` for fewer seeds and smaller budgets; needs
``pip install 'crystaljax[agents]'``). Two questions, both with PPO:

*Substitution.* Episodes begin with random elements, which the policy replaces one by one. CHGNet as the policy begins
from its published weights, or from random ones: the same settings, seeds, and budget of *distinct evaluations*, and
the same compiled program, since only the first parameters differ. The area is that of ``benchmarks/learning.py``,
with random search beside it; the mean reward of the last quarter of the episodes says what the policy itself is like.
Differences between the two are taken seed by seed.

*Mixed crystals.* A transformer trains on C2 ... C6, in every episode for another target drawn from :data:`TRAINED`.
It then designs C1 and C7, which it never saw, for targets inside and outside that range. Beside it: random designs,
the same policy told the nearest target that it was trained on instead, and the best reward that any crystal has
(densities depend on the composition only, of which there are few enough to try all).

The learning rates were chosen among :data:`RATES` with the tuning seeds (``--tuning`` runs these, writes no report):
the one with the highest sum of the areas over both networks and the first two tasks, and the one with the highest sum
for each network alone, which is the same for the random weights; for mixed crystals the one with the highest reward on
the crystals trained on. No other setting was varied. What is reported is of other seeds.

Numbers are interquartile means over seeds, intervals those of :func:`crystaljax.agents.metrics.interval`. Writes
``benchmarks/results/transfer.md`` and two pictures. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.learning import RANDOM, RESULTS, Outcome, Trial, Version, best_so_far, kept, rarity, run, spanned, table
from crystaljax.agents.base import whole_training
from crystaljax.agents.designs import Designs, evaluate, random_designs
from crystaljax.agents.evaluation import make_designer
from crystaljax.agents.hyperparameters import PPOConfig
from crystaljax.agents.metrics import interquartile_mean, interval
from crystaljax.agents.networks import make_trunk
from crystaljax.agents.ppo import make_ppo
from crystaljax.env import CrystalEnv, EnvParams
from crystaljax.tasks import make

NETWORKS = ("chgnet", "chgnet-pretrained")
SCRATCH, OWN_RATE = NETWORKS[0], "chgnet-pretrained, its own rate"
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Learning rates that were tried."""
FINE_TUNING = PPOConfig(lanes=4, minibatches=2, epochs=2, entropy=0.02, anneal=False, learning_rate=1e-2)
MIXED = PPOConfig(lanes=32, minibatches=4, epochs=4, entropy=0.02, learning_rate=1e-3)
"""The settings; an update is one episode in each lane, and what is not named has its default."""
VARIANTS = {name: (name, FINE_TUNING.learning_rate) for name in NETWORKS} | {OWN_RATE: (NETWORKS[1], 3e-2)}
"""Network and learning rate of what is compared."""
TRIALS = (
    Trial("Density-C6-v0", "unrelaxed-density", target=5.0, budget=300, quick_budget=80, seeds=10, episodes=1.5),
    Trial("BandGap-Rocksalt-Table-v0", "table", target=None, budget=40, quick_budget=40, seeds=20, episodes=6),
    Trial("BulkModulus-Rocksalt-Table-v0", "table", target=100.0, budget=40, quick_budget=40, seeds=20, episodes=6),
)
MOST_SEEDS = {Version.TUNING: 5, Version.QUICK: 4, Version.FULL: 30}
"""Of a task."""
MIXED_SEEDS = {Version.TUNING: 3, Version.QUICK: 4, Version.FULL: 10}
MIXED_UPDATES = {Version.TUNING: 100, Version.QUICK: 40, Version.FULL: 100}
TRAINED = (2.0, 4.0)
"""g/cm3; targets of the training on mixed crystals are drawn from this range."""
TARGETS = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
INSIDE = (TRAINED[0] <= TARGETS) & (TARGETS <= TRAINED[1])
DESIGNS = 64
"""Crystals that a policy designs for each target."""
CRYSTALS = {"Mixed": "trained on", "C1": "held out", "C7": "held out"}
COLOURS = ("#d55e00", "#0072b2", "#009e73", "0.45", "black")


class ManyTargets:
    """An environment of graph observations that draws a target for every episode, uniformly between two bounds."""

    def __init__(self, env: CrystalEnv, low: float, high: float):
        self._env, self._bounds = env, (low, high)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def reset(self, key: jax.Array, params: EnvParams) -> tuple[Any, tuple[Any, jax.Array]]:
        target = self._draw(key)
        observation, state = self._env.reset(key, params.replace(target=target))
        return observation, (state, target)

    def step(self, key: jax.Array, state: tuple[Any, jax.Array], action: jax.Array, params: EnvParams) -> tuple:
        state, target = state
        observation, state, reward, terminated, truncated, info = self._env.step(
            key, state, action, params.replace(target=target)
        )
        target = jnp.where(terminated | truncated, self._draw(key), target)
        # After an episode the observation is the first of the next one, whose target this is.
        return observation.replace(target=target), (state, target), reward, terminated, truncated, info

    def decide(self, state: tuple[Any, jax.Array], action: jax.Array) -> tuple[Any, jax.Array]:
        return self._env.decide(state[0], action), state[1]

    def observe(self, key: Any, state: tuple[Any, jax.Array], action: jax.Array, params: EnvParams) -> Any:
        return self._env.observe(key, state[0], action, params.replace(target=state[1]))

    def _draw(self, key: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, 7), (), jnp.float32, *self._bounds)


@functools.cache
def program(env: CrystalEnv, config: PPOConfig) -> Callable[[Any], Any]:
    """From a first train state to the records; one for both networks, which differ in their first parameters only."""
    update = make_ppo(config, env, make_trunk(env, SCRATCH)).update
    return jax.jit(lambda state: jax.lax.scan(lambda state, _: update(state)[::2], state, length=config.updates)[1])


def fine_tune(
    env: CrystalEnv, params: EnvParams, network: str, config: PPOConfig, seeds: Sequence[int], budget: int
) -> dict[str, Any]:
    """The fields of :class:`learning.Outcome`, and ``reward`` [S], the mean over the last quarter of the episodes."""
    start, first = time.perf_counter(), jax.jit(make_ppo(config, env, make_trunk(env, network)).init)
    train = program(env, config)
    records = [jax.device_get(train(first(jax.random.key(seed), params))) for seed in seeds]
    env.evaluator.check()
    curves, counts = zip(*(best_so_far(env, one, budget) for one in records), strict=True)
    rewards = [one.reward[one.finished][-(one.finished.sum() // 4) :].mean() for one in records]
    return {"best": curves, "evaluated": counts, "reward": rewards, "seconds": time.perf_counter() - start}


def substitution(
    trial: Trial, version: Version, variants: dict[str, tuple[str, float]], keep: Path | None
) -> tuple[dict[str, Outcome], dict[str, np.ndarray], list[str]]:
    """A task: outcomes of the variants and random search, last mean rewards [S] of variants, lines of the report."""
    env, params = make(trial.task, trial.evaluator, target=trial.target, mode="substitution")
    budget, seeds = trial.budget_of(version), trial.seeds_of(version)[: MOST_SEEDS[version]]
    episodes = round(budget * trial.episodes)
    outcomes, rewards = {}, {}
    for name, (network, rate) in variants.items():
        config = dataclasses.replace(FINE_TUNING, steps=env.horizon, learning_rate=rate)
        config = dataclasses.replace(config, updates=config.updates_for(episodes, env.horizon))
        path = keep and keep / f"{trial.task}-{version.value}-{network}-{rate:g}.npz"
        made_with = f"{config}, budget {budget}, target {trial.target}, seeds {seeds}"
        found = kept(path, made_with, functools.partial(fine_tune, env, params, network, config, seeds, budget))
        outcomes[name] = Outcome(*(np.asarray(found[field]) for field in ("best", "evaluated", "seconds")))
        rewards[name] = np.asarray(found["reward"])
    outcomes[RANDOM] = run(env, params, RANDOM, budget, trial.episodes, seeds)
    good = env.objective.best_reward - 0.1
    lines = [
        f"### {trial.task}, target {float(params.target):g} {env.objective.properties[0].unit}, {budget} evaluations, "
        f"{len(seeds)} seeds",
        "",
        f"Rewards: {env.evaluator.label}. {episodes} episodes. Of random labelings, a fraction of "
        f"{rarity(env, params, good):.1e} has a reward of at least {good:g}.",
        "",
        *table(outcomes),
        "",
        "| | mean reward of the last quarter | area minus chgnet's | mean reward minus chgnet's |",
        "|---|---:|---:|---:|",
        f"| {SCRATCH} | {shown(rewards[SCRATCH])} | | |",
        *(
            f"| {name} | {shown(rewards[name])} | {shown(gain['area'])} | {shown(gain['reward'])} |"
            for name, gain in gains(outcomes, rewards).items()
        ),
        "",
    ]
    return outcomes, rewards, lines


def gains(outcomes: dict[str, Outcome], rewards: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """What pre-training adds to the area and to the last mean reward, by variant; seed by seed, [S] each."""
    return {
        name: {"area": outcomes[name].area - outcomes[SCRATCH].area, "reward": rewards[name] - rewards[SCRATCH]}
        for name in rewards
        if name != SCRATCH
    }


def summary(values: np.ndarray) -> list[float]:
    """Interquartile mean over seeds [S], and the ends of its interval."""
    return [round(float(value), 3) for value in (interquartile_mean(values), *interval(values))]


def shown(values: np.ndarray) -> str:
    """The same for people."""
    return "{:.3f} ({:.3f} to {:.3f})".format(*summary(values))


def crystals_env(crystals: str) -> tuple[CrystalEnv, EnvParams]:
    """The environment of these crystals, on which a transformer acts."""
    return make(f"Density-{crystals}-v0", "unrelaxed-density", in_phase=True)


def train_mixed(config: PPOConfig, seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """Densities of designs of S policies, greedy and drawn: by name of the crystals [2, S, G, DESIGNS]."""
    env, params = crystals_env("Mixed")
    agent = make_ppo(config, ManyTargets(env, *TRAINED), make_trunk(env))
    train = jax.jit(lambda key: whole_training(agent, config.updates, params)(key)[0].network)
    networks = [train(jax.random.key(seed)) for seed in seeds]
    found = {}
    for crystals in CRYSTALS:
        other, params = crystals_env(crystals)
        policy = make_ppo(config, other, make_trunk(other)).policy
        found[crystals] = np.stack([densities(other, params, policy, networks, greedy) for greedy in (True, False)])
    return found


def densities(env: CrystalEnv, params: EnvParams, policy: Callable, networks: list[Any], greedy: bool) -> np.ndarray:
    """What each of S networks designs for each target, in g/cm3: [S, G, DESIGNS]."""
    design = make_designer(env, policy, DESIGNS, greedy)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def values(network: Any, target: jax.Array) -> jax.Array:
        records = design(jax.random.key(0), network, params.replace(target=target))
        return jnp.where(records.finished, records.values[..., 0], 0.0).sum(axis=0)

    return np.stack([values(network, jnp.float32(TARGETS)) for network in networks])


def reachable(env: CrystalEnv, params: EnvParams) -> np.ndarray:
    """The best reward that any crystal has, for each target [G]; mean over the skeletons.

    A density is one of the composition alone, so one labeling of each is tried.
    """
    best = []
    for index, skeleton in enumerate(env.skeletons):
        genes = np.array(list(itertools.combinations_with_replacement(range(env.num_actions), skeleton.n_sites)))
        genes = np.pad(genes, ((0, 0), (0, env.max_sites - skeleton.n_sites))).astype(np.int32)
        designs = Designs(genes, np.full(len(genes), index, np.int32))
        best.append(rewards_of(env, params, designs).max(axis=1))
    return np.mean(best, axis=0)


def rewards_of(env: CrystalEnv, params: EnvParams, designs: Designs) -> np.ndarray:
    """For each target: [G, L]."""
    values = jax.jit(lambda designs: evaluate(env, params, designs)[1].values[0, :, 0])(designs)
    return np.asarray(env.objective.terms[0].score(values, TARGETS[:, None]))


def mixed(
    version: Version, config: PPOConfig, keep: Path | None, crystals: Sequence[str] = tuple(CRYSTALS)
) -> dict[str, dict[str, np.ndarray]]:
    """Mean rewards of designs by crystals and by who designed: [S, G] for targets G; one row where no seed has part."""
    seeds = version.seeds[: MIXED_SEEDS[version]]
    steps = crystals_env("Mixed")[0].horizon
    config = dataclasses.replace(config, steps=steps, updates=MIXED_UPDATES[version])
    path = keep and keep / f"mixed-{version.value}-{config.learning_rate}.npz"
    made_with = f"{config}, targets {TARGETS} of {TRAINED}, {DESIGNS} designs, seeds {seeds}"
    found = kept(path, made_with, lambda: train_mixed(config, seeds))
    nearest = np.searchsorted(TARGETS, np.clip(TARGETS, *TRAINED))
    rewards = {}
    for name in crystals:
        env, params = crystals_env(name)
        greedy, told_nearest, drawn = (
            np.asarray(env.objective.terms[0].score(values, TARGETS[:, None])).mean(axis=-1)
            for values in (found[name][0], found[name][0][:, nearest], found[name][1])
        )
        chance = rewards_of(env, params, random_designs(jax.random.key(0), env, 40_000)).mean(axis=1)
        rewards[name] = {"greedy": greedy, "greedy, nearest target": told_nearest, "drawn": drawn}
        rewards[name] |= {"random designs": chance[None], "best reachable": reachable(env, params)[None]}
    return rewards


def closed(rewards: dict[str, np.ndarray], who: str, where: np.ndarray) -> np.ndarray:
    """[S]: the share of the way from random designs to the best crystals that is gone, over some of the targets."""
    chance, best = rewards["random designs"][:, where], rewards["best reachable"][:, where]
    return (rewards[who][:, where] - chance).sum(axis=1) / (best - chance).sum()


def mixed_lines(crystals: str, rewards: dict[str, np.ndarray]) -> list[str]:
    """The lines of a Markdown table, one for each target."""
    lines = [
        f"### {crystals}, {CRYSTALS[crystals]}",
        "",
        f"| target, g/cm3 | {' | '.join(rewards)} |",
        "|---|" + "---:|" * len(rewards),
    ]
    for index, (target, trained) in enumerate(zip(TARGETS, INSIDE, strict=True)):
        columns = (values[:, index] for values in rewards.values())
        cells = (shown(column) if len(column) > 1 else f"{column[0]:.3f}" for column in columns)
        lines.append(f"| {target:g}{'' if trained else ', outside'} | {' | '.join(cells)} |")
    return [*lines, ""]


def draw(path: Path, panels: dict[str, dict[str, np.ndarray]], x: np.ndarray | None, labels: tuple[str, str]) -> None:
    """A row of panels of curves over seeds [S, X] with their intervals, as a PNG; labels of both axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.9 * len(panels), 3.2), dpi=110, layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for (name, values), colour in zip(curves.items(), COLOURS, strict=False):
            places = np.arange(values.shape[1]) + 1 if x is None else x
            axes.plot(places, interquartile_mean(values), color=colour, lw=1.6, label=name)
            if len(values) > 1:
                axes.fill_between(places, *interval(values), color=colour, alpha=0.25, lw=0)
        if x is not None:
            axes.axvspan(*TRAINED, color="0.93", lw=0, zorder=0)
        axes.set_title(title, loc="left", fontsize=9)
        axes.legend(fontsize=7)
    figure.supxlabel(labels[0], fontsize=9)
    figure.supylabel(labels[1], fontsize=9)
    figure.savefig(path)


def tune(keep: Path | None) -> dict[str, dict[str, Any]]:
    """What the tuning seeds say of every learning rate, with a line about each."""
    found: dict[str, dict[str, Any]] = {}
    for rate in RATES:
        mine = found[f"{rate:g}"] = {}
        rewards = mixed(Version.TUNING, dataclasses.replace(MIXED, learning_rate=rate), keep, ["Mixed"])["Mixed"]
        mine["mixed"] = summary(rewards["greedy"][:, INSIDE].mean(axis=1))[0]
        for trial in TRIALS[:2]:
            variants = {name: (name, rate) for name in NETWORKS}
            outcomes, _, _ = substitution(trial, Version.TUNING, variants, keep)
            mine[trial.task] = {name: summary(outcomes[name].area)[0] for name in NETWORKS}
        print(f"learning rate {rate:g}: {mine}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="fewer seeds, smaller budgets")
    which.add_argument("--tuning", action="store_true", help="the seeds that learning rates are chosen with; no report")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep results here, and go on from those kept before")
    arguments = parser.parse_args()
    version = Version.QUICK if arguments.quick else Version.TUNING if arguments.tuning else Version.FULL
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    if version is Version.TUNING:
        print(json.dumps(tune(arguments.keep)))
        return
    start, quick = time.process_time(), version is Version.QUICK
    report = [
        "# What carries over: pre-trained weights, and a policy of mixed crystals",
        "",
        f"`python -m benchmarks transfer{' --quick' * quick}`. Settings are in the script, as is what was tried: "
        f"learning rates {', '.join(f'{rate:g}' for rate in RATES)}, with other seeds than those here, "
        f"{spanned(Version.TUNING.seeds[: MOST_SEEDS[Version.TUNING]])}. Both networks have "
        f"{FINE_TUNING.learning_rate:g}, the best over both and of random weights alone; *its own rate* is "
        f"{VARIANTS[OWN_RATE][1]:g}, the best of pre-trained weights alone, and the largest that was tried. Numbers "
        f"are interquartile means over seeds from {version.seeds[0]} on, with their 95 % bootstrap intervals.",
        "",
        "## Substitution: CHGNet as the policy, from random elements",
        "",
    ]
    summaries: dict[str, Any] = {"pretrained_minus_scratch": {}, "way_to_best_gone": {}}
    curves = {}
    variants = {name: VARIANTS[name] for name in (NETWORKS if quick else VARIANTS)}
    for trial in TRIALS[:2] if quick else TRIALS:
        outcomes, rewards, lines = substitution(trial, version, variants, arguments.keep)
        report += lines
        print("\n".join(lines), flush=True)
        summaries["pretrained_minus_scratch"][trial.task] = {
            name: {what: summary(values) for what, values in gain.items()}
            for name, gain in gains(outcomes, rewards).items()
        }
        curves[trial.task] = {name: outcome.best for name, outcome in outcomes.items()}
    labels = "Distinct crystals evaluated (count)", "Best reward so far above its floor"
    draw(RESULTS / f"transfer-substitution{version.suffix}.png", curves, None, labels)
    designed = mixed(version, MIXED, arguments.keep)
    way = []
    for name, rewards in designed.items():
        shares = {
            where: {who: summary(closed(rewards, who, mask)) for who in ("greedy", "greedy, nearest target")}
            for where, mask in (("inside", INSIDE), ("outside", ~INSIDE))
        }
        summaries["way_to_best_gone"][name] = shares
        way += [
            f"| {name}, {CRYSTALS[name]} | {where} | "
            + " | ".join("{:.2f} ({:.2f} to {:.2f})".format(*share) for share in by.values())
            + " |"
            for where, by in shares.items()
        ]
    lines = [
        f"![curves](transfer-substitution{version.suffix}.png)",
        "",
        f"## Mixed crystals: a transformer trained on C2 ... C6, targets {TRAINED[0]:g} to {TRAINED[1]:g} g/cm3",
        "",
        f"{MIXED_UPDATES[version] * MIXED.lanes} episodes, {MIXED_SEEDS[version]} seeds, unrelaxed densities, no DFT. "
        f"Mean reward of {DESIGNS} designs of each policy and target: of the likeliest elements (*greedy*), the same "
        "when the policy is told the nearest target it was trained on, and of elements *drawn* from the policy. "
        "Share of the way from random designs to the best reachable reward that is gone, over all targets of a row:",
        "",
        "| crystals | targets | greedy | greedy, nearest target |",
        "|---|---|---:|---:|",
        *way,
        "",
        *itertools.chain(*(mixed_lines(name, rewards) for name, rewards in designed.items())),
        f"![rewards](transfer-mixed{version.suffix}.png)",
        "",
    ]
    print("\n".join(lines), flush=True)
    panels = {
        f"{name}, {CRYSTALS[name]}": {who: rewards[who] for who in rewards if who != "drawn"}
        for name, rewards in designed.items()
    }
    labels = "Target, g/cm3; grey: trained on", "Mean reward of the designs"
    draw(RESULTS / f"transfer-mixed{version.suffix}.png", panels, TARGETS, labels)
    (RESULTS / f"transfer{version.suffix}.md").write_text("\n".join(report + lines))
    print(json.dumps(summaries | {"cpu_s": round(time.process_time() - start)}))


if __name__ == "__main__":
    main()
