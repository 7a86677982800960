"""The engines by name, for the command line and for configuration files."""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any

from crystaljax.dft_bridge.engines.ase_calculator import PREFIX, AseEngine
from crystaljax.dft_bridge.engines.base import Engine
from crystaljax.dft_bridge.engines.espresso import EspressoEngine
from crystaljax.dft_bridge.engines.gpaw import GpawEngine
from crystaljax.dft_bridge.engines.planewave import PlanewaveEngine

ENGINES: dict[str, type] = {
    "planewave": PlanewaveEngine,
    "espresso": EspressoEngine,
    "gpaw": GpawEngine,
    "ase": AseEngine,
}
"""Name -> class with a factory ``preset(name, **overrides) -> Engine``. A new engine is one more row."""


RUNS: dict[str, tuple[str, ...]] = {"ase": ("calculator", "arguments"), "espresso": ("command",)}
"""Settings that name programs or code. Arguments are those of a calculator, many of which take a command."""


def is_engine(name: str) -> bool:
    """Whether :func:`make_engine` knows this name."""
    return name in ENGINES or name.startswith(PREFIX)


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse what is not a setting of the engine, for the command line and configuration files.

    Raises:
        ValueError: an option is unknown, with the known ones.
    """
    settings = _settings(_split(name)[0]) if is_engine(name) else []
    unknown = sorted(set(options) - set(settings))
    if unknown:
        known = f"it has {', '.join(settings)}" if settings else "it has none"
        raise ValueError(f"{', '.join(unknown)}: not an option of the {name} engine; {known}")


def programs(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the settings of an engine would import or run, by the flag of the command line that asks for it.

    That an engine runs the program that it is made for, found on the PATH, is nothing special and not among it.
    """
    engine, implied = _split(name)
    settings = {**implied, **options}
    found = {}
    for setting in RUNS.get(engine, ()):
        if value := settings.get(setting):
            in_name = setting in implied and settings[setting] == implied[setting]
            found.update({"--engine": name} if in_name else {f"--engine-option {setting}": value})
    return found


def _split(name: str) -> tuple[str, dict[str, str]]:
    """The engine of a name, and what the name says besides."""
    return ("ase", {"calculator": name.removeprefix(PREFIX)}) if name.startswith(PREFIX) else (name, {})


def _settings(engine: str) -> list[str]:
    return [field.name for field in dataclasses.fields(ENGINES[engine]) if field.init]


def make_engine(name: str, preset: str = "fast", **overrides: Any) -> Engine:
    """The engine ``name`` with the settings of ``preset``, single settings overridden by keyword.

    ``ase:module.path.Class`` is short for the engine ``ase`` with this ``calculator``.

    Raises:
        ValueError: unknown engine or preset, with the known ones, or a value that a setting cannot have.
        TypeError: an override is not a setting of the engine; the message lists the settings.
    """
    name, implied = _split(name)
    overrides = {**implied, **overrides}
    if name not in ENGINES:
        raise ValueError(f"no engine {name!r}; choose one of {', '.join(ENGINES)}")
    settings = _settings(name)
    unknown = sorted(set(overrides) - set(settings))
    if unknown:
        raise TypeError(f"{', '.join(unknown)}: not a setting of the {name} engine; it has {', '.join(settings)}")
    hints = typing.get_type_hints(ENGINES[name])
    fitting = {setting: _fitting(value, hints[setting], setting) for setting, value in overrides.items()}
    return ENGINES[name].preset(preset, **fitting)


_MAY_BE_ZERO = ("_width", "dual", "extra_bands", "eos_further", "nstep", "min_distance", "min_distance_factor", "batch")
"""Numbers of engines are positive, but 0 means something in settings that end like this."""


def _fitting(value: Any, hint: Any, setting: str) -> Any:
    """A value as a setting of this type holds it; raises ``ValueError`` if it cannot."""
    if isinstance(hint, types.UnionType):
        hint = str if isinstance(value, str) else float
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        value = float(value) if isinstance(value, float) or abs(value) < 1e300 else math.inf
    elif hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        value = int(value)
    items = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        items = [items[0]] * len(value) if items[-1] is Ellipsis else items
        if len(items) == len(value):
            return tuple(_fitting(item, kind, setting) for item, kind in zip(value, items, strict=True))
    elif typing.get_origin(hint) is Mapping:
        if isinstance(value, Mapping):
            return value
    elif type(value) is hint:
        if hint in (int, float):
            _refuse_number(value, setting)
        return value
    raise ValueError(f"{setting} is {value!r}; give a value of type {getattr(hint, '__name__', hint)}")


def _refuse_number(value: float, setting: str) -> None:
    zero = setting.endswith(_MAY_BE_ZERO)
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{setting} is {value}; give a finite number {'from 0 on' if zero else 'above 0'}")
