"""Malformed inputs, and what becomes of each: a clear error, or a result that is right; nothing else, nothing written.

Every entry of :data:`TARGETS` pairs a strategy of ``hypothesis`` with a door of the package. A door returns for an
input that it accepts, after having checked the result. ``tests/test_fuzz.py`` tries a few inputs, and
``benchmarks/fuzz.py`` ten thousand.
"""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import faulthandler
import functools
import gzip
import json
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.formula import Formula
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from benchmarks import fake_pwx
from crystaljax.agents.comparison import write_report
from crystaljax.agents.config import RunConfig, from_table, load, read_toml
from crystaljax.agents.journal import History, Journal, history_at
from crystaljax.agents.ledger import Ledger
from crystaljax.agents.report import Origin, write_best
from crystaljax.agents.runs import read_all
from crystaljax.dft_bridge.accounting import Stats
from crystaljax.dft_bridge.engines import pwscf, upf
from crystaljax.dft_bridge.engines.base import Crystal, EngineNotReady, Result
from crystaljax.dft_bridge.engines.registry import ENGINES, make_engine, programs
from crystaljax.dft_bridge.keys import KeyRing
from crystaljax.dft_bridge.store import Record, Row, Store, StoreError
from crystaljax.dft_bridge.store.export import read_file, write_lines
from crystaljax.dft_bridge.store.schema import SCHEMA
from crystaljax.dft_bridge.store.verify import Findings, verify
from crystaljax.run_folder import ACCOUNTING, CRYSTALS, SWEEP
from crystaljax.run_folder import CONFIG as FILE
from crystaljax.skeleton import Skeleton, stack
from crystaljax.status import Status
from crystaljax.structures import MIN_DISTANCE, StructureError, read_mp20, to_skeleton
from crystaljax.tasks import make
from crystaljax.trust import NotTrusted, refuse_unasked

CLEAR = (ValueError, EngineNotReady, StoreError, pwscf.PwxFailure, OSError, MemoryError)
"""What a malformed input may raise; the package's own errors about input are ``ValueError``s."""

WORDS = [
    "",
    "nan",
    "inf",
    "-1",
    "0",
    "1e400",
    "1e-400",
    "?",
    ".",
    "'",
    '"',
    ";",
    "#",
    "loop_",
    "data_",
    "_",
    "Xx",
    "Na+",
]
WORDS += [
    "1/0",
    "x,y",
    "-x, -y, -z",
    "999999999999",
    "\x00",
    "é",
    "\u2028",
    "<",
    ">",
    "&",
    "</output>",
    "****",
    "1.0(3)",
]
NUMBERS = st.one_of(
    st.floats(-10, 10), st.sampled_from([0.0, 1e-12, 1e12, 1e308, float("nan"), float("inf"), -float("inf")])
)


@st.composite
def mutated(draw: st.DrawFn, texts: list[str]) -> str:
    """One of the texts with some of its words, lines or characters replaced, left out, repeated or cut off."""
    text = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["word", "line", "character", "end"]))
        separator = {"word": " ", "line": "\n", "character": "", "end": ""}[kind]
        parts = text.split(separator) if separator else list(text)
        if not parts:
            break
        at = draw(st.integers(0, len(parts) - 1))
        change = draw(st.sampled_from(["drop", "repeat", "swap", "replace"]))
        other = draw(st.integers(0, len(parts) - 1))
        if kind == "end":
            parts = parts[:at]
        elif change == "drop":
            del parts[at]
        elif change == "repeat":
            parts.insert(at, parts[other])
        elif change == "swap":
            parts[at], parts[other] = parts[other], parts[at]
        else:
            parts[at] = draw(st.sampled_from(WORDS) | st.text(max_size=8))
        text = separator.join(parts)
    return text


# Structures


def _cifs() -> list[str]:
    salt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    perovskite = Structure.from_spacegroup(
        "Pm-3m", Lattice.cubic(4.0), ["K", "Mg", "F"], [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0]]
    )
    from pymatgen.io.cif import CifWriter

    return [structure.to(fmt="cif") for structure in (salt.get_primitive_structure(), perovskite)] + [
        str(CifWriter(salt, symprec=0.1))
    ]


