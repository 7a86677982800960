"""Pictures of crystals, drawn by matplotlib: shaded spheres, bonds, the cell and its periodic images.

The figures need no display. Sites on faces, edges and corners of the cell are drawn on all of them, as in textbooks.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.data.colors import jmol_colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle

from crystaljax.run_folder import RunFolderError, aim_text, read_best, values_text

TILT, TURN = 15.0, 25.0
"""Degrees: how far the crystal is tilted towards the viewer, and turned about the vertical."""
RADIUS_FACTOR = 0.4
"""Drawn radius of a site, in units of the covalent radius."""
BOND_FACTOR = 1.1
"""Two sites are joined if each is among the nearest neighbours of the other, within this factor."""
FACE_TOLERANCE = 0.02
"""Fractional coordinate within which a site lies on a face of the cell."""
SHADES = 16
"""Discs that make up a shaded sphere."""
LIGHT = np.array([-0.35, 0.4])
"""Where the light falls on a sphere, from its centre, in units of its radius."""
PER_ROW = 5
"""Crystals in a row of a sheet."""
LEGEND_SPACE = 0.12
"""Height left below a crystal for its legend, as a fraction of the crystal's."""
MAX_SITES = 200
"""Largest cell that is drawn."""


def draw(atoms: Atoms, title: str = "", figure_size: float = 4.2) -> Figure:
    """A picture of one crystal.

    Args:
        atoms: the crystal, with its periodic cell.
        title: shown above; by default the formula.
        figure_size: width in inches.
    """
    figure = Figure(figsize=(figure_size, figure_size), dpi=150, layout="constrained")
    draw_on(figure.subplots(), atoms, title)
    return figure


