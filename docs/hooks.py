"""What MkDocs does not take from a page's own text: parts of other files, results of benchmarks, the registered tasks.

A line of a page may be one of

- ``<!-- include: README.md, section: Rewards -->``: that section of a file, without its heading;
- ``<!-- include: benchmarks/results/planewave.md, section: Speed -->``: the same of any file of the repository;
- ``<!-- generated: tasks -->``: what the function of that name in :data:`GENERATED` writes.

So every number stands in one place. What is missing ends the build.
"""

from __future__ import annotations

import atexit
import inspect
import posixpath
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from crystaljax.elements import Vocabulary
    from crystaljax.objectives import Objective
    from crystaljax.skeleton import Skeleton
    from crystaljax.tasks import Task

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results/"
PAGES_OF_RESULTS = "results/"
"""Where the files of :data:`RESULTS` are on the site."""
SHOWN_RESULTS = (".md", ".png", ".svg", ".csv", ".json")
DIRECTIVE = re.compile(r"^<!-- (include|generated): ([^,]*?)(?:, section: (.*?))? -->$", re.MULTILINE)


# What MkDocs calls.


def on_config(config: Any) -> Any:
    """Lists the results of benchmarks in the navigation, and shows mkdocstrings the packages as they are installed.

    It reads source files and does not follow the mapping of folders to packages, so it gets a folder of links.
    """
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [installed_layout()]
    pages = [{title(path): PAGES_OF_RESULTS + name} for name, path in results() if path.suffix == ".md"]
    for entry in config.nav:
        if "Measured" in entry:
            entry["Measured"] = pages
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the results of benchmarks to the site."""
    from mkdocs.structure.files import File

    for name, path in results():
        files.append(File.generated(config, PAGES_OF_RESULTS + name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts in place what the directives of a page ask for."""
    return expanded(markdown, page.file.src_uri)


def on_page_content(html: str, **_: Any) -> str:
    """Takes the roles of Sphinx, such as ``:class:``, off the names in docstrings."""
    html = re.sub(r":(?:attr|class|data|exc|func|meth|mod):\s*(<code)", r"\1", html)
    return re.sub(r"(<code[^>]*>)~[\w.]+\.(\w+</code>)", r"\1\2", html)


on_config.mkdocs_priority = 100  # before mkdocstrings reads its own settings


def installed_layout() -> str:
    """A folder that holds the package with its subpackages in place, as links; it goes with the process."""
    folder = tempfile.TemporaryDirectory(prefix="crystaljax-docs-")
    atexit.register(folder.cleanup)
    package = Path(folder.name, "crystaljax")
    package.mkdir()
    for path in [*(ROOT / "crystaljax").iterdir(), ROOT / "agents", ROOT / "dft_bridge"]:
        (package / path.name).symlink_to(path)
    return folder.name


# The pure parts.


def results() -> list[tuple[str, Path]]:
    """Files of :data:`RESULTS` that are shown, by their path in it."""
    folder = ROOT / RESULTS
    paths = sorted(path for path in folder.rglob("*") if path.suffix in SHOWN_RESULTS)
    return [(path.relative_to(folder).as_posix(), path) for path in paths]


