"""DFT engines as evaluators: open one with settings of your own, or name one in :func:`crystaljax.make`."""

from __future__ import annotations

import os
from typing import Any

from crystaljax.dft_bridge.accounting import Budget
from crystaljax.dft_bridge.bridge import Bridge
from crystaljax.dft_bridge.engines.registry import make_engine
from crystaljax.dft_bridge.limits import Limits
from crystaljax.dft_bridge.store import Store


def open_bridge(
    engine: str = "planewave",
    preset: str = "fast",
    store: Store | str | os.PathLike[str] | None = None,
    workers: int | None = None,
    *,
    scheduler: str | None = None,
    timeout: float | None = None,
    memory: float | None = None,
    retries: int = 2,
    max_calls: int | None = None,
    max_core_hours: float | None = None,
    **settings: Any,
) -> Bridge:
    """A bridge to an engine by name, for ``with open_bridge(...) as bridge`` and ``make(..., evaluator=bridge)``.

    Args:
        engine: name of the engine, see :mod:`crystaljax.dft_bridge.engines.registry`.
        preset: name of its settings.
        store: where results are kept, by default :func:`crystaljax.dft_bridge.store.default_path`.
        workers: worker processes, by default one per GPU that the engine can use, else one per CPU core.
        scheduler: address of a Dask scheduler, ``tcp://host:8786``, whose workers calculate instead.
        timeout, memory, retries: of a calculation: wall-clock seconds, GiB, and attempts after its worker died; see
            :class:`crystaljax.dft_bridge.limits.Limits`.
        max_calls, max_core_hours: how much may be calculated in all; beyond it comes ``BudgetSpent``.
        settings: single settings of the engine that replace those of the preset.

    Raises:
        ValueError, TypeError: unknown engine, preset or setting, with the known ones.
        ExecutorLost: no scheduler answers at that address.
    """
    chosen = make_engine(engine, preset, **settings)
    changed = "".join(f", {name}={value}" for name, value in sorted(settings.items()))
    limits, budget = Limits(timeout, memory, retries), Budget(max_calls, max_core_hours)
    label = preset + changed
    return Bridge(chosen, store, workers, scheduler=scheduler, preset=label, limits=limits, budget=budget)


def gpaw() -> Bridge:
    """The evaluator named ``gpaw``: its ``fast`` preset on the default store. Workers end with the program."""
    return open_bridge("gpaw")


def espresso() -> Bridge:
    """The evaluator named ``espresso``, with pseudopotentials in ``$ESPRESSO_PSEUDO``, otherwise as :func:`gpaw`."""
    return open_bridge("espresso")


def planewave() -> Bridge:
    """The evaluator named ``planewave``: its ``fast`` preset on the default store. Workers end with the program."""
    return open_bridge("planewave")


def default() -> Bridge:
    """The evaluator used when none is named."""
    return planewave()
