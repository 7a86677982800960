"""Plain data, as JSON and TOML hold it, as values of declared types: checked, and what is wrong is named by its place.

A type is a dataclass, a ``TypedDict``, a list, tuple, mapping or union of types, ``int``, ``float``, ``str``, ``bool``
or ``None``; ``Annotated[type, check, ...]`` has functions that say what is wrong with a value, or return ``""``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from crystaljax.errors import CrystalJAXError

T = TypeVar("T")
_SHOWN = 60
"""Characters of a wrong value that are shown."""


class WrongData(CrystalJAXError, ValueError):
    """A value is not of its type; the message names its place, such as ``crystals[2].value``, and what it must be."""


def shown(value: Any) -> str:
    """A value for a message: short, on one line, without control characters."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**_SHOWN else "a huge number"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def typed(value: Any, kind: Any, place: str = "") -> Any:
    """The value as that type: lists become tuples, and mappings dataclasses, where the type says so.

    Args:
        kind: see above. Of keys that it does not name, a ``TypedDict`` keeps the values and a dataclass does not. A
            float may come as a whole number, but must be finite.
        place: where the value is, for messages.

    Raises:
        WrongData: the value cannot be of that type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        found = typed(value, arguments[0], place)
        for check in arguments[1:]:
            if problem := check(found):
                raise WrongData(f"{_at(place)}{problem}")
        return found
    if origin in (types.UnionType, typing.Union):
        return _of_union(value, arguments, place)
    if origin is Literal:
        if value not in arguments:
            raise WrongData(f"{_at(place)}{shown(value)}; it must be one of {', '.join(map(str, arguments))}")
        return value
    if kind is float and type(value) in (int, float):
        return _finite(value, place)
    if kind in (int, float, str, bool, types.NoneType) or kind is None:
        if type(value) is not (types.NoneType if kind is None else kind):
            raise WrongData(f"{_at(place)}{shown(value)}; it must be {_NAMES[kind]}")
        return value
    if origin in (list, tuple):
        return _of_items(value, origin, arguments, place)
    if isinstance(value, Mapping):
        if origin is not None and issubclass(origin, Mapping):
            _, item = arguments
            return {str(name): typed(entry, item, _join(place, name)) for name, entry in value.items()}
        if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
            return _of_fields(value, kind, place)
    raise WrongData(f"{_at(place)}{shown(value)}; it must be {'a table' if origin is not list else 'a list'}")


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", None: "nothing"}
_NAMES[types.NoneType] = "nothing"


def _finite(value: float, place: str) -> float:
    try:
        finite = math.isfinite(value)
    except OverflowError:  # a whole number beyond floats
        finite = False
    if not finite:
        raise WrongData(f"{_at(place)}{shown(value)}; it must be a finite number")
    return float(value)


def _of_union(value: Any, kinds: tuple[Any, ...], place: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    problems = []
    for kind in kinds:
        if kind is not types.NoneType:
            try:
                return typed(value, kind, place)
            except WrongData as error:
                problems.append(error)
    raise problems[0]


def _of_items(value: Any, origin: Any, arguments: tuple[Any, ...], place: str) -> Any:
    if not isinstance(value, list | tuple):
        raise WrongData(f"{_at(place)}{shown(value)}; it must be a list")
    any_number = origin is list or (len(arguments) == 2 and arguments[1] is Ellipsis)
    kinds = [arguments[0]] * len(value) if any_number else list(arguments)
    if len(kinds) != len(value):
        raise WrongData(f"{_at(place)}{shown(value)}; it must have {len(kinds)} entries")
    return origin(typed(item, kind, f"{place}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True)))


def _of_fields(value: Mapping[str, Any], kind: Any, place: str) -> Any:
    hints, required = _fields(kind)
    if missing := sorted(required - set(value)):
        raise WrongData(f"{place or 'it'} has no {', '.join(missing)}")
    found = {name: typed(value[name], hint, _join(place, name)) for name, hint in hints.items() if name in value}
    return {**value, **found} if typing.is_typeddict(kind) else kind(**found)


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """The types of the fields of a dataclass or a ``TypedDict``, and the names of those that must be there."""
    hints = typing.get_type_hints(kind, include_extras=True)
    if typing.is_typeddict(kind):  # whose own __required_keys__ are wrong where annotations are text
        plain = {name: typing.get_args(hint)[0] if _optional(hint) else hint for name, hint in hints.items()}
        return plain, frozenset(name for name, hint in hints.items() if not _optional(hint))
    fields = [field for field in dataclasses.fields(kind) if field.init]
    missing = dataclasses.MISSING
    required = (field.name for field in fields if field.default is missing and field.default_factory is missing)
    return {field.name: hints[field.name] for field in fields}, frozenset(required)


def _optional(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.NotRequired


def _join(place: str, name: Any) -> str:
    return f"{place}.{shown(name)[1:-1]}" if place else shown(name)[1:-1]


def _at(place: str) -> str:
    return f"{place or 'it'} is "


# Checks


def at_least(bound: float) -> Callable[[float], str]:
    """Numbers from the bound on."""
    return lambda value: "" if value >= bound else f"{shown(value)}; it must be {bound} or more"
