"""The task ids in the registries of gymnax and Gymnasium.

Importing ``crystaljax`` leaves hooks that run these functions once gymnax and Gymnasium are imported, in whichever
order: importing them at once would make every light import of ours wait two seconds.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from crystaljax.tasks import make_env, registered_tasks, task


def register_gymnasium(gymnasium: ModuleType) -> None:
    """Makes ``gymnasium.make(id, evaluator=...)`` and ``make_vec`` know every task."""
    from gymnasium.envs.registration import register, registry

    for task_id in registered_tasks():
        if task_id not in registry:
            chosen = task(task_id)
            register(
                id=task_id,
                entry_point="crystaljax.adapters:make_gymnasium",
                vector_entry_point="crystaljax.adapters:make_gymnasium_vector",
                reward_threshold=chosen.reward_threshold,
                max_episode_steps=chosen.max_episode_steps,
                kwargs={"task_id": task_id},
            )


def register_gymnax(gymnax: ModuleType) -> None:
    """Makes ``gymnax.make(id, evaluator=...)`` know every task."""
    from gymnax.registration import register, registered_envs

    for task_id in registered_tasks():
        if task_id not in registered_envs:
            register(task_id, functools.partial(make_env, task_id))


def after_import(name: str, function: Callable[[ModuleType], None]) -> None:
    """Calls the function with the top-level module ``name``, once that has been imported; now if it has been."""
    if name in sys.modules:
        function(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Announced(name, function))


class _Announced:
    """A finder that finds what the others find, for one module, and has a function called after it is loaded.

    That of wrapt does the same, and is the larger part of what importing ``crystaljax`` takes.
    """

    def __init__(self, name: str, function: Callable[[ModuleType], None]):
        self._name, self._function, self._asking = name, function, False

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self._name or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking = False
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self._function(module)

        spec.loader.exec_module = exec_module
        return spec
