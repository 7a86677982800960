"""Pseudopotentials shipped with the package; see ``ATTRIBUTION.md`` for sources and licence."""