def draw_sheet(crystals: Sequence[Atoms], titles: Sequence[str], heading: str = "", caption: str = "") -> Figure:
    """A sheet of several crystals, row by row."""
    if not crystals:
        raise ValueError("no crystals to draw")
    columns = min(PER_ROW, len(crystals))
    rows = -(-len(crystals) // columns)
    figure = Figure(figsize=(2.9 * columns, 3.1 * rows + 0.6), dpi=130, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(crystals) :]:
        axis.set_axis_off()
    for axis, atoms, title in zip(axes, crystals, titles, strict=False):
        draw_on(axis, atoms, title)
    figure.suptitle(heading, fontsize=12)
    figure.supxlabel(caption, fontsize=8, color="0.35")
    return figure


def draw_file(path: str | os.PathLike[str]) -> Figure:
    """A picture of the crystal in a structure file.

    The lines at the head of CIF files that a run writes give the title its property.

    Raises:
        StructureError: if the file holds no usable crystal.
    """
    from crystaljax.structures import to_skeleton

    path = Path(path)
    crystal = to_skeleton(path, max_sites=MAX_SITES)
    atoms = Atoms(crystal.species, cell=crystal.lattice, scaled_positions=crystal.frac_coords, pbc=True)
    return draw(atoms, title="\n".join([_formula(atoms), *_property_comment(path)]))


def draw_run(folder: str | os.PathLike[str]) -> Figure:
    """A sheet of the best crystals of a training run.

    Raises:
        RunFolderError: if the folder holds no run, or one whose ``best.json`` is damaged.
        ValueError: if the run has no crystal yet.
    """
    try:
        best = read_best(Path(folder))
    except FileNotFoundError:
        raise RunFolderError(f"{folder} has no best.json: give the folder of a run") from None
    crystals = [
        Atoms(c["elements"], cell=c["lattice"], scaled_positions=c["frac_coords"], pbc=True) for c in best["crystals"]
    ]
    if not crystals:
        raise ValueError(f"the run in {folder} has found no crystal with a value, so there is nothing to draw")
    titles = [
        f"{_subscripts(c['formula'])}\n{plain(values_text(best, c, 2))}, reward {c['reward']:.3f}"
        + "".join(f"\n{plain(str(code))}" for code in c.get("caveats") or ())
        for c in best["crystals"]
    ]
    heading = f"{plain(best['task'])}, {plain(aim_text(best))}"
    return draw_sheet(crystals, titles, heading, f"Values: {plain(best['source'])}. Cells are drawn as given.")


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG; returns the path."""
    Path(path).write_bytes(png(figure))
    return Path(path)


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def plain(text: str) -> str:
    """A text that matplotlib shows as it is: a dollar sign begins a formula otherwise."""
    return text.replace("$", r"\$")


def draw_on(axes: Axes, atoms: Atoms, title: str = "") -> None:
    """Draw a crystal on axes, with a legend of its elements."""
    fractional, which = _with_images(atoms)
    numbers = atoms.numbers[which]
    points = fractional @ np.array(atoms.cell)
    centre = np.array(atoms.cell).sum(axis=0) / 2
    rotation = _rotation()
    sites = (points - centre) @ rotation.T
    corners = (np.array(list(itertools.product((0, 1), repeat=3))) @ np.array(atoms.cell) - centre) @ rotation.T
    # Seen along -z, so larger z is nearer; what is drawn later covers what is drawn before.
    span = np.ptp(np.concatenate([sites, corners]), axis=0).max()
    _draw_cell(axes, corners)
    _draw_bonds(axes, sites, numbers, BOND_FACTOR * _nearest(atoms)[which], span)
    for site, number in zip(sites, numbers, strict=True):
        _draw_sphere(axes, site, number)
    margin = RADIUS_FACTOR * covalent_radii[numbers].max() * 1.1
    shown = np.concatenate([sites, corners])[:, :2]
    low, high = shown.min(axis=0) - margin, shown.max(axis=0) + margin
    axes.set_xlim(low[0], high[0])
    axes.set_ylim(low[1] - LEGEND_SPACE * (high[1] - low[1]), high[1])
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set_title(title or _formula(atoms), fontsize=9)
    _draw_legend(axes, atoms)


def _rotation() -> np.ndarray:
    """[3, 3], from crystal axes to the viewer's: x to the right, y up (the crystal's z), z towards the eye."""
    turn, tilt = np.radians(TURN), np.radians(TILT)
    upright = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    about_vertical = np.array([[np.cos(turn), 0.0, -np.sin(turn)], [0.0, 1.0, 0.0], [np.sin(turn), 0.0, np.cos(turn)]])
    towards_viewer = np.array([[1.0, 0.0, 0.0], [0.0, np.cos(tilt), -np.sin(tilt)], [0.0, np.sin(tilt), np.cos(tilt)]])
    return towards_viewer @ about_vertical @ upright


def _with_images(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Fractional coordinates [M, 3] of all sites in the closed cell, and which atom [M] each of them is."""
    inside = atoms.get_scaled_positions() % 1.0
    inside[inside > 1.0 - FACE_TOLERANCE] -= 1.0
    found, which = [], []
    for index, position in enumerate(inside):
        choices = [(0.0, 1.0) if abs(x) < FACE_TOLERANCE else (0.0,) for x in position]
        for shift in itertools.product(*choices):
            found.append(position + shift)
            which.append(index)
    return np.array(found), np.array(which)


def _nearest(atoms: Atoms) -> np.ndarray:
    """Distance in Å of each atom to its nearest neighbour, periodic images of its own included."""
    distances = atoms.get_all_distances(mic=True)
    np.fill_diagonal(distances, np.linalg.norm(atoms.cell, axis=1).min())
    return distances.min(axis=1)


