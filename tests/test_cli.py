"""The command line: what works, and that bad input gets one line that says what to do."""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from ase.build import bulk
from ase.io import write as write_atoms

import crystaljax.agents
import crystaljax.dft_bridge
from crystaljax import cli, library
from crystaljax.agents.config import read_options
from crystaljax.dft_bridge import Store
from crystaljax.evaluators import UNRELAXED_DENSITY

SHORT = "--engine unrelaxed-density --network mlp --episodes 24 --lanes 4 --steps 6".split()


def run(capsys, *arguments):
    """Exit code, standard output and standard error of a command."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "density"
    assert cli.main(["train", "--task", "Density-RocksaltAB-v0", *SHORT, "--run", str(folder)]) == 0
    return folder


def test_help_is_light_and_names_every_command():
    program = "import sys, crystaljax.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False"
    assert all(command in done.stdout for command in ("train", "evaluate", "show", "doctor", "tasks"))


def test_help_of_train_shows_the_defaults(capsys):
    code, out, _ = run(capsys, "train", "--help")
    assert code == 0 and "0.00025" in out and "default: 1000" in out


def test_tasks(capsys):
    code, out, _ = run(capsys, "tasks")
    assert code == 0 and "BandGap-C1-v0" in out and "1.12 eV" in out


def test_doctor_reports_every_engine(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and "planewave" in out and "gpaw" in out


def test_train_writes_a_run_and_a_closing_table(capsys, tmp_path):
    arguments = [
        "--agent",
        "random",
        "--seed",
        20,
        "--target",
        5.0,
        "--vocabulary",
        "medium",
        "--run",
        tmp_path / "run",
    ]
    code, out, _ = run(capsys, "train", "--task", "Density-C5-v0", *SHORT, *arguments)
    assert code == 0
    assert "Best crystals, Density-C5-v0 (target 5 g/cm3)" in out and "no DFT" in out
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["agent"], saved["seed"], saved["target"], saved["vocabulary"]) == ("random", 20, 5.0, "medium")


def test_train_on_a_structure_of_ones_own(capsys, tmp_path):
    write_atoms(tmp_path / "salt.cif", bulk("NaCl", "rocksalt", a=5.64))
    arguments = ["--property", "density", "--agent", "random", "--run", tmp_path / "run"]
    code, out, _ = run(capsys, "train", "--structure", tmp_path / "salt.cif", *SHORT, *arguments)
    assert code == 0 and "Best crystals, Density-Custom" in out


def test_a_task_with_a_table_trains_on_it_unless_an_engine_is_named(capsys, tmp_path):
    code, out, err = run(capsys, "train", "--task", "BandGap-CsCl-Table-v0", *SHORT[2:], "--run", tmp_path / "run")
    assert code == 0 and "table: planewave" in " ".join(out.split()), err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["engine"] == "table"
    code, _, err = run(capsys, "train", "--task", "BandGap-CsCl-Table-v0", *SHORT)
    assert code == cli.BAD_INPUT and "choose another evaluator" in err


def test_settings_come_from_a_file_and_flags_come_before_them(capsys, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'task = "Density-RocksaltAB-v0"\nengine = "unrelaxed-density"\nnetwork = "mlp"\nagent = "random"\n'
        "episodes = 8\n[random]\nlanes = 4\nsteps = 2\n[dqn]\nlanes = 2\n"
    )
    code, _, err = run(capsys, "train", "--config", file, "--steps", 4, "--run", tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert code == 0 and saved["episodes"] == 8 and saved["random"] == {"lanes": 4, "steps": 4}, err
    code, _, err = run(capsys, "train", "--config", file, "--resume", "--run", tmp_path / "run")
    assert code == cli.BAD_INPUT and "leave out --config" in err
    for text, advice in (("epoch = 3", "unknown key 'epoch'; known keys"), ("task = ", "is not a TOML file")):
        file.write_text(text)
        code, _, err = run(capsys, "train", "--config", file)
        assert code == cli.BAD_INPUT and str(file) in err and advice in err


def test_options_of_the_engine_come_from_file_and_flags_and_count_as_settings(capsys, tmp_path):
    file, store = tmp_path / "run.toml", tmp_path / "results.db"
    engine = ["--engine", "ase:ase.calculators.emt.EMT"]
    file.write_text(
        f'task = "Density-RocksaltAB-v0"\nengine = "ase:ase.calculators.emt.EMT"\nnetwork = "mlp"\nagent = "random"\n'
        f'episodes = 4\nworkers = 1\nstore = "{store}"\n[random]\nlanes = 4\nsteps = 2\n'
        "[engine_options]\nnstep = 2\nfmax = 0.2\n"
    )
    for run_name, flags in (
        ("a", []),
        ("b", ["--engine-option", "nstep=1", "--engine-option", "arguments.asap_cutoff=true"]),
    ):
        code, _, err = run(capsys, "train", "--config", file, *engine, *flags, "--run", tmp_path / run_name)
        assert code == 0, err
    saved = json.loads((tmp_path / "b" / "config.json").read_text())["engine_options"]
    assert saved == {"nstep": 1, "fmax": 0.2, "arguments": {"asap_cutoff": True}}
    prints = [row.fingerprint for row in Store(store).rows()]
    found = {(p["nstep"], p["fmax"], p["arguments"].get("asap_cutoff", False)) for p in prints}
    assert found == {(2, 0.2, False), (1, 0.2, True)}, "the same crystals, calculated twice"
    code, _, err = run(capsys, "train", "--resume", "--run", tmp_path / "b", "--engine-option", "nstep=3")
    assert code == cli.BAD_INPUT and "leave out engine_options" in err


@pytest.mark.parametrize(
    ("options", "table"),
    [
        (["pseudopotentials=/data/SSSP 1.3", "ladder=[]"], {"pseudopotentials": "/data/SSSP 1.3", "ladder": []}),
        (["band_gap_cutoff=60", "double=true"], {"band_gap_cutoff": 60, "double": True}),
        (
            ["band_gap_cutoff=tight", "command=mpirun -np 2 pw.x"],
            {"band_gap_cutoff": "tight", "command": "mpirun -np 2 pw.x"},
        ),
        (["arguments.model=small", "arguments.size=3"], {"arguments": {"model": "small", "size": 3}}),
    ],
)
def test_options_are_read_as_toml_or_text(options, table):
    assert read_options(options) == table


def test_seeds_make_a_sweep_that_is_resumed_as_one(capsys, tmp_path):
    arguments = ["--agent", "random", "--seeds", 10, 20, "--run", tmp_path / "sweep"]
    code, out, _ = run(capsys, "train", "--task", "Density-RocksaltAB-v0", *SHORT, *arguments)
    assert code == 0 and out.count("24 episodes") == 2
    code, out, _ = run(capsys, "train", "--resume", "--run", tmp_path / "sweep")
    assert code == 0 and out.count("24 episodes") == 2
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {"sweep.json", "seed-10", "seed-20"}


def test_only_policies_with_probabilities_are_drawn_from(capsys, tmp_path):
    arguments = ["--agent", "dqn", "--start", 8, "--buffer", 64, "--batch", 4, "--run", tmp_path / "run"]
    assert run(capsys, "train", "--task", "Density-RocksaltAB-v0", *SHORT, *arguments)[0] == 0
    code, out, _ = run(capsys, "evaluate", tmp_path / "run", "--episodes", 5)
    assert code == 0 and "5 episodes" in out
    code, _, err = run(capsys, "evaluate", tmp_path / "run", "--sample")
    assert code == cli.BAD_INPUT and "leave out --sample" in err


def test_resuming_a_finished_run_changes_nothing(capsys, trained):
    before = (trained / "episodes.jsonl").read_text()
    code, out, _ = run(capsys, "train", "--resume", "--run", trained)
    assert code == 0 and "24 episodes" in out
    assert (trained / "episodes.jsonl").read_text() == before


def test_ctrl_c_says_how_to_resume(capsys, monkeypatch, tmp_path):
    class Impatient:
        def bind(self, problem):
            return UNRELAXED_DENSITY.bind(problem)._replace(check=lambda: os.kill(os.getpid(), signal.SIGINT))

    monkeypatch.setattr(cli.train, "open_evaluator", lambda config: contextlib.nullcontext(Impatient()))
    arguments = ["--agent", "random", "--run", tmp_path / "run"]
    code, _, err = run(capsys, "train", "--task", "Density-RocksaltAB-v0", *SHORT, *arguments)
    assert code == cli.INTERRUPTED and f"train --resume --run {tmp_path / 'run'}" in err
    monkeypatch.undo()
    code, out, _ = run(capsys, "train", "--resume", "--run", tmp_path / "run")
    assert code == 0 and "24 episodes" in out


def test_evaluate(capsys, trained):
    code, out, _ = run(capsys, "evaluate", trained, "--episodes", 5)
    assert code == 0 and "Designs for Density-RocksaltAB-v0" in out and "5 episodes" in out
    code, out, _ = run(capsys, "evaluate", trained, "--episodes", 5, "--sample", "--target", 5.0)
    assert code == 0 and "target 5 g/cm3" in out


def test_show_draws_files_and_runs(capsys, trained, tmp_path):
    cif = next((trained / "best").glob("*.cif"))
    code, out, _ = run(capsys, "show", cif, "-o", tmp_path / "one.png")
    assert code == 0 and (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(capsys, "show", trained)
    assert code == 0 and out.strip() == str(trained / "best.png") and (trained / "best.png").exists()


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["train"], "give a task"),
        (["train", "--task", "Density-C55-v0", "--engine", "unrelaxed-density"], "did you mean"),
        (["train", "--task", "Density-C1-v0", "--engine", "abacus"], "use one of"),
        (["train", "--task", "BandGap-C1-v0", "--engine", "unrelaxed-density"], "choose another evaluator"),
        (["train", "--task", "Density-C1-v0", "--engine", "unrelaxed-density", "--target", "-1"], "choose one inside"),
        (["train", "--task", "Density-C1-v0", "--engine", "unrelaxed-density", "--lanes", "0"], "at least 1"),
        (["train", "--task", "Density-C1-v0", *SHORT, "--minibatches", "7"], "choose a divisor"),
        (["train", "--task", "BandGap-C1-v0", "--engine", "gpaw", "--preset", "nice"], "nice"),
        (["train", "--structure", "missing.cif", "--property", "density", *SHORT], "no such file"),
        (["train", "--task", "Density-C1-v0", "--agent", "dqn", "--clip", "0.1"], "dqn has no --clip; it has --lanes"),
        (["train", "--task", "Density-C1-v0", "--start", "5"], "ppo has no --start; it has --lanes"),
        (["train", "--task", "Density-C1-v0", "--seed", "1", "--seeds", "2", "3"], "one of the two"),
        (["train", "--task", "BandGap-C1-v0", "--engine-option", "cutof=3"], "it has functional, pseudopotentials"),
        (["train", "--task", "BandGap-C1-v0", "--engine-option", "batch"], "write NAME=VALUE"),
        (["train", "--task", "BandGap-C1-v0", "--engine-option", "batch=1", "--engine-option", "batch=2"], "once"),
        (["train", "--task", "BandGap-C1-v0", "--engine-option", "band_gap_kppa=-5"], "above 0"),
        (["train", "--task", "BandGap-C1-v0", "--engine-option", "band_gap_kppa=many"], "value of type float"),
        (["train", "--task", "Density-C1-v0", *SHORT, "--engine-option", "nstep=3"], "it has none"),
        (["train", "--task", "Density-C1-v0", *SHORT, "--lanes", "1000000000"], "GiB or more"),
        (["train", "--task", "Density-C1-v0", *SHORT, "--lanes", "10000000000"], "give at most 2147483647"),
        (["train", "--task", "Density-C1-v0", *SHORT, "--episodes", "100000000000"], "at most 2147483647"),
        (["train", "--task", "Density-C1-v0", *SHORT, "--seed", "4294967296"], "between 0 and 4294967295"),
        (["train", "--task", "Density-C1-v0", *SHORT, "--seeds", "0", "4294967296"], "between 0 and 4294967295"),
        (["train", "--task", "Density-C1-v0", "--timeout", "inf"], "timeout is inf; it must be a finite number"),
        (["train", "--config", "missing.toml"], "missing.toml"),
        (["train", "--resume"], "give --run"),
        (["train", "--resume", "--run", "missing"], "not the folder of a run"),
        (["train", "--agent", "genetic"], "invalid choice"),
        (["evaluate", "missing"], "not the folder of a run"),
        (["show", "missing.cif"], "no such file"),
        (["doctor", "--install", "abacus"], "abacus"),
    ],
)
def test_bad_input_gets_one_line_of_advice(capsys, monkeypatch, tmp_path, arguments, advice):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    last = err.strip().splitlines()[-1]
    assert code == cli.BAD_INPUT and advice in last and last.startswith("crystaljax")
    assert "Traceback" not in err
    assert not list(tmp_path.glob("runs/*")), "no folder for a run that never was"


def test_a_run_is_not_overwritten_and_keeps_its_settings(capsys, trained):
    code, _, err = run(capsys, "train", "--task", "Density-RocksaltAB-v0", *SHORT, "--run", trained)
    assert code == cli.BAD_INPUT and "holds a run already" in err
    code, _, err = run(capsys, "train", "--resume", "--run", trained, "--lanes", 8)
    assert code == cli.BAD_INPUT and "leave out lanes" in err


def test_a_policy_for_one_skeleton_says_so_on_another(capsys, trained):
    code, _, err = run(capsys, "evaluate", trained, "--task", "Density-C5-v0")
    assert code == cli.BAD_INPUT and "transformer" in err


def test_missing_extra_is_named(capsys, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'orbax'", name="orbax")

    monkeypatch.setattr(library, "crystals", missing)
    code, _, err = run(capsys, "tasks")
    assert code == cli.BAD_INPUT and "pip install 'crystaljax[agents]'" in err


def hostile(folder, **settings):
    """A run folder whose settings name what should not run."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"engine": "ase:os.system"}, "--engine ase:os.system"),
        ({"engine": "ase:ase.calculators.emt.EMT"}, "--engine ase:ase.calculators.emt.EMT"),
        (
            {"engine": "ase", "engine_options": {"calculator": "os.system", "arguments": {"command": "touch x"}}},
            "--engine-option 'calculator=\"os.system\"' --engine-option 'arguments.command=\"touch x\"'",
        ),
        (
            {"engine": "espresso", "engine_options": {"command": "sh -c 'touch called'"}},
            "--engine-option 'command=\"sh -c '\"'\"'touch called'\"'\"'\"'",
        ),
        ({"scheduler": "tcp://elsewhere:8786", "engine": "planewave"}, "--scheduler tcp://elsewhere:8786"),
        ({"engine": "ase:evil\x1b[2J.x"}, "--engine 'ase:evil\\x1b[2J.x'"),
    ],
)
def test_a_file_alone_runs_nothing(capsys, monkeypatch, trained, tmp_path, settings, flags):
    """A run folder, a sweep or a configuration file names programs, modules and machines in vain."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "sweep" / "seed-10"
    shutil.copytree(trained, folder)
    hostile(folder, **settings)
    for command in (cli.train, cli.evaluate):
        monkeypatch.setattr(command, "open_evaluator", lambda config: pytest.fail("it was opened"))
    toml = tmp_path / "run.toml"
    table = {name: value for name, value in settings.items() if name != "engine_options"}
    options = settings.get("engine_options", {})
    lines = [f"{name} = {json.dumps(value)}" for name, value in ({"task": "Density-RocksaltAB-v0"} | table).items()]
    nested = {f"arguments.{name}": value for name, value in options.get("arguments", {}).items()}
    plain = {name: value for name, value in options.items() if name != "arguments"} | nested
    lines += ["[engine_options]"] * bool(plain) + [f"{name} = {json.dumps(value)}" for name, value in plain.items()]
    toml.write_text("\n".join(lines))
    commands = [("train", "--resume", "--run", folder), ("evaluate", folder), ("train", "--config", toml)]
    for command in commands:
        code, _, err = run(capsys, *command)
        assert code == cli.BAD_INPUT and err.strip().endswith(f"say so on the command line: {flags}"), err
        assert "\x1b" not in err
    (tmp_path / "sweep" / "sweep.json").write_text('{"seeds": [10]}')
    code, _, err = run(capsys, "train", "--resume", "--run", tmp_path / "sweep")
    assert code == cli.BAD_INPUT and err.strip().endswith(flags)
    for command in commands:
        with pytest.raises(pytest.fail.Exception, match="it was opened"):
            cli.main([*map(str, command), *(word.replace("\\x1b", "\x1b") for word in shlex.split(flags))])
    assert not (tmp_path / "called").exists()


def test_another_program_than_the_files_does_not_make_the_files_one_run(capsys, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    hostile(folder, engine="espresso", engine_options={"command": "touch called", "diagonalization": "david"})
    code, _, err = run(capsys, "evaluate", folder, "--engine-option", "diagonalization=cg")
    assert code == cli.BAD_INPUT and "touch called" in err
    code, _, err = run(capsys, "evaluate", folder, "--engine", "unrelaxed-density", "--episodes", 3)
    assert code == 0, err


def test_evaluate_writes_nothing_into_the_run(capsys, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    code, _, err = run(capsys, "evaluate", folder)
    assert code == cli.BAD_INPUT and "has no checkpoint" in err and not (folder / "checkpoints").exists()


@pytest.mark.parametrize("where", ["parser", "module"])
def test_ctrl_c_while_modules_load_is_no_traceback(capsys, monkeypatch, where):
    def interrupted(*arguments):
        if where == "parser":
            raise KeyboardInterrupt
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:  # as extension modules do
            raise ImportError("numpy.core.multiarray failed to import") from error

    monkeypatch.setattr(*((cli, "parser") if where == "parser" else (cli.show, "_tasks")), interrupted)
    code, _, err = run(capsys, "tasks")
    assert (code, err) == (cli.INTERRUPTED, "crystaljax: interrupted\n")


def test_a_run_is_called_after_what_it_asks_for():
    for asked, name in (
        ({"property": "density"}, "density-AB_cF8_225_a_b-ppo-planewave-10"),
        ({"objective": ["density<=5", "band_gap=1..2"]}, "density-band_gap-AB_cF8_225_a_b-ppo-planewave-10"),
    ):
        given = {"structures": ["AB_cF8_225_a_b"], **asked}
        assert cli.train.settings(None, False, None, given)[1] == Path("runs") / name


def test_ctrl_c_while_the_command_line_itself_loads_is_no_traceback(capsys, monkeypatch):
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    module, _, name = settings["project"]["scripts"]["crystaljax"].partition(":")
    program = getattr(importlib.import_module(module), name)

    class Interrupted:
        def find_spec(self, name, path=None, target=None):
            if name == "crystaljax.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "crystaljax.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    assert program() == cli.INTERRUPTED
    assert capsys.readouterr().err == "crystaljax: interrupted\n"


def test_every_error_of_the_package_is_one_of_ours():
    """So that a user can catch them all, and the command line shows each in one line."""
    named = {"Exception", "ValueError", "RuntimeError", "OSError", "KeyError", "TypeError"}
    ours = 0
    for package in (crystaljax, crystaljax.agents, crystaljax.dft_bridge):
        for file in Path(package.__file__).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                bases = {ast.unparse(base) for base in node.bases} if isinstance(node, ast.ClassDef) else set()
                assert not bases & named or "CrystalJAXError" in bases or node.name == "CrystalJAXError", node.name
                ours += "CrystalJAXError" in bases
    assert ours >= 12


def test_defects_of_ours_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(library, "crystals", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["tasks"])
