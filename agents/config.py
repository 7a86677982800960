"""The settings of a training run: from flags or a TOML file, and as they are saved in its folder.

A table of settings, in TOML or JSON, has the fields of :class:`RunConfig`, the name of an ``agent``, and a table for
each algorithm whose hyperparameters are not the defaults, and one for settings of the engine::

    task = "BandGap-PerovskiteABX3-v0"
    agent = "ppo"
    episodes = 2400

    [ppo]
    lanes = 16
    learning_rate = 1.5e-3

    [engine_options]
    band_gap_kppa = 200
"""

from __future__ import annotations

import builtins
import dataclasses
import inspect
import json
import logging
import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crystaljax import plugins
from crystaljax.agents.hyperparameters import LARGEST, AlgorithmConfig, PPOConfig
from crystaljax.files import FileRefused, replace_text
from crystaljax.plain_data import typed
from crystaljax.run_folder import CONFIG, LARGEST_SEED, RunFolderError, read_document
from crystaljax.urls import without_password

logger = logging.getLogger(__name__)

DEFAULT_AGENT = "ppo"
SHIPPED = Path(__file__).with_name("configs")
"""TOML files of settings that the package ships, each usable by its name."""
MOVABLE = ("store", "workers", "scheduler", "timeout", "memory", "max_dft_calls", "max_core_hours", "wandb")
"""Settings of where calculations happen, what they may cost and who is told, so a resumed run may have others."""
URLS = ("store", "scheduler")
"""Settings that may be URLs, with a password."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that determines the numbers of a run, and where its calculations happen.

    Attributes:
        task: id of a task; `crystaljax tasks` lists them.
        structures: design on this structure instead of a task's: a file (CIF, POSCAR ...) or AFLOW prototype; may be
            repeated.
        property: property to design for, with structures of one's own.
        objective: what to ask for in place of the task's or of a property, one term or several: band_gap=1.34+-0.2 (a
            target and the width of its Gaussian), band_gap=1.1..1.6, density<=5, bulk_modulus>=100, with *2 at the end
            for twice the weight.
        combine: how the terms of an objective make a reward, by their product or their weighted mean.
        algorithm: hyperparameters, whose type says which algorithm trains.
        network: features of a crystal; mlp is for one skeleton.
        engine: DFT engine (see `crystaljax doctor`), ase:MODULE.CLASS for any ASE calculator, or unrelaxed-density: no
            DFT, density tasks only. Tasks with a table of results take it from there unless an engine is named.
        preset: settings of the engine: fast, crystalgym, standard ...
        engine_options: single settings of the engine that replace those of the preset, such as band_gap_cutoff.
        vocabulary: elements to choose from.
        mode: one decision per site, or per symmetry orbit; the task's unless given.
        target: aim at this value, in eV, GPa or g/cm3; the task's unless given.
        episodes: crystals to design, rounded up to whole updates.
        seed: of everything random.
        checkpoint_every: updates between checkpoints.
        store: results store, shared by all runs: a file, or postgresql://...; the engine's default unless given. A
            password in it is not saved: it is better in PGPASSWORD or ~/.pgpass, where a resumed run finds it.
        workers: processes that calculate; one per GPU that the engine can use, else one per core, unless given.
        scheduler: Dask scheduler whose workers calculate instead, tcp://host:8786.
        timeout: stop a calculation after so many seconds; no limit unless given.
        memory: stop a calculation that needs more GiB; no limit unless given.
        max_dft_calls: end the run after so many calculations; --resume with more goes on.
        max_core_hours: end the run after so many core-hours of calculations.
        wandb: Weights & Biases project that gets the metrics too.
        delayed: go on acting while up to so many crystals wait for their reward, instead of waiting for every batch
            (gp, ppo, dqn, rainbow, sac, random, random-neutral). Numbers then depend on the order of arrival.
    """

    task: str = ""
    structures: tuple[str, ...] = ()
    property: str = ""
    objective: tuple[str, ...] = ()
    combine: str = "product"
    algorithm: AlgorithmConfig = PPOConfig()
    network: str = "transformer"
    engine: str = "planewave"
    preset: str = "fast"
    engine_options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    vocabulary: str = "small"
    mode: str = ""
    target: float | None = None
    episodes: int = 1000
    seed: int = 10
    checkpoint_every: int = 10
    store: str | None = dataclasses.field(default=None, repr=False)  # may hold a password
    workers: int | None = None
    scheduler: str | None = dataclasses.field(default=None, repr=False)
    timeout: float | None = None
    memory: float | None = None
    max_dft_calls: int | None = None
    max_core_hours: float | None = None
    wandb: str | None = None
    delayed: int = 0

    def __post_init__(self) -> None:
        if bool(self.task) == bool(self.structures):
            raise ValueError("give a task or structures of your own, one of the two")
        if self.property and self.objective:
            raise ValueError("give a property or an objective, one of the two")
        if self.structures and not (self.property or self.objective):
            raise ValueError("structures of your own need a property or an objective; give one")
        if self.task and self.property:
            raise ValueError("a task has a property of its own; leave it out, or give an objective in its place")
        if self.objective:
            from crystaljax.objectives import parse  # which loads JAX, and help does not need it

            parse(*self.objective, combine=self.combine)
        elif self.combine != RunConfig.combine:
            raise ValueError(f"combine={self.combine} is for an objective; give one")
        if self.target is not None and self.objective:
            raise ValueError("the targets of an objective stand in it; leave out target")
        for name in ("episodes", "checkpoint_every"):
            if not 1 <= getattr(self, name) <= LARGEST:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1 and at most {LARGEST}")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"seed is {self.seed}; give one between 0 and {LARGEST_SEED}, for no other is different")
        if self.delayed < 0:
            raise ValueError(f"delayed is {self.delayed}; give how many rewards may be outstanding, or 0 to wait")

    @builtins.property  # "property" is a field here
    def agent(self) -> str:
        """Name of the algorithm; raises ``ValueError`` if it has none."""
        for name, kind in algorithms().items():
            if type(self.algorithm) is kind:
                return name
        raise ValueError(
            f"{type(self.algorithm).__name__} is not the settings of any agent that is installed; offer it by an entry "
            f"point of the group {plugins.AGENTS!r}"
        )

    def updates(self, horizon: int) -> int:
        """Updates that complete at least ``episodes`` episodes of ``horizon`` steps."""
        return self.algorithm.updates_for(self.episodes, horizon)

    def save(self, folder: Path, skeletons: list[str]) -> None:
        """Write ``config.json``; ``skeletons`` are the digests of the skeletons, which :func:`load` returns too."""
        replace_text(folder / CONFIG, json.dumps({**to_table(self), "skeletons": skeletons}, indent=2) + "\n")