CIFS = _cifs()
SYMBOL_CIF = """data_x
_symmetry_space_group_name_H-M 'R -3 m :H'
_space_group_IT_number 166
_chemical_formula_sum 'Li Cl'
_cell_formula_units_Z 3
_cell_length_a 4.0(1)
_cell_length_b 4.0
_cell_length_c 9.8
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 120
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_symmetry_multiplicity
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
Li1 Li+ 3 0 0 0 1
Cl1 Cl- 3 0.333 0.667 0.1667 ?
"""
MAGNETIC_CIF = SYMBOL_CIF.replace(
    "_symmetry_space_group_name_H-M 'R -3 m :H'\n_space_group_IT_number 166\n", ""
).replace(
    "loop_\n",
    "loop_\n_space_group_symop_magn_operation.xyz\nx,y,z,+1\n-x,-y,-z,-1\nloop_\n_space_group_symop_magn_centering.xyz\n"
    "x,y,z,+1\n'x+2/3, y+1/3, z+1/3, +1'\nx+1/3,y+2/3,z+2/3,+1\n_text\n;\nloop_ of nothing\n;\nloop_\n",
    1,
)
ROWS = "material_id,pretty_formula,spacegroup.number,cif\n" + "\n".join(
    f'mp-{number},NaCl,{group},"{text}"' for number, (group, text) in enumerate(zip((225, 221, 225), CIFS, strict=True))
)


def use_skeleton(made: Skeleton) -> None:
    """A skeleton that was accepted must be usable and sane."""
    assert made.lattice.shape == (3, 3) and np.isfinite(made.lattice).all() and made.volume > 0
    assert np.isfinite(made.frac_coords).all() and (made.frac_coords >= 0).all() and (made.frac_coords < 1).all()
    assert len(made.species) == made.n_sites >= 1
    assert made.digest and sorted(made.site_orders[0]) == list(range(made.n_sites))
    assert len(made.bonds.distances) == 0 or made.bonds.distances.min() >= MIN_DISTANCE - 1e-6
    table = stack([made])
    assert all(np.isfinite(leaf).all() for leaf in (table.lattice, table.distances, table.volume))


def open_cif(text: str) -> None:
    with only_structure_errors():
        made = to_skeleton(text if "\n" in text else text + "\n")
    use_skeleton(made)


def open_text(text: str) -> None:
    with only_structure_errors():
        made = to_skeleton(text)
    use_skeleton(made)


def open_rows(text: str | bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".csv") as file:
        file.write(text if isinstance(text, bytes) else text.encode("utf-8", errors="surrogatepass"))
        file.flush()
        with only_structure_errors():
            found = read_mp20(file.name)
        for made in found:
            use_skeleton(made)


@contextlib.contextmanager
def only_structure_errors() -> Iterator[None]:
    """Of all errors about input these doors have one class."""
    try:
        yield
    except (ValueError, OSError) as error:
        assert isinstance(error, StructureError), f"{type(error).__name__} instead of a StructureError"
        raise


def _structure_files() -> dict[str, str]:
    """A file of each format, by the name that tells its format."""
    from pymatgen.io.res import ResWriter

    cell = "".join(f"<v>{row}</v>" for row in ("4 0 0", "0 4 0", "0 0 4"))
    crystal = f'<structure name="finalpos"><crystal><varray name="basis">{cell}</varray></crystal>'
    return {
        "salt.cif": SYMBOL_CIF,
        "POSCAR": SALT.to(fmt="poscar"),
        "CONTCAR": "salt\n-64\n 4 0 0\n 0 4 0\n 0 0 4\n1 1\nSelective\nCartesian\n0 0 0 T T F Na\n2 2 2 T T T Cl\n",
        "salt.json": SALT.to(fmt="json"),
        "salt.res": str(ResWriter(SALT)),
        "salt.xsf": SALT.to(fmt="xsf"),
        "salt.xyz": '2\nLattice="4 0 0 0 4 0 0 0 4" pbc="T T T" Properties=species:S:1:pos:R:3\nNa 0 0 0\nCl 2 2 2\n',
        "vasprun.xml": "<modeling><atominfo><array name='atoms'><set><rc><c>Na</c><c>1</c></rc><rc><c>Cl</c></rc></set>"
        f"</array></atominfo>{crystal}<varray name='positions'><v>0 0 0</v><v>.5 .5 .5</v></varray></structure>"
        "</modeling>",
    }


def _packed(data: bytes) -> dict[str, bytes]:
    return {"": data, ".gz": gzip.compress(data), ".bz2": bz2.compress(data)}


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1")


@st.composite
def encoded(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> bytes:
    """A text in one of the encodings that files have, sometimes cut off in the middle of a character."""
    data = draw(texts).encode(draw(st.sampled_from(ENCODINGS)), errors="replace")
    return data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 9)) == 9 else data


