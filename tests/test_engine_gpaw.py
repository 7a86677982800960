"""The gpaw engine: bookkeeping without a calculation, a few cheap calculations, and published PBE values (slow)."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import sys
import types

import numpy as np
import pytest

pytest.importorskip("gpaw", reason="run `crystaljax doctor --install gpaw` to test the gpaw engine")

from ase.build import bulk
from ase.data import atomic_numbers
from ase.units import GPa

from crystaljax.dft_bridge import doctor
from crystaljax.dft_bridge.engines import gpaw as module
from crystaljax.dft_bridge.engines.base import Crystal, Engine, EngineNotReady, Result
from crystaljax.dft_bridge.engines.checks import symbols_of
from crystaljax.dft_bridge.engines.equation_of_state import fit_murnaghan
from crystaljax.dft_bridge.engines.gpaw import PRESETS, RUNGS, GpawEngine
from crystaljax.dft_bridge.engines.registry import ENGINES, make_engine
from crystaljax.dft_bridge.ladder import names_of
from crystaljax.elements import LARGE
from crystaljax.properties import PROPERTIES
from crystaljax.status import Status

pytestmark = pytest.mark.gpaw

PEROVSKITE = np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
SKETCHY = GpawEngine.preset("fast", band_gap_cutoff=250.0, band_gap_kppa=1.0, density_cutoff=250.0, density_kppa=1.0)
"""Fast and wrong: for tests of what happens, not of numbers."""


def perovskite(symbols: str, a: float = 4.0) -> Crystal:
    return Crystal(np.eye(3) * a, PEROVSKITE, np.array([atomic_numbers[s] for s in symbols.split()]))


def simple(name: str, structure: str, a: float) -> Crystal:
    atoms = bulk(name, structure, a=a)
    return Crystal(atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers)


# Interface and registry


def test_is_a_small_picklable_engine():
    engine = make_engine("gpaw")
    assert isinstance(engine, Engine)
    assert engine.name == "gpaw"
    assert pickle.loads(pickle.dumps(engine)) == engine
    engine.preflight()


def test_defaults_are_the_standard_preset():
    assert GpawEngine() == GpawEngine.preset("standard")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_only_fields(preset: str):
    assert set(PRESETS[preset]) <= {field.name for field in dataclasses.fields(GpawEngine)}


def test_registry_says_what_it_knows():
    with pytest.raises(ValueError, match="gpaw"):
        make_engine("vasp")
    with pytest.raises(ValueError, match="standard"):
        make_engine("gpaw", "precise")
    with pytest.raises(TypeError, match="band_gap_cutoff"):
        make_engine("gpaw", cutoff=300)
    assert make_engine("gpaw", band_gap_cutoff=350.0).band_gap_cutoff == 350.0


@pytest.mark.parametrize("call", [lambda e, c: e.fingerprint("colour"), lambda e, c: e.compute(c, "colour")])
def test_unknown_property_is_the_callers_mistake(call):
    with pytest.raises(ValueError, match="band_gap"):
        call(GpawEngine(), perovskite("K Mg F F F"))


# Fingerprint


@pytest.mark.parametrize("name", PROPERTIES)
def test_fingerprint_is_json_and_deterministic(name: str):
    first = GpawEngine.preset("fast").fingerprint(name)
    assert json.loads(json.dumps(first)) == first == GpawEngine.preset("fast").fingerprint(name)


def test_fingerprint_follows_the_settings_of_its_property_only():
    plain, changed = GpawEngine(), GpawEngine(bulk_modulus_cutoff=700.0)
    assert plain.fingerprint("bulk_modulus") != changed.fingerprint("bulk_modulus")
    assert plain.fingerprint("band_gap") == changed.fingerprint("band_gap")
    assert plain.fingerprint("density") != dataclasses.replace(plain, nstep=7).fingerprint("density")


def test_every_setting_is_in_some_fingerprint():
    settings = {field.name for field in dataclasses.fields(GpawEngine)} - {"name", "kpoint_length"}
    assert GpawEngine().fingerprint("density")["sampling"] == {"rule": "lattice", "length": 12.0}
    assert settings <= set().union(*(GpawEngine().fingerprint(name) for name in PROPERTIES))
    assert "ladder" not in GpawEngine(ladder=()).fingerprint("density")


def test_fingerprint_follows_the_data_sets(tmp_path):
    def write(energy: int) -> str:
        (tmp_path / "H.PBE").write_text(f'<paw_setup><atom symbol="H" Z="1" core="0" valence="1"/>{energy}</paw_setup>')
        module.dataset.cache_clear()
        module.datasets_digest.cache_clear()
        return module.datasets_digest((str(tmp_path),))

    assert write(1) == write(1) != write(2)


# Data sets, refusals


def test_every_element_of_the_large_vocabulary_has_a_data_set():
    paths = module._setup_paths()
    assert len(LARGE.symbols) == 50
    assert [symbol for symbol in LARGE.symbols if module.dataset(symbol, paths) is None] == []


@pytest.mark.parametrize(("symbols", "electrons"), [("K Mg F F F", 40), ("Li Be H H H", 6), ("Sr Ti O O O", 40)])
def test_valence_electrons(symbols: str, electrons: int):
    assert module.valence_electrons(symbols_of(perovskite(symbols))) == electrons


def test_refuses_odd_electrons_for_gaps_only():
    engine, crystal = GpawEngine(), perovskite("K K F F F")
    assert engine.refuse(crystal, "band_gap").status == Status.ODD_ELECTRONS
    assert engine.refuse(crystal, "bulk_modulus") is None
    assert engine.refuse(crystal, "density") is None
    result = engine.compute(crystal, "band_gap")
    assert result.status == Status.ODD_ELECTRONS and math.isnan(result.value)


def test_refuses_elements_without_data_set():
    result = GpawEngine().refuse(perovskite("U Mg F F F"), "density")
    assert result.status == Status.UNSUPPORTED_ELEMENT and "U" in result.message


def test_refuses_close_atoms_across_the_boundary():
    crystal = Crystal(np.eye(3) * 4.0, np.array([[0.02, 0, 0], [0.9, 0, 0]]), np.array([12, 8]))
    result = GpawEngine().refuse(crystal, "band_gap")
    assert result.status == Status.ATOMS_TOO_CLOSE
    assert result.details["distance"] == pytest.approx(0.48)


def test_refuses_an_atom_close_to_its_own_image():
    crystal = Crystal(np.diag([1.0, 5.0, 5.0]), np.zeros((1, 3)), np.array([56]))
    assert GpawEngine().refuse(crystal, "density").status == Status.ATOMS_TOO_CLOSE


def test_random_elements_on_a_perovskite_are_not_too_close():
    rng = np.random.default_rng(0)
    numbers = [rng.choice([atomic_numbers[s] for s in LARGE.symbols], 5) for _ in range(50)]
    refused = [GpawEngine().refuse(Crystal(np.eye(3) * 4.5, PEROVSKITE, z), "density") for z in numbers]
    assert refused == [None] * 50


# k-points


def test_meshes_of_the_presets():
    assert GpawEngine.preset("fast").sampling_of("band_gap").mesh(np.eye(3) * 4.2, 5)[0] == (2, 2, 2)
    assert GpawEngine.preset("standard").sampling_of("band_gap").mesh(np.eye(3) * 4.2, 5)[0] == (6, 6, 6)


# Equation of state


def murnaghan(v: np.ndarray, v0: float, b0: float, b_prime: float) -> np.ndarray:
    """Murnaghan's energy (eV), zero at the minimum; volumes in Å^3, b0 in GPa."""
    b = b0 * GPa
    return b * v / b_prime * ((v0 / v) ** b_prime / (b_prime - 1) + 1) - b * v0 / (b_prime - 1)


