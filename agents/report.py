"""What a run leaves for people: the best crystals as CIF and JSON, the learning curve, a closing table."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms

from crystaljax import caveats, files
from crystaljax.agents.ledger import Episode, Ledger
from crystaljax.caveats import Caveat
from crystaljax.env import CrystalEnv
from crystaljax.run_folder import BEST, CRYSTALS, RunFolderError

if TYPE_CHECKING:
    from rich.table import Table

BEST_COUNT = 10
SMOOTHED_UPDATES = 5
"""Updates over which the learning curve is averaged."""
PROPERTY_NAMES = {"band_gap": "Band gap", "bulk_modulus": "Bulk modulus", "density": "Density"}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the values of a run come from.

    Attributes:
        label: of the evaluator, such as ``gpaw 26.7.0, fast``.
        fingerprint: JSON-able facts of the engine that can change a number (version, data sets, settings); empty for
            evaluators without one.
        target: what the run aimed at, in the unit of the property.
    """

    label: str
    fingerprint: dict[str, Any]
    target: float


def property_title(env: CrystalEnv) -> str:
    """Name of the property and its unit: ``Band gap (eV)``."""
    name = env.objective.property
    return f"{PROPERTY_NAMES.get(name, name)} ({env.objective.unit})"


def to_atoms(env: CrystalEnv, crystal: Episode) -> Atoms:
    """The crystal in the cell of its skeleton, which is not relaxed."""
    skeleton = env.skeletons[crystal.skeleton]
    return Atoms(crystal.elements, cell=skeleton.lattice, scaled_positions=skeleton.frac_coords, pbc=True)


def caveats_of(env: CrystalEnv, crystals: Sequence[Episode]) -> list[tuple[Caveat, ...] | None]:
    """What a reader must know of the values; ``None`` where there is no value, or nobody knows."""
    look_up, valued = env.evaluator.caveats, [crystal for crystal in crystals if crystal.value is not None]
    if look_up is None or not valued:
        return [None] * len(crystals)
    numbers = [env.vocabulary.numbers[env.vocabulary.indices(crystal.elements)] for crystal in valued]
    found = look_up([(z, crystal.skeleton) for z, crystal in zip(numbers, valued, strict=True)])
    of_crystal = {id(crystal): known for crystal, known in zip(valued, found, strict=True)}
    return [of_crystal.get(id(crystal)) for crystal in crystals]


def write_best(folder: Path, env: CrystalEnv, ledger: Ledger, origin: Origin, updates: int) -> list[Path]:
    """The best distinct crystals after so many updates, as ``best/NN_formula.cif`` and ``best.json``.

    Files of earlier updates are removed, and no others.

    Returns:
        The CIF files.

    Raises:
        RunFolderError, FileRefused: a file that no run has written has the name of one, or a link is there.
    """
    from pymatgen.io.ase import AseAtomsAdaptor
    from pymatgen.io.cif import CifWriter

    target_folder = files.make_folder(folder / CRYSTALS)
    old = {path for path in target_folder.glob("*.cif") if _of_a_run(path)}
    paths, entries = [], []
    best = ledger.best(BEST_COUNT)
    for rank, (crystal, known) in enumerate(zip(best, caveats_of(env, best), strict=True), start=1):
        path = target_folder / f"{rank:02}_{crystal.formula}.cif"
        comments = "".join(f"# {line}\n" for line in _provenance(env, crystal, known, origin))
        structure = AseAtomsAdaptor.get_structure(to_atoms(env, crystal))
        if os.path.lexists(path) and path not in old:
            raise RunFolderError(f"{path} was not written by a run, but has the name of a file of it; move it away")
        files.replace_text(path, comments + str(CifWriter(structure)))
        paths.append(path)
        entries.append({"rank": rank, "file": str(path.relative_to(folder)), **_entry(env, crystal, known)})
    heading = {
        "task": env.name,
        "property": env.objective.property,
        "unit": env.objective.unit,
        "target": origin.target,
        "source": origin.label,
        "fingerprint": origin.fingerprint,
        "updates": updates,
    }
    files.replace_text(folder / BEST, json.dumps({**heading, "crystals": entries}, indent=2) + "\n")
    for path in old.difference(paths):
        path.unlink()
    return paths


def _of_a_run(path: Path) -> bool:
    """Whether a CIF file has the name and the first line of those that :func:`write_best` writes."""
    formula = re.fullmatch(r"\d\d_(\w+)\.cif", path.name)
    if formula is None or path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.readline(1000).startswith(f"# {_title(formula[1])}".encode())


def _title(formula: str) -> str:
    """How the first line of a CIF file of a run begins."""
    return f"{formula}, designed by CrystalJAX, task "


def _entry(env: CrystalEnv, crystal: Episode, known: tuple[Caveat, ...] | None) -> dict[str, Any]:
    skeleton = env.skeletons[crystal.skeleton]
    return {
        "formula": crystal.formula,
        "elements": list(crystal.elements),
        "value": crystal.value,
        "caveats": None if known is None else caveats.names(known),
        "status": crystal.status,
        "reward": crystal.reward,
        "episode": crystal.episode,
        "skeleton": skeleton.name,
        "lattice": skeleton.lattice.tolist(),
        "frac_coords": skeleton.frac_coords.tolist(),
    }


