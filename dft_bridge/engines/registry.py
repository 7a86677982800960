"""The engines by name, for the command line and for configuration files."""

from __future__ import annotations

import dataclasses
from typing import Any

from dft_bridge.engines.ase_calculator import PREFIX, AseEngine
from dft_bridge.engines.base import Engine
from dft_bridge.engines.espresso import EspressoEngine
from dft_bridge.engines.gpaw import GpawEngine
from dft_bridge.engines.planewave import PlanewaveEngine

ENGINES: dict[str, type] = {
    "planewave": PlanewaveEngine,
    "espresso": EspressoEngine,
    "gpaw": GpawEngine,
    "ase": AseEngine,
}
"""Name -> class with a factory ``preset(name, **overrides) -> Engine``. A new engine is one more row."""


def is_engine(name: str) -> bool:
    """Whether :func:`make_engine` knows this name."""
    return name in ENGINES or name.startswith(PREFIX)


def make_engine(name: str, preset: str = "fast", **overrides: Any) -> Engine:
    """The engine ``name`` with the settings of ``preset``, single settings overridden by keyword.

    ``ase:module.path.Class`` is short for the engine ``ase`` with this ``calculator``.

    Raises:
        ValueError: unknown engine or preset; the message lists the known ones.
        TypeError: an override is not a setting of the engine; the message lists the settings.
    """
    if name.startswith(PREFIX):
        name, overrides = "ase", {"calculator": name.removeprefix(PREFIX), **overrides}
    if name not in ENGINES:
        raise ValueError(f"no engine {name!r}; choose one of {', '.join(ENGINES)}")
    settings = [field.name for field in dataclasses.fields(ENGINES[name]) if field.init]
    unknown = sorted(set(overrides) - set(settings))
    if unknown:
        raise TypeError(f"{', '.join(unknown)}: not a setting of the {name} engine; it has {', '.join(settings)}")
    return ENGINES[name].preset(preset, **overrides)
