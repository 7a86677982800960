"""CrystalJAX: reinforcement learning that designs crystals with direct DFT feedback.

``make("BandGap-C1-v0", evaluator=...)`` returns a gymnax environment and its parameters; ``registered_tasks()`` lists
the ids. Importing the package is light: everything is loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from wrapt import register_post_import_hook

from crystaljax.registration import register_gymnasium, register_gymnax

_EXPORTS = {
    "make": "tasks",
    "make_custom": "tasks",
    "registered_tasks": "tasks",
    "CrystalEnv": "env",
    "EnvParams": "env",
    "EnvState": "env",
    "GraphObservation": "observation",
    "Skeleton": "skeleton",
    "StructureError": "structures",
    "to_skeleton": "structures",
    "read_mp20": "structures",
    "Vocabulary": "elements",
    "FunctionEvaluator": "evaluators",
    "UNRELAXED_DENSITY": "evaluators",
    "Status": "status",
    "api_test": "testing",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"crystaljax.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'crystaljax' has no attribute {name!r}")


register_post_import_hook(register_gymnax, "gymnax")
register_post_import_hook(register_gymnasium, "gymnasium")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
