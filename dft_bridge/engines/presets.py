"""What the engines of this package share: presets, the settings that a property depends on, refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from crystaljax.dft_bridge.engines.base import Crystal, Result
from crystaljax.dft_bridge.engines.caveats import with_caveats
from crystaljax.dft_bridge.engines.checks import (
    bulk_modulus,
    check_property,
    checked,
    odd_electrons,
    plain,
    symbols_of,
    too_close,
)
from crystaljax.dft_bridge.kpoints import Sampling, shortest_cell
from crystaljax.status import Status

SAMPLING_FACT = "sampling"
"""Of a fingerprint: by which rule k-points are chosen, where it is not ``cell``."""


class PresetEngine:
    """Base of an engine whose settings are the fields of a frozen dataclass.

    Attributes:
        engine: its name in the registry and in fingerprints.
        method_version: raised when the code of the engine changes a number that the settings do not show.
        presets: settings by preset name.
        per_property: what each property has a setting of its own for, such as ``cutoff`` for ``density_cutoff``.
        shared_settings: the settings that every property depends on.
        own_settings: by property, the settings that only it depends on.
        sampling: rule for k-points, one of :data:`~crystaljax.dft_bridge.kpoints.RULES`; a field.
        kpoint_length: Å, of the period that a mesh stands for by the rule ``lattice``, at least; a field.
        spin: whether spin is free; ``None`` where that is for the calculator to know.
    """

    engine: str
    method_version: int
    presets: Mapping[str, Mapping[str, Any]]
    per_property: tuple[str, ...] = ()
    shared_settings: tuple[str, ...] = ()
    own_settings: Mapping[str, tuple[str, ...]]
    sampling: str = "cell"
    kpoint_length: float = 0.0
    spin: bool | None = None
    eos_volumes: tuple[float, ...]
    eos_range: tuple[float, float]
    eos_further: int = 0
    modulus_at: str = "relaxed"

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

    def sampling_of(self, property_name: str) -> Sampling:
        """Which k-points a calculation of the property gets."""
        return Sampling(
            rule=self.sampling,
            kppa=getattr(self, f"{property_name}_kppa"),
            length=self.kpoint_length,
            **self._sampling_settings(property_name),
        )

    def fingerprint_of(self, lattice: np.ndarray, frac_coords: np.ndarray, property_name: str) -> dict[str, Any]:
        """Everything that can change the number of this property for crystals of these sites (JSON-able).

        It is :meth:`fingerprint`, without the rule for k-points where both rules come to the same points: the number
        is then the same too, and so is its key.

        Args:
            lattice: [3, 3] Å.
            frac_coords: [N, 3].
            property_name: what is calculated.
        """
        facts = self.fingerprint(property_name)
        if self.sampling == "lattice":
            sampling = self.sampling_of(property_name)
            inner, _ = self._shortest(Crystal(lattice, frac_coords, np.zeros(len(frac_coords), int)))
            before = dataclasses.replace(sampling, rule="cell", special=self._cell_rule_special(property_name))
            if sampling.same_points(before, inner.lattice, inner.frac_coords):
                del facts[SAMPLING_FACT]
        return facts

    def _fingerprint(self, property_name: str, **facts: Any) -> dict[str, Any]:
        """The settings of the property, besides the facts of the engine."""
        common = {"engine": self.engine, "method": self.method_version, "property": property_name}
        if self.sampling != "cell":
            facts[SAMPLING_FACT] = {"rule": self.sampling, "length": self.kpoint_length}
        further = {"eos_further": self.further} if property_name == "bulk_modulus" and self.further else {}
        return {**common, **facts, **self.settings_of(property_name), **further}

    def _finished(self, result: Result, crystal: Crystal, property_name: str, seconds: float) -> Result:
        """The result of a calculation as it leaves the engine: its number is checked, its caveats are there."""
        settings = self._fingerprint(property_name, spin=self.spin)
        whole = with_caveats(checked(result, property_name), crystal, property_name, settings)
        return dataclasses.replace(whole, seconds=seconds)

    def before(self, property_name: str) -> Self | None:
        """The same engine when it calculated the planned volumes only, and extrapolated."""
        return dataclasses.replace(self, eos_further=0) if property_name == "bulk_modulus" and self.further else None

    def would_find(self, result: Result, property_name: str) -> bool:
        """Whether no further volume would be asked for: there is no number to improve, or its minimum is bracketed."""
        ratio = result.details.get("v0_over_v")
        if result.status != Status.OK or ratio is None:
            return result.status != Status.OK
        return min(self.eos_volumes) <= ratio <= max(self.eos_volumes)

    @property
    def further(self) -> int:
        """Volumes that may be calculated to bracket a minimum; a modulus at the given cell needs no minimum."""
        return self.eos_further if self.modulus_at == "relaxed" else 0

    def _modulus(
        self, scales: Sequence[float], energies: Sequence[float] | np.ndarray, volume: float, details: dict[str, Any]
    ) -> Result:
        """The bulk modulus by the engine's settings; arguments as :func:`.checks.bulk_modulus` has them."""
        planned, bracketed = len(self.eos_volumes), self.further > 0
        return bulk_modulus(
            scales,
            energies,
            volume,
            self.eos_range,
            self.modulus_at,
            details,
            planned=planned,
            bracketed=bracketed,
        )

    def _shortest(self, crystal: Crystal) -> tuple[Crystal, np.ndarray]:
        """The crystal in the cell that is calculated, and the integers U [3, 3] of that cell, U @ lattice."""
        operation = shortest_cell(crystal.lattice) if self.sampling == "lattice" else np.eye(3, dtype=int)
        if (operation == np.eye(3)).all():
            return crystal, operation
        coords = crystal.frac_coords @ np.linalg.inv(operation)
        return dataclasses.replace(crystal, lattice=operation @ crystal.lattice, frac_coords=coords), operation

    @staticmethod
    def _as_given(result: Result, operation: np.ndarray) -> Result:
        """The result with its relaxed cell, if it has one, in terms of the cell that was given."""
        if (operation == np.eye(3)).all() or "lattice" not in result.details:
            return result
        lattice = np.linalg.inv(operation) @ result.details["lattice"]
        coords = np.array(result.details["frac_coords"]) @ operation
        facts = {"lattice": lattice.tolist(), "frac_coords": coords.tolist()}
        return dataclasses.replace(result, details=result.details | facts)

    def _sampling_settings(self, property_name: str) -> dict[str, bool]:
        """``shifted``, ``even`` and ``special`` of the sampling."""
        raise NotImplementedError

    def _cell_rule_special(self, property_name: str) -> bool:
        """Whether the engine looks at special points by the rule ``cell`` too."""
        return False

    def _lacking(self, symbols: Sequence[str]) -> str:
        """For which of the elements there are no data, as a text; empty if there are for all."""
        return ""

    def _needs_pairs(self, property_name: str) -> bool:
        """Whether electrons must be even: a gap is counted by whole bands, and so are fixed occupations."""
        return property_name == "band_gap" or getattr(self, f"{property_name}_width") == 0.0

    def _electrons(self, symbols: Sequence[str]) -> int:
        """Valence electrons of these atoms."""
        raise NotImplementedError
