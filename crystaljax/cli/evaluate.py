"""``crystaljax evaluate``: the policy of a run designs crystals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from crystaljax.cli.runs import open_evaluator, refuse_unasked, usable_anywhere

MOST_DESIGNS = 100_000
"""Crystals that one `evaluate` designs, all at once, and lists."""


def add_command(commands: Any) -> None:
    """Add ``evaluate`` to the parser of the command line."""
    evaluate = commands.add_parser(
        "evaluate",
        help="let the policy of a run design crystals",
        description="Let the policy of a run's last checkpoint design crystals, also for another task or target.",
    )
    evaluate.add_argument("run", metavar="RUN", help="folder of the run")
    evaluate.add_argument("--episodes", type=int, default=32, help="crystals to design (default: 32)")
    evaluate.add_argument("--task", help="another task than the run's, such as a held-out crystal")
    evaluate.add_argument("--target", type=float, help="another target than the run's")
    evaluate.add_argument("--sample", action="store_true", help="draw from the policy instead of its likeliest element")
    evaluate.add_argument("--seed", type=int, default=0, help="of start sites and draws (default: 0)")
    evaluate.add_argument("--engine", help="another engine than the run's")
    evaluate.add_argument("--preset", help="other settings of the engine than the run's")
    evaluate.add_argument(
        "--engine-option",
        dest="engine_options",
        metavar="NAME=VALUE",
        action="append",
        help="a setting of the engine; another engine has none of the run's",
    )
    evaluate.add_argument("--store", metavar="FILE", help="another results store than the run's")
    evaluate.add_argument("--workers", type=int, help="processes that calculate (default: the run's)")
    evaluate.add_argument("--scheduler", metavar="URL", help="Dask scheduler whose workers calculate instead")
    evaluate.set_defaults(command=_evaluate)


def _evaluate(
    run: str, episodes: int, task: str | None, target: float | None, sample: bool, seed: int, **given: Any
) -> int:
    import jax
    from rich.console import Console

    from crystaljax.agents import config as configs
    from crystaljax.agents import report, runner
    from crystaljax.agents.checkpoints import Checkpoints
    from crystaljax.agents.evaluation import make_designer, refuse_other_shapes
    from crystaljax.agents.ledger import Ledger
    from crystaljax.run_folder import LARGEST_SEED

    if not 1 <= episodes <= MOST_DESIGNS:
        raise ValueError(f"--episodes is {episodes}; give at least 1 and at most {MOST_DESIGNS}")
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"--seed is {seed}; give one between 0 and {LARGEST_SEED}, for no other is different")
    config, _ = configs.load(Path(run))
    changes = {name: value for name, value in given.items() if value is not None}
    own_options = configs.read_options(changes.get("engine_options", []))
    asked = {**changes, "engine_options": own_options}
    options = {} if changes.get("engine", config.engine) != config.engine else config.engine_options
    changes["engine_options"] = {**options, **own_options}
    if task is not None:
        changes |= {"task": task, "structures": (), "property": "", "objective": (), "mode": "", "target": None}
        changes |= {"combine": configs.RunConfig.combine}
    if target is not None:
        changes["target"] = target
    config = usable_anywhere(dataclasses.replace(config, **changes))
    refuse_unasked(config, asked, run)
    checkpoints = Checkpoints(Path(run), read_only=True)
    if checkpoints.latest is None:
        raise ValueError(f"{run} has no checkpoint yet; train it first")
    with open_evaluator(config) as evaluator:
        env, params = runner.build_env(config, evaluator)
        agent = runner.build_agent(config, env)
        if agent.policy is None:
            raise ValueError(f"{run} is a run of {config.agent}, which has no policy to evaluate")
        if sample and not agent.draws:
            raise ValueError(f"{config.agent} has no probabilities to draw elements from; leave out --sample")
        refuse_other_shapes(env, agent, checkpoints.network_shapes())
        policy = checkpoints.restore_network()
        design = jax.jit(make_designer(env, agent.policy, episodes, greedy=not sample))
        records = design(jax.random.key(seed), policy, params)
        jax.block_until_ready(records)
        env.evaluator.check()
    ledger = Ledger(env.skeletons, env.vocabulary, env.objective.names)
    ledger.add_records(records, update=0)
    origin = report.Origin.of(env, params)
    Console().print(report.designs_table(env, ledger, origin))
    return 0