def _provenance(env: CrystalEnv, crystal: Episode, known: tuple[Caveat, ...] | None, origin: Origin) -> list[str]:
    """Comment lines of a CIF file."""
    skeleton, objective = env.skeletons[crystal.skeleton], env.objective
    lines = [
        f"{_title(crystal.formula)}{env.name}",
        f"{objective.property}: {crystal.value:.6g} {objective.unit}",
        *(f"caveat {caveat.name}: {caveat.value}" for caveat in known or ()),
        f"status: {crystal.status}",
        f"target: {origin.target:.6g} {objective.unit}",
        f"reward: {crystal.reward:.6g}",
        f"source of the value: {origin.label}",
        f"geometry: skeleton {skeleton.name} ({skeleton.source or 'user'}), as given",
    ]
    settings = [f"{key} = {json.dumps(value)}" for key, value in sorted(origin.fingerprint.items())]
    return [*lines, *(f"engine: {setting}" for setting in settings)]


def draw_curve(path: Path, env: CrystalEnv, metrics: list[dict[str, Any]], origin: Origin, agent: str) -> None:
    """Mean and best reward against the distinct crystals evaluated, as a PNG."""
    from matplotlib.figure import Figure

    from crystaljax import viewer

    rows = [row for row in metrics if row["mean_reward"] is not None]
    evaluated = np.array([row["distinct"] - row["refused"] for row in rows])
    mean = np.array([row["mean_reward"] for row in rows])
    best = [row["best_reward"] for row in rows]
    smooth = [mean[max(0, i + 1 - SMOOTHED_UPDATES) : i + 1].mean() for i in range(len(mean))]
    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(evaluated, mean, ".", color="#56b4e9", ms=5, label="mean over the episodes of an update")
    axes.plot(evaluated, smooth, color="#0072b2", lw=2, label=f"its mean over {SMOOTHED_UPDATES} updates")
    axes.step(evaluated, best, color="#d55e00", lw=2, where="post", label="best so far")
    axes.axhline(env.objective.best_reward, color="0.6", lw=0.8, ls="--")
    axes.set_xlabel("Distinct crystals evaluated (count)")
    axes.set_ylabel("Reward of an episode (dimensionless)")
    title = f"{env.name}, {agent}, target {origin.target:g} {env.objective.unit}"
    axes.set_title(viewer.plain(title), loc="left", fontsize=11)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", edgecolor="none")
    figure.supxlabel(viewer.plain(f"Values: {origin.label}"), fontsize=8, color="0.35", x=0.99, ha="right")
    files.replace_bytes(path, viewer.png(figure))


def best_table(env: CrystalEnv, ledger: Ledger, origin: Origin) -> Table:
    """The best distinct crystals of a run."""
    evaluated = len(ledger.crystals) - ledger.refused
    best = ledger.best(BEST_COUNT)
    table = _crystal_table(env, best)
    table.title = f"Best crystals, {env.name} (target {origin.target:g} {env.objective.unit})"
    table.caption = (
        f"{ledger.episodes} episodes, {evaluated} distinct crystals evaluated, {ledger.refused} refused without a "
        f"calculation. Values: {origin.label}{_explained(env, best)}"
    )
    return table


def designs_table(env: CrystalEnv, ledger: Ledger, origin: Origin) -> Table:
    """Every distinct crystal that a policy designed, the best first."""
    by_reward = sorted(ledger.crystals, key=lambda crystal: -crystal.reward)
    table = _crystal_table(env, by_reward)
    table.title = f"Designs for {env.name} (target {origin.target:g} {env.objective.unit})"
    table.caption = (
        f"{ledger.episodes} episodes, mean reward {ledger.mean_reward:.4f}, {len(ledger.crystals)} distinct crystals. "
        f"Values: {origin.label}{_explained(env, by_reward)}"
    )
    return table


def _crystal_table(env: CrystalEnv, crystals: list[Episode]) -> Table:
    from rich.table import Table

    table = Table()
    known = caveats_of(env, crystals)
    doubtful = any(known)
    several = len(env.skeletons) > 1
    table.add_column("#", justify="right")
    table.add_column("crystal")
    if several:
        table.add_column("skeleton")
    table.add_column(property_title(env), justify="right")
    if doubtful:
        table.add_column("caveats")
    table.add_column("reward", justify="right")
    table.add_column("outcome")
    table.add_column("episode", justify="right")
    for rank, (crystal, codes) in enumerate(zip(crystals, known, strict=True), start=1):
        skeleton = [env.skeletons[crystal.skeleton].name] if several else []
        value = "-" if crystal.value is None else f"{crystal.value:.3f}"
        told = [" ".join(caveats.names(codes or ()))] if doubtful else []
        rest = (value, *told, f"{crystal.reward:.4f}", crystal.status, str(crystal.episode))
        table.add_row(str(rank), crystal.formula, *skeleton, *rest)
    return table


def _explained(env: CrystalEnv, crystals: Sequence[Episode]) -> str:
    """What the codes in a table mean, a line each, after what its caption says; empty without codes."""
    present = {caveat for known in caveats_of(env, crystals) for caveat in known or ()}
    return "".join(f"\n{caveat.name}: {caveat.value}" for caveat in Caveat if caveat in present)
