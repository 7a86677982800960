"""The settings of a training run, as they are saved in its folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

AGENTS = ("ppo", "random")
NETWORKS = ("transformer", "megnet", "chgnet", "chgnet-pretrained", "mlp")
FILE = "config.json"
MOVABLE = ("store", "workers")
"""Settings that change no number, so a resumed run may have others."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that determines the numbers of a run, and where its calculations happen.

    Attributes:
        task: id of a registered task; empty for structures of one's own.
        structures: structure files or AFLOW prototype names that take the place of the task's skeletons.
        property: ``band_gap``, ``bulk_modulus`` or ``density``; only with ``structures``.
        agent: ``ppo`` or ``random``.
        network: one of :data:`NETWORKS`; ``mlp`` is for one skeleton.
        engine: DFT engine, or the name of an on-device evaluator.
        preset: settings of the DFT engine, by name.
        vocabulary: ``small``, ``medium`` or ``large``.
        mode: ``site``, ``orbit`` or ``substitution``; empty for the task's own.
        target: in the unit of the property; ``None`` for the task's own.
        episodes: episodes to train for; rounded up to whole updates.
        seed: of everything random.
        lanes, steps: environments in parallel, and steps of each per update.
        learning_rate, minibatches, epochs, entropy, discount, trace, clip, min_deviation, target_kl, anneal: see
            :class:`agents.ppo.PPOConfig`.
        checkpoint_every: updates between two checkpoints.
        store: folder or file of the results store; ``None`` for the engine's default.
        workers: processes that calculate; ``None`` for one per GPU that the engine can use, else one per core.
    """

    task: str = ""
    structures: tuple[str, ...] = ()
    property: str = ""
    agent: str = "ppo"
    network: str = "transformer"
    engine: str = "planewave"
    preset: str = "fast"
    vocabulary: str = "small"
    mode: str = ""
    target: float | None = None
    episodes: int = 1000
    seed: int = 10
    lanes: int = 16
    steps: int = 32
    learning_rate: float = 2.5e-4
    minibatches: int = 2
    epochs: int = 4
    entropy: float = 0.01
    discount: float = 0.99
    trace: float = 0.95
    clip: float = 0.2
    min_deviation: float = 1e-8
    target_kl: float | None = None
    anneal: bool = True
    checkpoint_every: int = 10
    store: str | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.agent not in AGENTS:
            raise ValueError(f"unknown agent {self.agent!r}: use one of {AGENTS}")
        if bool(self.task) == bool(self.structures):
            raise ValueError("give a task or structures of your own, one of the two")
        if bool(self.property) != bool(self.structures):
            raise ValueError("structures of your own need a property, and a task has its own; give both or neither")
        for name in ("episodes", "lanes", "steps", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")

    def updates(self, horizon: int) -> int:
        """Updates that complete at least ``episodes`` episodes of ``horizon`` steps."""
        per_lane = -(-self.episodes // self.lanes)
        return -(-per_lane * horizon // self.steps)

    def save(self, folder: Path, skeletons: list[str]) -> None:
        """Write ``config.json``; ``skeletons`` are the digests of the skeletons, which :func:`load` returns too."""
        text = json.dumps({**dataclasses.asdict(self), "skeletons": skeletons}, indent=2)
        (folder / FILE).write_text(text + "\n")


def load(folder: Path) -> tuple[RunConfig, list[str]]:
    """The settings of a run folder and the digests of its skeletons.

    Raises:
        ValueError: if the folder is not that of a run.
    """
    try:
        entries: dict[str, Any] = json.loads((folder / FILE).read_text())
        skeletons = entries.pop("skeletons")
        return RunConfig(**{**entries, "structures": tuple(entries["structures"])}), skeletons
    except FileNotFoundError:
        raise ValueError(f"{folder} is not the folder of a run: it has no {FILE}") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / FILE} is not the settings of a run ({error})") from error
