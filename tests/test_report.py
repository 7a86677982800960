"""The report: what is on the page, what it says of surrogates and unfinished runs, what it refuses."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ase.io import read as read_atoms

from crystaljax import FunctionEvaluator, cli
from crystaljax.agents import comparison, metrics, page, runs
from crystaljax.agents.config import RunConfig
from crystaljax.agents.hyperparameters import RandomConfig
from crystaljax.agents.runner import sweep, train
from crystaljax.caveats import Caveat
from crystaljax.dft_bridge import Bridge, Budget
from crystaljax.dft_bridge.testing import FakeEngine

RUN = RunConfig(
    task="BandGap-RocksaltAB-v0",
    network="mlp",
    algorithm=RandomConfig(lanes=4, steps=4),
    episodes=48,
    checkpoint_every=2,
)
SEEDS = [10, 20, 30]


def bridge(path, **options):
    engine = FakeEngine(refuse_element=1, fail_element=3, sleep=0.005)
    return Bridge(engine, path, executor=ThreadPoolExecutor(1), **options)


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    """Drawing them takes longest."""
    monkeypatch.setattr(comparison, "SHOWN_CRYSTALS", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sweep with "DFT", a run of another length, one that ran out of budget, and one with a surrogate."""
    folder = tmp_path_factory.mktemp("runs")
    with bridge(folder / "results.db") as evaluator:
        sweep(RUN, SEEDS, evaluator, folder / "sweep")
    with bridge(folder / "results.db") as evaluator:
        train(dataclasses.replace(RUN, episodes=32), evaluator, folder / "short")
    with bridge(folder / "other.db", budget=Budget(max_calls=9)) as evaluator:
        assert train(dataclasses.replace(RUN, seed=40), evaluator, folder / "stopped").interrupted
    surrogate = FunctionEvaluator(lambda numbers, skeleton: numbers.sum() / 10.0, "surrogate: made up")
    train(RUN, surrogate, folder / "surrogate")
    return folder