def settings(kind: type) -> dict[str, Any]:
    """The types of the fields that a user may set, by name."""
    types_ = typing.get_type_hints(kind)
    # An update is a matter of the run, which has a number of episodes.
    return {field.name: types_[field.name] for field in dataclasses.fields(kind) if field.name != "updates"}


def hyperparameters() -> dict[str, Any]:
    """The types of the settings of all algorithms, by name; what two of them share has one type, the first one's."""
    found: dict[str, Any] = {}
    for kind in algorithms().values():
        found |= {name: type_ for name, type_ in settings(kind).items() if name not in found}
    return found


def descriptions(kind: type) -> dict[str, str]:
    """What the ``Attributes`` of a dataclass, and of those that it extends, say about each field."""
    found = {}
    for base in reversed(kind.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE):
            found[name] = " ".join(text.split())
    return found


def algorithm(name: str) -> type[AlgorithmConfig]:
    """The settings of the algorithm of that name.

    Raises:
        PluginError: for an unknown one, with the known names, and for one that cannot be used; a ``ValueError``.
    """
    return _settings_of(plugins.find(plugins.AGENTS, name))


def algorithms() -> dict[str, type[AlgorithmConfig]]:
    """The settings of every agent that can be used, by its name; a warning names those that cannot."""
    found = {}
    for name, offer in plugins.offered(plugins.AGENTS).items():
        try:
            found[name] = _settings_of(offer)
        except plugins.PluginError as error:
            logger.warning("%s", error)
    return found


def _settings_of(offer: plugins.Offer) -> type[AlgorithmConfig]:
    """What an entry point offers, if it can be the settings of an agent; else raises ``PluginError``."""
    kind = offer.load()
    if not (isinstance(kind, type) and issubclass(kind, AlgorithmConfig)):
        raise plugins.PluginError(f"{offer} is {kind!r}, no AlgorithmConfig; mend it")
    taken = settings(kind).keys() & settings(RunConfig).keys()
    if taken:
        names = ", ".join(sorted(taken))
        raise plugins.PluginError(f"{offer} has settings named {names}, as every run has; rename them")
    return kind


def to_table(config: RunConfig) -> dict[str, Any]:
    """The settings of a run as a table, with every hyperparameter of its algorithm.

    Passwords in URLs are left out: a table is saved and shown. A resumed run takes that of a PostgreSQL store from
    ``PGPASSWORD`` or ``~/.pgpass``.
    """
    entries = {name: getattr(config, name) for name in settings(RunConfig) if name != "algorithm"}
    entries |= {name: without_password(entries[name]) for name in URLS if entries[name] is not None}
    chosen = {name: getattr(config.algorithm, name) for name in settings(type(config.algorithm))}
    agent = config.agent
    return {**entries, "agent": agent, agent: chosen}


