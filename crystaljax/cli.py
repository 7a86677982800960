"""The command line: ``crystaljax train``, ``evaluate``, ``report``, ``show``, ``doctor``, ``tasks`` and ``store``.

Here, and only here, environment, agents and DFT engines are wired together. Commands import what they need, so that
help is fast.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crystaljax import cli_store
from crystaljax.errors import CrystalJAXError
from crystaljax.signals import no_interrupt_is_lost
from crystaljax.urls import without_password

if TYPE_CHECKING:
    from crystaljax.agents.config import RunConfig
    from crystaljax.evaluators import Evaluator

BAD_INPUT, INTERRUPTED = 2, 130
MOST_DESIGNS = 100_000
"""Crystals that one `evaluate` designs, all at once, and lists."""
EXTRAS = {
    **dict.fromkeys(("flashbax", "matplotlib", "orbax", "rich", "scipy", "tensorboardX"), "agents"),
    "optuna": "bo",
    "smact": "smact",
    "wandb": "wandb",
}
"""The extra that a package belongs to."""

EXAMPLES = """examples:
  crystaljax train --config perovskite --run runs/first
  crystaljax train --task BandGap-PerovskiteABX3-v0 --episodes 1000 --run runs/gap
  crystaljax train --resume --run runs/gap
  crystaljax train --structure NaCl.cif --property band_gap
  crystaljax train --task Density-C1-v0 --engine unrelaxed-density     (no DFT; seconds)
  crystaljax evaluate runs/gap --episodes 32 --target 2.0
  crystaljax report runs/gap runs/random --reference mp.csv --output report.html
  crystaljax show runs/gap -o best.png
  crystaljax train --task BandGap-C1-v0 --engine espresso --engine-option pseudopotentials=SSSP
  crystaljax doctor --install gpaw
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    # A GPU's memory is for the policy and for the DFT worker, which is another process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    traceback = False
    try:
        given = vars(_parser().parse_args(arguments))
        sys.argv[1:] = map(without_password, sys.argv[1:])  # what tracks a run saves the command line
        command, traceback = given.pop("command"), given.pop("traceback")
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        logging.getLogger("crystaljax").setLevel(logging.INFO)
        with no_interrupt_is_lost():
            return command(**given) or 0
    except (KeyboardInterrupt, Exception) as error:
        if _interrupted(error):
            print("crystaljax: interrupted", file=sys.stderr)
            return INTERRUPTED
        message = _explain(error)
        if traceback or message is None:
            raise
        print(f"crystaljax: {message}", file=sys.stderr)
        return BAD_INPUT


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: modules that are being loaded make an error of their own of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _explain(error: Exception) -> str | None:
    """One line for an error that the user can do something about; ``None`` for a defect of ours."""
    package = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package in EXTRAS:
        return f"{package} is missing: pip install 'crystaljax[{EXTRAS[package]}]'"
    if isinstance(error, CrystalJAXError | ValueError | OSError):
        # What came from a file may hold the control characters of a terminal.
        text = without_password(" ".join(str(error).split()), "***")
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text) or type(error).__name__
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="crystaljax",
        description="Reinforcement learning that designs crystals; every reward is a DFT calculation.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_evaluate(commands)

    report = commands.add_parser(
        "report",
        help="compare runs on a page",
        description="Compare runs on one page: curves over distinct calculations with intervals over seeds, metrics, "
        "the best crystals with their CIF files, costs and provenance. Runs may be unfinished.",
    )
    report.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run or of a sweep")
    report.add_argument(
        "-o", "--output", metavar="FILE", default="report.html", help=".html or .md (default: %(default)s)"
    )
    report.add_argument(
        "--reference", metavar="FILE", help="known formulas (CSV, JSON or one in each line), for novelty"
    )
    report.add_argument("--tolerance", type=float, help="distance from the target that counts as success, in its unit")
    report.set_defaults(command=_report)

    show = commands.add_parser("show", help="draw a crystal, or the best crystals of a run")
    show.add_argument("source", metavar="CIF|RUN", help="structure file, or folder of a run")
    show.add_argument("-o", "--output", metavar="PNG", help="picture to write (default: next to the source)")
    show.set_defaults(command=_show)

    doctor = commands.add_parser("doctor", help="say which DFT engines can run here, and install them")
    doctor.add_argument("--install", metavar="ENGINE", help="install this engine with pip first")
    doctor.set_defaults(command=_doctor)

    tasks = commands.add_parser("tasks", help="list the registered tasks")
    tasks.set_defaults(command=_tasks)

    cli_store.add_commands(commands)
    return parser


