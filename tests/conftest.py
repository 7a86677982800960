"""Fixtures shared by the tests."""

from __future__ import annotations

import os

# One thread for each linear-algebra call, as in the bridge's workers: two processes run tests side by side, and
# threads that wait for each other over small matrices make DFT several times slower. Must precede NumPy's import.
os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}

import jax.numpy as jnp
import pytest

from crystaljax import FunctionEvaluator


@pytest.fixture(scope="session")
def landscape() -> FunctionEvaluator:
    """A made-up landscape with failures: a third of all crystals have no value."""

    def value(numbers, skeleton):
        total = numbers.sum()
        return jnp.where(total % 3 == 0, jnp.nan, total / skeleton.volume)

    return FunctionEvaluator(value, "surrogate: made-up landscape")
