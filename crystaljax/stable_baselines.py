"""The environment for Stable-Baselines3: its ``VecEnv`` over one compiled program for all lanes.

Import it from here; it needs ``pip install 'crystaljax[sb3]'``. Single environments need no adapter: those of
``gymnasium.make`` work with Stable-Baselines3 as they are, graph observations by its ``MultiInputPolicy``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

try:
    from stable_baselines3.common.vec_env import VecEnv
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "this adapter needs Stable-Baselines3: pip install 'crystaljax[sb3]'. It brings PyTorch, on Linux with CUDA, "
        "unless the CPU build is there before"
    ) from error

from crystaljax.adapters import GymnasiumVectorEnv
from crystaljax.env import CrystalEnv, EnvParams


class StableBaselinesVecEnv(VecEnv):
    """Many environments in one compiled program, for Stable-Baselines3.

    Lanes reset themselves. The info of a lane that has just ended holds ``terminal_observation``, and ``values``,
    ``status``, ``elements`` and ``skeleton`` of its crystal (and ``value``, if it has one property); that of any other
    lane is empty. ``set_options`` takes what :meth:`crystaljax.adapters.GymnasiumVectorEnv.reset` does. Errors are
    those of that class.
    """

    def __init__(
        self, env: CrystalEnv, num_envs: int = 1, params: EnvParams | None = None, render_mode: str | None = None
    ):
        """Arguments as :class:`crystaljax.adapters.GymnasiumVectorEnv`."""
        self._lanes = GymnasiumVectorEnv(env, num_envs, params, render_mode)
        self._actions: np.ndarray | None = None
        super().__init__(num_envs, self._lanes.single_observation_space, self._lanes.single_action_space)

    def reset(self) -> Any:
        """Observations of fresh episodes in all lanes; by the seeds and options that were set before, once."""
        if any(options != self._options[0] for options in self._options):
            raise ValueError("the lanes share one program, so their options must be equal")
        seeds = None if set(self._seeds) == {None} else self._seeds
        observation, _ = self._lanes.reset(seed=seeds, options=self._options[0])
        self._reset_seeds()
        self._reset_options()
        return jax.tree.map(np.array, observation)

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        if self._actions is None:
            raise RuntimeError("there are no actions to wait for; call step_async() first")
        observation, rewards, terminated, truncated, told = self._lanes.step(self._actions)
        done = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for lane in np.flatnonzero(done).tolist():
            of_crystal = ("values", "value", "status", "elements", "skeleton")
            infos[lane] = {name: _lane(told[name], lane) for name in of_crystal if name in told}
            infos[lane]["terminal_observation"] = _lane(told["final_obs"], lane)
            infos[lane]["TimeLimit.truncated"] = bool(truncated[lane] and not terminated[lane])
        # Copies: a learner adds to the rewards of what was cut off, and PyTorch wants arrays that can be written to.
        return jax.tree.map(np.array, observation), np.array(rewards), done, infos

    def close(self) -> None:
        self._lanes.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        if self.render_mode != "rgb_array":
            return [None] * self.num_envs
        return [np.asarray(picture) for picture in self._lanes.render() or ()]

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The attribute, which all lanes share, once for each lane asked for."""
        return [getattr(self._lanes, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Sets an attribute of all lanes; raises ``ValueError`` for some of them."""
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise ValueError(f"the lanes share one program; set {attr_name} for all of them")
        setattr(self._lanes, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Raises ``AttributeError``: there is no environment for each lane."""
        raise AttributeError(f"the lanes share one program, so none of them has a method {method_name}")

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]


def _lane(observations: Any, lane: int) -> Any:
    if isinstance(observations, dict):
        return {name: value[lane] for name, value in observations.items()}
    return observations[lane]
