"""``crystaljax evaluate``: policies of every algorithm and network, on crystals and targets they did not train on."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from crystaljax import cli
from crystaljax.agents import runner
from crystaljax.agents.checkpoints import Checkpoints
from crystaljax.agents.config import RunConfig, algorithm

LEARNING = ("ppo", "dqn", "rainbow", "sac", "hybrid")
DRAWING = ("ppo", "sac", "hybrid")
"""Agents whose policy is a distribution."""


def begin(folder, **settings):
    """The folder of a run that has been initialised: training it would only cost time."""
    config = RunConfig(engine="unrelaxed-density", **settings)
    env, params = runner.build_env(config, config.engine)
    folder.mkdir()
    config.save(folder, [skeleton.digest for skeleton in env.skeletons])
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, jax.jit(runner.build_agent(config, env).init)(jax.random.key(0), params))
    checkpoints.close()
    return folder


def evaluate(capsys, *arguments):
    code = cli.main(["evaluate", *map(str, arguments)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


@pytest.mark.parametrize(
    ("network", "held_out"),
    [
        ("transformer", "C7"),
        pytest.param("megnet", "C1", marks=pytest.mark.slow),
        pytest.param("chgnet-pretrained", "C1", marks=pytest.mark.slow),
    ],
)
def test_a_policy_of_mixed_crystals_designs_held_out_ones_for_far_targets(network, held_out, capsys, tmp_path):
    folder = begin(tmp_path / "run", task="Density-Mixed-v0", network=network)
    out = evaluate(capsys, folder, "--task", f"Density-{held_out}-v0", "--episodes", 3, "--target", 5.0)
    assert f"Designs for Density-{held_out}-v0 (target 5 g/cm3)" in out and "3 episodes" in out


@pytest.mark.parametrize("agent", LEARNING)
def test_every_algorithm_leaves_a_policy(agent, capsys, tmp_path):
    settings = dataclasses.replace(algorithm(agent)(), lanes=4)
    folder = begin(tmp_path / "run", task="Density-C1-v0", network="mlp", algorithm=settings)
    # C7 has five sites as well, so a network of flat observations fits.
    out = evaluate(capsys, folder, "--task", "Density-C7-v0", "--episodes", 3)
    assert "Designs for Density-C7-v0 (target 3 g/cm3)" in out
    draws = cli.main(["evaluate", str(folder), "--episodes", "3", "--sample"])
    assert draws == (0 if agent in DRAWING else cli.BAD_INPUT)
    assert agent in DRAWING or "leave out --sample" in capsys.readouterr().err


@pytest.mark.parametrize("agent", ["random", "ga", "annealing", "bo"])
def test_a_search_has_no_policy_to_evaluate(agent, capsys, tmp_path):
    settings = dataclasses.replace(algorithm(agent)(), lanes=4)
    folder = begin(tmp_path / "run", task="Density-C1-v0", network="mlp", algorithm=settings)
    assert cli.main(["evaluate", str(folder), "--episodes", "3"]) == cli.BAD_INPUT
    assert f"a run of {agent}, which has no policy" in capsys.readouterr().err


def test_designs_are_those_of_the_likeliest_elements_and_reproducible(capsys, tmp_path):
    folder = begin(tmp_path / "run", task="Density-C1-v0", network="mlp")
    greedy, again = (evaluate(capsys, folder, "--episodes", 8) for _ in range(2))
    assert greedy == again and greedy != evaluate(capsys, folder, "--episodes", 8, "--sample")
