"""Metrics of a run in Weights & Biases, beside TensorBoard; the library is the extra ``wandb``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crystaljax import files
from crystaljax.run_folder import TRACKER, read_tracker


def log_in() -> None:
    """See that runs can be tracked, before anything is begun.

    Raises:
        ModuleNotFoundError: the library is not installed.
        ValueError: nobody is logged in, and its mode is not offline (``$WANDB_MODE``).
    """
    import wandb

    try:
        wandb.login()
    except wandb.Error as error:
        raise ValueError(
            f"Weights & Biases: {error} Or set WANDB_MODE=offline and send the run later, by `wandb sync`."
        ) from error


class Tracker:
    """The tracked run of a run folder, which goes on as the same one when the run is resumed."""

    def __init__(self, project: str, folder: Path, settings: dict[str, Any]):
        import wandb

        known = read_tracker(folder)
        files.refuse_link(folder / "wandb")  # where the library writes
        # A sweep has several tracked runs at once.
        options = {"reinit": "create_new", "resume": "allow", "dir": str(folder)}
        self._run = wandb.init(project=project, name=folder.name, id=known, config=settings, **options)
        files.replace_text(folder / TRACKER, json.dumps({"id": self._run.id}) + "\n")

    def write(self, numbers: dict[str, float], update: int) -> None:
        """Enter the metrics of an update."""
        self._run.log(numbers, step=update)

    def close(self) -> None:
        self._run.finish()
