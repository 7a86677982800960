"""``crystaljax train``: its flags are the fields of the settings."""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crystaljax.cli.exit_codes import INTERRUPTED
from crystaljax.cli.runs import findable, open_evaluator, refuse_unasked, usable_anywhere

if TYPE_CHECKING:
    from crystaljax.agents.config import RunConfig


def add_command(commands: Any) -> None:
    """Add ``train`` to the parser of the command line."""
    from crystaljax import plugins
    from crystaljax.agents import config as configs
    from crystaljax.moves import MODES
    from crystaljax.properties import COMBINE, PROPERTIES

    train = commands.add_parser(
        "train",
        help="train an agent",
        argument_default=argparse.SUPPRESS,
        description="Train an agent. Ctrl-C stops it, keeps a checkpoint, and --resume goes on with the same numbers.",
    )
    texts, kinds = configs.descriptions(configs.RunConfig), configs.settings(configs.RunConfig)
    algorithms = configs.algorithms()

    def add(group: Any, name: str, **options: Any) -> None:
        """The flag of a field of the run's settings."""
        default = getattr(configs.RunConfig, name, None)
        shown = "" if default in (None, "", ()) else f" (default: {default})"
        options = {"help": texts[name].rstrip(".") + shown, **_parsed_as(kinds[name]), **options}
        group.add_argument(options.pop("flag", configs.flag(name)), dest=name, **options)

    what = train.add_argument_group("what to design")
    add(what, "task", metavar="ID")
    add(what, "structures", flag="--structure", metavar="FILE", action="append")
    add(what, "property", choices=tuple(PROPERTIES))
    add(what, "objective", metavar="TERM", nargs="+")
    add(what, "combine", choices=COMBINE)
    add(what, "target")
    add(what, "vocabulary", choices=("small", "medium", "large"))
    add(what, "mode", choices=MODES)

    how = train.add_argument_group("where rewards come from")
    add(how, "engine")
    add(how, "preset")
    add(how, "engine_options", flag="--engine-option", metavar="NAME=VALUE", action="append")
    add(how, "store", metavar="FILE|URL")
    add(how, "workers")
    add(how, "scheduler", metavar="URL")
    for name in ("timeout", "memory", "max_dft_calls", "max_core_hours", "delayed"):
        add(how, name)

    run = train.add_argument_group("the run")
    shipped = ", ".join(configs.shipped())
    run.add_argument(
        "--config", metavar="TOML|NAME", help=f"settings of the run, a file or {shipped}; flags come before them"
    )
    run.add_argument("--run", metavar="DIR", help="folder of the run (default: runs/TASK-AGENT-ENGINE-SEED)")
    run.add_argument("--resume", action="store_true", help="go on with the run in --run from its last checkpoint")
    run.add_argument("--agent", choices=tuple(algorithms), help=f"algorithm (default: {configs.DEFAULT_AGENT})")
    add(run, "network", choices=tuple(plugins.offered(plugins.NETWORKS)))
    for name in ("episodes", "seed", "checkpoint_every"):
        add(run, name)
    add(run, "wandb", metavar="PROJECT")
    run.add_argument("--seeds", metavar="N", type=int, nargs="+", help="several runs in one program, in DIR/seed-N")

    knobs = train.add_argument_group("hyperparameters", "Each algorithm has some of these: [its default].")
    for name, kind in configs.hyperparameters().items():
        owners = {agent: settings for agent, settings in algorithms.items() if name in configs.settings(settings)}
        defaults: dict[Any, list[str]] = {}
        for agent, settings in owners.items():
            defaults.setdefault(getattr(settings, name), []).append(agent)
        shown = "; ".join(f"{', '.join(agents)}: {default}" for default, agents in defaults.items())
        text = configs.descriptions(_origin(next(iter(owners.values())), name))[name].rstrip(".")
        knobs.add_argument(configs.flag(name), help=f"{text} [{shown}]", **_parsed_as(kind))
    train.set_defaults(command=_train, traceback=False)