@st.composite
def structure_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """Name and content of a file: of its own format, seldom of another, sometimes packed and then damaged."""
    files = STRUCTURE_FILES
    name = draw(st.sampled_from(sorted(files)))
    text = files[name if draw(st.integers(0, 9)) < 9 else draw(st.sampled_from(sorted(files)))]
    suffix, data = draw(st.sampled_from(sorted(_packed(draw(encoded(mutated([text])))).items())))
    return name + suffix, data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 19)) == 19 else data


def open_structure_file(file: tuple[str, bytes]) -> None:
    name, data = file
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(data)
        with only_structure_errors():
            made = to_skeleton(path)
    use_skeleton(made)


PROTOTYPES = ["AB_cF8_225_a_b", "AB3C_cP5_221_a_c_b"]

PLACES = st.tuples(*[st.sampled_from([0.0, 0.5, 2.0, 0.3]) | NUMBERS] * 3)
CUBE = [4.0, 0, 0, 0, 4.0, 0, 0, 0, 4.0]
CELLS = st.just(CUBE) | st.lists(NUMBERS | st.sampled_from([4.0, 5.0]), min_size=9, max_size=9)


@st.composite
def atoms(draw: st.DrawFn) -> Atoms:
    places = draw(st.lists(PLACES, max_size=4))
    return Atoms(
        numbers=[draw(st.sampled_from([11, 17]) | st.integers(0, 118)) for _ in places],
        positions=np.reshape(places, (-1, 3)),
        cell=np.reshape(draw(CELLS), (3, 3)),
        pbc=draw(st.just(True) | st.lists(st.booleans(), min_size=3, max_size=3)),
    )


@st.composite
def structures(draw: st.DrawFn) -> Structure:
    places = draw(st.lists(PLACES, max_size=4))
    species = st.sampled_from(["Na", "Cl", "H", "Og", "Na+", "D", {"Na": 0.5, "K": 0.5}, {"Na": 0.2}])
    return Structure(np.reshape(draw(CELLS), (3, 3)), [draw(species) for _ in places], places)


def open_structure(structure: Atoms | Structure) -> None:
    use_skeleton(to_skeleton(structure))


SALT = Structure.from_str(CIFS[0], fmt="cif")
STRUCTURE_FILES = _structure_files()


