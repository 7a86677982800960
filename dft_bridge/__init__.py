"""From finished crystals to real DFT numbers: the gate, the bridge, the store and the engines.

Importing the package is light: everything is loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {"open_bridge": "evaluators", "Bridge": "bridge", "Stats": "bridge", "Request": "keys", "Store": "store"}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"dft_bridge.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'dft_bridge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
