"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import signal
import sys
import textwrap

# One thread for each linear-algebra call, as in the bridge's workers: two processes run tests side by side, and
# threads that wait for each other over small matrices make DFT several times slower. Must precede NumPy's import.
os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}

# A shell's background jobs, and what they start, ignore Ctrl-C; the tests of it need the usual answer.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as compilation_cache_module

from crystaljax import FunctionEvaluator


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


@pytest.fixture(scope="module")
def compilation_cache(tmp_path_factory):
    """Most of a short run is compiling; here each program is compiled once."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    settings = {"jax_compilation_cache_dir": folder, "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache_module.reset_cache()
    yield {name.upper(): str(value) for name, value in settings.items()}
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache_module.reset_cache()
