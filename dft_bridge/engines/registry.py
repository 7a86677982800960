"""The engines by name, for the command line and for configuration files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from dft_bridge.engines.base import Engine
from dft_bridge.engines.gpaw import GpawEngine
from dft_bridge.engines.planewave import PlanewaveEngine

ENGINES: dict[str, Callable[..., Engine]] = {"planewave": PlanewaveEngine.preset, "gpaw": GpawEngine.preset}
"""Name -> factory ``(preset, **overrides) -> Engine``. A new engine is one more row."""

_SETTINGS: dict[str, type] = {"planewave": PlanewaveEngine, "gpaw": GpawEngine}


def make_engine(name: str, preset: str = "fast", **overrides: Any) -> Engine:
    """The engine ``name`` with the settings of ``preset``, single settings overridden by keyword.

    Raises:
        ValueError: unknown engine or preset; the message lists the known ones.
        TypeError: an override is not a setting of the engine; the message lists the settings.
    """
    if name not in ENGINES:
        raise ValueError(f"no engine {name!r}; choose one of {', '.join(ENGINES)}")
    settings = [field.name for field in dataclasses.fields(_SETTINGS[name]) if field.init]
    unknown = sorted(set(overrides) - set(settings))
    if unknown:
        raise TypeError(f"{', '.join(unknown)}: not a setting of the {name} engine; it has {', '.join(settings)}")
    return ENGINES[name](preset, **overrides)
