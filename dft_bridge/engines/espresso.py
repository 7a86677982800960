"""The ``espresso`` engine: PBE by ``pw.x`` of Quantum ESPRESSO, without spin, one process on one core.

``pw.x`` (GPL) runs as a program of its own, 6.7 or later; the user names a folder of pseudopotentials. How one
calculation is run and read is in :mod:`crystaljax.dft_bridge.engines.pwscf`. The presets (:data:`PRESETS`) and the
attempts at an SCF that does not converge (:data:`RUNGS`) are data.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ase import Atoms
from ase.units import Bohr, Ry

from crystaljax.dft_bridge.engines import pwscf, upf
from crystaljax.dft_bridge.engines.base import Crystal, EngineNotReady, Result
from crystaljax.dft_bridge.engines.checks import check_choice, density_of, to_atoms
from crystaljax.dft_bridge.engines.equation_of_state import MOST_FURTHER, sample
from crystaljax.dft_bridge.engines.presets import PresetEngine
from crystaljax.dft_bridge.kpoints import RULES
from crystaljax.dft_bridge.ladder import (
    AS_SET,
    PARTLY_FILLED,
    Climb,
    Rung,
    check_ladder,
    chosen,
    names_of,
    same_as_fixed,
)
from crystaljax.status import Status

FOLDER_VARIABLE = "ESPRESSO_PSEUDO"
"""Names the folder of pseudopotentials where no setting does; ``pw.x`` reads it too."""

METHOD_VERSION = 1
"""Raised when the code of the engine changes a number that the settings do not show."""


@dataclasses.dataclass(frozen=True)
class PwxRung(Rung):
    """One attempt at an SCF: what is changed against the engine's settings; ``width`` in Ry.

    Attributes:
        electrons: entries of the namelist ``electrons``.
    """

    electrons: Mapping[str, Any] = dataclasses.field(default_factory=dict)


RUNGS: tuple[PwxRung, ...] = (
    PwxRung("smaller mixing", electrons={"mixing_beta": 0.2}),
    PwxRung("conjugate gradients", electrons={"mixing_beta": 0.2, "diagonalization": "cg"}),
    PwxRung("more steps", steps=3, electrons={"mixing_beta": 0.1, "mixing_ndim": 12}),
    PwxRung("smearing", electrons={"mixing_beta": 0.2}, width=0.01),
)
"""The ladder: what is tried, one after the other, when an SCF does not converge with the engine's settings."""

PRESETS: dict[str, dict[str, Any]] = {
    "crystalgym": {
        "band_gap_cutoff": 50.0,
        "band_gap_kppa": 1000.0,
        "band_gap_width": 0.0,
        "bulk_modulus_cutoff": 50.0,
        "bulk_modulus_kppa": 1000.0,
        "bulk_modulus_width": 0.001,
        "density_cutoff": 50.0,
        "density_kppa": 1000.0,
        "density_width": 0.001,
        "dual": 8.0,
        "sampling": "cell",
        "kpoint_length": 0.0,
        "even_mesh": False,
        "max_scf_iterations": 300,
        "ladder": (),
        "eos_further": 0,
    },
    "standard": {
        "band_gap_cutoff": 80.0,
        "band_gap_kppa": 1000.0,
        "band_gap_width": 0.002,
        "bulk_modulus_cutoff": 90.0,
        "bulk_modulus_kppa": 1000.0,
        "bulk_modulus_width": 0.01,
        "density_cutoff": 90.0,
        "density_kppa": 1000.0,
        "density_width": 0.01,
        "dual": 0.0,
        "sampling": "lattice",
        "kpoint_length": 12.0,
        "even_mesh": True,
        "max_scf_iterations": 100,
        "ladder": names_of(RUNGS),
    },
    "fast": {
        "band_gap_cutoff": 50.0,
        "band_gap_kppa": 100.0,
        "band_gap_width": 0.004,
        "bulk_modulus_cutoff": 90.0,
        "bulk_modulus_kppa": 100.0,
        "bulk_modulus_width": 0.01,
        "density_cutoff": 80.0,
        "density_kppa": 100.0,
        "density_width": 0.01,
        "dual": 0.0,
        "sampling": "lattice",
        "kpoint_length": 7.5,
        "even_mesh": True,
        "max_scf_iterations": 60,
        "ladder": ("smaller mixing",),
    },
}
"""Settings by preset name; every key is a field of :class:`EspressoEngine`."""

