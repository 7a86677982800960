"""Caveats: which values have them, where they are kept and shown, and moduli whose minimum lies beyond the volumes."""

from __future__ import annotations

import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.lattice import BCC, BCT, CUB, FCC, HEX, ORC, RHL
from ase.spacegroup import crystal as of_group
from ase.units import GPa

import crystaljax
from crystaljax import caveats, cli, library, tables
from crystaljax.agents import report
from crystaljax.agents.ledger import Ledger
from crystaljax.caveats import Caveat, changed_bonds, free_parameters
from crystaljax.dft_bridge import Bridge, Request
from crystaljax.dft_bridge.engines.base import Crystal, Result
from crystaljax.dft_bridge.engines.caveats import held_points, with_caveats
from crystaljax.dft_bridge.engines.equation_of_state import fit_murnaghan, sample
from crystaljax.dft_bridge.engines.registry import make_engine
from crystaljax.dft_bridge.keys import Keys
from crystaljax.dft_bridge.store import Record, Store
from crystaljax.dft_bridge.store.export import read_file, write_lines
from crystaljax.dft_bridge.store.verify import verify
from crystaljax.dft_bridge.testing import FakeEngine
from crystaljax.evaluators import TableEvaluator
from crystaljax.status import Status

WITHOUT_SPIN = {"spin": False}


def plain(atoms: Atoms) -> Crystal:
    return Crystal(atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers.astype(np.int64))


def codes(atoms: Atoms, property_name: str, details: dict, settings: dict) -> list[str]:
    crystal = plain(atoms)
    sites = crystal.lattice, crystal.frac_coords, crystal.numbers
    return caveats.names(caveats.derive(*sites, property_name, details, settings))


QUARTZ = of_group(
    ["Si", "O"],
    [(0.4697, 0, 1 / 3), (0.4135, 0.2669, 0.7858)],
    spacegroup=152,
    cellpar=[4.916, 4.916, 5.4054, 90, 90, 120],
)
RUTILE = of_group(["Ti", "O"], [(0, 0, 0), (0.305, 0.305, 0)], spacegroup=136, cellpar=[4.59, 4.59, 2.96, 90, 90, 90])
PYRITE = of_group(["Fe", "S"], [(0, 0, 0), (0.385, 0.385, 0.385)], spacegroup=205, cellpar=[5.42] * 3 + [90] * 3)
ROCKSALT = bulk("NaCl", "rocksalt", 5.64)


# What follows from crystal, facts and settings


@pytest.mark.parametrize(
    ("atoms", "strains", "moves"),
    [
        (ROCKSALT, 1, 0),
        (bulk("NaCl", "rocksalt", 5.64, cubic=True), 1, 0),
        (bulk("Mg"), 2, 0),
        (bulk("ZnO", "wurtzite", a=3.25, c=5.2, u=0.382), 2, 1),
        (QUARTZ, 2, 4),
        (RUTILE, 2, 1),
        (PYRITE, 1, 1),
        (
            Atoms(
                "LiNa",
                cell=[[3.9, 0.2, 0.1], [0, 4.3, 0.3], [0, 0, 5.1]],
                scaled_positions=[(0, 0, 0), (0.4, 0.5, 0.6)],
            ),
            6,
            3,
        ),
    ],
)
def test_what_symmetry_leaves_free(atoms, strains, moves):
    """As the Wyckoff positions of these structures have it."""
    crystal = plain(atoms)
    assert free_parameters(crystal.lattice, crystal.frac_coords, crystal.numbers) == (strains, moves)


def test_a_modulus_of_clamped_ions_says_so():
    assert codes(QUARTZ, "bulk_modulus", {}, {}) == codes(PYRITE, "bulk_modulus", {}, {}) == ["CLAMPED_IONS"]
    assert codes(bulk("Mg"), "bulk_modulus", {}, {}) == ["CLAMPED_IONS"], "c/a is held too"
    assert codes(ROCKSALT, "bulk_modulus", {}, {}) == []
    assert codes(QUARTZ, "band_gap", {}, {}) == codes(QUARTZ, "density", {}, {}) == []


