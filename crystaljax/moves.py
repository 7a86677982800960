"""What a step of an episode decides, by name. Light to import: the command line lists the modes in its help."""

MODES = ("site", "orbit", "substitution")
"""Modes of the environment, see :class:`crystaljax.env.CrystalEnv`."""