@pytest.mark.parametrize(("v0", "b0", "b_prime"), [(18.8, 150.0, 4.1), (45.0, 24.0, 4.8), (43.0, 89.0, 4.3)])
@pytest.mark.parametrize("shift", [0.95, 1.0, 1.05])
def test_fit_recovers_an_exact_murnaghan(v0: float, b0: float, b_prime: float, shift: float):
    volumes = shift * v0 * np.array(GpawEngine().eos_volumes)
    fit = fit_murnaghan(volumes, murnaghan(volumes, v0, b0, b_prime) - 1234.5)
    assert fit.b0 / GPa == pytest.approx(b0, rel=1e-3)
    assert fit.v0 == pytest.approx(v0, rel=1e-4)
    assert fit.b_prime == pytest.approx(b_prime, rel=1e-2)
    assert fit.e0 == pytest.approx(-1234.5, abs=1e-5)
    assert fit.residual < 1e-8
    step = 1e-3 * volumes[2]
    e = murnaghan(volumes[2] + step * np.array([-1, 0, 1]), v0, b0, b_prime)
    assert fit.modulus(volumes[2]) == pytest.approx(volumes[2] * (e[0] - 2 * e[1] + e[2]) / step**2, rel=1e-3)


def test_fit_without_a_minimum_is_meaningless():
    volumes = 60.0 * np.array(GpawEngine().eos_volumes)
    downhill = fit_murnaghan(volumes, -((volumes / 60) ** 2))
    assert downhill.problem(60.0, (0.9, 1.1))
    json.dumps(downhill.details(60.0), allow_nan=False)
    far = fit_murnaghan(volumes, murnaghan(volumes, 80.0, 50.0, 4.0))
    assert "V0" in far.problem(60.0, (0.9, 1.1))
    assert not far.problem(60.0, (0.5, 1.5))