@pytest.mark.parametrize(
    ("symbol", "magnetic"),
    [("V", 1), ("Cr", 1), ("Mn", 1), ("Fe", 1), ("Co", 1), ("Ni", 1), ("Gd", 1), ("Ti", 0), ("Zn", 0), ("La", 0)],
)
def test_magnetic_elements_without_spin(symbol, magnetic):
    oxide = bulk(f"{symbol}O", "rocksalt", 4.3)
    assert codes(oxide, "band_gap", {}, WITHOUT_SPIN) == ["MAGNETIC"] * magnetic
    assert codes(oxide, "band_gap", {}, {}) == [], "of other calculators nobody knows"


def test_a_relaxation_that_used_up_its_steps():
    assert codes(ROCKSALT, "density", {"relaxed": False}, {}) == ["NOT_RELAXED"]
    assert codes(ROCKSALT, "density", {"relaxed": True}, {}) == []


@pytest.mark.parametrize(
    ("details", "strained"),
    [
        ({"pressure": 8.0}, True),
        ({"pressure": 4.0}, False),
        ({"pressure": -60.0}, False),  # without its Pulay correction, which is positive
        ({"pressure": 8.0, "pulay_pressure": 2.0}, True),
        ({"pressure": 8.0, "pulay_pressure": 20.0}, False),  # within the uncertainty of the correction
        ({"pressure": -8.0, "pulay_pressure": 2.0}, True),
        ({"pressure": math.nan, "pulay_pressure": 2.0}, False),
        ({}, False),
    ],
)
def test_strain_is_said_of_pressures_that_are_known(details, strained):
    assert codes(ROCKSALT, "band_gap", details, {}) == ["STRAINED"] * strained


@pytest.mark.parametrize("nonsense", ["x", None, [1, 2], {"a": 1}, math.inf, True])
@pytest.mark.parametrize("property_name", ["band_gap", "bulk_modulus", "density"])
def test_facts_that_make_no_sense_are_not_judged(property_name, nonsense):
    names = ("pressure_at_cell", "v0_over_v", "lattice", "frac_coords", "kpoints", "pulay_pressure", "relaxed")
    details = dict.fromkeys(names, nonsense)
    settings = {"eos_volumes": nonsense, "modulus_at": "cell"}
    assert with_caveats(Result(1.0, Status.OK, details=details), plain(ROCKSALT), property_name, settings).caveats == ()


def test_tension_counts_at_cutoffs_that_are_tight():
    relaxed = {"relaxed": True, "pressure": -8.0}
    assert codes(ROCKSALT, "density", relaxed, {"density_cutoff": "tight"}) == ["STRAINED"]
    assert codes(ROCKSALT, "density", relaxed, {"density_cutoff": 20.0}) == []
    at_cell = {"pressure_at_cell": 30.0, "v0_over_v": 1.1}
    assert codes(ROCKSALT, "bulk_modulus", at_cell, {"modulus_at": "cell", "eos_volumes": [0.98, 1.02]}) == ["STRAINED"]


def test_a_minimum_beyond_the_volumes_is_extrapolated():
    settings = {"eos_volumes": [0.98, 0.99, 1.0, 1.01, 1.02]}
    assert codes(ROCKSALT, "bulk_modulus", {"v0_over_v": 0.84}, settings) == ["EXTRAPOLATED"]
    assert codes(ROCKSALT, "bulk_modulus", {"v0_over_v": 1.015}, settings) == []
    assert codes(ROCKSALT, "bulk_modulus", {"v0_over_v": 0.84}, settings | {"eos_further": 3}) == []