def _add_train(commands: Any) -> None:
    from crystaljax.agents import config as configs
    from crystaljax.agents.hyperparameters import ALGORITHMS
    from crystaljax.properties import COMBINE, PROPERTIES
    from crystaljax.tasks import MODES

    train = commands.add_parser(
        "train",
        help="train an agent",
        argument_default=argparse.SUPPRESS,
        description="Train an agent. Ctrl-C stops it, keeps a checkpoint, and --resume goes on with the same numbers.",
    )
    texts, kinds = configs.descriptions(configs.RunConfig), configs.settings(configs.RunConfig)

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
    run.add_argument("--agent", choices=tuple(ALGORITHMS), help=f"algorithm (default: {configs.DEFAULT_AGENT})")
    add(run, "network", choices=configs.NETWORKS)
    for name in ("episodes", "seed", "checkpoint_every"):
        add(run, name)
    add(run, "wandb", metavar="PROJECT")
    run.add_argument("--seeds", metavar="N", type=int, nargs="+", help="several runs in one program, in DIR/seed-N")

    knobs = train.add_argument_group("hyperparameters", "Each algorithm has some of these: [its default].")
    for name, kind in configs.hyperparameters().items():
        owners = {agent: settings for agent, settings in ALGORITHMS.items() if name in configs.settings(settings)}
        defaults: dict[Any, list[str]] = {}
        for agent, settings in owners.items():
            defaults.setdefault(getattr(settings, name), []).append(agent)
        shown = "; ".join(f"{', '.join(agents)}: {default}" for default, agents in defaults.items())
        text = configs.descriptions(next(iter(owners.values())))[name].rstrip(".")
        knobs.add_argument(configs.flag(name), help=f"{text} [{shown}]", **_parsed_as(kind))
    train.set_defaults(command=_train, traceback=False)


