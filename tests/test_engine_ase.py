"""The ase engine: calculators by import path, what they can and cannot do, and that surrogates are called so."""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
from pathlib import Path

import pytest
from ase.build import bulk
from ase.units import GPa

from crystaljax import cli
from crystaljax.dft_bridge import Bridge, Request
from crystaljax.dft_bridge.engines.ase_calculator import PRESETS, AseEngine, _make_calculator
from crystaljax.dft_bridge.engines.base import Crystal, Engine, EngineNotReady
from crystaljax.dft_bridge.engines.registry import is_engine, make_engine
from crystaljax.properties import PROPERTIES
from crystaljax.skeleton import Skeleton
from crystaljax.status import Status

EMT = "ase:ase.calculators.emt.EMT"
FREE_ELECTRONS = "ase:ase.calculators.test.FreeElectrons"


def simple(name: str, structure: str, a: float) -> Crystal:
    atoms = bulk(name, structure, a=a)
    return Crystal(atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers)


COPPER = simple("Cu", "fcc", 3.59)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module of one's own with calculators in it; returns its name."""
    monkeypatch.syspath_prepend(tmp_path)
    name = f"calculators_of_{tmp_path.name}"

    def write(text: str) -> str:
        header = "from ase.calculators.emt import EMT\nfrom ase.calculators.calculator import SCFError\n"
        (tmp_path / f"{name}.py").write_text(header + text)
        sys.modules.pop(name, None)
        _make_calculator.cache_clear()
        return name

    yield write
    sys.modules.pop(name, None)


def test_is_a_small_picklable_engine():
    engine = make_engine(EMT)
    assert isinstance(engine, Engine) and pickle.loads(pickle.dumps(engine)) == engine
    assert engine == make_engine("ase", calculator="ase.calculators.emt.EMT")
    assert is_engine(EMT) and is_engine("espresso") and not is_engine("unrelaxed-density")
    engine.preflight()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_only_fields(preset):
    assert set(PRESETS[preset]) <= {field.name for field in dataclasses.fields(AseEngine)}


def test_bulk_modulus_is_that_of_the_stress():
    """B = -V dP/dV, from the calculator's own stress."""
    engine = make_engine(EMT, modulus_at="cell")
    result = engine.compute(COPPER, "bulk_modulus")
    pressures, atoms, step = [], bulk("Cu", "fcc", a=3.59), 1e-3
    for scale in (1 - step, 1 + step):
        strained = atoms.copy()
        strained.set_cell(atoms.cell * scale ** (1 / 3), scale_atoms=True)
        strained.calc = engine._calculator()
        pressures.append(-strained.get_stress()[:3].mean())
    assert result.status == Status.OK
    assert result.value == pytest.approx((pressures[0] - pressures[1]) / (2 * step) / GPa, rel=1e-3)
    json.dumps(result.details, allow_nan=False)


def test_density_is_that_of_the_relaxed_cell():
    first, second = (make_engine(EMT, "standard").compute(simple("Cu", "fcc", a), "density") for a in (3.5, 3.7))
    assert first.details["relaxed"] and second.details["relaxed"]
    assert first.value == pytest.approx(second.value, rel=1e-3)
    assert first.value == pytest.approx(9.1, abs=0.1)
    assert abs(first.details["pressure"]) < 0.5


def test_values_are_labelled():
    assert make_engine(EMT).name == "surrogate EMT"
    assert make_engine("ase:gpaw.GPAW").name == "DFT GPAW"
    assert make_engine("ase:ase.calculators.vasp.Vasp").name == "DFT Vasp"
    assert make_engine("ase:gpawlike.GPAW").name == "surrogate GPAW"
    assert make_engine(EMT, label="effective medium").name == "effective medium EMT"


def test_bridge_and_store_show_the_label(tmp_path):
    skeleton = Skeleton("copper", COPPER.lattice, COPPER.frac_coords, ("Cu",))
    with Bridge(make_engine(EMT), tmp_path / "store.db", workers=1, preset="fast") as bridge:
        found = bridge.evaluate([Request.of(skeleton, [z], "bulk_modulus") for z in (29, 14)])
        assert bridge._archive.label("bulk_modulus").startswith("surrogate EMT 3.")
    assert [result.status for result in found] == [Status.OK, Status.UNSUPPORTED_ELEMENT]


def test_command_line_takes_an_import_path(capsys, tmp_path):
    command = ["train", "--task", "Density-RocksaltAB-v0", "--agent", "random", "--episodes", "2", "--lanes", "2"]
    command += ["--run", str(tmp_path / "run"), "--store", str(tmp_path / "store.db"), "--workers", "1"]
    assert cli.main([*command, "--engine", "ase:ase.calculators.lj.LennardJones"]) == 0
    assert "surrogate LennardJones" in capsys.readouterr().out
    assert cli.main([*command, "--engine", "ase:no.such.Thing"]) == cli.BAD_INPUT
    assert "no.such cannot be imported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("calculator", "reason"),
    [
        ("", "import path"),
        ("emt", "import path"),
        ("nowhere.Emt", "nowhere cannot be imported"),
        ("ase.calculators.emt.Emt", "no calculator Emt"),
        ("json.dumps", "not an ASE calculator, so it is not called"),
        ("builtins.dict", "not an ASE calculator"),
        ("os.system", "os.system is not an ASE calculator, so it is not called"),
        ("ase.build.bulk", "not an ASE calculator"),
    ],
)
def test_preflight_says_what_is_wrong(calculator, reason):
    with pytest.raises(EngineNotReady, match=reason):
        make_engine("ase", calculator=calculator).preflight()


