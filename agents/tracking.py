"""Metrics of a run in Weights & Biases, beside TensorBoard; the library is the extra ``wandb``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crystaljax.files import replace_text

ID_FILE = "wandb.json"


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

        path = folder / ID_FILE
        known = json.loads(path.read_text())["id"] if path.exists() else None
        # A sweep has several tracked runs at once.
        options = {"reinit": "create_new", "resume": "allow", "dir": str(folder)}
        self._run = wandb.init(project=project, name=folder.name, id=known, config=settings, **options)
        replace_text(path, json.dumps({"id": self._run.id}) + "\n")

    def write(self, numbers: dict[str, float], update: int) -> None:
        """Enter the metrics of an update."""
        self._run.log(numbers, step=update)

    def close(self) -> None:
        self._run.finish()