# Calculations, cheap


def test_computes_a_gap():
    result = SKETCHY.compute(simple("NaCl", "rocksalt", 5.6), "band_gap")
    assert result.status == Status.OK and 3.0 < result.value < 7.0
    assert result.details["valence_electrons"] == 14 and result.details["kpoints"] == [2, 2, 2]
    assert result.value == pytest.approx(result.details["lumo"] - result.details["homo"])
    assert result.seconds > 0
    json.dumps(result.details, allow_nan=False)


def test_a_metal_has_no_gap_and_keeps_the_raw_number():
    result = SKETCHY.compute(simple("Mg", "bcc", 3.5), "band_gap")
    assert result.status == Status.OK
    assert result.value == 0.0 and result.details["raw_gap"] < 0


def test_bands_touch_at_the_corner_of_a_hexagonal_zone():
    """Graphene on a mesh of 4 x 4 without K, on which alone it has a gap of 2 eV."""
    lattice = np.array([[1, 0, 0], [-0.5, np.sqrt(0.75), 0], [0, 0, 1]]) * [2.46, 2.46, 7.6]
    graphene = Crystal(lattice, np.array([[1 / 3, 2 / 3, 0.5], [2 / 3, 1 / 3, 0.5]]), np.array([6, 6]))
    result = SKETCHY.compute(graphene, "band_gap")
    assert result.details["kpoints"] == [4, 4, 2]
    assert result.value < 0.02 and result.details["direct_gap"] < 1e-3


def test_too_few_iterations_are_a_result():
    engine = dataclasses.replace(SKETCHY, max_scf_iterations=2, ladder=names_of(RUNGS))
    result = engine.compute(simple("NaCl", "rocksalt", 5.6), "band_gap")
    assert result.status == Status.NOT_CONVERGED and "6 iterations" in result.message and math.isnan(result.value)
    tried = [(attempt["rung"], attempt["message"].split()[-2]) for attempt in result.details["failed_attempts"]]
    assert tried == [("as set", "2"), ("smaller mixing", "2"), ("davidson", "2"), ("more steps", "6")]


@pytest.mark.parametrize("property_name", PROPERTIES)
def test_ladder_reaches_the_value_of_a_calculation_that_converges(property_name):
    crystal = simple("NaCl", "rocksalt", 5.6)
    engine = dataclasses.replace(SKETCHY, energy_tolerance=1e-5, density_tolerance=1e-5)
    plain = dataclasses.replace(engine, nstep=1, bulk_modulus_kppa=1.0, bulk_modulus_cutoff=250.0)
    expected = plain.compute(crystal, property_name)
    assert expected.details["rung"] == "as set" and "failed_attempts" not in expected.details
    result = dataclasses.replace(plain, max_scf_iterations=6, ladder=("more steps",)).compute(crystal, property_name)
    assert result.status == expected.status == Status.OK
    assert result.details["rung"] == "more steps"
    assert [tried["rung"] for tried in result.details["failed_attempts"]] == ["as set"]
    assert result.value == pytest.approx(expected.value, rel=1e-3)


def test_unknown_exception_becomes_an_engine_error(monkeypatch):
    def broken(self, crystal, climb):
        raise RuntimeError("the moon is full")

    monkeypatch.setattr(GpawEngine, "_density", broken)
    result = GpawEngine().compute(perovskite("K Mg F F F"), "density")
    assert result.status == Status.ENGINE_ERROR
    assert result.message == "RuntimeError: the moon is full" == result.details["failed_attempts"][0]["message"]


@pytest.mark.parametrize("error", [OSError("disk full"), MemoryError(), ImportError("no numba")])
def test_errors_of_the_machine_are_raised(monkeypatch, error):
    def broken(self, crystal, climb):
        raise error

    monkeypatch.setattr(GpawEngine, "_density", broken)
    with pytest.raises(type(error)):
        GpawEngine().compute(perovskite("K Mg F F F"), "density")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e6])