# Settings

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**20),
    NUMBERS,
    st.text(max_size=10),
    st.sampled_from([*WORDS, "tight", "cell", "PBE"]),
    st.lists(st.one_of(NUMBERS, st.text(max_size=3)), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@st.composite
def engine_settings(draw: st.DrawFn) -> tuple[str, str, dict[str, Any]]:
    name = draw(st.sampled_from([*ENGINES, "ase:ase.calculators.emt.EMT", "ase:", "vasp", ""]))
    preset = draw(st.sampled_from(["fast", "fast", "fast", "crystalgym", "standard", "moon"]))
    kind = ENGINES.get(name, ENGINES["ase"])
    names = st.sampled_from([field.name for field in dataclasses.fields(kind) if field.init])
    return name, preset, draw(st.dictionaries(names, VALUES, max_size=3))


def open_engine(given_settings: tuple[str, str, dict[str, Any]]) -> None:
    name, preset, overrides = given_settings
    engine = make_engine(name, preset, **overrides)
    for setting, value in overrides.items():
        kept = getattr(engine, setting)
        assert kept == value or list(kept) == list(value) or setting == "label"
        if isinstance(kept, float):
            assert np.isfinite(kept) and kept >= 0
    if name.startswith("ase"):  # the others' fingerprints need programs and files
        engine.preflight()
        json.dumps(engine.fingerprint("bulk_modulus"), allow_nan=False)


def _config() -> str:
    with tempfile.TemporaryDirectory() as folder:
        RunConfig(task="BandGap-C1-v0").save(Path(folder), ["0" * 16])
        return Path(folder, FILE).read_text()


CONFIG = _config()


def open_config(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, FILE).write_text(text, encoding="utf-8", errors="surrogatepass")
        config, _ = load(Path(folder))
        assert bool(config.task) != bool(config.structures) and config.episodes >= 1


# Folders of runs


@functools.cache
def run_files() -> dict[str, str]:
    """The text files of a sweep of one run, which are made without training."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        run = root / "seed-10"
        run.mkdir()
        env = make(RUN.task, RUN.engine)[0]
        RUN.save(run, [skeleton.digest for skeleton in env.skeletons])
        ledger, journal = Ledger(env.skeletons, env.vocabulary, env.objective.names), Journal(run, History([], []))
        for update, pairs in enumerate((["NaCl", "KCl"], ["NaCl", "LiF"]), start=1):
            line = {
                "update": update,
                "skeleton": 0,
                "values": {env.objective.names[0]: 2.5},
                "status": "OK",
                "reward": 0.5,
            }
            symbols = [list(Formula(pair).count()) for pair in pairs]
            episodes = [ledger.add_line(line | {"elements": elements}) for elements in symbols]
            metrics = {"update": update, "episodes": ledger.episodes, "mean_reward": 0.5, "best_reward": 0.5}
            journal.write(metrics | {"distinct": len(ledger.crystals), "refused": 0, "seconds": 1.0}, episodes)
        journal.close()
        write_best(run, env, ledger, Origin("on-device: made up", {"scale": 1.0}, env.objective), updates=2)
        (root / SWEEP).write_text('{"seeds": [10]}\n')
        (root / ACCOUNTING).write_text(json.dumps(Stats(requests=4, distinct=3, calls=3).summary()))
        paths = [path for path in root.rglob("*") if path.suffix in (".json", ".jsonl", ".cif")]
        return {str(path.relative_to(root)): path.read_text() for path in paths}


RUN = RunConfig(task="Density-RocksaltAB-v0", engine="unrelaxed-density", network="mlp", episodes=4)
INSTEAD = ("link", "pipe", "folder", "nothing")
"""What may be in the place of a file."""


@st.composite
def run_folders(draw: st.DrawFn) -> tuple[str, str, str]:
    """The name of a file, a text for it, and what is in its place, if it is not a file."""
    names = sorted(run_files())
    name = draw(st.sampled_from(names))
    values = st.sampled_from(["", "null", "[]", "{}", "3", '"x"', "[" * 5000, '{"seeds": {}}', "\ufeff", "NaN"])
    text = draw(mutated([run_files()[name]]) | mutated([run_files()[name]]) | values)
    return name, text, draw(st.sampled_from(["file"] * 8 + list(INSTEAD)))


def open_run_folder(damage: tuple[str, str, str]) -> None:
    """What a report, a picture and a resume make of a damaged run; none of them changes a byte of it."""
    name, text, kind = damage
    with tempfile.TemporaryDirectory() as folder:
        root, secret = Path(folder, "root"), Path(folder, "secret")
        secret.write_text("TOP-SECRET")
        (root / "seed-10" / CRYSTALS).mkdir(parents=True)
        for path, sound in run_files().items():
            if path != name:
                (root / path).write_text(sound)
        changed = root / name
        if kind == "file":
            changed.write_text(text, encoding="utf-8", errors="surrogatepass")
        elif kind == "link":
            changed.symlink_to(secret)
        elif kind == "pipe":
            os.mkfifo(changed)
        elif kind == "folder":
            changed.mkdir()
        before = _bytes_of(root)
        try:
            _use_run_folder(root, Path(folder, "page.md"))
        finally:
            assert _bytes_of(root) == before, "the run was changed"
        written = [Path(folder, "page.md"), *Path(folder, "page_files").glob("*.cif")]
        assert not any("TOP-SECRET" in path.read_text() for path in written)
        assert sorted(os.listdir(folder)) == ["page.md", "page_files", "root", "secret"]


def _bytes_of(root: Path) -> dict[Path, bytes | None]:
    ordinary = (path for path in root.rglob("*") if not path.is_dir())
    return {path: path.read_bytes() if path.is_file() and not path.is_symlink() else None for path in ordinary}


def _use_run_folder(root: Path, page: Path) -> None:
    (run,) = read_all([root])
    assert all(np.isfinite(episode.reward) for episode in run.episodes)
    write_report([run], page)
    env = make(RUN.task, RUN.engine)[0]
    history = history_at(run.folder, run.best.get("updates", 0))
    ledger = Ledger(env.skeletons, env.vocabulary, env.objective.names)
    for episode in history.episodes:
        ledger.add_line(dataclasses.asdict(episode))
    assert ledger.episodes == (history.metrics[-1]["episodes"] if history.metrics else 0)


TOML = """task = "BandGap-PerovskiteABX3-v0"
agent = "dqn"
engine = "planewave"
episodes = 2400
seed = 10
timeout = 600.0

[dqn]
learning_rate = 1.5e-3

[engine_options]
band_gap_kppa = 200
"""


HOSTILE = [
    TOML.replace('"planewave"', '"ase:os.system"').partition("[engine_options]")[0],
    TOML.replace('"planewave"', '"espresso"').replace("band_gap_kppa = 200", "command = \"sh -c 'touch owned'\""),
    TOML.replace('"planewave"', '"ase"').replace(
        "band_gap_kppa = 200", 'calculator = "os.system"\narguments.command = "x"'
    ),
]


def open_toml(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.toml")
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        config = from_table(read_toml(path), str(path))
        assert bool(config.task) != bool(config.structures) and 1 <= config.episodes and 0 <= config.seed < 2**32
        named = programs(config.engine, config.engine_options)
        try:  # as the command line does, where no flag asks for what the file names
            refuse_unasked(named, {}, str(path))
            assert not named
        except NotTrusted as error:
            assert all(flag.split()[0] in str(error) for flag in named)
            raise


# What pw.x leaves

OUTPUTS = [
    fake_pwx.TEXT,
    fake_pwx.TEXT + fake_pwx.NOT_CONVERGED,
    fake_pwx.error("electrons", "charge is wrong: smearing is needed"),
    fake_pwx.error("check_atoms", "atoms #   1 and #   2 overlap!"),
]


@st.composite
def outputs(draw: st.DrawFn) -> tuple[str, bytes | None, int]:
    xml = draw(st.none() | st.just(fake_pwx.XML) | mutated([fake_pwx.XML]) | st.text())
    data = None if xml is None else xml.encode("utf-8", errors="surrogatepass")
    return draw(st.just(fake_pwx.TEXT) | mutated(OUTPUTS)), data, draw(st.sampled_from([0, 1, 2, 3, -6, -9, -11]))


def open_output(left: tuple[str, bytes | None, int]) -> None:
    found = pwscf.read(*left)
    assert np.isfinite([found.energy, found.electrons]).all() and np.isfinite(found.eigenvalues).all()
    assert found.eigenvalues.shape == found.occupations.shape and np.isfinite(found.lattice).all()


def _pseudopotentials() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        return [fake_pwx.upf(Path(folder), symbol).read_text() for symbol in ("Si", "O")]


PSEUDOPOTENTIALS = [
    *_pseudopotentials(),
    "<PP_HEADER>\n 0 Version\n Mg Element\n US type\n T core\n SLA PW PBE PBE PBE functional\n 10.0 Z\n</PP_HEADER>\n"
    "<PP_RHOATOM>\n1.0\n</PP_RHOATOM>\n",
]


def open_pseudopotential(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "Si.upf")
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        found = upf.read_file(path)
        assert found.valence >= 1 and found.sha256


# Results of somebody else


def _import_line() -> str:
    crystal = Crystal(np.array(SALT.lattice.matrix), np.array(SALT.frac_coords), np.array(SALT.atomic_numbers))
    details = {"iterations": 9, "bands": [0.5, 1.5], "raw_gap": 5.1}
    fingerprint = {"engine": "fake", "cutoff": 400.0}
    record = Record("", crystal, "band_gap", Result(5.1, Status.OK, 12.5, "", details), "fake 1.0", fingerprint)
    row = Row.of(record)
    return row.with_key(row.expected_key(KeyRing())).to_json(SCHEMA)


def _pieces(line: str) -> dict[str, Any]:
    return {name: json.dumps(value) for name, value in json.loads(line).items()}


@st.composite
def import_lines(draw: st.DrawFn) -> str:
    """Lines of an export: with an entry of another kind, damaged, or with names that mean something to ASE."""
    if draw(st.booleans()):
        return draw(mutated([IMPORT_LINE]))
    entries = _pieces(IMPORT_LINE)
    for name in draw(st.lists(st.sampled_from([*entries, "more"]), min_size=1, max_size=2)):
        entries[name] = draw(st.sampled_from(ODD_JSON) | VALUES.map(json.dumps))
    return "{" + ",".join(f'"{name}":{text}' for name, text in entries.items()) + "}"


def open_import_line(text: str) -> None:
    """What is taken over can be read, checked, exported and imported again, and no file is left half-made."""
    with tempfile.TemporaryDirectory() as folder:
        path, again = Path(folder, "lines.jsonl"), Path(folder, "again.jsonl")
        path.write_text(text + "\n", encoding="utf-8", errors="surrogatepass")
        store, other = Store(Path(folder, "results.db")), Store(Path(folder, "other.db"))
        merged = read_file(store, path)
        assert merged.added and verify(store) == Findings(SCHEMA, merged.added)
        with open(again, "w", encoding="utf-8") as file:
            assert write_lines(store.rows(), file) == merged.added
        assert read_file(other, again).added == merged.added and not verify(other).problems
        if merged.refused:
            raise ValueError(merged.problems[0])


ODD_JSON = [
    "true",
    "null",
    "6.7",
    "1e400",
    "NaN",
    "-Infinity",
    "9" * 310,
    "9" * 5000,
    '["a"]',
    "{}",
    "[" * 2000 + "]" * 2000,
    '{"x":' * 40 + "1" + "}" * 40,
    '{"__ndarray__":[[3],"float64",[1,2,3]]}',
    '{"x":{"__ase_objtype__":"atoms"}}',
    '{"__complex__":[1,2]}',
    '{"limits":{"timeout":1}}',
    '"\\ud800"',
    '"\\u0000"',
    "[[0,0,0]]",
    "[[1e9,0,0],[0,1e-9,0],[0,0,1]]",
    "[[4,0,0],[0,4,0],[8,0,0]]",
    "[11,17,11,17]",
    "[11.0,17]",
]


@dataclasses.dataclass(frozen=True)
class Target:
    """What is tried, at which door, its share of all inputs, and what the door must accept as it is."""

    inputs: st.SearchStrategy[Any]
    door: Callable[[Any], None]
    share: float
    sound: tuple[Any, ...]


IMPORT_LINE = _import_line()
TARGETS = {
    "cif": Target(mutated([*CIFS, SYMBOL_CIF, MAGNETIC_CIF]), open_cif, 0.25, (*CIFS, SYMBOL_CIF, MAGNETIC_CIF)),
    "mp20_csv": Target(
        mutated([ROWS]) | encoded(mutated([ROWS, ROWS.replace(",", ";")])),
        open_rows,
        0.1,
        (ROWS, ROWS.encode("utf-16")),
    ),
    "structure_files": Target(
        structure_files(),
        open_structure_file,
        0.25,
        tuple((name, text.encode()) for name, text in STRUCTURE_FILES.items()),
    ),
    "names_and_paths": Target(
        st.text(max_size=30) | st.sampled_from(WORDS) | mutated(PROTOTYPES), open_text, 0.05, tuple(PROTOTYPES)
    ),
    "ase_atoms": Target(atoms(), open_structure, 0.1, (SALT.to_ase_atoms(),)),
    "pymatgen_structures": Target(structures(), open_structure, 0.1, (SALT,)),
    "engine_settings": Target(engine_settings(), open_engine, 0.1, (("planewave", "fast", {"tolerance": 1e-6}),)),
    "run_configs": Target(mutated([CONFIG]), open_config, 0.05, (CONFIG,)),
    "toml_configs": Target(mutated([TOML, *HOSTILE]), open_toml, 0.05, (TOML,)),
    "run_folders": Target(run_folders(), open_run_folder, 0.02, (("sweep.json", '{"seeds": [10]}', "file"),)),
    "pwx_outputs": Target(outputs(), open_output, 0.15, ((fake_pwx.TEXT, fake_pwx.XML.encode(), 0),)),
    "import_lines": Target(import_lines(), open_import_line, 0.05, (IMPORT_LINE,)),
    "pseudopotentials": Target(mutated(PSEUDOPOTENTIALS), open_pseudopotential, 0.1, tuple(PSEUDOPOTENTIALS)),
}


def fuzz(name: str, count: int, random_seed: int = 0, longest: float | None = None) -> Counter[str]:
    """Try this many inputs at one door; how many were accepted and refused.

    An input that takes more than the ``longest`` seconds ends the program, with a traceback of where it hangs.

    Raises:
        AssertionError: an accepted input gave a wrong result, an error was empty, or a file was left behind.
        Exception: any error that is not in :data:`CLEAR`, for the smallest input that raises it.
    """
    target, tally = TARGETS[name], Counter[str]()
    places = Path.cwd(), Path(tempfile.gettempdir())

    def listing() -> list[list[str]]:
        return [sorted(os.listdir(place)) for place in places]

    before = listing()

    @seed(random_seed)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(target.inputs)
    def run(value: Any) -> None:
        if longest is not None:
            faulthandler.dump_traceback_later(longest, exit=True)
        try:
            target.door(value)
            tally["accepted"] += 1
        except CLEAR as error:
            assert str(error).strip(), f"{type(error).__name__} says nothing"
            tally["refused"] += 1
        assert listing() == before, "files were left behind"

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run()
    finally:
        if longest is not None:
            faulthandler.cancel_dump_traceback_later()
    return tally
