"""What is read from a run folder: nothing is lost, no file outside is read or written, and every refusal says where."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

import pytest

import crystaljax
from crystaljax import cli, files, run_folder
from crystaljax.agents import outstanding, runs
from crystaljax.agents.config import RunConfig
from crystaljax.agents.hyperparameters import RandomConfig
from crystaljax.agents.runner import sweep, train
from crystaljax.errors import CrystalJAXError
from crystaljax.plain_data import WrongData, at_least, typed

CONFIG = RunConfig(
    task="Density-RocksaltAB-v0",
    engine="unrelaxed-density",
    network="mlp",
    algorithm=RandomConfig(lanes=4, steps=4),
    episodes=32,
    checkpoint_every=2,
)
UPDATES = 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(CONFIG, "unrelaxed-density", folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(folder):
    """Every file, and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change(path, number, text):
    """Another text for a line, counted from 1; ``None`` leaves it out."""
    lines = path.read_text().splitlines()
    lines[number - 1 : number] = [] if text is None else [text]
    path.write_text("".join(f"{line}\n" for line in lines))


def resume(folder):
    return train(CONFIG, "unrelaxed-density", folder, resume=True)


def line_with(path, number, **values):
    return json.dumps(json.loads(path.read_text().splitlines()[number - 1]) | values)