def title(path: Path) -> str:
    """The first heading of a Markdown file; raises ``ValueError`` if it has none."""
    found = re.search(r"^# (.+)$", path.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{path} begins with no heading; give it a line '# Title'")
    return found[1]


def expanded(markdown: str, page: str) -> str:
    """The text of a page (its path below ``docs``) with its directives carried out."""

    def text(found: re.Match) -> str:
        kind, name, heading = found.groups()
        if kind == "generated":
            return GENERATED[name]()
        return relinked(section((ROOT / name).read_text(), heading, name), page)

    return DIRECTIVE.sub(text, markdown)


def section(markdown: str, heading: str, name: str) -> str:
    """What stands under a heading, up to the next one of its level or above.

    Raises:
        ValueError: if there is no such heading; lists those that there are.
    """
    lines = markdown.splitlines()
    headings = list(_headings(lines))
    for position, (start, level, found) in enumerate(headings):
        if found == heading:
            later = (line for line, depth, _ in headings[position + 1 :] if depth <= level)
            return "\n".join(lines[start + 1 : next(later, len(lines))]).strip()
    raise ValueError(f"{name} has no section {heading!r}; it has {', '.join(found for _, _, found in headings)}")


def _headings(lines: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Line number, level and text of each heading; lines of code that begin with # are none."""
    code = False
    for number, line in enumerate(lines):
        if line.startswith("```"):
            code = not code
        found = re.match(r"(#+) (.+)", line)
        if found and not code:
            yield number, len(found[1]), found[2].strip()


def relinked(markdown: str, page: str) -> str:
    """Links to results of benchmarks, as the README has them, for a page of the site."""
    up = posixpath.relpath(PAGES_OF_RESULTS, posixpath.dirname(page) or ".")
    return markdown.replace(f"]({RESULTS}", f"]({up}/")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def task_cards() -> str:
    """Every registered task, property by property."""
    from crystaljax import tasks
    from crystaljax.objectives import OBJECTIVES

    registered = [tasks.task(task_id) for task_id in tasks.registered_tasks()]
    cards = []
    for name, objective in OBJECTIVES.items():
        own = [task for task in registered if task.property == name]
        rows = [_task_row(task) for task in own]
        header = ("id", "crystals", "decisions", "distinct crystals, small vocabulary", "values from", "best crystals")
        cards += [f"## {name.replace('_', ' ').capitalize()}", _objective_card(objective), table(header, rows)]
    return "\n\n".join(cards)


def _objective_card(objective: Objective) -> str:
    """Target and reward of a property, from the code that computes them."""
    term = objective.terms[0]
    unit = term.property.unit
    summary = inspect.getdoc(term.score).split("\n\n")[0].replace("``", "`")
    if hasattr(term.score, "width"):
        summary = summary.replace("/ width)", f"/ {term.score.width:.4g})")
    rows = [
        ("target", f"{objective.target:g} {unit}"),
        ("target out of distribution", f"{objective.far_targets[0]:g} {unit}"),
        ("reward", summary.rstrip(".")),
        ("reward of a failed calculation", f"{objective.failure_reward:g}"),
        ("no reward exceeds", f"{objective.best_reward:g}"),
    ]
    return table(("", ""), rows)


def _task_row(task: Task) -> tuple[str, ...]:
    from crystaljax import library
    from crystaljax.elements import SMALL

    skeletons = library.crystals(task.crystals)
    decisions = sorted({decisions_of(skeleton, task.mode) for skeleton in skeletons})
    distinct = sum(distinct_crystals(skeleton, task.mode, SMALL) for skeleton in skeletons)
    steps = f"{decisions[0]}" if len(decisions) == 1 else f"{decisions[0]} to {decisions[-1]}"
    source, best = ("DFT", "not known") if task.evaluator is None else optimum(task)
    return f"`{task.id}`", task.crystals, steps, f"{distinct:,}", source, best


def optimum(task: Task) -> tuple[str, str]:
    """Where the values of a task with a table come from, and its best crystals: formula, value, reward."""
    from crystaljax import tables
    from crystaljax.objectives import OBJECTIVES

    objective, known = OBJECTIVES[task.property], tables.load(f"{task.property}-{task.crystals}")
    rewards = np.asarray(objective.reward(known.values, known.statuses, objective.target))
    best = [known.entries[index] for index in np.flatnonzero(rewards == rewards.max())]
    shown = ", ".join(f"{''.join(entry.elements)} {entry.value:.3f} {objective.properties[0].unit}" for entry in best)
    return known.label, f"{shown} (reward {rewards.max():.4f})"


def decisions_of(skeleton: Skeleton, mode: str) -> int:
    """Steps of an episode."""
    return int(skeleton.orbits.max()) + 1 if mode == "orbit" else skeleton.n_sites


def distinct_crystals(skeleton: Skeleton, mode: str, vocabulary: Vocabulary) -> int:
    """How many different crystals the decisions of an episode lead to."""
    from crystaljax.symmetry import count_distinct
    from crystaljax.tables import labelings

    if mode != "orbit":
        return count_distinct(skeleton.permutations, len(vocabulary))
    return len(labelings(skeleton, vocabulary)[0])


def skeleton_table() -> str:
    """The crystals of the tasks, but for the many of ``Five``."""
    import spglib

    from crystaljax import library

    rows = []
    for name in (*library.BENCHMARK_ROWS, *library.PROTOTYPES):
        (skeleton,) = library.crystals(name)
        kinds = np.unique(skeleton.species, return_inverse=True)[1]
        group = spglib.get_spacegroup((skeleton.lattice, skeleton.frac_coords, kinds), symprec=1e-3)
        lengths = ", ".join(f"{length:.3f}" for length in sorted(set(np.round(skeleton.parameters[:3], 3))))
        angles = ", ".join(f"{angle:g}" for angle in sorted(set(np.round(skeleton.parameters[3:], 1))))
        orbits = int(skeleton.orbits.max()) + 1
        prototype = "".join(skeleton.species)
        rows.append((name, prototype, skeleton.source, group, skeleton.n_sites, orbits, lengths, angles))
    header = ("name", "prototype", "source", "space group", "sites", "orbits", "lengths, Å", "angles, degrees")
    return table(header, rows)


def landscapes() -> str:
    """The pictures of tables that ``benchmarks/table_report.py`` has drawn."""
    pictures = [name for name, path in results() if name.startswith("tables/") and path.suffix == ".png"]
    return "\n".join(f"![Landscape of {Path(name).stem}]({PAGES_OF_RESULTS}{name})" for name in pictures)


def vocabulary_table() -> str:
    """The vocabularies; each begins with the one before."""
    from crystaljax.elements import VOCABULARIES

    rows, before = [], 0
    for name, vocabulary in VOCABULARIES.items():
        more = " ".join(vocabulary.symbols[before:])
        rows.append((name, len(vocabulary), ("the above, then " if before else "") + more))
        before = len(vocabulary)
    return table(("name", "elements", "which"), rows)


GENERATED: dict[str, Callable[[], str]] = {
    "tasks": task_cards,
    "skeletons": skeleton_table,
    "landscapes": landscapes,
    "vocabularies": vocabulary_table,
}
