"""The command line: ``crystaljax train``, ``evaluate``, ``report``, ``show``, ``doctor``, ``tasks`` and ``store``.

Here, and only here, environment, agents and DFT engines are wired together. Commands import what they need, so that
help is fast.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from crystaljax.cli import evaluate, show, store, train
from crystaljax.cli.exit_codes import BAD_INPUT, INTERRUPTED
from crystaljax.errors import CrystalJAXError
from crystaljax.signals import no_interrupt_is_lost
from crystaljax.urls import without_password

EXTRAS = {
    **dict.fromkeys(("flashbax", "matplotlib", "orbax", "rich", "scipy", "tensorboardX"), "agents"),
    "optuna": "bo",
    "smact": "smact",
    "wandb": "wandb",
}
"""The extra that a package belongs to."""

EXAMPLES = """examples:
  crystaljax train --config perovskite --run runs/first
  crystaljax train --task BandGap-PerovskiteABX3-v0 --episodes 1000 --run runs/gap
  crystaljax train --resume --run runs/gap
  crystaljax train --structure NaCl.cif --property band_gap
  crystaljax train --task Density-C1-v0 --engine unrelaxed-density     (no DFT; seconds)
  crystaljax evaluate runs/gap --episodes 32 --target 2.0
  crystaljax report runs/gap runs/random --reference mp.csv --output report.html
  crystaljax show runs/gap -o best.png
  crystaljax train --task BandGap-C1-v0 --engine espresso --engine-option pseudopotentials=SSSP
  crystaljax doctor --install gpaw
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    # A GPU's memory is for the policy and for the DFT worker, which is another process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    traceback = False
    try:
        given = vars(parser().parse_args(arguments))
        sys.argv[1:] = map(without_password, sys.argv[1:])  # what tracks a run saves the command line
        command, traceback = given.pop("command"), given.pop("traceback")
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        logging.getLogger("crystaljax").setLevel(logging.INFO)
        with no_interrupt_is_lost():
            return command(**given) or 0
    except (KeyboardInterrupt, Exception) as error:
        if _interrupted(error):
            print("crystaljax: interrupted", file=sys.stderr)
            return INTERRUPTED
        message = _explain(error)
        if traceback or message is None:
            raise
        print(f"crystaljax: {message}", file=sys.stderr)
        return BAD_INPUT


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: modules that are being loaded make an error of their own of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _explain(error: BaseException) -> str | None:
    """One line for an error that the user can do something about; ``None`` for a defect of ours."""
    package = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package in EXTRAS:
        return f"{package} is missing: pip install 'crystaljax[{EXTRAS[package]}]'"
    if isinstance(error, CrystalJAXError | ValueError | OSError):
        # What came from a file may hold the control characters of a terminal.
        text = without_password(" ".join(str(error).split()), "***")
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text) or type(error).__name__
    return None


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; what it returns has the function of the command under ``command``."""
    found = argparse.ArgumentParser(
        prog="crystaljax",
        description="Reinforcement learning that designs crystals; every reward is a DFT calculation.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = found.add_subparsers(required=True, metavar="COMMAND")
    train.add_command(commands)
    evaluate.add_command(commands)
    show.add_commands(commands)
    store.add_commands(commands)
    return found
