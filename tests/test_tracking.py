"""Weights & Biases: with a stand-in for the library, and with the library offline where it is installed."""

from __future__ import annotations

import dataclasses
import json
import sys
import types

import pytest

from crystaljax import cli
from crystaljax.agents.config import RunConfig
from crystaljax.agents.hyperparameters import RandomConfig
from crystaljax.agents.runner import sweep, train

RUN = RunConfig(
    task="Density-RocksaltAB-v0",
    engine="unrelaxed-density",
    network="mlp",
    algorithm=RandomConfig(lanes=4, steps=4),
    episodes=24,
    checkpoint_every=1,
    wandb="crystals",
)
TRAIN = "train --task Density-RocksaltAB-v0 --engine unrelaxed-density --agent random --wandb crystals --run".split()


@pytest.fixture
def library(monkeypatch):
    """A stand-in for the library that keeps what it is told."""
    module = types.ModuleType("wandb")
    module.Error, module.runs = type("Error", (Exception,), {}), []

    def init(**options):
        logged = []
        run = types.SimpleNamespace(id=options["id"] or f"id{len(module.runs)}", options=options, logged=logged)
        run.log = lambda numbers, step: logged.append((step, numbers))
        run.finish = lambda: logged.append("finished")
        module.runs.append(run)
        return run

    module.init, module.login = init, lambda: True
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_run_of_a_sweep_is_tracked_and_goes_on_as_the_same_one(library, tmp_path):
    sweep(RUN, [10, 20], "unrelaxed-density", tmp_path / "runs")
    first, second = library.runs
    assert first.options["project"] == "crystals" and first.options["name"] == "seed-10"
    assert first.options["config"]["seed"] == 10 and first.options["config"]["random"]["lanes"] == 4
    written = metrics(tmp_path / "runs" / "seed-20")
    assert second.logged[-1] == "finished" and [step for step, _ in second.logged[:-1]] == [1, 2, 3]
    for (_, numbers), line in zip(second.logged[:-1], written, strict=True):
        assert numbers == {name: line[name] for name in numbers} and "best_reward" in numbers
        assert "failures" not in numbers and "update" not in numbers, "numbers only"
    sweep(RUN, [10, 20], "unrelaxed-density", tmp_path / "runs", resume=True)
    assert [run.id for run in library.runs] == ["id0", "id1", "id0", "id1"]


def test_runs_that_do_not_ask_for_it_are_not_tracked(library, tmp_path):
    train(dataclasses.replace(RUN, wandb=None), "unrelaxed-density", tmp_path / "run")
    assert not library.runs and not (tmp_path / "run" / "wandb.json").exists()


def test_what_is_missing_is_said_before_anything_begins(library, capsys, tmp_path, monkeypatch):
    def nobody():
        raise library.Error("No API key configured.")

    monkeypatch.setattr(library, "login", nobody)
    assert cli.main([*TRAIN, str(tmp_path / "run")]) == cli.BAD_INPUT
    assert "No API key configured. Or set WANDB_MODE=offline" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    assert cli.main([*TRAIN, str(tmp_path / "run")]) == cli.BAD_INPUT
    assert "wandb is missing: pip install 'crystaljax[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_library_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="extra [wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(RUN, "unrelaxed-density", tmp_path / "run")
    name = json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    (file,) = (tmp_path / "run").glob(f"wandb/offline-run-*/run-{name}.wandb")
    assert b"best_reward" in file.read_bytes()