def from_table(table: Mapping[str, Any], source: str) -> RunConfig:
    """The run that a table describes; tables of other algorithms are checked and put aside.

    Args:
        source: where the table comes from, for messages.

    Raises:
        ValueError: for a key that nothing has, with the known ones, and for a value that cannot be.
    """
    entries = dict(table)
    chosen = algorithm(entries.pop("agent", DEFAULT_AGENT))
    built = {chosen: chosen()}
    for name, kind in algorithms().items():
        if name in entries:
            built[kind] = _build(kind, entries.pop(name), f"{source}, table [{name}]")
    return _build(RunConfig, entries, source, algorithm=built[chosen])


def overlaid(table: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """A table with flags on top; hyperparameters go into the table of the agent.

    Raises:
        ValueError: for a hyperparameter that the agent does not have, with those that it has.
    """
    agent = flags.get("agent", table.get("agent", DEFAULT_AGENT))
    own = settings(algorithm(agent))
    mine = {name: value for name, value in flags.items() if name in hyperparameters()}
    foreign = [name for name in mine if name not in own]
    if foreign:
        missing, known = (", ".join(map(flag, names)) for names in (foreign, own))
        raise ValueError(f"{agent} has no {missing}; it has {known}")
    others = {name: value for name, value in flags.items() if name not in mine}
    if "engine_options" in others:
        others["engine_options"] = {**table.get("engine_options", {}), **others["engine_options"]}
    return {**table, **others, "agent": agent, agent: {**table.get(agent, {}), **mine}}


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def _build(kind: type, entries: Any, source: str, **fixed: Any) -> Any:
    """A dataclass from the entries of a table."""
    if not isinstance(entries, Mapping):
        raise ValueError(f"{source} is {entries!r}; it must be a table")
    known = {name: type_ for name, type_ in settings(kind).items() if name not in fixed}
    for name in entries:
        if name not in known:
            raise ValueError(f"{source}: unknown key {name!r}; known keys are {', '.join(known)}")
    return kind(**{name: typed(value, known[name], f"{source}: {name}") for name, value in entries.items()}, **fixed)


def shipped() -> tuple[str, ...]:
    """Names of the settings that the package ships."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.toml")))


def find(name: str) -> Path:
    """The TOML file of that path, or else the shipped one of that name; raises ``ValueError`` if there is neither."""
    if Path(name).exists():
        return Path(name)
    if name in shipped():
        return SHIPPED / f"{name}.toml"
    raise ValueError(f"there is no file {name}; give the path of a TOML file, or one of {', '.join(shipped())}")


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file; raises ``ValueError``, with file and place, for one that cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, or not TOML
        raise ValueError(f"{path} is not a TOML file: {error}") from error


def read_options(options: Sequence[str]) -> dict[str, Any]:
    """The table of options ``name=value``; a value is read as in TOML, and as text if it is no value of TOML.

    So ``arguments.model=small`` is an entry of the table ``arguments``.

    Raises:
        ValueError: an option is not of this form, or is given twice.
    """
    lines = []
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", name.strip()):
            raise ValueError(f"--engine-option {option}: write NAME=VALUE, such as band_gap_kppa=200")
        try:
            tomllib.loads(f"value = {value}")
        except ValueError:
            value = json.dumps(value)
        lines.append(f"{name} = {value}")
    try:
        return tomllib.loads("\n".join(lines))
    except ValueError as error:
        raise ValueError(f"--engine-option {', '.join(options)}: give each once ({error})") from error


def load(folder: Path) -> tuple[RunConfig, list[str]]:
    """The settings of a run folder and the digests of its skeletons.

    Raises:
        RunFolderError: if the folder is not that of a run (names those in it), or that of a run of an earlier version.
        FileRefused: if the file is a link, a pipe ...
    """
    path = folder / CONFIG
    try:
        entries = read_document(path, dict[str, Any])
        skeletons = typed(entries.pop("skeletons", None), list[str], "skeletons")
        return from_table(entries, str(path)), skeletons
    except (FileNotFoundError, NotADirectoryError):
        inside = " ".join(str(file.parent) for file in sorted(folder.glob(f"*/{CONFIG}")))
        advice = f"there are runs in it, such as {inside}" if inside else "give what was --run of a training"
        raise RunFolderError(f"{folder} is not the folder of a run: it has no {CONFIG}; {advice}") from None
    except FileRefused:
        raise
    except ValueError as error:
        raise RunFolderError(
            f"{path} is not the settings of a run that this version can read ({error}); start the run anew"
        ) from error
