"""Structure files of all formats are read as data, in bounded time and space, or refused."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.constraints import FixAtoms
from pymatgen.core import Lattice, Species, Structure
from pymatgen.io.res import ResIO
from pymatgen.io.vasp import Poscar

from crystaljax import StructureError, StructureWarning, read_mp20, structure_files, to_skeleton
from crystaljax.structures import to_skeletons

SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
NEARLY = Structure(Lattice.cubic(4), [{"Na": 0.9999}], [[0, 0, 0]])
SLAB = Structure(Lattice(np.eye(3) * 4, (True, True, False)), ["Na"], [[0, 0, 0]])
FRAME = '1\nLattice="4 0 0 0 4 0 0 0 4"\nNa 0 0 0\n'
CIF = SALT.to(fmt="cif")
XSF = "# salt\nCRYSTAL\nPRIMVEC\n 4 0 0\n 0 4 0\n 0 0 4\nPRIMCOORD\n2 1\n11 0 0 0\nCl 2 2 2 0.1 0 0\n"
VASPRUN = """<?xml version="1.0" encoding="ISO-8859-1"?>
<modeling>
 <atominfo><atoms>2</atoms><array name="atoms"><field type="string">element</field><set>
  <rc><c>Na</c><c>   1</c></rc><rc><c>Cl</c><c>   2</c></rc></set></array></atominfo>
 <structure name="initialpos"><crystal><varray name="basis"><v>5 0 0</v><v>0 5 0</v><v>0 0 5</v></varray></crystal>
  <varray name="positions"><v>0 0 0</v><v>.4 .5 .5</v></varray></structure>
 <calculation><structure><crystal><varray name="basis"><v>4 0 0</v><v>0 4 0</v><v>0 0 4</v></varray></crystal>
  <varray name="positions"><v>0 0 0</v><v>.5 .5 .5</v></varray></structure></calculation>
 <structure name="finalpos"><crystal><varray name="basis"><v>4 0 0</v><v>0 4 0</v><v>0 0 4</v></varray></crystal>
  <varray name="positions"><v>0 0 0</v><v>.5 .5 .5</v></varray></structure>
