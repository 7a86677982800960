"""What the README and the guides tell people to type works: every block of code is run, or stands below with a reason.

The ``python`` and ``bash`` blocks of a page run in their order, in one namespace and one empty folder; a block with a
``title`` is a module of that name, which later blocks import. ``crystaljax`` commands run in this process. Blocks in
another language are output or configuration. DFT itself is tested elsewhere: here an engine that answers at once stands
in for ``planewave``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from ase.build import bulk

from benchmarks import main_job as main_job_benchmark
from crystaljax import cli, library, symmetry, tasks
from crystaljax.cli.train import settings
from crystaljax.dft_bridge.engines import registry
from crystaljax.dft_bridge.testing import FakeEngine
from crystaljax.elements import SMALL, Vocabulary

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))

NOT_RUN = {
    "python3 -m venv": "the CI script does the same",
    ". .venv/bin/activate": "the CI script does the same",
    "pip install": "the CI script installs; how, is asserted below",
    "pytest": "this is it",
    "crystaljax train --task BandGap-C1-v0 --engine espresso": "needs SSSP; the engine has tests of its own",
}
"""Commands that are not run here, by how they begin, and why."""
NOT_CODE = ("bibtex", "toml")
"""Languages of blocks in which there is nothing to run."""

SMALLER = {
    "crystaljax train --config perovskite": "--network mlp --episodes 96",
    "crystaljax train --task Density-Mixed-v0": "--task Density-C1-v0 --network mlp --episodes 240",
}
"""Commands that would take minutes, by how they begin, and flags that overrule theirs."""


@dataclasses.dataclass(frozen=True)
class StandIn(FakeEngine):
    """Stands in for planewave: the same flags, numbers without physics, at once."""

    name: str = "stand-in"

    @classmethod
    def preset(cls, name: str, **overrides: object) -> StandIn:
        if name not in ("fast", "crystalgym"):
            raise ValueError(f"no preset {name!r}")
        return cls(**overrides)


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        language: after the three backticks.
        title: name of the module that it is, or empty.
        code: what it says.
    """

    language: str
    title: str
    code: str


