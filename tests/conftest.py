"""Fixtures shared by the tests."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile
import textwrap
from pathlib import Path

# One thread for each linear-algebra call, as in the bridge's workers: two processes run tests side by side, and
# threads that wait for each other over small matrices make DFT several times slower. Must precede NumPy's import.
os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}

# A shell's background jobs, and what they start, ignore Ctrl-C; the tests of it need the usual answer.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Most of a test's time is compiling, so each program is compiled once in a session, by the process that comes first to
# it: xdist's workers, and every program that a test starts, inherit this folder. It is new, so no program of an earlier
# session stands in for a compilation.
if "CRYSTALJAX_TEST_PROGRAMS" not in os.environ:
    os.environ["CRYSTALJAX_TEST_PROGRAMS"] = tempfile.mkdtemp(prefix="crystaljax-programs-")
    atexit.register(shutil.rmtree, os.environ["CRYSTALJAX_TEST_PROGRAMS"], ignore_errors=True)
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": os.environ["CRYSTALJAX_TEST_PROGRAMS"],
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}

import jax
import jax.numpy as jnp
import pytest

from crystaljax import FunctionEvaluator
from crystaljax.dft_bridge.planewave import program_cache

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a plugin of pytest may have imported JAX
program_cache.use(Path(os.environ["CRYSTALJAX_TEST_PROGRAMS"]))


@pytest.fixture(scope="session")
def landscape() -> FunctionEvaluator:
    """A made-up landscape with failures: a third of all crystals have no value."""

    def value(numbers, skeleton):
        total = numbers.sum()
        return jnp.where(total % 3 == 0, jnp.nan, total / skeleton.volume)

    return FunctionEvaluator(value, "surrogate: made-up landscape")


@pytest.fixture
def offer(monkeypatch, tmp_path_factory):
    """Installs a package that offers a module by entry points: ``offer(group, name, value, module, code)``."""

    def install(group: str, name: str, value: str, module: str, code: str = "", package: str = "their-package") -> None:
        site = tmp_path_factory.mktemp("site")
        (site / f"{module}.py").write_text(textwrap.dedent(code))
        facts = site / f"{package.replace('-', '_')}-1.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, module, raising=False)

    return install
