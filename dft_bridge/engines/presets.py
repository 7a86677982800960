"""What the engines of this package share: presets, the settings that a property depends on, refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from crystaljax.dft_bridge.engines.base import Crystal, Result
from crystaljax.dft_bridge.engines.checks import check_property, odd_electrons, plain, symbols_of, too_close

from crystaljax.status import Status


class PresetEngine:
    """Base of an engine whose settings are the fields of a frozen dataclass.

    Attributes:
        engine: its name in the registry and in fingerprints.
        method_version: raised when the code of the engine changes a number that the settings do not show.
        presets: settings by preset name.
        per_property: what each property has a setting of its own for, such as ``cutoff`` for ``density_cutoff``.
        shared_settings: the settings that every property depends on.
        own_settings: by property, the settings that only it depends on.
    """

    engine: str
    method_version: int
    presets: Mapping[str, Mapping[str, Any]]
    per_property: tuple[str, ...] = ()
    shared_settings: tuple[str, ...] = ()
    own_settings: Mapping[str, tuple[str, ...]]

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The engine with the settings of a preset; any field may be overridden by keyword."""
        if name not in cls.presets:
            raise ValueError(f"no preset {name!r} of the {cls.engine} engine; choose one of {', '.join(cls.presets)}")
        return cls(**{**cls.presets[name], **overrides})

    def settings_of(self, property_name: str) -> dict[str, Any]:
        """The settings that a property depends on, by name (JSON-able); raises ``ValueError`` for an unknown one."""
        check_property(property_name)
        names = [f"{property_name}_{what}" for what in self.per_property]
        names += [*self.shared_settings, *self.own_settings[property_name]]
        return {name: plain(getattr(self, name)) for name in names}

    def refuse(self, crystal: Crystal, property_name: str) -> Result | None:
        """A failure that needs no calculation, or ``None``: no data for an element, atoms too close, odd electrons."""
        check_property(property_name)
        symbols = symbols_of(crystal)
        lacking = self._lacking(symbols)
        if lacking:
            return Result.failure(Status.UNSUPPORTED_ELEMENT, lacking)
        refusal = too_close(crystal, self.min_distance, self.min_distance_factor)
        if refusal is None and self._needs_pairs(property_name):
            refusal = odd_electrons(self._electrons(symbols))
        return refusal

    def _fingerprint(self, property_name: str, **facts: Any) -> dict[str, Any]:
        """The settings of the property, besides the facts of the engine."""
        common = {"engine": self.engine, "method": self.method_version, "property": property_name}
        return {**common, **facts, **self.settings_of(property_name)}

    def _lacking(self, symbols: Sequence[str]) -> str:
        """For which of the elements there are no data, as a text; empty if there are for all."""
        return ""

    def _needs_pairs(self, property_name: str) -> bool:
        """Whether electrons must be even: a gap is counted by whole bands, and so are fixed occupations."""
        return property_name == "band_gap" or getattr(self, f"{property_name}_width") == 0.0

    def _electrons(self, symbols: Sequence[str]) -> int:
        """Valence electrons of these atoms."""
        raise NotImplementedError