def test_bad_settings_are_refused(module):
    name = module("class Plain(EMT):\n    def __init__(self):\n        super().__init__()\n")
    with pytest.raises(EngineNotReady, match="correct the setting `arguments`"):
        make_engine(f"ase:{name}.Plain", arguments={"colour": "blue"}).preflight()
    with pytest.raises(ValueError, match="plain data"):
        make_engine(EMT, arguments={"function": print})
    with pytest.raises(ValueError, match="cell or relaxed"):
        make_engine(EMT, modulus_at="moon")
    with pytest.raises(ValueError, match="standard"):
        make_engine(EMT, "precise")
    with pytest.raises(TypeError, match="calculator"):
        make_engine(EMT, colour="blue")


def test_properties_without_their_numbers_are_refused_at_the_door(module):
    with pytest.raises(ValueError, match="no eigenvalues"):
        make_engine(EMT).fingerprint("band_gap")
    name = module("class Stressless(EMT):\n    implemented_properties = ['energy', 'forces']")
    engine = make_engine(f"ase:{name}.Stressless")
    with pytest.raises(ValueError, match="no stress"):
        engine.fingerprint("density")
    engine.fingerprint("bulk_modulus")


def test_gap_comes_from_eigenvalues():
    engine = make_engine(FREE_ELECTRONS, arguments={"nvalence": 2, "kpts": [3, 3, 3]})
    engine.fingerprint("band_gap")
    result = engine.compute(simple("Si", "diamond", 5.4), "band_gap")
    assert result.status == Status.OK and result.value >= 0


def test_fingerprint_follows_arguments_files_and_source(module, tmp_path):
    def make(**arguments) -> dict:
        return make_engine(f"ase:{name}.Mine", arguments=arguments).fingerprint("density")

    text = "class Mine(EMT):\n    def __init__(self, weights='', scale=1):\n        super().__init__()\n"
    name = module(text)
    weights = tmp_path / "weights.pt"
    weights.write_text("1")
    first = make(weights=str(weights))
    assert json.loads(json.dumps(first)) == first == make(weights=str(weights))
    copied = tmp_path / "copy.pt"
    copied.write_text("1")
    assert make(weights=str(copied)) == first != make(weights=str(weights), scale=2)
    weights.write_text("2")
    assert make(weights=str(weights)) != first
    module(text + "# another version")
    assert make(weights=str(copied)) != first


def test_fingerprint_follows_the_function_that_makes_the_calculator(module):
    text = "def mine() -> EMT:\n    return EMT(asap_cutoff={})\n"
    name = module(text.format(False))
    engine = make_engine(f"ase:{name}.mine")
    first = engine.fingerprint("density")
    assert engine.fingerprint("density") == first
    module(text.format(True))
    assert engine.fingerprint("density") != first


def test_only_what_says_that_it_makes_calculators_is_called(module):
    text = "import pathlib\ndef mine(){}:\n    pathlib.Path(__file__).with_name('called').touch()\n    return EMT()\n"
    for says, made in (
        ("", False),
        (" -> dict", False),
        (" -> 'Missing'", False),
        (" -> EMT", True),
        (" -> 'EMT'", True),
    ):
        name = module(text.format(says))
        engine = make_engine(f"ase:{name}.mine")
        if made:
            engine.preflight()
        else:
            with pytest.raises(EngineNotReady, match="not an ASE calculator, so it is not called"):
                engine.preflight()
        called = Path(sys.modules[name].__file__).with_name("called")
        assert called.exists() == made
        called.unlink(missing_ok=True)


def test_every_setting_is_in_some_fingerprint():
    settings = {field.name for field in dataclasses.fields(AseEngine)} - {"label"}
    engine = make_engine(FREE_ELECTRONS)
    assert settings <= set().union(*(engine.fingerprint(name) for name in PROPERTIES if name != "density")) | {
        "nstep",
        "fmax",
    }


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ("SCFError('gave up')", Status.NOT_CONVERGED),
        ("NotImplementedError('no parameters for Cu')", Status.UNSUPPORTED_ELEMENT),
        ("KeyError('moon')", Status.ENGINE_ERROR),
    ],
)
def test_exceptions_become_results(module, error, status):
    name = module(f"class Broken(EMT):\n    def calculate(self, *args, **kwargs):\n        raise {error}\n")
    result = make_engine(f"ase:{name}.Broken").compute(COPPER, "bulk_modulus")
    assert result.status == status and error.split("(")[0] in result.message


@pytest.mark.parametrize("error", ["OSError('disk full')", "MemoryError()", "ImportError('no numba')"])
def test_errors_of_the_machine_are_raised(module, error):
    name = module(f"class Broken(EMT):\n    def calculate(self, *args, **kwargs):\n        raise {error}\n")
    with pytest.raises((OSError, MemoryError, ImportError)):
        make_engine(f"ase:{name}.Broken").compute(COPPER, "density")


def test_nan_is_no_result_and_close_atoms_are_refused(module):
    nan = "    def get_property(self, *args, **kwargs):\n        return float('nan')\n"
    name = module(f"class Nan(EMT):\n{nan}")
    result = make_engine(f"ase:{name}.Nan").compute(COPPER, "bulk_modulus")
    assert result.status in (Status.FIT_MEANINGLESS, Status.INVALID_RESULT)
    assert make_engine(EMT).compute(simple("Cu", "fcc", 0.9), "density").status == Status.ATOMS_TOO_CLOSE


def test_files_of_a_calculator_do_not_stay(module, tmp_path, monkeypatch):
    writes = "    def calculate(self, *a, **k):\n        open('calc.out', 'w').close(); super().calculate(*a, **k)\n"
    name = module(f"class Writer(EMT):\n{writes}")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert make_engine(f"ase:{name}.Writer").compute(COPPER, "density").status == Status.OK
    assert list(here.iterdir()) == []
