"""The command line: ``crystaljax train``, ``evaluate``, ``show``, ``doctor`` and ``tasks``.

Here, and only here, environment, agents and DFT engines are wired together. Commands import what they need, so that
help is fast.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.config import RunConfig
    from crystaljax.evaluators import Evaluator

BAD_INPUT, INTERRUPTED = 2, 130
AGENTS_EXTRA = {"matplotlib", "orbax", "rich", "tensorboardX"}
"""Packages of the extra ``agents``."""

EXAMPLES = """examples:
  crystaljax train --task BandGap-PerovskiteABX3-v0 --episodes 1000 --run runs/gap
  crystaljax train --resume --run runs/gap
  crystaljax train --structure NaCl.cif --property band_gap
  crystaljax train --task Density-C1-v0 --engine unrelaxed-density     (no DFT; seconds)
  crystaljax evaluate runs/gap --episodes 32 --target 2.0
  crystaljax show runs/gap -o best.png
  crystaljax doctor --install gpaw
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    # A GPU's memory is for the policy and for the DFT worker, which is another process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    given = vars(_parser().parse_args(arguments))
    command, traceback = given.pop("command"), given.pop("traceback")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for package in ("agents", "crystaljax", "dft_bridge"):
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        return command(**given) or 0
    except KeyboardInterrupt:
        print("crystaljax: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        message = _explain(error)
        if traceback or message is None:
            raise
        print(f"crystaljax: {message}", file=sys.stderr)
        return BAD_INPUT


def _explain(error: Exception) -> str | None:
    """One line for an error that the user can do something about; ``None`` for a defect of ours."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in AGENTS_EXTRA:
        return f"{error.name} is missing: pip install 'crystaljax[agents]'"
    if isinstance(error, ValueError | OSError) or type(error).__name__ in (
        "EngineNotReady",
        "InstallError",
        "StoreError",
    ):
        return " ".join(str(error).split()) or type(error).__name__
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

    show = commands.add_parser("show", help="draw a crystal, or the best crystals of a run")
    show.add_argument("source", metavar="CIF|RUN", help="structure file, or folder of a run")
    show.add_argument("-o", "--output", metavar="PNG", help="picture to write (default: next to the source)")
    show.set_defaults(command=_show)

    doctor = commands.add_parser("doctor", help="say which DFT engines can run here, and install them")
    doctor.add_argument("--install", metavar="ENGINE", help="install this engine with pip first")
    doctor.set_defaults(command=_doctor)

    tasks = commands.add_parser("tasks", help="list the registered tasks")
    tasks.set_defaults(command=_tasks)
    return parser


def _add_train(commands: Any) -> None:
    from agents.config import AGENTS, NETWORKS, RunConfig
    from crystaljax.tasks import MODES, PREFIXES

    train = commands.add_parser(
        "train",
        help="train an agent",
        argument_default=argparse.SUPPRESS,
        description="Train an agent. Ctrl-C stops it, keeps a checkpoint, and --resume goes on with the same numbers.",
    )

    def add(group: Any, flag: str, text: str, **options: Any) -> None:
        default = getattr(RunConfig, options.get("dest", flag.strip("-").replace("-", "_")), None)
        shown = "" if default in (None, "", ()) else f" (default: {default})"
        group.add_argument(flag, help=text + shown, **options)

    what = train.add_argument_group("what to design")
    add(what, "--task", "id of a task; `crystaljax tasks` lists them", metavar="ID")
    add(
        what,
        "--structure",
        "design on this structure instead of a task's: a file (CIF, POSCAR ...) or AFLOW prototype; may be repeated",
        metavar="FILE",
        dest="structures",
        action="append",
    )
    add(what, "--property", "property to design for; needed with --structure", choices=tuple(PREFIXES))
    add(what, "--target", "aim at this value, in eV, GPa or g/cm3 (default: the task's)", type=float)
    add(what, "--vocabulary", "elements to choose from", choices=("small", "medium", "large"))
    add(what, "--mode", "one decision per site, or per symmetry orbit (default: the task's)", choices=MODES)

    how = train.add_argument_group("where rewards come from")
    add(how, "--engine", "DFT engine (see `crystaljax doctor`), unrelaxed-density (no DFT) or chgnet (a surrogate)")
    add(how, "--preset", "settings of the engine: fast, crystalgym, standard ...")
    add(how, "--store", "file of the results store, shared by all runs", metavar="FILE")
    add(how, "--workers", "processes that calculate (default: one per GPU, else one per core)", type=int)

    run = train.add_argument_group("the run")
    add(run, "--run", "folder of the run (default: runs/TASK-AGENT-ENGINE-SEED)", metavar="DIR")
    run.add_argument("--resume", action="store_true", help="go on with the run in --run from its last checkpoint")
    add(run, "--agent", "algorithm", choices=AGENTS)
    add(run, "--episodes", "crystals to design, rounded up to whole updates", type=int)
    add(run, "--seed", "of everything random", type=int)
    add(run, "--checkpoint-every", "updates between checkpoints", type=int)

    knobs = train.add_argument_group("hyperparameters")
    add(knobs, "--network", "what reads the crystal; mlp is for one skeleton", choices=NETWORKS)
    add(knobs, "--lanes", "environments in parallel; also the crystals that one DFT batch may hold", type=int)
    add(knobs, "--steps", "steps of each environment per update", type=int)
    add(knobs, "--learning-rate", "of Adam, at the start", type=float)
    knobs.add_argument("--no-anneal", dest="anneal", action="store_false", help="keep the learning rate constant")
    add(knobs, "--minibatches", "parts of an update's steps", type=int)
    add(knobs, "--epochs", "passes over an update's steps", type=int)
    add(knobs, "--entropy", "weight of the entropy bonus", type=float)
    add(knobs, "--discount", "gamma", type=float)
    add(knobs, "--trace", "lambda of the advantage estimate", type=float)
    add(knobs, "--clip", "range of the probability ratio", type=float)
    add(knobs, "--min-deviation", "advantages are divided by their deviation, at least by this", type=float)
    add(knobs, "--target-kl", "how far (nats) the policy may move in an update (default: no limit)", type=float)
    train.set_defaults(command=_train, traceback=False)


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
    evaluate.add_argument("--store", metavar="FILE", help="another results store than the run's")
    evaluate.add_argument("--workers", type=int, help="processes that calculate (default: the run's)")
    evaluate.set_defaults(command=_evaluate)


@contextlib.contextmanager
def _open_evaluator(config: RunConfig) -> Iterator[Evaluator]:
    """The bridge to a DFT engine, closed at the end, or an on-device evaluator."""
    from crystaljax import evaluators
    from dft_bridge.engines.registry import ENGINES

    if config.engine not in ENGINES:
        yield evaluators.evaluator(config.engine)
        return
    from dft_bridge import open_bridge

    with open_bridge(config.engine, config.preset, store=config.store, workers=config.workers) as bridge:
        yield bridge


def _train(run: str | None = None, resume: bool = False, **given: Any) -> int:
    from rich.console import Console

    config, folder = _settings(run, resume, given)
    from agents import report, runner

    console = Console()
    progress = Console(stderr=True)
    with _open_evaluator(config) as evaluator:
        result = runner.train(config, evaluator, folder, resume=resume, console=progress)
    console.print(report.best_table(result.env, result.ledger, result.origin))
    console.print(f"Everything is in {result.folder}", highlight=False, soft_wrap=True)
    if not result.interrupted:
        return 0
    print(
        f"crystaljax: stopped after update {result.updates} of {result.planned}; "
        f"go on with: crystaljax train --resume --run {result.folder}",
        file=sys.stderr,
    )
    return INTERRUPTED


def _settings(run: str | None, resume: bool, given: dict[str, Any]) -> tuple[RunConfig, Path]:
    """The settings of a run, new or resumed, and its folder."""
    import dataclasses

    from agents import config as configs

    if "structures" in given:
        given["structures"] = tuple(
            str(Path(structure).absolute()) if Path(structure).exists() else structure
            for structure in given["structures"]
        )
    if not resume:
        config = configs.RunConfig(**given)
        return config, Path(run or Path("runs") / _run_name(config))
    if run is None:
        raise ValueError("--resume needs the folder of the run: give --run DIR")
    saved, _ = configs.load(Path(run))
    config = dataclasses.replace(saved, **given)
    changed = [name for name in given if name not in configs.MOVABLE and getattr(saved, name) != given[name]]
    if changed:
        raise ValueError(f"a resumed run keeps its settings; leave out {', '.join(changed)}, or start a new run")
    return config, Path(run)


def _run_name(config: RunConfig) -> str:
    task = config.task or f"{config.property}-{Path(config.structures[0]).stem}"
    return f"{task}-{config.agent}-{config.engine}-{config.seed}"


def _evaluate(
    run: str, episodes: int, task: str | None, target: float | None, sample: bool, seed: int, **given: Any
) -> int:
    import dataclasses

    import jax
    from rich.console import Console

    from agents import config as configs
    from agents import report, runner
    from agents.checkpoints import Checkpoints
    from agents.evaluation import make_designer, refuse_other_shapes
    from agents.ledger import Ledger
    from agents.networks import make_network

    if episodes < 1:
        raise ValueError(f"--episodes is {episodes}; give at least 1")
    config, _ = configs.load(Path(run))
    if config.agent == "random":
        raise ValueError(f"{run} is a random search, which has no policy to evaluate")
    changes = {name: value for name, value in given.items() if value is not None}
    if task is not None:
        changes |= {"task": task, "structures": (), "property": "", "mode": "", "target": None}
    if target is not None:
        changes["target"] = target
    config = dataclasses.replace(config, **changes)
    checkpoints = Checkpoints(Path(run))
    if checkpoints.latest is None:
        raise ValueError(f"{run} has no checkpoint yet; train it first")
    with _open_evaluator(config) as evaluator:
        env, params = runner.build_env(config, evaluator)
        network = make_network(env, config.network)
        policy = checkpoints.restore_network()
        refuse_other_shapes(env, network, policy)
        design = jax.jit(make_designer(env, network, episodes, greedy=not sample))
        records = design(jax.random.key(seed), policy, params)
        jax.block_until_ready(records)
        env.evaluator.check()
    ledger = Ledger(env.skeletons, env.vocabulary)
    ledger.add_records(records, update=0)
    origin = report.Origin(env.evaluator.label, {}, float(params.target))
    Console().print(report.designs_table(env, ledger, origin))
    return 0


def _show(source: str, output: str | None) -> int:
    from crystaljax import viewer

    path = Path(source)
    if not path.exists():
        raise ValueError(f"no such file or run: {source}")
    if path.is_dir():
        written = viewer.save(viewer.draw_run(path), output or path / "best.png")
    else:
        written = viewer.save(viewer.draw_file(path), output or path.with_suffix(".png"))
    print(written)
    return 0


def _doctor(install: str | None) -> int:
    from rich.console import Console
    from rich.table import Table

    from dft_bridge import doctor

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

    from crystaljax import library, rewards, tasks

    table = Table(title="Tasks")
    for column, justify in (("task", "left"), ("target", "right"), ("crystals", "right"), ("sites", "right")):
        table.add_column(column, justify=justify)
    table.add_column("decides")
    for task_id in tasks.registered_tasks():
        task = tasks.task(task_id)
        objective, skeletons = rewards.OBJECTIVES[task.property], library.crystals(task.crystals)
        sites = sorted({skeleton.n_sites for skeleton in skeletons})
        shown = str(sites[0]) if len(sites) == 1 else f"{sites[0]}-{sites[-1]}"
        decides = "each orbit" if task.mode == "orbit" else "each site"
        table.add_row(task.id, f"{objective.target:g} {objective.unit}", str(len(skeletons)), shown, decides)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