def test_bonds_that_changed():
    """A perovskite's atoms move, or its cell scales and turns; only the first is another structure."""
    skeleton = library.perovskite()
    numbers = np.array([20, 22, 8, 8, 8])
    given = skeleton.lattice, skeleton.frac_coords
    turned = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    assert not changed_bonds(given, (1.1 * skeleton.lattice @ turned, skeleton.frac_coords), numbers)
    moved = skeleton.frac_coords.copy()
    moved[0, 2] += 0.03
    assert not changed_bonds(given, (skeleton.lattice, moved), numbers), "a ferroelectric is a perovskite still"
    sheared = skeleton.lattice @ np.array([[1, 0.5, 0], [0, 1, 0], [0, 0, 1]])
    assert changed_bonds(given, (sheared, skeleton.frac_coords), numbers)
    details = {"relaxed": True, "lattice": sheared.tolist(), "frac_coords": skeleton.frac_coords.tolist()}
    atoms = Atoms(numbers=numbers, cell=skeleton.lattice, scaled_positions=skeleton.frac_coords, pbc=True)
    assert codes(atoms, "density", details, {}) == ["CHANGED_BONDS"]


@pytest.mark.parametrize(
    ("atoms", "details", "settings", "few"),
    [
        (library.perovskite(), {"kpoints": [5, 5, 5]}, {}, True),  # CrystalGym's mesh has no X, M and R
        (library.perovskite(), {"kpoints": [6, 6, 6]}, {}, False),
        (library.perovskite(), {"kpoints": [2, 2, 2]}, {"shifted": True, "special_points": False}, True),
        (library.perovskite(), {"kpoints": [2, 2, 2]}, {"shifted": True, "special_points": True}, False),
        (
            library.perovskite(),
            {"kpoints": [2, 2, 2]},
            {"special_points": True, "sampling": {"rule": "lattice"}},
            False,
        ),
        (bulk("Mg"), {"kpoints": [4, 4, 2]}, {}, True),  # no K
        (bulk("Mg"), {"kpoints": [6, 6, 2]}, {}, False),
        (library.perovskite(), {}, {}, False),  # whoever does not say
    ],
)
def test_meshes_without_special_points(atoms, details, settings, few):
    crystal = (
        atoms if isinstance(atoms, Atoms) else Atoms("CaTiO3", cell=atoms.lattice, scaled_positions=atoms.frac_coords)
    )
    judged = with_caveats(Result(1.0, Status.OK, details=details), plain(crystal), "band_gap", settings)
    assert (Caveat.FEW_KPOINTS in judged.caveats) == few
    other = with_caveats(Result(1.0, Status.OK, details=details), plain(crystal), "density", settings)
    assert Caveat.FEW_KPOINTS not in other.caveats


@pytest.mark.parametrize(
    ("lattice", "stars"),
    [
        (CUB(4.0), 4),  # Gamma X M R
        (FCC(5.0), 4),  # Gamma X L W
        (BCC(3.0), 4),  # Gamma H N P
        (HEX(3.0, 5.0), 6),  # Gamma A M L K H
        (BCT(3.0, 5.0), 5),  # Gamma X M N P
        (RHL(4.0, 70.0), 4),  # Gamma T L F
        (ORC(3.0, 4.0, 5.0), 8),
    ],
)
def test_special_points_are_those_of_the_tables(lattice, stars):
    assert len(held_points(lattice.tocell().array)) == stars


def test_codes_as_text():
    both = (Caveat.STRAINED, Caveat.MAGNETIC)
    assert caveats.text(both[::-1]) == "STRAINED MAGNETIC" and caveats.parse("STRAINED MAGNETIC") == both
    assert caveats.text(()) == "none" and caveats.parse("none") == ()
    with pytest.raises(ValueError, match="unknown caveats MOON.*CLAMPED_IONS.*update crystaljax"):
        caveats.parse("STRAINED MOON")


# Equations of state