_SHARED_SETTINGS = (
    "dual",
    "even_mesh",
    "tolerance",
    "mixing",
    "diagonalization",
    "max_scf_iterations",
    "extra_bands",
    "min_distance_factor",
    "min_distance",
)
_OWN_SETTINGS: dict[str, tuple[str, ...]] = {
    "band_gap": (),
    "bulk_modulus": ("eos_volumes", "eos_same_waves", "eos_range", "modulus_at"),
    "density": ("nstep", "largest_force", "largest_stress"),
}


@dataclasses.dataclass(frozen=True)
class EspressoEngine(PresetEngine):
    """Band gap, bulk modulus and density from ``pw.x``.

    Presets (``EspressoEngine.preset(name, **overrides)``, the numbers are in :data:`PRESETS`): ``crystalgym`` has the
    settings of the CrystalGym benchmark, made for SSSP (with PseudoDojo's files its 50 Ry give MgO no minimum of E(V)),
    and gives up where that does; ``standard`` and ``fast`` smear in every SCF and count gaps by bands. With PseudoDojo
    ``standard`` gives MgO 149.0, NaCl 23.6 and Si 88.4 GPa (published PBE: 149, 23.7, 88.8).

    Attributes:
        pseudopotentials: folder of UPF files, SSSP's or PseudoDojo's, one for each element; by default
            ``$ESPRESSO_PSEUDO``.
        command: how ``pw.x`` is called; by default the one on the PATH, or else the wheel ``qepy`` where
            ``crystaljax doctor --install espresso`` has put it.
        band_gap_cutoff, bulk_modulus_cutoff, density_cutoff: plane-wave cut-off in Ry.
        band_gap_kppa, bulk_modulus_kppa, density_kppa: k-points per reciprocal atom, in a mesh that holds Gamma.
        band_gap_width, bulk_modulus_width, density_width: Gaussian smearing in Ry; 0 for fixed occupations. A gap is
            counted by whole bands in both cases.
        dual: cut-off of the density in units of that of the waves; 0 for 4 where all files of a crystal are
            norm-conserving and 8 where not.
        sampling: how k-points are chosen: ``cell`` as CrystalGym does, from the lengths of the given cell vectors;
            ``lattice`` with the symmetry and the special points of the lattice, see
            :mod:`crystaljax.dft_bridge.kpoints`; for a gap bands at those that the mesh lacks are calculated in the
            density of the SCF.
        kpoint_length: Å: with ``lattice`` a mesh stands for a supercell whose edges are at least so long.
        even_mesh: round the subdivisions up to even numbers, so that the mesh also holds the zone boundary.
        tolerance: SCF criterion, estimated error of the energy in Ry per atom.
        mixing: share of the new density in the mixing.
        diagonalization: ``david`` or another word of ``pw.x``.
        max_scf_iterations: SCF steps before an attempt counts as failed.
        ladder: names of those of the :data:`RUNGS` that are tried, in the order there, when an SCF does not converge.
            The last, ``smearing``, is only for fixed occupations. Its result stands where it is the one that was asked
            for: where all occupations come out as 0 or 1 it is the state of fixed occupations, and where bands overlap
            the gap is 0 with either. Otherwise the crystal counts as not converged.
        extra_bands: empty bands, as a fraction of the occupied ones (at least four).
        eos_volumes: sampled volumes, in units of the given cell's volume.
        eos_same_waves: every volume has the plane waves of the given one, so that E(V) has no steps; otherwise every
            volume has the same cut-off.
        eos_range: where the minimum of the equation of state must lie, in the same unit.
        eos_further: volumes that may be calculated besides, where the minimum lies beyond those; without any, a modulus
            there is extrapolated, and says so. Only for a modulus at the minimum. 0 leaves no trace in keys.
        modulus_at: ``cell``: the modulus at the given cell; ``relaxed``: at the fitted minimum.
        nstep: largest number of ionic steps of the relaxation before a density.
        largest_force: eV/Å, and
        largest_stress: GPa, below which the relaxation stops early.
        min_distance_factor: atoms closer than this fraction of the sum of their covalent radii are refused.
        min_distance: atoms closer than this (Å) are refused.
    """

    engine = "espresso"
    method_version = METHOD_VERSION
    presets = PRESETS
    per_property = ("cutoff", "kppa", "width")
    shared_settings = _SHARED_SETTINGS
    own_settings = _OWN_SETTINGS
    spin = False

    name: str = dataclasses.field(default=engine, init=False)
    pseudopotentials: str = dataclasses.field(default_factory=lambda: os.environ.get(FOLDER_VARIABLE, ""))
    command: str = ""
    band_gap_cutoff: float = 80.0
    band_gap_kppa: float = 1000.0
    band_gap_width: float = 0.002
    bulk_modulus_cutoff: float = 90.0
    bulk_modulus_kppa: float = 1000.0
    bulk_modulus_width: float = 0.01
    density_cutoff: float = 90.0
    density_kppa: float = 1000.0
    density_width: float = 0.01
    dual: float = 0.0
    sampling: str = "lattice"
    kpoint_length: float = 12.0
    even_mesh: bool = True
    tolerance: float = 1e-8
    mixing: float = 0.7
    diagonalization: str = "david"
    max_scf_iterations: int = 100
    ladder: tuple[str, ...] = names_of(RUNGS)
    extra_bands: float = 0.1
    eos_volumes: tuple[float, ...] = (0.98, 0.99, 1.0, 1.01, 1.02)
    eos_same_waves: bool = True
    eos_range: tuple[float, float] = (0.8, 1.25)
    eos_further: int = MOST_FURTHER
    modulus_at: str = "relaxed"
    nstep: int = 5
    largest_force: float = 0.05
    largest_stress: float = 0.5
    min_distance_factor: float = 0.3
    min_distance: float = 0.6

    def __post_init__(self) -> None:
        check_choice("modulus_at", self.modulus_at, ("cell", "relaxed"))
        if not re.fullmatch(r"\w+(-\w+)*", self.diagonalization):  # it becomes part of an input file
            raise ValueError(f"diagonalization is {self.diagonalization!r}; give a word of pw.x, such as david")
        check_choice("sampling", self.sampling, RULES)
        check_ladder(self.ladder, RUNGS)

    def fingerprint(self, property_name: str) -> dict[str, Any]:
        """Everything that can change the number of this property (JSON-able)."""
        return self._fingerprint(
            property_name,
            **{self.name: pwscf.find_program(self.command).version},
            pseudopotential_files=upf.digest(self._files()),
            xc="PBE",
            spin=self.spin,
            ladder=[dataclasses.asdict(rung) for rung in self.rungs(property_name)],
        )

    def rungs(self, property_name: str) -> list[PwxRung]:
        """What is tried for an SCF of this property, in order."""
        fixed = getattr(self, f"{property_name}_width") == 0.0
        return [PwxRung(AS_SET), *chosen(self.ladder, RUNGS, fixed)]

    def preflight(self) -> None:
        """Raise :class:`EngineNotReady` if there is no ``pw.x`` that runs, or no pseudopotentials that it can use."""
        pwscf.find_program(self.command)
        if not self.pseudopotentials:
            raise EngineNotReady(
                "the espresso engine needs a folder of UPF files for PBE: get SSSP (materialscloud.org) or PseudoDojo "
                f"(pseudo-dojo.org) and name it by the setting `pseudopotentials` or by ${FOLDER_VARIABLE}"
            )
        try:
            self._files()
        except (upf.UpfError, OSError) as error:
            raise EngineNotReady(str(error)) from error

    def compute(self, crystal: Crystal, property_name: str) -> Result:
        """Run the calculation on one core; a failure is a result with its status, its reason and the end of the log.

        Raises:
            EngineNotReady, OSError, MemoryError: the machine is to blame, not the crystal.
        """
        start = _cpu_seconds()
        result = self.refuse(crystal, property_name)
        if result is None:
            inner, operation = self._shortest(crystal)
            climb = _Climb(self, property_name, to_atoms(inner))
            try:
                result = self._as_given(getattr(self, f"_{property_name}")(climb), operation)
            except pwscf.PwxFailure as failed:
                result = Result.failure(failed.status, str(failed), log=failed.log)
            result = dataclasses.replace(result, details={**climb.facts, **result.details})
        return self._finished(result, crystal, property_name, _cpu_seconds() - start)

    # One method per property, named after it.

    def _band_gap(self, climb: _Climb) -> Result:
        """max(0, LUMO - HOMO) in eV over mesh and special points, bands counted from the valence electrons."""
        found = climb.calculate()
        homo, lumo = _edges(found)
        occupied = round(found.electrons) // 2
        direct = (found.bands[:, occupied] - found.bands[:, occupied - 1]).min()
        details = {
            "rung": climb.rung.name,
            "iterations": found.iterations,
            "energy": found.energy,
            "homo": homo,
            "lumo": lumo,
            "raw_gap": lumo - homo,
            "direct_gap": float(direct),
            **({} if found.pressure is None else {"pressure": found.pressure}),
        }
        return Result(max(0.0, lumo - homo), Status.OK, details=details)

    def _bulk_modulus(self, climb: _Climb) -> Result:
        """Bulk modulus in GPa of a Murnaghan fit to volumes around the given cell, scaled uniformly, ions at rest."""
        iterations = []

        def energy(scale: float) -> float:
            found = climb.calculate(scale)
            iterations.append(found.iterations)
            return found.energy

        sampled = sample(energy, self.eos_volumes, self.further, self.eos_range)
        details = {"rung": climb.rung.name, "iterations": iterations}
        return self._modulus(*sampled, float(climb.atoms.get_volume()), details)

    def _density(self, climb: _Climb) -> Result:
        """g/cm3 after at most ``nstep`` ionic steps that move atoms and cell (BFGS of ``pw.x``)."""
        found = climb.calculate(relax=True)
        atoms = climb.atoms.copy()
        atoms.set_cell(found.lattice)
        details = {
            "rung": climb.rung.name,
            "iterations": found.iterations,
            "energy": found.energy,
            "relaxed": found.relaxed,
            "ionic_steps": found.ionic_steps,
            "lattice": found.lattice.tolist(),
            "frac_coords": found.frac_coords.tolist(),
            "pressure": found.pressure,
        }
        return Result(density_of(atoms), Status.OK, details=details)

    # What a calculation gets

    def _files(self) -> Mapping[str, upf.UpfFile]:
        return upf.read_folder(self.pseudopotentials)

    def _lacking(self, symbols: Sequence[str]) -> str:
        missing = sorted(set(symbols) - set(self._files()))
        return f"{self.pseudopotentials} has no pseudopotential for {', '.join(missing)}" if missing else ""

    def _electrons(self, symbols: Sequence[str]) -> int:
        return sum(self._files()[symbol].valence for symbol in symbols)

    def _sampling_settings(self, property_name: str) -> dict[str, bool]:
        return {"even": self.even_mesh, "special": self.sampling == "lattice" and property_name == "band_gap"}

    def _bands(self, electrons: int) -> int:
        occupied = math.ceil(electrons / 2)
        return occupied + max(4, math.ceil(self.extra_bands * occupied))

    def _dual(self, atoms: Atoms) -> float:
        soft = all(self._files()[symbol].norm_conserving for symbol in atoms.get_chemical_symbols())
        return self.dual or (4.0 if soft else 8.0)

    def _namelists(
        self, atoms: Atoms, property_name: str, rung: PwxRung, scale: float, relax: bool
    ) -> dict[str, dict[str, Any]]:
        """The namelists of ``pw.x``, for the given cell scaled by this factor of its volume."""
        cutoff = getattr(self, f"{property_name}_cutoff")
        if self.eos_same_waves:
            cutoff *= scale ** (-2 / 3)
        width = getattr(self, f"{property_name}_width") or rung.width
        smearing = {"occupations": "smearing", "smearing": "gaussian", "degauss": width}
        namelists: dict[str, dict[str, Any]] = {
            "control": {"calculation": "vc-relax" if relax else "scf"},
            "system": {
                "ecutwfc": cutoff,
                "ecutrho": self._dual(atoms) * cutoff,
                "nbnd": self._bands(self._electrons(atoms.get_chemical_symbols())),
                **(smearing if width else {"occupations": "fixed"}),
            },
            "electrons": {
                "conv_thr": self.tolerance * len(atoms),
                "mixing_beta": self.mixing,
                "diagonalization": self.diagonalization,
                "electron_maxstep": rung.steps * self.max_scf_iterations,
                **rung.electrons,
            },
        }
        if property_name == "band_gap":
            namelists["control"]["tstress"] = True  # a gap is told with the pressure of its cell
        if relax:
            namelists["control"] |= {"nstep": self.nstep, "forc_conv_thr": self.largest_force / (Ry / Bohr)}
            namelists["cell"] = {"press_conv_thr": 10 * self.largest_stress}  # kbar
        return namelists


