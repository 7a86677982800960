"""Skeletons from what people have, and what is refused."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from crystaljax import library, read_mp20, to_skeleton
from crystaljax.data import build
from crystaljax.structures import StructureError, to_skeletons

SHARED = Path(__file__).parents[2] / "shared" / "data" / "mp20_val_cubic.csv"
CUBE = Lattice.cubic(4.0)


def nacl() -> Structure:
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def test_every_source_gives_the_same_skeleton(tmp_path: Path) -> None:
    structure = nacl().get_primitive_structure()
    path = tmp_path / "salt.cif"
    structure.to(filename=str(path))
    skeletons = [
        to_skeleton(source)
        for source in (structure, path, str(path), path.read_text(), bulk("NaCl", "rocksalt", a=5.64))
    ]
    for made in skeletons:
        assert made.n_sites == 2
        assert made.volume == pytest.approx(5.64**3 / 4, rel=1e-6)
        assert len(made.bonds.senders) == 12
        assert made.bonds.distances == pytest.approx(2.82, abs=1e-4)
    assert skeletons[1].name == "salt"


def test_aflow_prototype_by_name() -> None:
    made = to_skeleton("AB3C_cP5_221_a_c_b")
    built_in = library.perovskite()
    assert made.lattice == pytest.approx(built_in.lattice)
    assert sorted(made.frac_coords.round(9).tolist()) == sorted(built_in.frac_coords.tolist())
    assert (made.permutations == built_in.permutations).all()
    rocksalt = to_skeleton("AB_cF8_225_a_b")
    assert rocksalt.volume == pytest.approx(library.rocksalt().volume, rel=1e-5)


def test_benchmark_crystals_match_their_formula_and_space_group() -> None:
    expected = {
        "C1": ("RbVF3", 221), "C2": ("RbCaH3", 221), "C3": ("Nb6AlGe", 200), "C4": ("SnI4", 215),
        "C5": ("AlCo2Nb", 225), "C6": ("Sb3Au", 229), "C7": ("Yb3SnO", 221),
    }  # fmt: skip
    for name, (formula, space_group) in expected.items():
        made = library.benchmark(name)
        structure = Structure(made.lattice, list(made.species), made.frac_coords)
        assert structure.composition.reduced_composition == type(structure.composition)(formula)
        assert structure.get_space_group_info(0.01)[1] == space_group
        assert made.source.startswith("mp-")
    assert len(library.five_site()) == 94


@pytest.mark.skipif(not SHARED.exists(), reason="the original MP-20 rows are not here")
def test_shipped_numbers_come_from_the_mp20_rows(tmp_path: Path) -> None:
    import json

    assert build.build(str(SHARED)) == json.loads(library.DATA_FILE.read_text())


@pytest.mark.skipif(not SHARED.exists(), reason="the original MP-20 rows are not here")
def test_mp20_rows_by_number_and_cubic_only(tmp_path: Path) -> None:
    (row,) = read_mp20(SHARED, rows=[3403])
    assert row.digest == library.benchmark("C1").digest
    assert len(read_mp20(SHARED)) == 97
    with pytest.raises(StructureError, match="no rows"):
        read_mp20(SHARED, rows=[1])


def test_bonds_are_in_both_directions_with_their_images() -> None:
    for name in library.BENCHMARK_ROWS:
        made = library.benchmark(name)
        bonds = made.bonds
        edges = {(s, r, *i) for s, r, i in zip(bonds.senders, bonds.receivers, bonds.images.tolist(), strict=True)}
        assert all((r, s, -a, -b, -c) in edges for s, r, a, b, c in edges)
        ends = made.frac_coords[bonds.receivers] + bonds.images
        lengths = np.linalg.norm((ends - made.frac_coords[bonds.senders]) @ made.lattice, axis=1)
        assert lengths == pytest.approx(bonds.distances)


def test_site_orders_are_breadth_first() -> None:
    for name in library.BENCHMARK_ROWS:
        made = library.benchmark(name)
        neighbours = [set(made.bonds.receivers[made.bonds.senders == site]) for site in range(made.n_sites)]
        for start, order in enumerate(made.site_orders):
            assert order[0] == start
            assert sorted(order) == list(range(made.n_sites))
            depth = {start: 0}
            for site in order:  # shortest-path depths by relaxation in visiting order
                for other in neighbours[site]:
                    depth.setdefault(int(other), depth[int(site)] + 1)
            depths = [depth[int(site)] for site in order]
            assert depths == sorted(depths)


def test_disconnected_sites_follow_in_index_order() -> None:
    # SnI4: the molecule's bonds reach every site; isolated helium atoms far apart do not bond at all.
    lattice = Lattice.orthorhombic(30, 31, 32)
    made = to_skeleton(Structure(lattice, ["He"] * 3, [[0, 0, 0], [0.5, 0.5, 0.5], [0.25, 0.75, 0.5]]))
    assert sorted(made.site_orders[1]) == [0, 1, 2]
    assert made.site_orders[1][0] == 1


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (Structure(CUBE, [{"Na": 0.5, "K": 0.5}, "Cl"], [[0, 0, 0], [0.5] * 3]), "site 0 is disordered.*occupancy"),
        (Structure(CUBE, [{"Na": 0.7}], [[0, 0, 0]]), "site 0 is disordered"),
        (Structure(CUBE, ["Na", "Cl"], [[0, 0, 0], [0.01, 0, 0]]), "sites 0 and 1 overlap.*remove one"),
        (Structure(CUBE, ["Na", "Cl"], [[0.999, 0, 0], [0.0, 0, 0]]), "sites 0 and 1 overlap"),
        (Structure(CUBE, ["Na", "Cl"], [[0, 0, 0], [np.nan, 0, 0]]), "site 1 has coordinates that are not finite"),
        (Structure(np.diag([4.0, 4.0, 0.0]), ["Na"], [[0, 0, 0]]), "cell is flat or missing"),
        (Structure(np.diag([4.0, 4.0, 1e7]), ["Na"], [[0, 0, 0]]), "vector is 1e.07 Å long"),
        (Structure(CUBE, ["Na"], [[0, 0, 1e9]]), "site 0 is 1e.09 cells away"),
        (Structure(np.diag([4.0, 4.0, np.nan]), ["Na"], [[0, 0, 0]]), "cell has entries that are not finite"),
        (Structure(CUBE, [], []), "no sites"),
        (nacl() * (2, 2, 2), "64 sites, more than the limit of 20.*max_sites"),
        (Atoms("NaCl", positions=[[0, 0, 0], [2, 2, 2]]), "no periodic cell"),
        (Atoms("NaCl", positions=[[0, 0, 0], [2, np.nan, 2]], cell=[4, 4, 4], pbc=True), "site 1 has a position"),
    ],
)  # fmt: skip
def test_unusable_structures_are_refused_with_site_and_fix(structure: object, message: str) -> None:
    with pytest.raises(StructureError, match=f"(?s){message}"):
        to_skeleton(structure)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not a cif\nat all", "not a readable CIF"),
        ("data_x\n_cell_length_a 4\n", "not a readable CIF"),
        ("", "no file and no AFLOW prototype"),
        ("missing.cif", "no such file"),
        ("AB3C_cP5_221", "did you mean AB3C_cP5_221_a_c_b"),
    ],
)
def test_unusable_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(StructureError, match=message):
        to_skeleton(text)


def test_cif_with_partial_occupancy_names_the_site(tmp_path: Path) -> None:
    path = tmp_path / "half.cif"
    Structure(CUBE, [{"Na": 0.5, "K": 0.5}, "Cl"], [[0, 0, 0], [0.5] * 3]).to(filename=str(path))
    with pytest.raises(StructureError, match="site 0 is disordered"):
        to_skeleton(path)


@pytest.mark.parametrize("group", ["Fm-3m", "F-43m", "Pm-3m"])
def test_a_cif_with_symmetry_is_the_crystal_that_it_describes(group: str) -> None:
    coords = [[0, 0, 0], [0.25] * 3 if group == "F-43m" else [0.5] * 3]
    structure = Structure.from_spacegroup(group, Lattice.cubic(5.64), ["Na", "Cl"], coords)
    text = str(CifWriter(structure, symprec=0.1))
    assert text.count("'") > 40  # operators
    read, made = to_skeleton(text), to_skeleton(structure)
    assert read.n_sites == made.n_sites and read.volume == pytest.approx(made.volume, rel=1e-6)
    assert sorted(read.species) == sorted(made.species)
    np.testing.assert_allclose(sorted(read.bonds.distances), sorted(made.bonds.distances), atol=1e-4)


@pytest.mark.parametrize("label", ["Na9", "K9"])
def test_two_sites_of_a_cif_on_one_place_are_refused(label: str) -> None:
    text = nacl().get_primitive_structure().to(fmt="cif").rstrip()
    element = label.rstrip("9")
    with pytest.raises(StructureError, match="Occupancy 2.0"):
        to_skeleton(f"{text}\n  {element}  {label}  1  0.0  0.0  0.00001  1\n")


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="CIF path"):
        to_skeleton(42)  # type: ignore[arg-type]


def test_max_sites_can_be_raised() -> None:
    assert to_skeleton(nacl() * (2, 2, 1), max_sites=32).n_sites == 32


def test_mp20_row_without_cif(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["material_id", "spacegroup.number", "cif"])
        writer.writeheader()
        writer.writerow({"material_id": "mp-1", "spacegroup.number": "225", "cif": ""})
    with pytest.raises(StructureError, match="mp-1.*no 'cif'"):
        read_mp20(path)


@pytest.mark.skipif(not SHARED.exists(), reason="the original MP-20 rows are not here")
def test_a_csv_file_stands_for_its_cubic_rows() -> None:
    assert len(to_skeletons(str(SHARED))) == 97
    assert len(to_skeletons([SHARED, library.rocksalt()])) == 98