def _parsed_as(kind: Any) -> dict[str, Any]:
    """Options of the flag of a field of that type."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": next((number for number in (int, float) if number in (kind, *typing.get_args(kind))), str)}


def _add_evaluate(commands: Any) -> None:
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


@contextlib.contextmanager
def _open_evaluator(config: RunConfig) -> Iterator[Evaluator]:
    """The bridge to a DFT engine, closed at the end, or an on-device evaluator."""
    from crystaljax import evaluators
    from crystaljax.dft_bridge.engines.registry import check_options, is_engine

    check_options(config.engine, config.engine_options)
    if not is_engine(config.engine):
        yield evaluators.evaluator(config.engine)
        return
    from crystaljax.dft_bridge import open_bridge

    with open_bridge(
        config.engine,
        config.preset,
        store=config.store,
        workers=config.workers,
        scheduler=config.scheduler,
        timeout=config.timeout,
        memory=config.memory,
        max_calls=config.max_dft_calls,
        max_core_hours=config.max_core_hours,
        **config.engine_options,
    ) as bridge:
        yield bridge


def _train(run: str | None = None, resume: bool = False, seeds: list[int] | None = None, **given: Any) -> int:
    from rich.console import Console

    config, folder, seeds = _settings(run, resume, seeds, given)
    from crystaljax.agents import report, runner

    console = Console()
    progress = Console(stderr=True)
    with _open_evaluator(config) as evaluator:
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


def _settings(
    run: str | None, resume: bool, seeds: list[int] | None, given: dict[str, Any]
) -> tuple[RunConfig, Path, list[int] | None]:
    """The settings of a run, new or resumed, its folder, and the seeds of a sweep."""
    from crystaljax import run_folder, tasks
    from crystaljax.agents import config as configs
    from crystaljax.agents import runs

    file = given.pop("config", None)
    if "structures" in given:
        given["structures"] = _findable(given["structures"])
    if "engine_options" in given:
        given["engine_options"] = configs.read_options(given["engine_options"])
    if not resume:
        table = {} if file is None else configs.read_toml(configs.find(file))
        table = configs.overlaid(table, given)
        if table.get("task") and "engine" not in table and (own := tasks.task(table["task"]).evaluator):
            table["engine"] = own
        config = _usable_anywhere(configs.from_table(table, file or "command line"))
        _refuse_unasked(config, given, str(file))
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
    _refuse_unasked(config, given, run)
    return config, Path(run), run_folder.read_sweep(Path(run))


def _refuse_unasked(config: RunConfig, given: Mapping[str, Any], source: str) -> None:
    """Refuse what would run because a file says so, and the flags that were given do not."""
    from crystaljax import trust
    from crystaljax.dft_bridge.engines.registry import programs

    named = programs(config.engine, config.engine_options)
    asked = programs(config.engine, given.get("engine_options") or {})
    if given.get("engine") != config.engine:
        asked.pop("--engine", None)
    if config.scheduler is not None:  # its workers and this process send each other code
        named["--scheduler"], asked["--scheduler"] = config.scheduler, given.get("scheduler")
    trust.refuse_unasked(named, asked, source)


def _findable(structures: Sequence[str]) -> tuple[str, ...]:
    """Structure files by their absolute paths, so that a run can be resumed from anywhere; other names as they are."""
    return tuple(str(Path(name).absolute()) if Path(name).exists() else name for name in structures)


def _usable_anywhere(config: RunConfig) -> RunConfig:
    """The settings with absolute paths of structure files and of a folder of pseudopotentials."""
    import dataclasses

    options = dict(config.engine_options)
    if isinstance(options.get("pseudopotentials"), str):
        (options["pseudopotentials"],) = _findable([options["pseudopotentials"]])
    return dataclasses.replace(config, structures=_findable(config.structures), engine_options=options)


def _run_name(config: RunConfig, seeds: Sequence[int] | None) -> str:
    task = config.task or f"{config.property}-{Path(config.structures[0]).stem}"
    return f"{task}-{config.agent}-{config.engine}-{'sweep' if seeds else config.seed}"


def _evaluate(
    run: str, episodes: int, task: str | None, target: float | None, sample: bool, seed: int, **given: Any
) -> int:
    import dataclasses

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
    if target is not None:
        changes["target"] = target
    config = _usable_anywhere(dataclasses.replace(config, **changes))
    _refuse_unasked(config, asked, run)
    checkpoints = Checkpoints(Path(run), read_only=True)
    if checkpoints.latest is None:
        raise ValueError(f"{run} has no checkpoint yet; train it first")
    with _open_evaluator(config) as evaluator:
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


def _report(runs: list[str], output: str, reference: str | None, tolerance: float | None) -> None:
    from crystaljax.agents import comparison
    from crystaljax.agents import reference as references
    from crystaljax.agents import runs as folders

    known = None if reference is None else references.read(Path(reference))
    found = folders.read_all(map(Path, runs))
    comparison.write_report(found, Path(output), known=known, tolerance=tolerance)
    print(output)


def _show(source: str, output: str | None) -> int:
    from crystaljax import files, viewer

    path = Path(source)
    if not path.exists():
        raise ValueError(f"no such file or run: {source}")
    picture = viewer.png(viewer.draw_run(path) if path.is_dir() else viewer.draw_file(path))
    if output is None:  # beside what may come from somebody else: a link there is not followed
        written = path / "best.png" if path.is_dir() else path.with_suffix(".png")
        files.replace_bytes(written, picture)
    else:
        written = Path(output)
        written.write_bytes(picture)
    print(written)
    return 0


def _doctor(install: str | None) -> int:
    from rich.console import Console
    from rich.table import Table

    from crystaljax.dft_bridge import doctor

    console = Console()
    if install:
        console.print(f"installing {install} with pip ...")
        doctor.install(install)
    table = Table(title=f"DFT engines ({os.cpu_count()} CPU cores)")
    for column in ("engine", "state", "version", "what to do"):
        table.add_column(column)
    reports = doctor.check()
    for report in reports:
        state = "[green]ready[/]" if report.ready else "[red]not ready[/]"
        table.add_row(report.name, state, report.version, report.detail)
    console.print(table)
    return 0 if any(report.ready for report in reports) else 1


def _tasks() -> int:
    from rich.console import Console
    from rich.table import Table

    from crystaljax import library, objectives, tasks

    table = Table(title="Tasks")
    for column, justify in (("task", "left"), ("target", "right"), ("crystals", "right"), ("sites", "right")):
        table.add_column(column, justify=justify)
    table.add_column("decides")
    for task_id in tasks.registered_tasks():
        task = tasks.task(task_id)
        objective, skeletons = objectives.OBJECTIVES[task.property], library.crystals(task.crystals)
        sites = sorted({skeleton.n_sites for skeleton in skeletons})
        shown = str(sites[0]) if len(sites) == 1 else f"{sites[0]}-{sites[-1]}"
        decides = "each orbit" if task.mode == "orbit" else "each site"
        table.add_row(
            task.id, f"{objective.target:g} {objective.properties[0].unit}", str(len(skeletons)), shown, decides
        )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