def report(capsys, *arguments):
    code = cli.main(["report", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def cells(text, name):
    """The cells of the row of a Markdown table that begins with a name."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_an_html_report_holds_everything_itself(capsys, folder, tmp_path):
    code, out, err = report(capsys, folder / "sweep", "-o", tmp_path / "page.html")
    assert code == 0 and out.strip() == str(tmp_path / "page.html"), err
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    page = (tmp_path / "page.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "nothing is fetched"
    assert "<script" not in page
    pictures = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 1 + comparison.SHOWN_CRYSTALS
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    links = re.findall(r'download="(\w+\.cif)" href="data:chemical/x-cif;base64,([^"]+)"', page)
    assert len(links) == comparison.SHOWN_CRYSTALS
    atoms = read_atoms(io.StringIO(base64.b64decode(links[0][1]).decode()), format="cif")
    assert len(atoms) == 2
    for fact in ("fake 1.0", "nterquartile mean", "&quot;scale&quot;: 1.0", "core-hours"):
        assert fact in page
    assert "surrogate" not in page


def test_numbers_of_the_report_are_those_of_the_runs(capsys, folder, tmp_path):
    given = [folder / "sweep", folder / "short", folder / "sweep" / "seed-10", "-o", tmp_path / "page.md"]
    (tmp_path / "known.txt").write_text("NaCl\nKCl\nNaK\n")
    assert report(capsys, *given, "--tolerance", 0.5, "--reference", tmp_path / "known.txt")[0] == 0
    page = (tmp_path / "page.md").read_text()
    several, short = runs.read_all([folder / "sweep"]), runs.read_all([folder / "short"])
    assert cells(page, "seeds") == ["1", "3"], "a run that is given twice counts once"
    budget = min(int(metrics.calculations(run.episodes)[-1]) for run in several + short)
    assert f"After {budget} distinct calculations" in page and "which has 3 formulas" in page
    seen = [metrics.within(run.episodes, budget) for run in several]
    best = np.array([max(e.reward for e in episodes) for episodes in seen])
    low, high = metrics.interval(best)
    assert cells(page, "best reward")[1] == f"{best.mean():.3f} [{low:.3f}, {high:.3f}]"
    alone = metrics.within(short[0].episodes, budget)
    assert cells(page, "best reward")[0] == f"{max(e.reward for e in alone):.3f}", "one seed has no interval"
    novelty = metrics.novelty(metrics.distinct(alone), {"NaCl", "KCl", "KNa"})
    assert cells(page, "novelty")[0] == f"{novelty:.3f}"
    found = metrics.distinct(metrics.succeeded(alone, {"band_gap": metrics.Goal(1.12, 1.12, 0.5)}))
    assert cells(page, "successes (distinct crystals)")[0] == f"{len(found):.1f}"
    idle = metrics.idle_share(short[0].updates)
    assert 0.0 < idle < 1.0 and cells(page, "share of it waiting for DFT")[0] == f"{idle:.3f}"
    spent = json.loads((folder / "sweep" / "accounting.json").read_text())
    assert cells(page, str(folder / "sweep"))[0] == str(spent["requests"])
    assert f"{spent['failures']['NOT_CONVERGED']} NOT_CONVERGED" in page
    for link in re.findall(r"\]\((page_files/[^)]+)\)", page):
        assert (tmp_path / link).exists()
    assert len(list((tmp_path / "page_files").glob("*.cif"))) == 2 * comparison.SHOWN_CRYSTALS


def test_names_are_text_in_markdown_and_become_no_paths(tmp_path):
    hostile = "x [link](http://elsewhere) ![i](http://elsewhere/p.png) <script>a</script> `c` $m$ *b* | _u_ &lt;"
    blocks = [
        page.Heading("a\n# b"),
        page.Text("- " + hostile),
        page.Table(["h"], [["a|b\n| c"]]),
        page.Picture("../../pwned", b"png", hostile, ("01_NaCl.cif", "data_")),
        page.Folded("</summary>", "```\n[out](http://elsewhere)"),
    ]
    page.write(tmp_path / "page.md", "t", blocks)
    text = (tmp_path / "page.md").read_text()
    outside, fenced = text.split("````", 1)
    assert "[out]" in fenced and fenced.count("````") == 1, "the fence is longer than the text's own"
    assert not re.search(r"(?<!\\)(\](?=\(http)|[<`$*](?!details|summary|/summary|/details))", outside)
    assert "\n# b" not in text and "## a # b" in text and "\n\\- x" in text and "| a\\|b \\| c |" in text
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "page.md",
        "page_files/_pwned.cif",
        "page_files/_pwned.png",
    ]
    assert re.findall(r"\]\((\S+)\)", text.split("````")[0])[-1] == "page_files/_pwned.cif"


def test_caveats_of_values_are_on_the_page_and_explained(capsys, folder, tmp_path):
    run = shutil.copytree(folder / "short", tmp_path / "run")
    best = json.loads((run / "best.json").read_text())
    assert all(crystal["caveats"] == [] for crystal in best["crystals"]), "the bridge knows them"
    best["crystals"][0]["caveats"] = ["STRAINED", "FEW_KPOINTS"]
    del best["crystals"][1]["caveats"]  # as older runs have it
    (run / "best.json").write_text(json.dumps(best))
    for name in ("page.md", "page.html"):
        assert report(capsys, run, "-o", tmp_path / name)[0] == 0
        text = (tmp_path / name).read_text().replace("\\", "")
        assert "[STRAINED FEW_KPOINTS], reward" in text and f"STRAINED: {Caveat.STRAINED.value}" in text
        assert Caveat.FEW_KPOINTS.value in text and Caveat.MAGNETIC.value not in text


def test_curves_are_interquartile_means_over_calculations(folder):
    several = runs.read_all([folder / "sweep"])
    (problem,) = comparison.problems(several)
    axes = comparison.draw_curves(problem).axes
    assert axes[0].get_xlabel() == "Distinct DFT calculations" and axes[1].get_title(loc="left").startswith("Mean")
    curves = [metrics.best_reward(run.episodes) for run in several]
    length = min(map(len, curves))
    expected = np.mean([curve[:length] for curve in curves], axis=0)  # of three seeds, none is left out
    (line,) = [line for line in axes[0].lines if line.get_label() == "random"]
    np.testing.assert_array_equal(line.get_xdata(), np.arange(1, length + 1))
    np.testing.assert_allclose(line.get_ydata(), expected)
    assert len(axes[0].collections) == 1, "the shaded interval"
    assert len([line for line in axes[0].lines if line.get_linewidth() == 0.6]) == 3


def test_separate_runs_of_one_agent_are_the_seeds_of_one_group(capsys, tmp_path):
    config = dataclasses.replace(RUN, task="BandGap-Rocksalt-Table-v0", checkpoint_every=12)
    given = [tmp_path / f"run-{seed}" for seed in (5, 1, 4, 2, 3)]
    for path in given:
        train(dataclasses.replace(config, seed=int(path.name[-1])), "table", path)
    assert report(capsys, *given, "-o", tmp_path / "page.md")[0] == 0
    curves = []
    for path in given:
        calculated: dict[frozenset[str], float] = {}  # two equivalent sites: a crystal is a set of elements
        for line in (path / "episodes.jsonl").read_text().splitlines():
            episode = json.loads(line)
            if episode["status"] != "ODD_ELECTRONS":
                calculated.setdefault(frozenset(episode["elements"]), episode["reward"])
        curves.append(np.maximum.accumulate([*calculated.values()]))
    budget = min(map(len, curves))
    areas = sorted(curve[:budget].mean() for curve in curves)
    middle = np.mean(areas[1:-1])  # a quarter of five seeds is one whole seed at either end
    assert f"{middle:.3f}" != f"{np.mean(areas):.3f}"
    page = (tmp_path / "page.md").read_text()
    assert cells(page, "seeds") == ["5"] and f"After {budget} distinct calculations" in page
    found = cells(page, "best reward, mean over calculations")[0]
    low, high = map(float, re.fullmatch(rf"{middle:.3f} \[(\S+), (\S+)\]", found).groups())
    assert areas[0] - 1e-3 < low < middle < high < areas[-1] + 1e-3


def test_surrogates_are_called_so_and_never_mixed_with_dft(capsys, folder, tmp_path):
    assert report(capsys, folder / "surrogate", folder / "sweep", "-o", tmp_path / "page.md")[0] == 0
    page = (tmp_path / "page.md").read_text()
    ours, dft = page.split("## BandGap-RocksaltAB-v0, target 1.12 eV")[1:]
    assert "Values: surrogate: made up (surrogate: not DFT)." in ours and "surrogate" not in dft
    captions = re.findall(r"eV( \(surrogate\))?, reward", ours)
    assert len(captions) == comparison.SHOWN_CRYSTALS and all(captions)
    (problem, _) = comparison.problems(runs.read_all([folder / "surrogate", folder / "sweep"]))
    assert comparison.draw_curves(problem).axes[0].get_xlabel() == "Distinct crystals evaluated (surrogate)"


def test_stopped_and_killed_runs_are_reported_as_far_as_they_came(capsys, folder, tmp_path):
    killed = tmp_path / "killed"
    shutil.copytree(folder / "sweep" / "seed-20", killed)
    (killed / "learning_curve.png").unlink()
    with (killed / "episodes.jsonl").open("a") as file:
        file.write('{"episode": 48, "upd')
    begun = tmp_path / "begun"
    shutil.copytree(folder / "stopped", begun)
    for name in ("episodes.jsonl", "metrics.jsonl"):
        (begun / name).write_text("")
    config = json.loads((begun / "config.json").read_text())
    (begun / "config.json").write_text(json.dumps(config | {"episodes": 64}))
    assert report(capsys, killed, folder / "stopped", begun, "-o", tmp_path / "page.md")[0] == 0
    page = (tmp_path / "page.md").read_text()
    assert "finished" in cells(page, str(killed))
    assert re.search(r"stopped after \d updates", " ".join(cells(page, str(folder / "stopped"))))
    assert cells(page, "seeds") == ["2", "0"] and cells(page, "best reward")[1] == "-", "nothing calculated yet"
    assert report(capsys, begun, "-o", tmp_path / "page.md")[0] == 0
    assert "nothing to compare" in (tmp_path / "page.md").read_text()


def test_groups_are_named_by_what_tells_them_apart(folder):
    run = runs.read_all([folder / "short"])[0]

    def variant(seed=10, **changes):
        return dataclasses.replace(run, config=dataclasses.replace(run.config, seed=seed, **changes))

    wider = RandomConfig(lanes=8, steps=4)
    given = [variant(), variant(20, store="elsewhere.db"), variant(algorithm=wider), variant(vocabulary="medium")]
    small, medium = comparison.problems(given)
    assert [group.label for group in small.groups] == ["random, lanes=4", "random, lanes=8"]
    assert [len(group.runs) for group in small.groups] == [2, 1], "where results are stored makes no difference"
    assert medium.groups[0].label == "random"
    (both,) = comparison.problems([variant(), variant(network="transformer")])
    assert [group.label for group in both.groups] == ["random, mlp", "random, transformer"]


def test_what_cannot_be_reported_is_refused_with_the_fix(capsys, folder, tmp_path):
    def refused(*arguments):
        code, _, err = report(capsys, *arguments, "-o", tmp_path / "page.html")
        assert code == cli.BAD_INPUT and not (tmp_path / "page.html").exists()
        return err

    assert f"there are runs in it, such as {folder / 'short'} {folder / 'stopped'}" in refused(folder)
    assert "give what was --run of a training" in refused(tmp_path)
    assert "give what was --run of a training" in refused(tmp_path / "missing")
    assert "no such file" in refused(folder / "short", "--reference", tmp_path / "missing.csv").lower()
    assert "give 0 or more" in refused(folder / "short", "--tolerance", -1)
    twin = shutil.copytree(folder / "sweep" / "seed-10", tmp_path / "twin")
    assert "give one of them" in refused(folder / "sweep", twin)
    (twin / "best.json").unlink()
    assert f"crystaljax train --resume --run {twin}" in refused(twin)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text('{"agent": "ppo"}')
    assert "start the run anew" in refused(tmp_path / "old")
    code, _, err = report(capsys, folder / "short", "-o", tmp_path / "page.pdf")
    assert code == cli.BAD_INPUT and "must end in .html or .md" in err


def test_without_smact_the_report_says_how_to_get_it(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "_has_smact", lambda: False)
    assert report(capsys, folder / "short", "-o", tmp_path / "page.md")[0] == 0
    page = (tmp_path / "page.md").read_text()
    assert "pip install 'crystaljax[smact]'" in page and "| plausible" not in page