def vinet(scale: float, v0: float, b0: float, b_prime: float) -> float:
    """Energy in eV of Vinet's equation of state; scales of 15 Å^3, b0 in GPa."""
    eta = 1.5 * (b_prime - 1)
    x = (scale / v0) ** (1 / 3)
    return 9 * 15 * v0 * b0 * GPa / eta**2 * (1 - (1 - eta * (1 - x)) * math.exp(eta * (1 - x)))


PLANNED = (0.98, 0.99, 1.0, 1.01, 1.02)


@pytest.mark.parametrize("b_prime", [3.5, 4.5])
@pytest.mark.parametrize("v0", [0.84, 0.93, 1.07, 1.2])
def test_a_minimum_beyond_the_volumes_is_bracketed_and_its_modulus_right(v0, b_prime):
    scales, energies = sample(lambda scale: vinet(scale, v0, 120.0, b_prime), PLANNED, 3, (0.8, 1.25))
    assert scales[:5] == list(PLANNED) and 5 < len(scales) <= 8
    assert min(scales) < v0 < max(scales)
    engine = make_engine("ase:ase.calculators.emt.EMT")
    result = engine._modulus(scales, energies, 15.0, {})
    assert result.details["v0_over_v"] == pytest.approx(v0, abs=1e-3)
    assert result.value == pytest.approx(120.0, rel=0.02)
    extrapolated = fit_murnaghan(15 * np.array(PLANNED), np.array(energies[:5]))
    assert abs(result.value / 120 - 1) < abs(extrapolated.b0 / GPa / 120 - 1)


def test_a_minimum_among_the_volumes_costs_nothing():
    asked = []
    sample(lambda scale: asked.append(scale) or vinet(scale, 1.01, 120.0, 4.0), PLANNED, 3, (0.8, 1.25))
    assert asked == list(PLANNED)


def test_what_is_not_bracketed_is_a_failure_with_its_reason():
    """Energies that fall for ever, of which five points look as if they had a minimum."""
    minimum = 0.9

    def receding(scale: float) -> float:
        return vinet(scale, min(minimum, scale - 0.05), 120.0, 4.0) + scale

    scales, energies = sample(receding, PLANNED, 3, (0.5, 1.5))
    result = make_engine("ase:ase.calculators.emt.EMT", eos_range=(0.5, 1.5))._modulus(scales, energies, 15.0, {})
    assert result.status == Status.FIT_MEANINGLESS and result.message


def test_calculators_find_the_modulus_from_a_stretched_cell():
    """Copper by EMT, from a cell of 15 % more volume."""
    engine = make_engine("ase:ase.calculators.emt.EMT")
    at_rest, stretched = (
        engine.compute(plain(bulk("Cu", "fcc", a)), "bulk_modulus") for a in (3.59, 3.59 * 1.15 ** (1 / 3))
    )
    assert stretched.value == pytest.approx(at_rest.value, rel=0.03) and not stretched.caveats
    only_planned = dataclasses.replace(engine, eos_further=0)
    extrapolated = only_planned.compute(plain(bulk("Cu", "fcc", 3.59 * 1.15 ** (1 / 3))), "bulk_modulus")
    assert extrapolated.caveats == (Caveat.EXTRAPOLATED,)
    assert len(extrapolated.details["volumes"]) == 5 < len(stretched.details["volumes"])
    assert only_planned.compute(plain(bulk("Cu", "fcc", 3.59)), "bulk_modulus").value == at_rest.value


# Where they are kept


FINGERPRINT = {"engine": "fake", "fake": "1.0", "scale": 1.0, "property": "band_gap"}


def a_record(result: Result, numbers=(26, 8), fingerprint=FINGERPRINT | WITHOUT_SPIN) -> Record:
    skeleton = library.rocksalt()
    request = Request.of(skeleton, numbers, "band_gap")
    key = Keys(skeleton, "band_gap", fingerprint).key(request.numbers)
    return Record(key, request.crystal, "band_gap", result, "fake 1.0, fast", fingerprint)


