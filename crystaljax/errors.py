"""The error that all errors of this package are."""

from __future__ import annotations


class CrystalJAXError(Exception):
    """Something that the user can mend; the message says what was wrong and what to do.

    Each part of the package has subclasses of its own, most of them also a ``ValueError`` (bad input) or a
    ``RuntimeError`` (the machine is not ready). The command line shows the message alone, without a traceback.
    """
