"""What other packages offer by name: evaluators, agents and networks."""

from __future__ import annotations

import pytest

import crystaljax
from crystaljax import cli, evaluators, plugins
from crystaljax.agents import config, networks
from crystaljax.agents.hyperparameters import AlgorithmConfig, PPOConfig, RandomConfig

AGENT = """
    import dataclasses
    from crystaljax.agents.hyperparameters import RandomConfig, RolloutConfig

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class TheirConfig(RolloutConfig):
        '''Theirs.

        Attributes:
            boldness: how bold it is.
        '''

        {fields}

        def make(self, env, trunk=None):
            return RandomConfig(lanes=self.lanes, steps=self.steps).make(env, trunk)
"""


def offer_agent(offer, fields="boldness: int = 3", **options):
    offer(plugins.AGENTS, "theirs", "their_agents:TheirConfig", "their_agents", AGENT.format(fields=fields), **options)


def test_every_agent_and_network_of_the_package_can_be_loaded():
    assert set(config.algorithms()) == set(plugins.offered(plugins.AGENTS)) >= {"ppo", "gp", "bo", "hybrid"}
    for kind in config.algorithms().values():
        assert issubclass(kind, AlgorithmConfig) and kind.maker
    for name in plugins.offered(plugins.NETWORKS):
        assert networks.network(name).observation == ("flat" if name == "mlp" else "graph")


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown agent 'pp0': use one of annealing, bo, .*ppo.*sac$"):
        config.algorithm("pp0")
    with pytest.raises(ValueError, match="unknown network 'cnn': use one of chgnet, .*mlp, transformer$"):
        networks.network("cnn")
    assert {"planewave", "table", "unrelaxed-density"} <= set(evaluators.available())
    with pytest.raises(ValueError, match="unknown evaluator 'dft'.*'planewave'"):
        evaluators.evaluator("dft")


def test_an_agent_of_another_package_trains_from_the_command_line(offer, tmp_path, capsys):
    offer_agent(offer)
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    assert "theirs" in text and "--boldness BOLDNESS" in text and "how bold it is [theirs: 3]" in " ".join(text.split())
    words = "train --task Density-C1-v0 --engine unrelaxed-density --network mlp --agent theirs --boldness 7 --steps 5"
    assert cli.main([*words.split(), "--episodes", "16", "--run", str(tmp_path / "run")]) == 0
    saved, _ = config.load(tmp_path / "run")
    assert saved.agent == "theirs" and saved.algorithm.boldness == 7
    assert cli.main([*words.split(), "--clip", "0.1"]) == cli.BAD_INPUT
    assert "theirs has no --clip; it has" in capsys.readouterr().err


def test_a_network_of_another_package_is_found(offer):
    code = """
        from crystaljax.agents.networks import GraphTransformer, Network
        SMALL = Network(lambda env: GraphTransformer(env.num_actions, blocks=1))
    """
    offer(plugins.NETWORKS, "small", "their_networks:SMALL", "their_networks", code)
    env, _ = crystaljax.make("Density-C1-v0", "unrelaxed-density")
    assert networks.make_trunk(env, "small").blocks == 1
    flat, _ = crystaljax.make("Density-C1-v0", "unrelaxed-density", observation="flat")
    with pytest.raises(ValueError, match="small network does not read flat observations; use 'mlp'"):
        networks.make_trunk(flat, "small")


@pytest.mark.parametrize(
    ("value", "fields", "message"),
    [
        ("their_agents:Missing", "pass", "cannot be loaded.*Missing.*; mend or uninstall it"),
        ("missing_module:TheirConfig", "pass", "cannot be loaded.*No module named 'missing_module'"),
        ("their_agents:RandomConfig.maker", "pass", "no AlgorithmConfig; mend it"),
        ("their_agents:TheirConfig", "seed: int = 3", "has settings named seed, as every run"),
    ],
)
def test_an_agent_that_cannot_be_used_stops_only_who_asks_for_it(offer, caplog, value, fields, message):
    offer(plugins.AGENTS, "theirs", value, "their_agents", AGENT.format(fields=fields))
    with pytest.raises(plugins.PluginError, match=f"agent 'theirs' of the package their-package .*{message}"):
        config.algorithm("theirs")
    assert "theirs" not in config.algorithms() and "their-package" in caplog.text
    assert config.algorithm("ppo") is PPOConfig and config.hyperparameters()["steps"] is int


def test_two_packages_with_one_name_are_told(offer):
    offer_agent(offer)
    offer(plugins.AGENTS, "theirs", "others:Agent", "others", package="another")
    with pytest.raises(plugins.PluginError, match="agent 'theirs' of the package another is offered by their-package"):
        plugins.offered(plugins.AGENTS)


def test_settings_without_a_name_say_what_to_do():
    class Nameless(RandomConfig):
        pass

    with pytest.raises(ValueError, match="Nameless is not the settings of any agent.*offer it by an entry point"):
        _ = config.RunConfig(task="x", algorithm=Nameless()).agent