def test_a_store_keeps_them_and_old_rows_have_those_that_follow(tmp_path, capsys):
    store = Store(tmp_path / "results.db")
    told = a_record(Result(1.0, Status.OK, caveats=(Caveat.STRAINED,)), (11, 17))
    none = a_record(Result(2.0, Status.OK, caveats=()), (12, 8))
    old = a_record(Result(3.0, Status.OK), (26, 8))
    failed = a_record(Result.failure(Status.NOT_CONVERGED, "gave up"), (25, 8))
    store.write([told, none, old, failed])
    read = store.read([record.key for record in (told, none, old, failed)])
    assert read[told.key].caveats == (Caveat.STRAINED,) and read[none.key].caveats == ()
    assert read[old.key].caveats is None and read[failed.key].caveats is None
    assert not verify(store).problems

    with open(tmp_path / "lines.jsonl", "w") as out:
        write_lines(store.rows(), out)
    lines = {line["key"]: line for line in map(json.loads, open(tmp_path / "lines.jsonl"))}
    assert lines[told.key]["caveats"] == "STRAINED" and lines[none.key]["caveats"] == "none"
    assert lines[old.key]["caveats"] == "MAGNETIC" and "caveats" not in lines[failed.key]
    other = Store(tmp_path / "other.db")
    assert read_file(other, tmp_path / "lines.jsonl").added == 4
    assert other.read([old.key])[old.key].caveats == (Caveat.MAGNETIC,) and not verify(other).problems
    assert store.merge(other.rows()).known == 4 and not verify(store).problems

    assert cli.main(["store", "query", "--store", str(tmp_path / "results.db"), "--status", "OK"]) == 0
    shown = capsys.readouterr().out
    assert "MAGNETIC" in shown.split("FeO")[1].splitlines()[0] and "STRAINED" in shown.split("NaCl")[1].splitlines()[0]
    assert f"MAGNETIC: {Caveat.MAGNETIC.value}" in shown and "none" not in shown