DAMAGES = {
    "cut in the middle": ("episodes.jsonl", 5, lambda path: path.read_text().splitlines()[4][:40]),
    "missing": ("episodes.jsonl", 5, lambda path: None),
    "said twice": ("episodes.jsonl", 5, lambda path: "\n".join(path.read_text().splitlines()[3:5])),
    "of another update": ("episodes.jsonl", 5, lambda path: line_with(path, 5, update=9)),
    "no number": ("episodes.jsonl", 5, lambda path: line_with(path, 5, reward="much")),
    "a bare number": ("episodes.jsonl", 5, lambda path: "3"),
    "another element": ("episodes.jsonl", 5, lambda path: line_with(path, 5, elements=["Og", "Og"])),
    "an unknown element": ("episodes.jsonl", 5, lambda path: line_with(path, 5, elements=["Na", "Qq"])),
    "too many sites": ("episodes.jsonl", 5, lambda path: line_with(path, 5, elements=["Na", "Na", "Cl"])),
    "another skeleton": ("episodes.jsonl", 5, lambda path: line_with(path, 5, skeleton=7)),
    "another crystal": ("episodes.jsonl", 5, lambda path: line_with(path, 5, crystal=99)),
    "damaged metrics": ("metrics.jsonl", 2, lambda path: "{"),
    "metrics missing": ("metrics.jsonl", 2, lambda path: None),
    "metrics of another update": ("metrics.jsonl", 2, lambda path: line_with(path, 2, update=7)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_damaged_line_stops_a_resume_and_nothing_is_lost(run, damage):
    name, number, text = DAMAGES[damage]
    change(run / name, number, text(run / name))
    before = contents(run)
    with pytest.raises(CrystalJAXError, match=rf"{name}, line \d+ .*restore") as refused:
        resume(run)
    assert abs(int(re.search(r"line (\d+)", str(refused.value))[1]) - number) <= 1
    assert contents(run) == before


def test_missing_last_lines_stop_a_resume(run):
    for name, what in (("episodes.jsonl", "31 of the 32 episodes"), ("metrics.jsonl", "3 of the 4 updates")):
        kept = (run / name).read_text()
        (run / name).write_text("".join(kept.splitlines(keepends=True)[:-1]))
        before = contents(run)
        with pytest.raises(run_folder.RunFolderError, match=f"{name} has {what} up to the checkpoint of update 4"):
            resume(run)
        assert contents(run) == before
        (run / name).write_text(kept)


def test_a_torn_last_line_is_left_out_and_nothing_else(run):
    before = contents(run)
    for torn in (b'{"episode": 32, "upda', b"\0\0\0", b"\xff"):
        for name in ("episodes.jsonl", "metrics.jsonl"):
            with (run / name).open("ab") as file:
                file.write(torn)
        assert len(runs.read_all([run])[0].episodes) == 32
        assert resume(run).ledger.episodes == 32
        after = contents(run)
        assert all(after[name] == before[name] for name in before if not name.startswith("tensorboard"))
    (run / "episodes.jsonl").write_bytes(before["episodes.jsonl"].removesuffix(b"\n"))
    assert resume(run).ledger.episodes == 32, "the line is whole but for its end"
    assert (run / "episodes.jsonl").read_bytes() == before["episodes.jsonl"]


def test_lost_and_damaged_checkpoints_stop_a_resume(run):
    def refused(message):
        before = contents(run)
        with pytest.raises(run_folder.RunFolderError, match=message):
            resume(run)
        assert contents(run) == before

    whole = shutil.copytree(run / "checkpoints", run.parent / "kept")
    for path in (run / "checkpoints" / "4").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(b"damaged")
    refused(r"checkpoints/4 cannot be read .*remove that folder to go on from update 2")
    shutil.rmtree(run / "checkpoints" / "4")
    assert resume(run).ledger.episodes == 32, "the updates since are made again"
    shutil.rmtree(run / "checkpoints")
    refused("has come to update 4, but its last checkpoint is of update 0")
    shutil.copytree(whole, run / "checkpoints", dirs_exist_ok=True)
    shutil.rmtree(run / "checkpoints" / "2")
    (run / "checkpoints" / "4" / "link").symlink_to("/etc/passwd")
    with pytest.raises(files.FileRefused, match="is a link"):
        resume(run)


def test_tickets_that_do_not_follow_from_one_another_are_refused(tmp_path):
    env = crystaljax.make("Density-RocksaltAB-v0", "unrelaxed-density", in_phase=True)[0]
    good = [
        {"update": 1, "sent": [[0, 0, [1, 2]], [1, 0, [2, 3]]], "arrived": [1]},
        {"update": 2, "sent": [], "arrived": [0]},
    ]

    def read(*lines, update=2):
        (tmp_path / "tickets.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return outstanding.tickets_at(tmp_path, update, env)

    assert [line["arrived"] for line in read(*good)] == [[1], [0]] and len(read(*good, update=1)) == 1
    for number, changed in (
        (2, {"arrived": [1]}),
        (2, {"arrived": [0, 0]}),
        (2, {"update": 3}),
        (2, {"sent": [[0, 0, [1, 2]]]}),
        (2, {"sent": [[5, 9, [1, 2]]]}),
        (1, {"sent": [[0, 0, [1, 2, 3]], [1, 0, [2, 3]]]}),
        (1, {"sent": [[0, 0, [1, 99]], [1, 0, [2, 3]]]}),
        (1, {"sent": [[-1, 0, [1, 2]]]}),
    ):
        lines = [line | (changed if line["update"] == number else {}) for line in good]
        with pytest.raises(run_folder.RunFolderError, match=f"tickets.jsonl, line {number} .*restore"):
            read(*lines)
    with pytest.raises(run_folder.RunFolderError, match="has 1 of the 2 updates"):
        read(good[0])


def replaced(**values):
    """A change of a JSON document."""
    return lambda text: json.dumps(json.loads(text) | values)


def crystal(**values):
    """A change of the first of the best crystals."""

    def changed(text):
        best = json.loads(text)
        best["crystals"][0] |= values
        return json.dumps(best)

    return changed


BROKEN = [
    ("best.json", lambda text: "[]"),
    ("best.json", lambda text: "null"),
    ("best.json", lambda text: "3"),
    ("best.json", lambda text: ""),
    ("best.json", lambda text: text[:100]),
    ("best.json", lambda text: "[" * 100_000),
    ("best.json", lambda text: "é\ud800".encode("utf-8", "surrogatepass")),
    ("best.json", replaced(crystals=None)),
    ("best.json", replaced(crystals=[3])),
    ("best.json", replaced(best_reward="high")),
    ("best.json", lambda text: text.replace('"best_reward": 1.0', '"best_reward": NaN')),
    ("best.json", lambda text: text.replace('"best_reward": 1.0', '"best_reward": 1e400')),
    ("best.json", lambda text: text.replace('"best_reward": 1.0', f'"best_reward": {"1" * 5000}')),
    ("best.json", replaced(source=None)),
    ("best.json", replaced(fingerprint=[])),
    ("best.json", crystal(elements=["Na", "Qq"])),
    ("best.json", crystal(elements=[])),
    ("best.json", crystal(elements=["Na", "Cl", "Cl"])),
    ("best.json", crystal(values=None)),
    ("best.json", crystal(values={"band_gap": 3.0})),
    ("best.json", crystal(values={"density": "high"})),
    ("best.json", crystal(formula="../../NaCl")),
    ("best.json", crystal(lattice=[[0, 0, 0]] * 3)),
    ("best.json", crystal(lattice=[[1e300, 0, 0], [0, 1, 0], [0, 0, 1]])),
    ("best.json", crystal(lattice=[1, 2])),
    ("best.json", crystal(file="/etc/passwd")),
    ("best.json", crystal(file="best/../../secret.cif")),
    ("metrics.jsonl", lambda text: "3"),
    ("metrics.jsonl", lambda text: "{}\n"),
    ("metrics.jsonl", lambda text: "null\n" + text),
    ("episodes.jsonl", lambda text: "3"),
    ("episodes.jsonl", lambda text: "[]\n" + text),
    ("episodes.jsonl", lambda text: text.replace('"OK"', '"FINE"')),
    (
        "episodes.jsonl",
        lambda text: text.replace('"density": ', '"density": "', 1).replace('}, "status"', '"}, "status"', 1),
    ),
    ("accounting.json", lambda text: "[]"),
    ("accounting.json", lambda text: '{"calls": -5}'),
    ("sweep.json", lambda text: "{}"),
    ("sweep.json", lambda text: '{"seeds": 3}'),
    ("sweep.json", lambda text: '{"seeds": []}'),
    ("sweep.json", lambda text: '{"seeds": [1, 1]}'),
    ("sweep.json", lambda text: '{"seeds": ["../x"]}'),
    ("sweep.json", lambda text: '{"seeds": [4294967296]}'),
    ("config.json", lambda text: "[]"),
    ("config.json", lambda text: "{}"),
    ("config.json", replaced(skeletons=3)),
    ("config.json", replaced(seed=2**32)),
    ("config.json", replaced(episodes=-1)),
    ("config.json", replaced(timeout="soon")),
    ("config.json", lambda text: text.replace('"timeout": null', '"timeout": Infinity')),
    ("config.json", lambda text: text.replace('"timeout": null', f'"timeout": {"9" * 400}')),
]


def one_line(capsys, *arguments):
    """What a command says that is refused, in one line."""
    code = cli.main([str(argument) for argument in arguments])
    err = capsys.readouterr().err.strip().splitlines()
    assert code == cli.BAD_INPUT and len(err) == 1 and err[0].startswith("crystaljax: "), err
    return err[0]


@pytest.mark.parametrize("case", range(len(BROKEN)))
def test_broken_run_folders_are_refused_with_the_file(capsys, run, case):
    name, damage = BROKEN[case]
    path = run / name
    broken = damage(path.read_text() if path.exists() else "")
    path.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    before = contents(run)
    commands = [("report", run, "-o", run.parent / "page.md"), ("train", "--resume", "--run", run)]
    commands += [("show", run)] * (name == "best.json")
    for command in commands:
        if name == "accounting.json" and command[0] == "train":
            continue  # without a bridge there is nothing to count on
        assert str(path) in one_line(capsys, *command), command
    assert contents(run) == before and not (run.parent / "page.md").exists()


def not_a_file(path, kind, outside):
    """Something else in the place of a file."""
    path.unlink(missing_ok=True)
    if kind == "link":
        outside.write_text("something private\n")
        path.symlink_to(outside)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
@pytest.mark.parametrize("name", ["best.json", "metrics.jsonl", "episodes.jsonl", "config.json", "sweep.json"])
def test_what_is_no_file_is_not_read(capsys, run, name, kind):
    outside = run.parent / "outside"
    not_a_file(run / name, kind, outside)
    for command in (("report", run, "-o", run.parent / "page.md"), ("train", "--resume", "--run", run)):
        said = one_line(capsys, *command)
        assert str(run / name) in said and ("link" in said or "not an ordinary file" in said)
    assert kind != "link" or outside.read_text() == "something private\n"


def test_nothing_is_written_through_links(capsys, run):
    outside = run.parent / "outside"
    outside.mkdir()
    victim = outside / "victim"
    victim.write_text("mine")
    first = next((run / "best").glob("01_*.cif"))
    for name in ("best.png", "learning_curve.png", ".best.json.partial", "best.partial"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(victim)
    assert cli.main(["show", str(run)]) == 0 and (run / "best.png").read_bytes().startswith(b"\x89PNG")
    resume(run)
    assert victim.read_text() == "mine" and not (run / "learning_curve.png").is_symlink()
    for name in ("best", "checkpoints", "tensorboard"):
        shutil.move(run / name, run / f"{name}-aside")
        (run / name).symlink_to(outside)
        with pytest.raises(files.FileRefused, match=f"{name} is a link"):
            resume(run)
        (run / name).unlink()
        shutil.move(run / f"{name}-aside", run / name)
    text = first.read_text()
    first.unlink()
    first.symlink_to(victim)
    assert "is a link" in one_line(capsys, "report", run, "-o", run.parent / "page.md")
    with pytest.raises(run_folder.RunFolderError, match="was not written by a run"):
        resume(run)
    first.unlink()
    first.write_text(text)
    assert sorted(path.name for path in outside.iterdir()) == ["victim"] and victim.read_text() == "mine"
    resume(run)


def test_a_report_holds_what_the_run_wrote_and_nothing_else(capsys, run):
    (run.parent / "secret.cif").write_text("TOP-SECRET")
    best = json.loads((run / "best.json").read_text())
    for file in ("../secret.cif", "best/../../secret.cif", str(run.parent / "secret.cif"), "best/01_/secret.cif", ""):
        (run / "best.json").write_text(json.dumps(best | {"crystals": [best["crystals"][0] | {"file": file}]}))
        assert "crystals[0].file is" in one_line(capsys, "report", run, "-o", run.parent / "page.html")
    assert not (run.parent / "page.html").exists()


def test_files_of_others_in_a_folder_are_left_alone(run):
    best = run / "best"
    ours = next(best.glob("01_*.cif"))
    others = {
        best / "mine.cif": "data_mine",
        best / "99_NaCl.cif": "data_mine, not of a run",
        best / "01_NaCl copy.cif": ours.read_text(),
        run / "notes.txt": "mine",
    }
    for path, text in others.items():
        path.write_text(text)
    old = best / "98_NaCl.cif"
    old.write_text("# NaCl, designed by CrystalJAX, task Density-RocksaltAB-v0\n")
    resume(run)
    assert {path: path.read_text() for path in others} == others
    assert not old.exists(), "one that an earlier update wrote"
    ours.write_text("data_mine")
    with pytest.raises(run_folder.RunFolderError, match="was not written by a run"):
        resume(run)
    assert ours.read_text() == "data_mine"


@pytest.mark.parametrize(
    "name", ["best/", "checkpoints/", "episodes.jsonl", "metrics.jsonl", "best.json", "sweep.json"]
)
def test_a_folder_with_the_files_of_a_run_is_not_taken_over(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text("mine")
    before = contents(folder)
    message = "holds a run already" if name == "sweep.json" else rf"has {name.rstrip('/')}, .*choose another folder"
    with pytest.raises(run_folder.RunFolderError, match=message):
        train(CONFIG, "unrelaxed-density", folder)
    with pytest.raises(run_folder.RunFolderError, match=message):
        sweep(CONFIG, [1, 2], "unrelaxed-density", folder)
    assert contents(folder) == before and len(list(folder.iterdir())) == 1


def test_seeds_are_those_that_make_a_difference(capsys):
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=f"seed is {seed}; give one between 0 and 4294967295"):
            dataclasses.replace(CONFIG, seed=seed)
    assert dataclasses.replace(CONFIG, seed=2**32 - 1).seed == 2**32 - 1
    assert "between 0 and" in one_line(capsys, "evaluate", "nowhere", "--seed", 2**32)


# Files and plain data


def test_a_file_is_replaced_whole_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path, victim = tmp_path / "best.json", tmp_path / "victim"
    victim.write_text("mine")
    path.symlink_to(victim)
    files.replace_text(path, "new")
    assert path.read_text() == "new" and not path.is_symlink() and victim.read_text() == "mine"
    seen = []
    monkeypatch.setattr(os, "replace", lambda partial, final: seen.append(Path(partial).name) or 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            files.replace_text(path, "newer")
    assert len(set(seen)) == 2, "nobody can foresee the name"
    assert path.read_text() == "new" and sorted(os.listdir(tmp_path)) == ["best.json", "victim"]


def test_files_are_ordinary_and_of_bounded_size(tmp_path):
    (tmp_path / "large").write_bytes(b"x" * 101)
    assert len(files.read_bytes(tmp_path / "large", largest=101)) == 101
    with pytest.raises(files.FileRefused, match="more than 100 bytes"):
        files.read_bytes(tmp_path / "large", largest=100)
    with pytest.raises(files.FileRefused, match="not an ordinary file"):
        files.read_bytes(Path("/dev/zero"))
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(files.FileRefused, match="not text in UTF-8"):
        files.read_text(tmp_path / "latin")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(files.FileRefused, match="is a link"):
        files.open_to_append(tmp_path / "link")
    with pytest.raises(files.FileRefused, match="is a link"):
        files.make_folder(tmp_path / "link")


class Table(TypedDict):
    count: Annotated[int, at_least(1)]
    note: NotRequired[str]


@dataclasses.dataclass(frozen=True)
class Pair:
    left: tuple[float, ...]
    right: str | None = None


def test_plain_data_become_values_of_their_type():
    assert typed({"count": 3, "other": []}, Table) == {"count": 3, "other": []}
    assert typed({"left": [1, 2.5], "other": 0}, Pair) == Pair((1.0, 2.5))
    assert typed([[1, "a"]], list[tuple[int, str]]) == [(1, "a")]
    for value, kind, message in (
        ({"count": 0}, Table, "count is 0; it must be 1 or more"),
        ({}, Table, "it has no count"),
        ({"count": True}, Table, "count is True; it must be a whole number"),
        ({"left": [1, "x"]}, Pair, r"left\[1\] is 'x'; it must be a number"),
        ({"left": [10**400]}, Pair, r"left\[0\] is a huge number; it must be a finite number"),
        ({"left": [], "right": 3}, Pair, "right is 3; it must be text"),
        ([[1]], list[tuple[int, str]], r"\[0\] is \[1\]; it must have 2 entries"),
        (3, Table, "it is 3; it must be a table"),
        ({"count": 1, "note": "\x1b[2J" + "x" * 1000}, dict[str, int], r"note is '\\x1b\[2Jx+\.\.\.; it must be"),
    ):
        with pytest.raises(WrongData, match=message):
            typed(value, kind)
