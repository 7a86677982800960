"""Pictures of crystals: what is in them."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import write as write_atoms
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Circle

from crystaljax import StructureError, library, viewer


def perovskite() -> Atoms:
    skeleton = library.perovskite()
    return Atoms("KMgF3", cell=skeleton.lattice, scaled_positions=skeleton.frac_coords, pbc=True)


def spheres(figure: Figure) -> int:
    circles = [patch for patch in figure.axes[0].patches if isinstance(patch, Circle)]
    return len(circles) // (viewer.SHADES + 1)


def test_sites_on_the_cells_surface_are_drawn_on_all_of_it():
    assert spheres(viewer.draw(perovskite())) == 8 + 1 + 6
    just_below_one = perovskite()
    just_below_one.set_scaled_positions(just_below_one.get_scaled_positions() - 1e-9)
    assert spheres(viewer.draw(just_below_one)) == 8 + 1 + 6


def test_bonds_and_cell():
    lines = viewer.draw(perovskite()).axes[0].lines
    dashed = [line for line in lines if line.get_linestyle() != "-"]
    assert len(dashed) == 3, "the edges behind"
    assert len(lines) == 12 + 6 * 4, "six B-X bonds, each in two halves with a rim"


def test_legend_and_title_name_the_crystal():
    axes = viewer.draw(perovskite()).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["K", "Mg", "F"]
    assert axes.get_title() == "KMgF$_{3}$"


@pytest.mark.parametrize(
    "atoms", [bulk("NaCl", "rocksalt", a=5.64), bulk("Cu"), bulk("Mg")], ids=lambda a: str(a.symbols)
)
def test_any_cell_gives_a_picture(atoms, tmp_path):
    path = viewer.save(viewer.draw(atoms), tmp_path / "crystal.png")
    assert np.ptp(imread(path)[..., :3]) > 0.5


def test_title_of_a_runs_cif_has_the_property(tmp_path):
    write_atoms(tmp_path / "salt.cif", bulk("NaCl", "rocksalt", a=5.64))
    plain = (tmp_path / "salt.cif").read_text()
    assert viewer.draw_file(tmp_path / "salt.cif").axes[0].get_title() == "NaCl"
    (tmp_path / "salt.cif").write_text("# band_gap: 5.01 eV\n" + plain)
    assert viewer.draw_file(tmp_path / "salt.cif").axes[0].get_title() == "NaCl\nband gap: 5.01 eV"


def test_what_cannot_be_drawn_is_refused(tmp_path):
    (tmp_path / "bad.cif").write_text("not a crystal")
    with pytest.raises(StructureError):
        viewer.draw_file(tmp_path / "bad.cif")
    with pytest.raises(ValueError, match="no best.json"):
        viewer.draw_run(tmp_path)