@pytest.mark.parametrize("told", [["STRAINED"], "STRAINED MOON", 7])
def test_unknown_caveats_of_an_import_are_refused_by_name(tmp_path, told):
    store = Store(tmp_path / "results.db")
    store.write([a_record(Result(1.0, Status.OK, caveats=()))])
    (row,) = store.rows()
    line = json.loads(row.to_json(2)) | {"caveats": told}
    (tmp_path / "lines.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(Exception, match="caveats"):
        read_file(Store(tmp_path / "other.db"), tmp_path / "lines.jsonl")


@dataclasses.dataclass(frozen=True)
class WithoutSpin(FakeEngine):
    """Tells no caveats of its own."""

    def fingerprint(self, property_name):
        return super().fingerprint(property_name) | WITHOUT_SPIN


def test_the_bridge_tells_them_of_new_results_and_of_old_ones(tmp_path):
    skeleton = library.rocksalt()
    requests = [Request.of(skeleton, numbers, "band_gap") for numbers in ((26, 8), (12, 8))]
    expected = [(Caveat.MAGNETIC,), ()]
    old = Store(tmp_path / "old.db")
    old.write([a_record(Result(3.0, Status.OK)), a_record(Result(2.0, Status.OK), (12, 8))])
    for store in ("new.db", "old.db"):
        engine = WithoutSpin(log=str(tmp_path / f"log of {store}"))
        with ThreadPoolExecutor(1) as executor, Bridge(engine, tmp_path / store, executor=executor) as bridge:
            assert bridge.known(requests) == [None, None] if store == "new.db" else True
            assert [result.caveats for result in bridge.evaluate(requests)] == expected
            assert [result.caveats for result in bridge.known(requests)] == expected
            assert len(engine.calculations()) == (2 if store == "new.db" else 0)


def test_moduli_from_before_are_taken_over_where_they_would_be_the_same(tmp_path):
    """Copper's minimum is among the volumes of one cell, and beyond those of the other."""
    engine = make_engine("ase:ase.calculators.emt.EMT")
    skeletons = [
        crystaljax.Skeleton("Cu", bulk("Cu", "fcc", a).cell.array, np.zeros((1, 3)), ("Cu",)) for a in (3.6, 3.8)
    ]
    requests = [Request.of(skeleton, [29], "bulk_modulus") for skeleton in skeletons]
    with ThreadPoolExecutor(1) as executor:
        with Bridge(dataclasses.replace(engine, eos_further=0), tmp_path / "results.db", executor=executor) as bridge:
            near, far = bridge.evaluate(requests)
        assert (near.caveats, far.caveats) == ((), (Caveat.EXTRAPOLATED,))
        with Bridge(engine, tmp_path / "results.db", executor=executor) as bridge:
            same, better = bridge.evaluate(requests)
            assert bridge.stats().calls == 1 and bridge.stats().store_hits == 1
    assert same == near and better.value == pytest.approx(near.value, rel=0.03)
    assert abs(far.value / near.value - 1) > abs(better.value / near.value - 1) and not better.caveats
    assert not verify(Store(tmp_path / "results.db")).problems


# Where they are shown


def test_reports_of_a_run_show_them(tmp_path):
    """Of a table that is older than caveats: those that follow from its details are shown, and explained once."""
    shipped = tables.load("bulk_modulus-RocksaltAB")
    settings = {name: value for name, value in shipped.origin["settings"].items() if name != "eos_further"}
    entries = tuple(dataclasses.replace(entry, caveats=None) for entry in shipped.entries)
    table = dataclasses.replace(shipped, entries=entries, origin={**shipped.origin, "settings": settings})
    env, params = crystaljax.make("BulkModulus-Rocksalt-Table-v0", TableEvaluator(table))
    far = next(e for e in table.entries if e.value is not None and not 0.98 <= e.details["v0_over_v"] <= 1.02)
    near = next(e for e in table.entries if e.value is not None and 0.98 <= e.details["v0_over_v"] <= 1.02)
    assert table.caveats(far) == (Caveat.EXTRAPOLATED,) and table.caveats(near) == ()
    ledger = Ledger(env.skeletons, env.vocabulary, env.objective.names)
    for entry in (far, near):
        line = {"update": 1, "elements": entry.elements, "skeleton": 0, "status": "OK"}
        line["values"] = {"bulk_modulus": entry.value}
        ledger.add_line(line | {"reward": -0.1})
    origin = report.Origin.of(env, params)
    paths = report.write_best(tmp_path, env, ledger, origin, updates=1)
    entries = json.loads((tmp_path / "best.json").read_text())["crystals"]
    assert [entry["caveats"] for entry in entries] == [["EXTRAPOLATED"], []]
    line = f"# caveat EXTRAPOLATED: {Caveat.EXTRAPOLATED.value}\n"
    assert line in paths[0].read_text() and "caveat" not in paths[1].read_text()
    shown = report.best_table(env, ledger, origin)
    assert "caveats" in [column.header for column in shown.columns]
    assert f"EXTRAPOLATED: {Caveat.EXTRAPOLATED.value}" in shown.caption


def test_tables_keep_what_engines_told(tmp_path):
    table = tables.load("bulk_modulus-RocksaltAB")
    told = tuple(dataclasses.replace(e, caveats=(Caveat.STRAINED,)) if e.value else e for e in table.entries)
    path = tables.write(dataclasses.replace(table, entries=told), tmp_path)
    read = tables.read(path)
    assert {read.caveats(entry) for entry in read.entries if entry.value} == {(Caveat.STRAINED,)}
    assert {read.caveats(entry) for entry in read.entries if entry.value is None} == {()}


def test_the_page_about_caveats_has_every_code():
    page = (Path(__file__).parents[1] / "docs" / "caveats.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert rows == [f"| `{caveat.name}` | {caveat.value} |" for caveat in Caveat]