def _draw_cell(axes: Axes, corners: np.ndarray) -> None:
    """The twelve edges; corners [8, 3] in the order of ``product((0, 1), repeat=3)``."""
    # Edges that meet in the hindmost corner are behind everything.
    hindmost = int(corners[:, 2].argmin())
    for first, second in itertools.combinations(range(8), 2):
        if bin(first ^ second).count("1") == 1:
            hidden = hindmost in (first, second)
            depth = corners[[first, second], 2].mean()
            axes.plot(
                *corners[[first, second], :2].T,
                color="0.55" if hidden else "0.3",
                lw=0.8,
                ls=(0, (4, 3)) if hidden else "-",
                zorder=_order(depth),
            )


def _draw_bonds(axes: Axes, sites: np.ndarray, numbers: np.ndarray, reach: np.ndarray, span: float) -> None:
    """Bonds in two halves, in the colours of their ends; each site bonds up to its ``reach`` in Å."""
    width = 72.0 * 0.11 * 2.0 / span
    for first, second in itertools.combinations(range(len(sites)), 2):
        distance = np.linalg.norm(sites[first] - sites[second])
        if distance > min(reach[first], reach[second]):
            continue
        middle = (sites[first] + sites[second]) / 2
        for end in (first, second):
            line = np.stack([sites[end], middle])
            colour = np.array(jmol_colors[numbers[end]])
            depth = line[:, 2].mean()
            for factor, scale in ((0.55, 1.0), (0.85, 0.55)):  # a dark rim makes a cylinder of it
                axes.plot(
                    *line[:, :2].T, color=colour * factor, lw=width * scale, solid_capstyle="butt", zorder=_order(depth)
                )


def _draw_sphere(axes: Axes, site: np.ndarray, number: int) -> None:
    radius = RADIUS_FACTOR * covalent_radii[number]
    colour = np.array(jmol_colors[number])
    order = _order(site[2] + radius / 2)
    axes.add_patch(Circle((float(site[0]), float(site[1])), radius, color=colour * 0.35, zorder=order, lw=0))
    for shade in np.linspace(0.0, 1.0, SHADES):
        bright = np.clip(colour * (0.62 + 0.38 * min(1.0, 1.6 * shade)) + 0.75 * max(0.0, shade - 0.55), 0.0, 1.0)
        size = 0.96 * radius * (1.0 - 0.92 * shade)
        place = site[:2] + LIGHT * radius * shade * 0.75
        axes.add_patch(Circle(place, size, color=bright, zorder=order, lw=0))


def _order(depth: float) -> float:
    """The drawing order of something at that depth; positive, as matplotlib's frames have order 0-3."""
    return 10.0 + depth


def _draw_legend(axes: Axes, atoms: Atoms) -> None:
    symbols = dict(zip(atoms.get_chemical_symbols(), atoms.numbers, strict=True))
    handles = [
        Line2D([], [], marker="o", ls="", ms=7, mfc=jmol_colors[number], mec="0.3", mew=0.6, label=symbol)
        for symbol, number in symbols.items()
    ]
    axes.legend(
        handles=handles,
        loc="lower center",
        ncols=min(5, len(handles)),
        frameon=False,
        fontsize=8,
        handletextpad=0.1,
        columnspacing=1.0,
        borderpad=0.0,
    )


def _formula(atoms: Atoms) -> str:
    return _subscripts(atoms.symbols.formula.reduce()[0].format("metal"))


def _subscripts(formula: str) -> str:
    """``KMgF3`` for matplotlib, with subscripts."""
    return "".join(f"$_{{{''.join(run)}}}$" if is_digit else "".join(run) for is_digit, run in _runs(formula))


def _runs(text: str) -> list[tuple[bool, list[str]]]:
    return [(is_digit, list(run)) for is_digit, run in itertools.groupby(text, str.isdigit)]


def _property_comment(path: Path) -> list[str]:
    """The property in the head of a CIF file that a run wrote; nothing for other files."""
    names = ("band_gap: ", "bulk_modulus: ", "density: ")
    for line in path.read_text(errors="replace").splitlines()[:10]:
        if line.startswith(tuple(f"# {name}" for name in names)):
            return [plain(line[2:].replace("_", " "))]
    return []