class _Climb(Climb[PwxRung]):
    """The SCFs of one crystal."""

    def __init__(self, engine: EspressoEngine, property_name: str, atoms: Atoms):
        super().__init__(engine.rungs(property_name))
        self.atoms = pwscf.oriented(atoms)
        self._engine, self._property = engine, property_name
        sampling = engine.sampling_of(property_name)
        self._mesh, _ = sampling.mesh(atoms.cell.array, len(atoms))
        self._extra = sampling.points_beyond_mesh(atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers)
        self._electrons = engine._electrons(atoms.get_chemical_symbols())
        self._program = pwscf.find_program(engine.command)

    @property
    def facts(self) -> dict[str, Any]:
        """The part of ``details`` that every property shares, and the attempts that failed."""
        return {
            "valence_electrons": self._electrons,
            "kpoints": list(self._mesh),
            "cutoff": getattr(self._engine, f"{self._property}_cutoff"),
            "bands": self._engine._bands(self._electrons),
            **super().facts,
        }

    def calculate(self, scale: float = 1.0, relax: bool = False) -> pwscf.PwxOutput:
        """One calculation of the crystal at this factor of its volume; raises :class:`pwscf.PwxFailure`."""
        atoms = self.atoms.copy()
        atoms.set_cell(atoms.cell.array * scale ** (1 / 3), scale_atoms=True)
        return self.run(lambda rung: self._attempt(rung, atoms, scale, relax))

    def _attempt(self, rung: PwxRung, atoms: Atoms, scale: float, relax: bool) -> pwscf.PwxOutput:
        engine = self._engine
        settings = engine._namelists(atoms, self._property, rung, scale, relax)
        found = pwscf.calculate(self._program, atoms, settings, self._mesh, engine._files(), self._extra)
        if round(found.electrons) != self._electrons:
            message = f"pw.x counted {found.electrons:g} electrons instead of {self._electrons}"
            raise pwscf.PwxFailure(Status.ENGINE_ERROR, message, "")
        occupied = round(found.electrons) // 2
        if rung.width and not same_as_fixed(found.eigenvalues, found.occupations, occupied, self._property):
            raise pwscf.PwxFailure(Status.NOT_CONVERGED, PARTLY_FILLED, "")
        return found


def _edges(found: pwscf.PwxOutput) -> tuple[float, float]:
    """Highest occupied and lowest empty level in eV, two electrons a band."""
    occupied = round(found.electrons) // 2
    return float(found.bands[:, occupied - 1].max()), float(found.bands[:, occupied].min())


def _cpu_seconds() -> float:
    """CPU seconds of this process and of the programs it waited for."""
    return sum(os.times()[:4])
