"""Says which DFT engines can run here and installs a missing one. It never prints: the command line does that."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

from crystaljax.dft_bridge import engines
from crystaljax.dft_bridge.engines.base import EngineNotReady
from crystaljax.dft_bridge.engines.pwscf import QEPY_HOME
from crystaljax.dft_bridge.engines.registry import ENGINES, make_engine
from crystaljax.errors import CrystalJAXError

_SITECONFIG = Path(engines.__file__).with_name("gpaw_siteconfig.py")
_LAST_LINES = 15


class InstallError(CrystalJAXError, RuntimeError):
    """pip failed; the message ends with the last lines of its output."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How pip installs an engine.

    Attributes:
        packages: names for ``pip install``; the first one's version is the engine's version.
        environment: variables that pip and the build need.
        home: a virtual environment of its own, made anew, for packages that do not go with ours; else None.
    """

    packages: tuple[str, ...]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    home: Path | None = None


RECIPES: dict[str, Recipe] = {
    "gpaw": Recipe(("gpaw", "gpaw-data"), {"GPAW_CONFIG": str(_SITECONFIG)}),
    "espresso": Recipe(("qepy==7.2.0", "f90wrap==0.2.16"), home=QEPY_HOME),
}
"""Engines that pip can install. Engines of the registry without a recipe need a hand; their preflight says which."""


@dataclasses.dataclass(frozen=True)
class EngineReport:
    """The state of one engine on this machine.

    Attributes:
        name: its name in the registry.
        ready: whether its preflight passes.
        version: of its main package, empty if that is not installed.
        detail: what is missing and the command that fixes it, empty if ready.
    """

    name: str
    ready: bool
    version: str
    detail: str


def check() -> list[EngineReport]:
    """One report per engine of the registry."""
    return [_check_one(name) for name in ENGINES]


def install(name: str) -> EngineReport:
    """Install an engine with pip, for the running interpreter or into its own environment, and report on it.

    Nothing happens if it is ready. The report comes from a new process: this one may have cached a failed import.

    Raises:
        ValueError: unknown engine, or one that pip cannot install.
        InstallError: pip failed.
    """
    if name not in RECIPES:
        raise ValueError(f"pip cannot install the engine {name!r}; it can install {', '.join(RECIPES)}")
    if _check_one(name).ready:
        return _check_one(name)
    home = RECIPES[name].home
    if home is not None:
        venv.create(home, clear=True, symlinks=True, with_pip=True)
    command = install_command(name)
    environment = {**os.environ, **RECIPES[name].environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        output = "\n".join((done.stdout + done.stderr).strip().splitlines()[-_LAST_LINES:])
        raise InstallError(f"`{' '.join(command)}` failed with exit status {done.returncode}:\n{output}")
    return _check_in_fresh_interpreter(name)


def install_command(name: str) -> list[str]:
    """The pip command of an engine, for the running interpreter or for the engine's own environment."""
    home = RECIPES[name].home
    if home is not None:
        return [str(home / "bin" / "python"), "-m", "pip", "install", *RECIPES[name].packages]
    # pip is content with an installed but broken package (GPAW without its extension) and with a broken cached wheel.
    again = ["--force-reinstall", "--no-deps", "--no-cache-dir"] if _version(name) else []
    return [sys.executable, "-m", "pip", "install", *again, *RECIPES[name].packages]


def _check_one(name: str) -> EngineReport:
    engine = make_engine(name)
    try:
        engine.preflight()
    except EngineNotReady as error:
        return EngineReport(name, False, _version(name), str(error))
    return EngineReport(name, True, engine.fingerprint("density").get(engine.name, ""), "")


def _check_in_fresh_interpreter(name: str) -> EngineReport:
    """The preflight in a new process, which sees what has just been installed."""
    code = f"from crystaljax.dft_bridge.engines.registry import make_engine; make_engine({name!r}).preflight()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    detail = "" if done.returncode == 0 else "\n".join(done.stderr.strip().splitlines()[-1:])
    return EngineReport(name, done.returncode == 0, _version(name), detail)


def _version(name: str) -> str:
    """Version of an engine's main package; one that no package installs into this environment has none."""
    if name not in RECIPES or RECIPES[name].home is not None:
        return ""
    try:
        return metadata.version(RECIPES[name].packages[0])
    except metadata.PackageNotFoundError:
        return ""
