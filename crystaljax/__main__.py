"""The program ``crystaljax``, also ``python -m crystaljax``: the command line, and Ctrl-C while that is loaded."""

from __future__ import annotations

import sys


def main() -> int:
    """Entry point; returns the exit code, see :func:`crystaljax.cli.main`."""
    try:
        from crystaljax.signals import no_interrupt_is_lost

        with no_interrupt_is_lost():
            from crystaljax.cli import main as command

            return command()
    except KeyboardInterrupt:
        print("crystaljax: interrupted", file=sys.stderr)
        return 130  # as cli.INTERRUPTED, which may not be there yet


if __name__ == "__main__":
    sys.exit(main())
