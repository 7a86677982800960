"""The version of the package, which stands in ``pyproject.toml`` only."""

from importlib import metadata

__version__ = metadata.version("crystaljax")
