"""What the README tells people to run is what is tested and measured."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

from crystaljax import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def main_job() -> dict:
    """The arguments of the README's training command, as the command line parses them."""
    command = next(block for block in blocks("bash") if "crystaljax train" in block)
    words = shlex.split(command.replace("\\\n", " ").rsplit("&&", 1)[1])
    return vars(cli._parser().parse_args(words[1:]))


def test_the_environment_example_runs() -> None:
    example = next(block for block in blocks("python") if "unrelaxed-density" in block)
    code = [line for line in example.splitlines() if line and not line.startswith("import")]
    assert len(code) <= 12
    namespace: dict = {}
    exec(example, namespace)
    assert namespace["terminated"].all()


def test_the_main_job_is_the_one_whose_learning_is_measured() -> None:
    spec = importlib.util.spec_from_file_location("main_job", ROOT / "benchmarks" / "main_job.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    given = {name: value for name, value in main_job().items() if name not in ("command", "traceback", "run")}
    assert cli._settings(None, False, None, given)[0] == benchmark.MAIN_JOB


def test_the_ci_script_runs_the_test_command() -> None:
    command = next(block for block in blocks("bash") if "pytest" in block)
    script = (ROOT / ".ci" / "run").read_text()
    for step in ("pip install '.[test]'", "pytest"):
        assert step in command.replace("--quiet ", "") and step in script.replace("--quiet ", "")
