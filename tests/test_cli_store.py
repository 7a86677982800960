"""``crystaljax store ...``: what it prints, and that bad input gets one line that says what to do."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
import subprocess
import sys

import pytest
from test_cli import run
from test_store import BAD, GOOD, VERSION_1, damage, many, new_schema, real  # noqa: F401

from crystaljax.cli.exit_codes import PROBLEMS
from crystaljax.dft_bridge.store import PATH_VARIABLE, Store


@pytest.fixture
def filled(tmp_path, monkeypatch):
    """The default store, with a success and a failure."""
    store = Store(tmp_path / "results.db")
    store.write([real(), real([12, 8], BAD)])
    monkeypatch.setenv(PATH_VARIABLE, str(store.path))
    return store


def test_help_names_every_action_and_its_options(capsys):
    code, out, _ = run(capsys, "store", "--help")
    assert code == 0 and all(
        name in out for name in ("stats", "query", "export", "import", "merge", "verify", "repair")
    )
    code, out, _ = run(capsys, "store", "query", "--help")
    assert code == 0 and all(option in out for option in ("--store", "--property", "--elements", "--min", "--json"))


def test_stats(capsys, filled):
    code, out, _ = run(capsys, "store", "stats")
    lines = out.splitlines()
    assert code == 0 and lines[0].split() == ["property", "engine", "status", "results", "core-seconds"]
    assert lines[1].split() == ["band_gap", "fake", "1.0,", "fast", "NOT_CONVERGED", "1", "80.0"]
    assert lines[-1] == f"{filled.path}: 2 results, 1 with a value; 0.03 core-hours"
    code, out, _ = run(capsys, "store", "stats", "--json")
    found = json.loads(out)
    assert (found["results"], found["core_seconds"]) == (2, 92.5)
    assert {(g["status"], g["results"]) for g in found["groups"]} == {("OK", 1), ("NOT_CONVERGED", 1)}


def test_query(capsys, filled):
    code, out, _ = run(capsys, "store", "query", "--elements", "Na, Cl", "--min", 5)
    assert code == 0 and out.splitlines()[1].split()[:5] == ["1", "NaCl", "band_gap", "5.1", "OK"]
    assert out.splitlines()[-1] == "1 results"
    code, out, _ = run(capsys, "store", "query", "--status", "NOT_CONVERGED", "--json")
    line = json.loads(out)
    assert (line["formula"], line["value"], line["message"], line["log"]) == ("MgO", None, BAD.message, BAD.log)
    code, out, _ = run(capsys, "store", "query", "--limit", 1)
    assert out.splitlines()[-1] == "1 results"


@pytest.mark.parametrize("action", ["query --json", "query", "export -"])
def test_a_reader_may_leave_early(tmp_path, action):
    store = Store(tmp_path / "results.db")
    store.write(many(500))
    program = f"{sys.executable} -m crystaljax.cli store {action} --store {store.path}"
    command = f"set -o pipefail; {program} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert len(done.stdout.splitlines()) == 1 and done.stderr == "" and done.returncode == 0


def test_lines_that_are_no_results_are_named_and_the_rest_is_taken_over(capsys, filled, tmp_path):
    path = tmp_path / "results.jsonl"
    run(capsys, "store", "export", path)
    first, second = path.read_text().splitlines()
    coloured = second.replace("NOT_CONVERGED", r"\u001b[31mOK")
    path.write_text(f"{first}\n{{\n{coloured}\n{second}\n")
    code, out, err = run(capsys, "store", "import", path, "--store", tmp_path / "copy.db")
    assert code == PROBLEMS and "new: 2" in out and "refused: 2" in out
    assert [line.split(": ")[0] for line in err.splitlines()] == [f"line {n} of {path} is no result" for n in (2, 3)]
    assert "\x1b" not in err
    path.write_text("{\n")
    code, out, err = run(capsys, "store", "import", path, "--store", tmp_path / "other.db")
    assert code == 2 and "nothing was imported" in err and not (tmp_path / "other.db").exists()


def test_a_row_that_is_no_result_spoils_no_command(capsys, filled, tmp_path):
    with contextlib.closing(sqlite3.connect(filled.path, isolation_level=None)) as connection:
        connection.execute("UPDATE systems SET key_value_pairs='{}' WHERE id=1")
    copy = tmp_path / "copy.jsonl"
    commands = (["stats"], ["stats", "--json"], ["query"], ["query", "--json"], ["export", copy], ["export", "-"])
    for command in (*commands, ["merge", filled.path, "--store", tmp_path / "other.db"], ["verify"]):
        code, out, err = run(capsys, "store", *command)
        assert code == PROBLEMS and "row 1" in err, command
    assert len(copy.read_text().splitlines()) == 1 == len(Store(tmp_path / "other.db"))
    assert run(capsys, "store", "repair")[0] == 0 and run(capsys, "store", "verify")[0] == 0


HOSTILE = {
    "no database": b"no database at all\n" * 500,
    "empty": b"",
    "noise": bytes(range(256)) * 64,
    "only a header": b"SQLite format 3\0" + bytes(4080),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("action", ["stats", "query", "export", "verify", "repair", "merge", "import"])
def test_hostile_files_get_one_line(capsys, tmp_path, monkeypatch, name, action):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "foreign.db"
    path.write_bytes(HOSTILE[name])
    arguments = {"export": ["-"], "merge": [path], "import": [path]}.get(action, [])
    where = tmp_path / "mine.db" if action in ("merge", "import") else path
    code, out, err = run(capsys, "store", action, *arguments, "--store", where)
    assert code in (0, 1, 2) and (code != 2 or len(err.splitlines()) == 1) and "Traceback" not in err
    if name != "empty" and action != "repair":
        assert code != 0


def test_a_file_with_programs_gets_one_line(capsys, filled, tmp_path):
    with contextlib.closing(sqlite3.connect(filled.path, isolation_level=None)) as connection:
        connection.execute("CREATE TRIGGER evil AFTER INSERT ON systems BEGIN DELETE FROM systems; END")
    for command in (["stats"], ["query"], ["export", "-"], ["verify"], ["repair"], ["merge", filled.path]):
        where = ["--store", tmp_path / "mine.db"] if command[0] == "merge" else []
        code, out, err = run(capsys, "store", *command, *where)
        assert code == 2 and "'trigger evil', which runs" in err and len(err.splitlines()) == 1 and out == "", command


def test_an_export_takes_no_place_of_another_file(capsys, filled, tmp_path):
    target, link = tmp_path / "mine.txt", tmp_path / "results.jsonl"
    target.write_text("mine")
    link.symlink_to(target)
    (tmp_path / "results.jsonl.part").symlink_to(target)
    code, _, err = run(capsys, "store", "export", link)
    assert code == 2 and "exists" in err
    link.unlink()
    assert run(capsys, "store", "export", link)[0] == 0 and target.read_text() == "mine"


def test_export_import_and_merge(capsys, filled, tmp_path):
    lines, copy, other = tmp_path / "results.jsonl", tmp_path / "copy.db", tmp_path / "other.db"
    code, out, err = run(capsys, "store", "export", lines)
    assert code == 0 and out == "" and "2 results written" in err and len(lines.read_text().splitlines()) == 2
    assert run(capsys, "store", "export", "-")[1] == lines.read_text()
    code, out, _ = run(capsys, "store", "import", lines, "--store", copy)
    assert code == 0 and "new: 2" in out and len(Store(copy)) == 2
    Store(other).write([real(result=BAD), real([12, 8]), real([3, 9])])
    code, out, err = run(capsys, "store", "merge", other, VERSION_1, "--store", copy)
    assert code == 0 and err == ""
    first, second = out.splitlines()
    assert "new: 1, failures replaced by a success: 1, known already: 1 (with another value: 0)" in first
    assert "new: 5, failures replaced by a success: 1, known already: 1" in second
    assert run(capsys, "store", "verify", "--store", copy)[1].endswith("schema 2, 8 good results, 0 problems\n")


def test_merge_tells_conflicts(capsys, filled, tmp_path):
    Store(tmp_path / "other.db").write([real(result=dataclasses.replace(GOOD, value=5.3))])
    code, out, err = run(capsys, "store", "merge", tmp_path / "other.db")
    assert code == 0 and "conflict: NaCl band_gap is 5.1 here, 5.3 there; not changed" in err
    assert "(with another value: 1)" in out


def test_verify_and_repair(capsys, tmp_path):
    store, copy = Store(tmp_path / "results.db"), tmp_path / "copy.jsonl"
    records = many(300)
    store.write(records)
    assert run(capsys, "store", "verify", "--store", store.path)[0] == 0
    damage(store.path, f'"key": "{records[150].key}"')
    code, out, err = run(capsys, "store", "verify", "--store", store.path)
    assert code == PROBLEMS and "cannot be read" in err
    assert "more results are in the journal results.db.jsonl" in out
    assert f"crystaljax store repair --store {store.path}" in err
    code, _, err = run(capsys, "store", "export", copy, "--store", store.path)
    assert code == 2 and "it is damaged; end its runs; `crystaljax store repair`" in err
    assert list(tmp_path.glob("copy*")) == []
    code, out, _ = run(capsys, "store", "repair", "--store", store.path)
    assert code == 0 and out.endswith(f"the damaged file is {store.path}.damaged\n")
    code, out, _ = run(capsys, "store", "verify", "--store", store.path)
    assert code == 0 and out.endswith("300 good results, 0 problems\n")


@pytest.mark.postgres
def test_a_store_moves_to_a_server(capsys, filled, new_schema):  # noqa: F811
    url = new_schema()
    code, out, _ = run(capsys, "store", "merge", filled.path, "--store", url)
    assert code == 0 and "new: 2" in out and "no-secret" not in out
    code, out, _ = run(capsys, "store", "query", "--store", url, "--formula", "NaCl")
    assert code == 0 and "5.1" in out
    assert run(capsys, "store", "verify", "--store", url)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["stats", "--store", "missing.db"], "there is no store"),
        (["verify", "--store", "missing.db"], "there is no store"),
        (["repair", "--store", "missing.db"], "there is no store"),
        (["merge", "missing.db"], "there is no store"),
        (["import", "missing.jsonl"], "cannot read missing.jsonl"),
        (["query", "--property", "gap"], "choose one of band_gap"),
        (["query", "--formula", "Xy2"], "is not a formula such as CaTiO3"),
        (["query", "--limit", "0"], "give at least 1"),
        (["export", "results.db"], "results.db exists; delete it or give another name"),
        (["stats", "--store", "text.txt"], "it is not a database; move it away"),
    ],
)
def test_bad_input_gets_one_line_of_advice(capsys, filled, monkeypatch, tmp_path, arguments, advice):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("no database\n" * 1000)
    before = sorted(tmp_path.iterdir())
    code, out, err = run(capsys, "store", *arguments)
    assert code == 2 and advice in err and len(err.splitlines()) == 1 and out == ""
    assert sorted(tmp_path.iterdir()) == before, "nothing is written"


def test_help_is_light():
    """The commands import what they need: help needs neither JAX nor ASE."""
    program = (
        "import sys, crystaljax.cli as c\ntry: c.main(['store', '-h'])\n"
        "except SystemExit: print({'jax', 'ase'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "set()"
