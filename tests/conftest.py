"""Fixtures shared by the tests."""

from __future__ import annotations

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
