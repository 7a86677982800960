"""Networks, algorithms and the training runner of CrystalJAX.

Importing the package is light: everything is loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "Agent": "base",
    "Records": "base",
    "GraphTransformer": "networks",
    "MLP": "networks",
    "make_network": "networks",
    "PPOConfig": "ppo",
    "make_ppo": "ppo",
    "make_train": "ppo",
    "RandomConfig": "random_search",
    "make_random_search": "random_search",
    "RunConfig": "config",
    "RunResult": "runner",
    "train": "runner",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"agents.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'agents' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