def test_unbelievable_numbers_are_failures(monkeypatch, value: float):
    monkeypatch.setattr(GpawEngine, "_density", lambda self, crystal, climb: Result(value, Status.OK))
    result = GpawEngine().compute(perovskite("K Mg F F F"), "density")
    assert result.status == Status.INVALID_RESULT and math.isnan(result.value)


def test_leaves_no_files_and_prints_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    SKETCHY.compute(simple("NaCl", "rocksalt", 5.6), "band_gap")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


# Doctor


def test_doctor_reports_every_engine():
    reports = doctor.check()
    assert [report.name for report in reports] == list(ENGINES)
    report = next(r for r in reports if r.name == "gpaw")
    assert report.ready and report.version and report.detail == ""


def test_preflight_says_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gpaw", None)
    with pytest.raises(EngineNotReady, match="crystaljax doctor --install gpaw"):
        GpawEngine().preflight()
    report = next(r for r in doctor.check() if r.name == "gpaw")
    assert not report.ready and "GPAW_CONFIG" in report.detail


def test_preflight_needs_the_data_sets(monkeypatch):
    monkeypatch.setattr(module, "_setup_paths", lambda: ("/nonexistent",))
    with pytest.raises(EngineNotReady, match="gpaw-data"):
        GpawEngine().preflight()


def test_install_builds_with_the_siteconfig_and_keeps_pips_words(monkeypatch):
    seen = {}

    def run(command, env, **_):
        seen.update(command=command, config=env["GPAW_CONFIG"])
        return types.SimpleNamespace(returncode=1, stdout="", stderr="noise\nerror: no C compiler")

    monkeypatch.setitem(sys.modules, "gpaw", None)
    monkeypatch.setattr(doctor.subprocess, "run", run)
    with pytest.raises(doctor.InstallError, match="no C compiler"):
        doctor.install("gpaw")
    assert seen["command"][:4] == [sys.executable, "-m", "pip", "install"]
    namespace: dict = {}
    with open(seen["config"], encoding="utf-8") as file:
        exec(file.read(), namespace)
    assert namespace["mpi"] is False and namespace["compiler"] == "cc"
    with pytest.raises(ValueError, match="gpaw"):
        doctor.install("vasp")


# Published PBE values

PUBLISHED = {
    # (structure, PBE lattice constant Å, PBE bulk modulus GPa, experimental lattice constant Å, PBE gap eV there).
    # Lattice constants and moduli: G. I. Csonka et al., Phys. Rev. B 79, 155107 (2009); P. Haas et al., Phys.
    # Rev. B 79, 085104 (2009); F. Tran, J. Stelzl, P. Blaha, J. Chem. Phys. 144, 204120 (2016). Gaps (at experimental
    # lattices): F. Tran, P. Blaha, Phys. Rev. Lett. 102, 226401 (2009) and J. Phys. Chem. A 121, 3318 (2017). Rounded:
    # the tables differ among themselves by 1-2 % and some 0.05 eV.
    "Si": ("diamond", 5.469, 88.8, 5.430, 0.58),
    "MgO": ("rocksalt", 4.258, 149.0, 4.207, 4.71),
    "NaCl": ("rocksalt", 5.698, 23.7, 5.595, 5.11),
    "LiF": ("rocksalt", 4.068, 67.4, 4.010, 9.08),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_bulk_modulus(name: str):
    structure, lattice, modulus, _, _ = PUBLISHED[name]
    result = GpawEngine.preset("standard").compute(simple(name, structure, lattice), "bulk_modulus")
    assert result.status == Status.OK, result.message
    assert result.value == pytest.approx(modulus, rel=0.05)
    assert result.details["v0_over_v"] == pytest.approx(1.0, abs=0.025)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_gap(name: str):
    structure, _, _, lattice, gap = PUBLISHED[name]
    result = GpawEngine.preset("standard").compute(simple(name, structure, lattice), "band_gap")
    assert result.status == Status.OK, result.message
    assert result.value == pytest.approx(gap, abs=0.15)


@pytest.mark.slow
def test_relaxation_finds_the_density_from_a_stretched_cell():
    a = PUBLISHED["MgO"][1]
    result = GpawEngine.preset("standard", density_kppa=200.0).compute(simple("MgO", "rocksalt", 4.35), "density")
    assert result.status == Status.OK, result.message
    assert result.value == pytest.approx(4 * (24.305 + 15.999) * 1.66053907 / a**3, rel=0.02)
    assert np.shape(result.details["lattice"]) == (3, 3)