</modeling>
"""


def silent(path: Path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", StructureWarning)
        return to_skeleton(path, **options)


@pytest.fixture
def write(tmp_path):
    def written(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return written


# What each format says


def test_every_format_gives_the_same_crystal(tmp_path: Path, write) -> None:
    expected = to_skeleton(SALT)
    SALT.to_ase_atoms().write(tmp_path / "salt.extxyz", format="extxyz")
    files = {
        "salt.cif": CIF,
        "POSCAR": Poscar(SALT).get_str(direct=True),
        "CONTCAR_last": Poscar(SALT).get_str(direct=False),
        "salt.vasp": Poscar(SALT).get_str(vasp4_compatible=True),
        "CHGCAR": Poscar(SALT).get_str() + "\n  2 2 2\n 1.0 1.0 1.0 1.0 1.0 1.0 1.0 1.0\n",
        "salt.json": SALT.to(fmt="json"),
        "salt.xsf": SALT.to(fmt="xsf"),
        "salt.xyz": (tmp_path / "salt.extxyz").read_text(),
    }
    ResIO.structure_to_file(SALT, str(tmp_path / "salt.res"))
    files["again.res"] = (tmp_path / "salt.res").read_text()
    for name, content in files.items():
        made = silent(write(name, content))
        assert sorted(made.species) == sorted(expected.species), name
        assert made.volume == pytest.approx(expected.volume, rel=1e-5)
        np.testing.assert_allclose(sorted(made.bonds.distances), sorted(expected.bonds.distances), atol=1e-4)


@pytest.mark.parametrize(("name", "content"), [("vasprun.xml", VASPRUN), ("salt.xsf", XSF)])
def test_small_files_of_other_programs(name: str, content: str, write) -> None:
    made = silent(write(name, content))
    assert made.species == ("Na", "Cl") and made.volume == pytest.approx(64)
    assert np.linalg.norm(made.lattice @ (made.frac_coords[1] - made.frac_coords[0])) == pytest.approx(2 * 3**0.5)


@pytest.mark.parametrize(
    ("scale", "volume"), [("1.0", 64.0), ("1.5 ! a comment", 216.0), ("-100", 100.0), ("1 2 1.5", 192.0)]
)
@pytest.mark.parametrize("mode", ["Direct", "Cartesian"])
def test_scales_of_poscar_hold_for_cell_and_sites(scale: str, volume: float, mode: str, write) -> None:
    sites = "0 0 0\n.5 .5 .5" if mode == "Direct" else "0 0 0\n2 2 2"
    made = silent(write("POSCAR", f"salt\n{scale}\n4 0 0\n0 4 0\n0 0 4\nNa_pv/f474ac0d Cl\n1 1\n{mode}\n{sites}\n"))
    assert made.volume == pytest.approx(volume) and made.species == ("Na", "Cl")
    offset = made.frac_coords[1] - made.frac_coords[0]
    assert offset - np.round(offset * 2) / 2 == pytest.approx(0, abs=1e-9)


def test_one_frame_of_xyz_with_its_lattice(write) -> None:
    head = 'Lattice="4 0 0 0 4 0 0 0 4" Properties=id:I:1:species:S:1:pos:R:3:magmoms:R:1'
    with pytest.warns(StructureWarning, match="magmoms are dropped"):
        assert to_skeleton(write("a.xyz", f"2\n{head}\n1 Na 0 0 0 1\n2 Cl 2 2 2 0\n")).species == ("Na", "Cl")


# Read as data


def test_json_imports_nothing_that_it_names(write, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "module_of_somebody_else.py").write_text("raise SystemExit('it was run')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    data = SALT.as_dict()
    named = {"@module": "module_of_somebody_else", "@class": "Anything", "value": 1}
    data |= {"@module": "module_of_somebody_else", "@class": "Structure"}
    data["properties"] = named
    data["sites"][0]["properties"] = {"label": named}
    data["lattice"]["@module"] = "module_of_somebody_else"
    assert silent(write("salt.json", json.dumps(data))).n_sites == 8
    assert "module_of_somebody_else" not in sys.modules


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[" * 100_000, "not a readable structure file"),
        ("a.json", '{"lattice": ' + "1" * 5000 + "}", "not a readable structure file"),
        ("a.json", "[1, 2]", "not a pymatgen Structure"),
        ("a.json", '{"lattice": {"matrix": [[4, 0, 0], [0, 4, 0], ["x"]]}, "sites": [{}]}', "matrix of the lattice"),
        ("a.json", NEARLY.to(fmt="json"), "disordered .Na at 0.9999"),
        ("a.json", SLAB.to(fmt="json"), "no periodic"),
        ("a.res", "TITL x\nCELL 1.0 4 4 4 90 90 90\nLATT 1\nSFAC Na\nNa 1 0 0 0 1\nEND\n", "LATT -1"),
        ("a.res", "TITL x\nCELL 1.0 4 4 4 90 90 90\nLATT -1\nSYMM -x,-y,-z\nSFAC Na\nNa 1 0 0 0 1\nEND\n", "LATT -1"),
        ("a.res", "CELL 1.0 4 4 4 90 90 90\nLATT -1\nSFAC Na\nNa 1 0 0 0 0.5\nEND\n", "disordered"),
        ("a.res", "CELL 1.0 4 4 4 90 90 90\nLATT -1\nSFAC Na\nCl 2 0 0 0 1\nEND\n", "SFAC number 2"),
        ("a.res", "CELL 1.0 4 4 4 90\nSFAC Na\nEND\n", "CELL is.*7 numbers"),
        ("a.res", "WHAT\n", "not understood"),
        ("a.res", "", "no CELL"),
        ("vasprun.xml", VASPRUN[:400], "not whole XML.*CONTCAR"),
        ("vasprun.xml", "<a/>", "no structure with its elements"),
        ("vasprun.xml", '<!DOCTYPE x [<!ENTITY a "aaa">]><a>&a;</a>', "entities"),
        ("POSCAR", "x\n1\n4 0 0\n0 4 0\n0 0 4\nNa\n99999999999\nDirect\n0 0 0\n", "99999999999 sites, more than"),
        ("POSCAR", "x\n1\n4 0 0\n0 4 0\n0 0 4\n1 1\nDirect\n0 0 0\n.5 .5 .5\n", "names no elements"),
        ("POSCAR", "x\n1\n4 0 0\n0 4 0\n0 0 4\nNa Cl\n1\nDirect\n0 0 0\n", "2 elements and 1 numbers"),
        ("POSCAR", "x\n1\n4 0 0\n0 4 0\n0 0 4\nNa\n2\nDirect\n0 0 0\n", "ends before site 1"),
        ("POSCAR", "x\n0\n4 0 0\n0 4 0\n0 0 4\nNa\n1\nDirect\n0 0 0\n", "scale"),
        ("POSCAR", "x\n1\n0 0 0\n0 4 0\n0 0 4\nNa\n1\nCartesian\n0 0 0\n", "flat or missing"),
        ("POSCAR", "x\n1\n4 0 0\n0 4 0\n0 0 4\nNa\n1\n0 0 0\n", "neither Direct nor Cartesian"),
        ("POSCAR", "", "ends before"),
        ("a.xyz", "2\nsalt\nNa 0 0 0\nCl 2 2 2\n", "no periodic cell.*Lattice"),
        ("a.xyz", '1\nLattice="4 0 0 0 4 0 0 0 4" pbc="T T F"\nNa 0 0 0\n', "no periodic cell"),
        ("a.xyz", "99999999999\n\nNa 0 0 0\n", "99999999999 sites"),
        ("a.xyz", FRAME * 2, "one structure"),
        ("a.xyz", '1\nLattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:999999999\nNa 0 0 0\n', "columns"),
        ("a.xsf", XSF.replace("2 1", "99999999999 1"), "99999999999 sites"),
        ("a.xsf", XSF.replace("CRYSTAL", "SLAB"), "SLAB"),
        ("a.xsf", "CRYSTAL\n", "no PRIMVEC"),
        ("a.yaml", "a: 1", "not a format that is read by name.*Structure or Atoms"),
        ("run.py", "raise SystemExit", "not a format"),
        ("a.cif", b"\x89PNG\r\n\x1a\n\x00\x00", "not text"),
        ("a.cif.gz", b"\x1f\x8b but not gzip", "cannot be unpacked"),
        ("a.cif.bz2", b"not bzip2", "cannot be unpacked"),
        ("a.cif.xz", b"not xz", "cannot be unpacked"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_soon_with_what_to_do(
    name: str, content: str | bytes, message: str, write
) -> None:
    path, begin = write(name, content), time.process_time()
    with pytest.raises(StructureError, match=message) as caught:
        to_skeleton(path)
    assert str(path) in str(caught.value)
    assert time.process_time() - begin < 2


# Bytes


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1", "utf-32"])
def test_encodings(encoding: str, write) -> None:
    text = CIF.replace("data_", "data_", 1).replace("# generated", "# Übung: generated")
    assert silent(write("salt.cif", text.encode(encoding))).n_sites == 8


def test_packed_files(write) -> None:
    for suffix, module in ((".gz", gzip), (".bz2", bz2), (".xz", lzma)):
        made = silent(write(f"salt.cif{suffix}", module.compress(CIF.encode())))
        assert (made.n_sites, made.name) == (8, "salt")
    assert silent(write("POSCAR.gz", gzip.compress(Poscar(SALT).get_str().encode()))).n_sites == 8


def test_a_file_that_unpacks_to_gigabytes_is_refused_before_it_has(write) -> None:
    bomb = gzip.compress(bytes(structure_files.MAX_BYTES * 2), 9)
    assert len(bomb) < 100_000
    with pytest.raises(StructureError, match="larger than 32 MiB"):
        to_skeleton(write("bomb.cif.gz", bomb))
    with pytest.raises(StructureError, match="larger than 32 MiB"):
        to_skeleton(write("bomb.cif", bytes(structure_files.MAX_BYTES + 1)))


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(StructureError, match="not a file"):
        to_skeleton(tmp_path)
    for name in ("a" * 5000 + ".cif", "nul\x00.cif"):
        with pytest.raises(StructureError):
            to_skeleton(name)


# Tables


def table(path: Path, rows: list[dict], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "latin-1", "utf-16"])
def test_tables_as_spreadsheets_write_them(delimiter: str, encoding: str, tmp_path: Path) -> None:
    rows = [
        {"row": "0.0", "material_id": "mp-1", "pretty_formula": "Größe", "spacegroup.number": "225,0", "cif": CIF},
        {"row": "7.0", "material_id": "mp-2", "pretty_formula": "NaCl", "spacegroup.number": "194.0", "cif": CIF},
    ]
    path = table(tmp_path / "rows.CSV", rows, delimiter, encoding)
    assert [made.source for made in read_mp20(path)] == ["mp-1"]
    assert [made.source for made in read_mp20(path, rows=[7], cubic_only=False)] == ["mp-2"]
    assert len(to_skeletons(str(path))) == 1


@pytest.mark.parametrize(
    "group", [{"spacegroup.symbol": "Fm-3m"}, {"spacegroup": "Fm3m"}, {"spacegroup.number": "?"}, {}]
)
def test_groups_by_symbol_and_by_the_crystal_itself(group: dict, tmp_path: Path) -> None:
    tetragonal = Structure(Lattice.tetragonal(4, 5), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]).to(fmt="cif")
    other = {key: "P4/mmm" for key in group}
    rows = [{"material_id": "mp-1", **group, "cif": CIF}, {"material_id": "mp-2", **other, "cif": tetragonal}]
    assert [made.source for made in read_mp20(table(tmp_path / "rows.csv", rows))] == ["mp-1"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"material_id": "mp-1", "cif": "x" * 200_000}], "not a table.*field larger"),
        ([{"row": "one", "cif": CIF}], "row number 'one'"),
        ([{"row": "1.5", "cif": CIF}], "row number '1.5'"),
        ([{"row": "1e400", "cif": CIF}], "row number"),
        ([{"material_id": "mp-1", "other": CIF}], "mp-1.*no 'cif'"),
        ([{"material_id": "mp-1", "cif": "data_x"}], "mp-1: not a readable CIF"),
    ],
)
def test_tables_that_cannot_be_read_are_refused(rows: list[dict], message: str, tmp_path: Path) -> None:
    with pytest.raises(StructureError, match=message):
        read_mp20(table(tmp_path / "rows.csv", rows))


# What is dropped


def once(said) -> str:
    (warning,) = [warning for warning in said if warning.category is StructureWarning]
    return str(warning.message)


def test_what_is_dropped_of_atoms_is_said_once() -> None:
    atoms = bulk("Fe", cubic=True)
    atoms.set_initial_magnetic_moments([2.2, 2.2])
    atoms.set_constraint(FixAtoms([0]))
    with pytest.warns(StructureWarning) as said:
        to_skeleton(atoms)
    assert "constraints" in once(said) and "magnetic moments" in once(said)
    with warnings.catch_warnings():
        warnings.simplefilter("error", StructureWarning)
        to_skeleton(bulk("Cu"))


def test_what_is_dropped_of_structures_is_said_once(write) -> None:
    cube = Lattice.cubic(4)
    flags = {"selective_dynamics": [[True, True, False]], "magmom": [2.0]}
    for structure in (
        Structure(cube, ["Fe"], [[0, 0, 0]], site_properties=flags),
        Structure(cube, [Species("Fe", 2, spin=5)], [[0, 0, 0]]),
    ):
        for given in (structure, write("fe.json", structure.to(fmt="json"))):
            with pytest.warns(StructureWarning) as said:
                to_skeleton(given)
            assert "dropped" in once(said)
    fixed = Structure(cube, ["Fe"], [[0, 0, 0]], site_properties={"selective_dynamics": [[True, True, False]]})
    with pytest.warns(StructureWarning, match="selective dynamics of 1 sites are dropped"):
        to_skeleton(write("POSCAR", Poscar(fixed).get_str()))


def test_disorder_that_ase_keeps_aside_is_refused(write) -> None:
    from ase.io import read

    alloy = Structure(Lattice.cubic(4), [{"Na": 0.6, "K": 0.4}, "Cl"], [[0, 0, 0], [0.5] * 3])
    atoms = read(write("alloy.cif", alloy.to(fmt="cif")))
    assert isinstance(atoms, Atoms) and len(atoms) == 2
    with pytest.raises(StructureError, match="disordered.*Na at 0.6, K at 0.4|disordered.*K at 0.4, Na at 0.6"):
        to_skeleton(atoms)


def test_structures_of_two_dimensions_are_refused() -> None:
    with pytest.raises(StructureError, match="periodic in 2 directions"):
        to_skeleton(SLAB)


def test_deuterium_is_hydrogen() -> None:
    assert to_skeleton(Structure(Lattice.cubic(4), ["Li", "D"], [[0, 0, 0], [0.5] * 3])).species == ("Li", "H")
