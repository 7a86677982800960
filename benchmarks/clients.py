"""Other people's training code on our environment: PPO of jaxnasium, rejax and Stable-Baselines3 on ``Density-C1-v0``.

``python -m benchmarks clients`` (needs ``pip install 'crystaljax[benchmark]'``). jaxnasium makes the environment
through gymnax' registry, without an adapter; rejax takes the five-tuple adapter, Stable-Baselines3 its ``VecEnv`` (left
out unless ``pip install 'crystaljax[sb3]'``). The evaluator is the density of the unrelaxed cell, so no DFT runs.
Reported is the mean reward of sampled episodes after training, over the best reward that any labeling reaches (found by
trying every composition), and the CPU time of a step of a single Gymnasium environment. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time

import gymnasium
import jax
import jaxnasium
import numpy as np
import rejax
from jaxnasium.algorithms import PPO

import crystaljax
from crystaljax.adapters import FiveTupleEnv
from crystaljax.elements import masses
from crystaljax.evaluators import AVOGADRO

TASK = "Density-C1-v0"
EVALUATOR = "unrelaxed-density"
STEPS = 200_000
EPISODES = 256
SINGLE_STEPS = 500


def best_reward(env: crystaljax.CrystalEnv, target: float) -> float:
    """The best reward over all compositions of the cell, in float64."""
    weights = masses().astype(np.float64)[env.vocabulary.numbers[:-1]]
    sites = env.skeletons[0].n_sites
    totals = np.array([sum(c) for c in itertools.combinations_with_replacement(weights, sites)])
    density = totals / (env.skeletons[0].volume * AVOGADRO)
    return float(np.exp(-((target - density) ** 2) / 3.0).max())


def train_jaxnasium(seed: int) -> float:
    """Mean reward of jaxnasium's PPO, sampled actions."""
    env = jaxnasium.make(f"gymnax:{TASK}", evaluator=EVALUATOR, observation="flat")
    trainer = PPO(
        total_timesteps=STEPS,
        num_envs=32,
        num_steps=40,
        learning_rate_start=1e-3,
        learning_rate_end=0.0,
        ent_coef_start=0.01,
        ent_coef_end=0.0,
        log_function=None,
    )
    agent, _ = trainer.train(jax.random.key(seed), env)
    returns = agent.evaluate(jax.random.key(seed + 1), env, num_eval_episodes=EPISODES, deterministic_policy=False)
    return float(np.mean(returns))


def train_rejax(seed: int) -> float:
    """Mean reward of rejax' PPO, sampled actions (rejax' own evaluation)."""
    env, params = crystaljax.make(TASK, EVALUATOR, observation="flat")
    algorithm = rejax.get_algo("ppo").create(
        env=FiveTupleEnv(env),
        env_params=params,
        total_timesteps=STEPS,
        eval_freq=STEPS,
        num_envs=32,
        num_steps=40,
        num_epochs=4,
        num_minibatches=4,
        learning_rate=1e-3,
        ent_coef=0.001,
        max_grad_norm=0.5,
        skip_initial_evaluation=True,
    )
    _, (_, returns) = jax.jit(algorithm.train)(jax.random.key(seed))
    return float(np.mean(returns[-1]))


def train_stable_baselines(seed: int) -> float | None:
    """Mean reward of Stable-Baselines3's PPO, sampled actions; ``None`` where it is not installed."""
    try:
        from stable_baselines3 import PPO as StableBaselinesPPO
        from stable_baselines3.common.evaluation import evaluate_policy
    except ModuleNotFoundError:
        return None
    from crystaljax.stable_baselines import StableBaselinesVecEnv

    env, params = crystaljax.make(TASK, EVALUATOR, observation="flat")
    lanes = StableBaselinesVecEnv(env, 32, params)
    model = StableBaselinesPPO(
        "MlpPolicy",
        lanes,
        n_steps=40,
        batch_size=320,
        n_epochs=4,
        learning_rate=1e-3,
        ent_coef=0.001,
        seed=seed,
        device="cpu",
    )
    model.learn(STEPS)
    return float(evaluate_policy(model, lanes, EPISODES, deterministic=False, warn=False)[0])


def step_milliseconds(observation: str) -> float:
    """CPU milliseconds of a step of a single Gymnasium environment, resets included; the best of ten rounds."""
    env = gymnasium.make(TASK, evaluator=EVALUATOR, observation=observation)
    best = float("inf")
    for _ in range(10):
        env.reset(seed=0)
        start = time.process_time()
        for _ in range(SINGLE_STEPS):
            if env.step(3)[2]:
                env.reset()
        best = min(best, (time.process_time() - start) / SINGLE_STEPS)
    return 1e3 * best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=10)
    seed = parser.parse_args().seed
    env, params = crystaljax.make(TASK, EVALUATOR)
    best = best_reward(env, float(params.target))
    print(f"best reachable reward {best:.6f}")
    ratios = {}
    for name, train in (
        ("jaxnasium", train_jaxnasium),
        ("rejax", train_rejax),
        ("stable-baselines3", train_stable_baselines),
    ):
        start = time.perf_counter()
        reward = train(seed)
        if reward is None:
            print(f"{name} is not installed")
            continue
        ratios[name] = round(reward / best, 4)
        seconds = time.perf_counter() - start
        print(f"{name}: mean reward {reward:.4f} after {STEPS:,} steps, {seconds:.0f} s", flush=True)
    steps = {observation: round(step_milliseconds(observation), 3) for observation in ("flat", "graph")}
    found = {"reward_ratio": ratios, "best_reward": best, "steps": STEPS, "seed": seed, "step_cpu_ms": steps}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
