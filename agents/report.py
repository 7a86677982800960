"""What a run leaves for people: the best crystals as CIF and JSON, the learning curve, a closing table."""

from __future__ import annotations

import dataclasses
import json
import math
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
from crystaljax.env import CrystalEnv, EnvParams
from crystaljax.objectives import Objective
from crystaljax.run_folder import BEST, CRYSTALS, Goals, RunFolderError

if TYPE_CHECKING:
    from rich.table import Table

BEST_COUNT = 10
SMOOTHED_UPDATES = 5
"""Updates over which the learning curve is averaged."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the values of a run come from.

    Attributes:
        label: of the evaluator, such as ``gpaw 26.7.0, fast``.
        fingerprint: JSON-able facts of the engine that can change a number (version, data sets, settings); empty for
            evaluators without one.
        objective: what the run asks for, with its targets.
    """

    label: str
    fingerprint: dict[str, Any]
    objective: Objective

    @classmethod
    def of(cls, env: CrystalEnv, params: EnvParams, fingerprint: dict[str, Any] | None = None) -> Origin:
        """Of what an environment evaluates under these parameters."""
        return cls(env.evaluator.label, fingerprint or {}, env.objective.with_targets(params.target))


def _goals(objective: Objective) -> dict[str, Goals]:
    found = {}
    for wanted in objective.properties:
        low, high = objective.goal(wanted)
        bounds = {"low": low if math.isfinite(low) else None, "high": high if math.isfinite(high) else None}
        found[wanted.name] = {"unit": wanted.unit, **bounds, "tolerance": wanted.tolerance}
    return found


def to_atoms(env: CrystalEnv, crystal: Episode) -> Atoms:
    """The crystal in the cell of its skeleton, which is not relaxed."""
    skeleton = env.skeletons[crystal.skeleton]
    return Atoms(crystal.elements, cell=skeleton.lattice, scaled_positions=skeleton.frac_coords, pbc=True)


def caveats_of(env: CrystalEnv, crystals: Sequence[Episode]) -> list[tuple[Caveat, ...] | None]:
    """What a reader must know of the values; ``None`` where there is no value, or nobody knows."""
    look_up, valued = env.evaluator.caveats, [crystal for crystal in crystals if crystal.values is not None]
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
        "objective": origin.objective.text(),
        "properties": _goals(origin.objective),
        "best_reward": origin.objective.best_reward,
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
        "values": crystal.values,
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
    skeleton = env.skeletons[crystal.skeleton]
    lines = [
        f"{_title(crystal.formula)}{env.name}",
        *(f"{of.name}: {crystal.values[of.name]:.6g} {of.unit}".rstrip() for of in origin.objective.properties),
        *(f"caveat {caveat.name}: {caveat.value}" for caveat in known or ()),
        f"status: {crystal.status}",
        f"objective: {origin.objective.text()}",
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
    title = f"{env.name}, {agent}, {origin.objective.title}"
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
    table.title = f"Best crystals, {env.name} ({origin.objective.title})"
    table.caption = (
        f"{ledger.episodes} episodes, {evaluated} distinct crystals evaluated, {ledger.refused} refused without a "
        f"calculation. Values: {origin.label}{_explained(env, best)}"
    )
    return table


def designs_table(env: CrystalEnv, ledger: Ledger, origin: Origin) -> Table:
    """Every distinct crystal that a policy designed, the best first."""
    by_reward = sorted(ledger.crystals, key=lambda crystal: -crystal.reward)
    table = _crystal_table(env, by_reward)
    table.title = f"Designs for {env.name} ({origin.objective.title})"
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
    for wanted in env.objective.properties:
        table.add_column(wanted.heading, justify="right")
    if doubtful:
        table.add_column("caveats")
    table.add_column("reward", justify="right")
    table.add_column("outcome")
    table.add_column("episode", justify="right")
    for rank, (crystal, codes) in enumerate(zip(crystals, known, strict=True), start=1):
        skeleton = [env.skeletons[crystal.skeleton].name] if several else []
        values = ["-" if crystal.values is None else f"{crystal.values[name]:.3f}" for name in env.objective.names]
        told = [" ".join(caveats.names(codes or ()))] if doubtful else []
        rest = (*values, *told, f"{crystal.reward:.4f}", crystal.status, str(crystal.episode))
        table.add_row(str(rank), crystal.formula, *skeleton, *rest)
    return table


def _explained(env: CrystalEnv, crystals: Sequence[Episode]) -> str:
    """What the codes in a table mean, a line each, after what its caption says; empty without codes."""
    present = {caveat for known in caveats_of(env, crystals) for caveat in known or ()}
    return "".join(f"\n{caveat.name}: {caveat.value}" for caveat in Caveat if caveat in present)
