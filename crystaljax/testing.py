"""A conformance test for environments: ``api_test(env, params)`` raises ``AssertionError`` where a promise is broken.

It holds for every task of ours and for environments that others build on the same interface.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments.environment import Environment

LANES = 3


def api_test(env: Environment, params: Any = None, seed: int = 0) -> None:
    """Checks the promises of a discrete-action gymnax environment on a few episodes.

    Shapes and dtypes never change; observations lie in the observation space; jit equals eager; vmap equals a loop;
    an ended episode restarts by itself; equal keys give equal episodes; illegal actions are refused or clipped.

    Args:
        env: the environment.
        params: its parameters; default the environment's own.
        seed: of every key used.

    Raises:
        AssertionError: naming the promise and the leaf that breaks it.
    """
    params = env.default_params if params is None else params
    key = jax.random.key(seed)
    _check_episodes(env, params, key)
    _check_jit_equals_eager(env, params, key)
    _check_vmap_equals_loop(env, params, key)
    _check_reproducible(env, params, key)
    _check_illegal_actions(env, params, key)


def _signature(tree: Any) -> list[tuple[str, tuple[int, ...], str]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), jnp.shape(leaf), str(jnp.result_type(leaf))) for path, leaf in leaves]


def _assert_equal(left: Any, right: Any, what: str) -> None:
    assert _signature(left) == _signature(right), f"{what}: {_signature(left)} is not {_signature(right)}"
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(
            np.asarray(a), np.asarray(b), rtol=1e-6, err_msg=f"{what}: {jax.tree_util.keystr(path)}"
        )


def _assert_in_space(space: Any, observation: Any) -> None:
    if hasattr(space, "spaces"):
        for name, part in space.spaces.items():
            value = observation[name] if isinstance(observation, dict) else getattr(observation, name)
            assert value.shape == part.shape and value.dtype == part.dtype, f"observation.{name}: not of its space"
            assert part.contains(value), f"observation.{name} outside {part}: {value}"
    else:
        assert observation.shape == space.shape and observation.dtype == space.dtype, "observation: not of its space"
        assert space.contains(observation), f"observation outside {space}"


def _steps_to_cover(params: Any) -> int:
    """Enough steps for at least two episodes."""
    return 2 * int(np.max(params.max_steps_in_episode)) + 1


def _check_episodes(env: Environment, params: Any, key: jax.Array) -> None:
    space = env.observation_space(params)
    observation, state = env.reset(key, params)
    first = _signature((observation, state))
    _assert_in_space(space, observation)
    ended = 0
    for step in range(_steps_to_cover(params)):
        key, action_key, step_key = jax.random.split(key, 3)
        action = env.action_space(params).sample(action_key)
        observation, state, reward, terminated, truncated, info = env.step(step_key, state, action, params)
        assert _signature((observation, state)) == first, f"shapes or dtypes changed at step {step}"
        assert jnp.shape(reward) == () and reward.dtype == jnp.float32, "reward is not a float32 scalar"
        assert jnp.shape(terminated) == () and terminated.dtype == jnp.bool_, "terminated is not a bool scalar"
        assert not truncated, "truncated: max_steps_in_episode must exceed the natural horizon"
        assert np.isfinite(reward), "reward is not finite"
        assert type(info) is dict, "info is not a plain dict"
        _assert_in_space(space, observation)
        _assert_in_space(space, info["final_observation"])
        if terminated:
            ended += 1
            assert state.time == 0, "an ended episode did not restart"
    assert ended >= 2, f"{ended} episodes ended in {_steps_to_cover(params)} steps"


def _check_jit_equals_eager(env: Environment, params: Any, key: jax.Array) -> None:
    compiled = env.reset(key, params)
    stepped = env.step(key, compiled[1], jnp.int32(0), params)
    with jax.disable_jit():
        eager = env.reset(key, params)
        _assert_equal(compiled, eager, "reset under jit and eager")
        _assert_equal(stepped, env.step(key, eager[1], jnp.int32(0), params), "step under jit and eager")


def _check_vmap_equals_loop(env: Environment, params: Any, key: jax.Array) -> None:
    keys = jax.random.split(key, LANES)
    actions = jax.random.randint(key, (LANES,), 0, env.num_actions)
    _, states = jax.vmap(env.reset, (0, None))(keys, params)
    step = jax.jit(jax.vmap(env.step, (0, 0, 0, None)))
    for _ in range(int(np.max(params.max_steps_in_episode))):
        batch = step(keys, states, actions, params)
        for lane in range(LANES):
            state = jax.tree.map(lambda leaf, lane=lane: leaf[lane], states)
            alone = env.step(keys[lane], state, actions[lane], params)
            _assert_equal(jax.tree.map(lambda leaf, lane=lane: leaf[lane], batch), alone, "vmap and loop")
        states = batch[1]


def _check_reproducible(env: Environment, params: Any, key: jax.Array) -> None:
    def episode(key: jax.Array) -> Any:
        reset_key, scan_key = jax.random.split(key)
        _, state = env.reset(reset_key, params)

        def step(state: Any, step_key: jax.Array) -> tuple[Any, Any]:
            action = jax.random.randint(step_key, (), 0, env.num_actions)
            observation, state, reward, *_ = env.step(step_key, state, action, params)
            return state, (observation, reward)

        return jax.lax.scan(step, state, jax.random.split(scan_key, _steps_to_cover(params)))[1]

    run = jax.jit(episode)
    _assert_equal(run(key), run(key), "two runs from one key")


def _check_illegal_actions(env: Environment, params: Any, key: jax.Array) -> None:
    _, state = env.reset(key, params)
    for illegal, nearest in ((-1, 0), (env.num_actions, env.num_actions - 1), (2**31 - 1, env.num_actions - 1)):
        left = env.step(key, state, jnp.int32(illegal), params)
        right = env.step(key, state, jnp.int32(nearest), params)
        _assert_equal(left, right, f"action {illegal} is not clipped to {nearest}")
    for wrong in (jnp.float32(0.5), jnp.zeros(2, jnp.int32)):
        try:
            env.step(key, state, wrong, params)
        except TypeError:
            continue
        raise AssertionError(f"an action {wrong.dtype}{list(wrong.shape)} was not refused with TypeError")
