"""The task ids in the registries of gymnax and Gymnasium.

Importing ``crystaljax`` leaves hooks that run these functions once gymnax and Gymnasium are imported, in whichever
order: importing them at once would make every light import of ours wait two seconds.
"""

from __future__ import annotations

import functools
from types import ModuleType

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
