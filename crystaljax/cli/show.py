"""``crystaljax report``, ``show``, ``doctor`` and ``tasks``: what there is, on a page, as a picture, as a table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Add these commands to the parser of the command line."""
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
    table.add_column("task")
    for column in ("target", "crystals", "sites"):
        table.add_column(column, justify="right")
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
