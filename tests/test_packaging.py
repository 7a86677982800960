"""What is installed: one import root, every package and every data file of it."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import importlib.util
import pkgutil
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import crystaljax
from crystaljax.agents.networks import Network

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETTINGS, PROJECT = PYPROJECT["tool"]["setuptools"], PYPROJECT["project"]
FOLDERS = {"crystaljax": "crystaljax", "agents": "crystaljax.agents", "dft_bridge": "crystaljax.dft_bridge"}
"""The folders of the repository that are installed, and the packages that they become."""


def packages() -> dict[str, Path]:
    """Every package below the installed folders."""
    found = {}
    for folder, name in FOLDERS.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            parts = path.parent.relative_to(ROOT / folder).parts
            found[".".join([name, *parts])] = path.parent
    return found


def test_every_package_is_installed_below_one_root():
    assert set(SETTINGS["packages"]) == set(packages())
    assert {name.partition(".")[0] for name in SETTINGS["packages"]} == {"crystaljax"}
    assert {value: name for name, value in SETTINGS["package-dir"].items()} == {
        folder: name for folder, name in FOLDERS.items() if folder != name
    }


@pytest.mark.parametrize("name", packages())
def test_every_data_file_of_a_package_is_installed(name):
    folder, patterns = packages()[name], SETTINGS["package-data"].get(name, [])
    inner = [path for path in packages().values() if path != folder and path.is_relative_to(folder)]
    for path in folder.rglob("*"):
        own = path.is_file() and not any(path.is_relative_to(other) for other in inner)
        if own and path.suffix not in (".py", ".pyc"):
            relative = str(path.relative_to(folder))
            assert any(fnmatch.fnmatch(relative, pattern) for pattern in patterns), f"{name}: {relative} is not shipped"


def imported(path: Path) -> set[str]:
    """The dotted names that a file imports, wherever in it: ``a.b`` and ``a.b.c`` for ``from a.b import c``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_benchmarks_need_no_tests_and_tests_no_inner_part_of_a_benchmark():
    of_tests = {"tests", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}
    for path in (ROOT / "benchmarks").glob("*.py"):
        text = path.read_text()
        assert not of_tests & {name.partition(".")[0] for name in imported(path)}, path.name
        assert "sys.path" not in text and "pythonpath" not in text.lower(), f"{path.name} changes the path"
    for path in (ROOT / "tests").rglob("*.py"):
        inner = [name for name in imported(path) if name.startswith("benchmarks.") and "._" in name]
        assert not inner, f"{path.name}: {inner}"


def test_what_is_offered_by_name_is_there():
    for points in PROJECT["entry-points"].values():
        for value in points.values():
            assert callable(pkgutil.resolve_name(value)) or isinstance(pkgutil.resolve_name(value), Network), value
    assert callable(pkgutil.resolve_name(PROJECT["scripts"]["crystaljax"]))


def test_the_version_stands_in_one_place():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {PROJECT['version']}\n" in citation, "CITATION.cff is for readers; keep it at the version"
    assert f"\n## {PROJECT['version']}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert crystaljax.__version__ == metadata.version("crystaljax")


def test_links_of_the_readme_lead_somewhere_and_are_absolute_on_pypi():
    spec = importlib.util.spec_from_file_location("pypi_links", ROOT / ".github" / "pypi_links.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        assert link.startswith("https://") or (ROOT / link.partition("#")[0]).exists(), link
    made = re.findall(r"\]\(([^)\s]+)\)", module.absolute(text, "https://host/owner/name", "v1.2.3"))
    assert len(made) == len(links) and all(link.startswith("https://") for link in made)
    assert module.absolute("![a](b/c.png) [d](e.md#f) [g](https://h)", "https://r", "v1") == (
        "![a](https://r/raw/v1/b/c.png) [d](https://r/blob/v1/e.md#f) [g](https://h)"
    )


@pytest.mark.parametrize("package", ["crystaljax", "crystaljax.agents", "crystaljax.dft_bridge"])
def test_every_public_name_is_there(package):
    module = importlib.import_module(package)
    assert module.__all__ == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None, name