def _origin(kind: type, name: str) -> type:
    """The class that a setting comes from, which says what it is for all that have it."""
    return next(base for base in reversed(kind.__mro__) if name in vars(base).get("__annotations__", ()))


def _parsed_as(kind: Any) -> dict[str, Any]:
    """Options of the flag of a field of that type."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": next((number for number in (int, float) if number in (kind, *typing.get_args(kind))), str)}


def _train(run: str | None = None, resume: bool = False, seeds: list[int] | None = None, **given: Any) -> int:
    from rich.console import Console

    config, folder, seeds = settings(run, resume, seeds, given)
    from crystaljax.agents import report, runner

    console = Console()
    progress = Console(stderr=True)
    with open_evaluator(config) as evaluator:
        if seeds:
            results = runner.sweep(config, seeds, evaluator, folder, resume=resume, console=progress)
        else:
            results = [runner.train(config, evaluator, folder, resume=resume, console=progress)]
    for result in results:
        console.print(report.best_table(result.env, result.ledger, result.origin))
    console.print(f"Everything is in {folder}", highlight=False, soft_wrap=True)
    if not result.interrupted:
        return 0
    reason = f"{result.stopped}; " if result.stopped else ""
    more = " and a larger budget" if result.stopped else ""
    print(
        f"crystaljax: {reason}stopped after update {result.updates} of {result.planned}; "
        f"go on with: crystaljax train --resume --run {folder}{more}",
        file=sys.stderr,
    )
    return 0 if result.stopped else INTERRUPTED


def settings(
    run: str | None, resume: bool, seeds: list[int] | None, given: dict[str, Any]
) -> tuple[RunConfig, Path, list[int] | None]:
    """The settings of a run, new or resumed, its folder, and the seeds of a sweep."""
    from crystaljax import run_folder, tasks
    from crystaljax.agents import config as configs
    from crystaljax.agents import runs

    file = given.pop("config", None)
    if "structures" in given:
        given["structures"] = findable(given["structures"])
    if "engine_options" in given:
        given["engine_options"] = configs.read_options(given["engine_options"])
    if not resume:
        table = {} if file is None else configs.read_toml(configs.find(file))
        table = configs.overlaid(table, given)
        if table.get("task") and "engine" not in table and (own := tasks.task(table["task"]).evaluator):
            table["engine"] = own
        config = usable_anywhere(configs.from_table(table, file or "command line"))
        refuse_unasked(config, given, str(file))
        if seeds and "seed" in given:
            raise ValueError("give --seed or --seeds, one of the two")
        return config, Path(run or Path("runs") / _run_name(config, seeds)), seeds
    if run is None:
        raise ValueError("--resume needs the folder of the run: give --run DIR")
    if file is not None:
        raise ValueError("a resumed run keeps its settings; leave out --config")
    if seeds is not None:
        raise ValueError("a resumed sweep keeps its seeds; leave out --seeds")
    before = configs.to_table(configs.load(runs.members(Path(run))[0])[0])
    after = configs.overlaid(before, given)
    saved, wanted = ({**table, **table.get(after["agent"], {})} for table in (before, after))
    changed = [name for name in given if name not in configs.MOVABLE and saved[name] != wanted[name]]
    if changed:
        raise ValueError(f"a resumed run keeps its settings; leave out {', '.join(changed)}, or start a new run")
    config = configs.from_table(after, "command line")
    refuse_unasked(config, given, run)
    return config, Path(run), run_folder.read_sweep(Path(run))


def _run_name(config: RunConfig, seeds: Sequence[int] | None) -> str:
    asked = config.property
    if config.objective:
        from crystaljax.objectives import parse

        asked = "-".join(parse(*config.objective).names)
    task = config.task or f"{asked}-{Path(config.structures[0]).stem}"
    return f"{task}-{config.agent}-{config.engine}-{'sweep' if seeds else config.seed}"