def blocks(text: str) -> list[Block]:
    """The blocks of code of a page that have a language."""
    found = re.findall(r"^```(\w+)(?: title=\"(.*?)\")?\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert text.count("\n```") == 2 * len(re.findall(r"^```\w*.*?\n.*?^```$", text, re.DOTALL | re.MULTILINE))
    assert {language for language, *_ in found} <= {"python", "bash", *NOT_CODE}
    return [Block(*block) for block in found]


def commands(script: str) -> list[str]:
    """The commands of a block of bash, without comments and continuations."""
    joined = script.replace("\\\n", " ")
    lines = [line.split(" #")[0] for line in joined.splitlines()]
    return [" ".join(part.split()) for line in lines for part in line.split("&&") if part.strip()]


def run_command(command: str) -> None:
    """A command, unless there is a reason not to."""
    if command.startswith(tuple(NOT_RUN)):
        return
    overruling = [flags for beginning, flags in SMALLER.items() if command.startswith(beginning)]
    program, *words = shlex.split(" ".join([command, *overruling]))
    assert program == "crystaljax", f"{command}: this test runs crystaljax only; say in NOT_RUN why this is not run"
    assert cli.main(words) == 0, command


@pytest.fixture
def page_folder(tmp_path, monkeypatch):
    """A folder with a structure of the reader's, whose modules this process and the workers can import."""
    before = set(sys.modules)
    bulk("NaCl", "rocksalt", a=5.64).write(tmp_path / "mine.cif")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    # Workers are new processes; they must find the modules of the page and the engine that stands in.
    paths = [str(tmp_path), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("CRYSTALJAX_STORE", str(tmp_path / "default.db"))
    monkeypatch.setitem(registry.ENGINES, "planewave", StandIn)
    yield tmp_path
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


def case_of(page: Path):
    """A page; one with a training takes long."""
    lines = [line for block in blocks(page.read_text()) if block.language == "bash" for line in commands(block.code)]
    trains = any(line.startswith("crystaljax train") and not line.startswith(tuple(NOT_RUN)) for line in lines)
    return pytest.param(page, id=str(page.relative_to(ROOT)), marks=[pytest.mark.slow] * trains)


@pytest.mark.parametrize("page", map(case_of, PAGES))
def test_every_block_of_a_page_runs(page, page_folder):
    namespace: dict = {"__name__": "__main__"}
    for block in blocks(page.read_text()):
        if block.title:
            (page_folder / block.title).write_text(block.code)
        elif block.language == "python":
            exec(compile(block.code, f"{page.name}, block of Python", "exec"), namespace)
        elif block.language == "bash":
            for command in commands(block.code):
                run_command(command)


def test_no_reason_is_left_over():
    every = [command for page in PAGES for block in blocks(page.read_text()) for command in commands(block.code)]
    for beginning in (*NOT_RUN, *SMALLER):
        assert any(command.startswith(beginning) for command in every), f"{beginning} stands nowhere"


def first_block(beginning: str, language: str = "bash") -> str:
    """The first block of the README with these words."""
    of_language = (block.code for block in blocks(README.read_text()) if block.language == language)
    return next(code for code in of_language if beginning in code)


def main_job() -> dict:
    """The arguments of the README's training command, as the command line parses them."""
    command = commands(first_block("crystaljax train"))[-1]
    return vars(cli.parser().parse_args(shlex.split(command)[1:]))


def test_the_environment_example_is_short():
    code = [line for line in first_block("unrelaxed-density", "python").splitlines() if line]
    assert len([line for line in code if not line.startswith("import")]) <= 12


def test_the_main_job_is_the_one_whose_learning_is_measured():
    given = {name: value for name, value in main_job().items() if name not in ("command", "traceback", "run")}
    assert settings(None, False, None, given)[0] == main_job_benchmark.MAIN_JOB


def test_the_ci_script_runs_the_test_command():
    command = first_block("pytest")
    script = (ROOT / ".ci" / "run").read_text()
    for step in ("pip install -e '.[test]'", "pytest"):
        assert step in command.replace("--quiet ", "") and step in script.replace("--quiet ", "")


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_its_notebooks_run(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"CRYSTALJAX_STORE": str(tmp_path / "default.db"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cards = (tmp_path / "site" / "tasks" / "index.html").read_text()
    assert all(f"<code>{task_id}</code>" in cards for task_id in tasks.registered_tasks())
    for notebook in NOTEBOOKS:
        shown = (tmp_path / "site" / "notebooks" / notebook.stem / "index.html").read_text()
        assert "data:image/png" in shown, f"no picture in {notebook.name}"


def test_notebooks_are_kept_without_outputs():
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
        assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells), notebook.name


def load_hooks():
    """The module ``docs/hooks.py``."""
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_section_ends_at_the_next_heading_of_its_level_or_above():
    text = "# Page\nintro\n## A\none\n### Inner\n```bash\n# no heading\n```\n## B\ntwo\n"
    section = load_hooks().section
    assert section(text, "A", "page") == "one\n### Inner\n```bash\n# no heading\n```"
    assert section(text, "Inner", "page") == "```bash\n# no heading\n```"
    assert section(text, "B", "page") == "two"
    with pytest.raises(ValueError, match="page has no section 'C'; it has Page, A, Inner, B"):
        section(text, "C", "page")


def test_links_to_results_lead_to_their_pages():
    text = "[rows](benchmarks/results/planewave.md)"
    hooks = load_hooks()
    assert hooks.relinked(text, "engines.md") == "[rows](results/planewave.md)"
    assert hooks.relinked(text, "quickstart/benchmarker.md") == "[rows](../results/planewave.md)"


def test_distinct_crystals_of_orbit_mode_count_each_pair_once():
    hooks, (rocksalt,) = load_hooks(), library.crystals("RocksaltAB")
    assert hooks.distinct_crystals(rocksalt, "orbit", SMALL) == 18 * 19 // 2
    (perovskite,) = library.crystals("PerovskiteABX3")
    assert hooks.distinct_crystals(perovskite, "orbit", Vocabulary("three", ("Li", "O", "F"))) == 27
    assert hooks.distinct_crystals(perovskite, "site", SMALL) == symmetry.count_distinct(perovskite.permutations, 18)
