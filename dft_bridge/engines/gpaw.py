"""The ``gpaw`` engine: plane-wave PBE with projector augmented waves, without spin, one process on one core.

GPAW (GPL) is used through its public interface and is imported only by the methods that need it, so importing this
module is cheap. The presets are data (:data:`PRESETS`); what they cost and how far they are from converged is measured
by ``benchmarks/gpaw_convergence.py``, whose output is ``benchmarks/results/gpaw_convergence.md``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import math
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from ase.units import GPa

from crystaljax.dft_bridge.engines.base import Crystal, EngineNotReady, Result, about_the_machine
from crystaljax.dft_bridge.engines.checks import (
    check_choice,
    density_of,
    relax,
    symbols_of,
    to_atoms,
)
from crystaljax.dft_bridge.engines.equation_of_state import MOST_FURTHER, sample
from crystaljax.dft_bridge.engines.presets import PresetEngine
from crystaljax.dft_bridge.kpoints import RULES
from crystaljax.dft_bridge.ladder import AS_SET, Climb, Rung, ScfFailure, check_ladder, chosen, described, names_of
from crystaljax.status import Status

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator

INSTALL_HINT = (
    "run `crystaljax doctor --install gpaw`, or by hand "
    "`GPAW_CONFIG=<path of dft_bridge/engines/gpaw_siteconfig.py> pip install gpaw gpaw-data`"
)
"""What to do when GPAW is missing; the siteconfig makes GPAW build with a C compiler alone."""


@dataclasses.dataclass(frozen=True)
class GpawRung(Rung):
    """One attempt at an SCF: what is changed against the engine's settings.

    Attributes:
        parameters: of GPAW.
    """

    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_DAVIDSON = {"name": "davidson", "niter": 4}
RUNGS: tuple[GpawRung, ...] = (
    GpawRung("smaller mixing", parameters={"mixer": {"name": "pulay", "beta": 0.03, "nmaxold": 8}}),
    GpawRung(
        "davidson",
        parameters={"mixer": {"name": "pulay", "beta": 0.03, "nmaxold": 8}, "eigensolver": _DAVIDSON},
    ),
    GpawRung(
        "more steps",
        steps=3,
        parameters={"mixer": {"name": "pulay", "beta": 0.01, "nmaxold": 16}, "eigensolver": _DAVIDSON},
    ),
)
"""The ladder: what is tried, one after the other, when an SCF does not converge with the engine's settings.

None smears: there always is a smearing, and a wider one would be another calculation.
"""

PRESETS: dict[str, dict[str, Any]] = {
    "standard": {
        "band_gap_cutoff": 600.0,
        "band_gap_kppa": 1000.0,
        "bulk_modulus_cutoff": 800.0,
        "bulk_modulus_kppa": 1000.0,
        "density_cutoff": 800.0,
        "density_kppa": 1000.0,
        "sampling": "lattice",
        "kpoint_length": 12.0,
        "hard_elements": (("F", 1500.0),),
        "energy_tolerance": 1e-5,
        "density_tolerance": 1e-5,
        "eigenstates_tolerance": 4e-8,
        "max_scf_iterations": 100,
        "ladder": names_of(RUNGS),
    },
    "fast": {
        "band_gap_cutoff": 400.0,
        "band_gap_kppa": 100.0,
        "bulk_modulus_cutoff": 800.0,
        "bulk_modulus_kppa": 100.0,
        "density_cutoff": 600.0,
        "density_kppa": 100.0,
        "sampling": "lattice",
        "kpoint_length": 7.5,
        "hard_elements": (),
        "energy_tolerance": 1e-3,
        "density_tolerance": 1e-3,
        "eigenstates_tolerance": 1e-6,
        "max_scf_iterations": 60,
        "ladder": ("smaller mixing",),
    },
}
"""Settings by preset name; every key is a field of :class:`GpawEngine`."""

_MAX_UNKNOWN_MESSAGE = 300  # characters

METHOD_VERSION = 1
"""Raised when the code of this module changes a number that the settings do not show."""

_SHARED_SETTINGS = (
    "smearing_width",
    "extra_bands",
    "energy_tolerance",
    "density_tolerance",
    "eigenstates_tolerance",
    "max_scf_iterations",
    "min_distance_factor",
    "min_distance",
)
_OWN_SETTINGS: dict[str, tuple[str, ...]] = {
    "band_gap": (),
    "bulk_modulus": ("hard_elements", "eos_volumes", "eos_range"),
    "density": ("hard_elements", "nstep", "fmax"),
}


@dataclasses.dataclass(frozen=True)
class GpawEngine(PresetEngine):
    """Band gap, bulk modulus and density from GPAW.

    Presets (``GpawEngine.preset(name, **overrides)``, the numbers are in :data:`PRESETS`):

    * ``standard``: 600 eV for gaps, 800 eV for the rest (1,500 eV with fluorine), 1,000 k-points per reciprocal atom:
      6x6x6 for a cubic perovskite, whose gap takes 7-34 CPU seconds. MgO, NaCl, Si and LiF come within 5 % of the
      published PBE bulk moduli and 0.15 eV of the gaps. gpaw-data freezes lithium's 1s: LiF's lattice constant is
      0.7 % and its modulus 4 % too large, and with 1s in the valence both are right.
    * ``fast``: 400 eV for gaps, 800 eV for bulk moduli, 600 eV for densities, 100 k-points per reciprocal atom: 2x2x2
      for a perovskite, whose gap takes 2-4 CPU seconds. Its mean absolute error on six perovskites is 0.13 eV against
      ``standard``: 0.14 eV or less but for SrTiO3's 0.41 eV, of which a 4x4x4 mesh (``band_gap_kppa=400``) leaves 0.04.
      Densities are +0.2 % (NaCl) and +3.5 % (MgO) off published PBE; moduli of fluorides are not converged.

    Attributes:
        band_gap_cutoff, bulk_modulus_cutoff, density_cutoff: plane-wave cut-off in eV.
        band_gap_kppa, bulk_modulus_kppa, density_kppa: k-points per reciprocal atom, in a mesh that holds Gamma; its
            subdivisions are rounded up to even numbers, so that it holds the points with coordinates 0 and 1/2 too.
        sampling: how k-points are chosen: ``cell`` as CrystalGym does, from the lengths of the given cell vectors;
            ``lattice`` with the symmetry and the special points of the lattice, see
            :mod:`crystaljax.dft_bridge.kpoints`; for a gap bands at those that the mesh lacks are calculated in the
            density of the SCF.
        kpoint_length: Å: with ``lattice`` a mesh stands for a supercell whose edges are at least so long.
        hard_elements: (symbol, eV): crystals with this element get at least this cut-off for bulk modulus and density.
            Of the 50 elements of the large vocabulary only fluorine's data set needs it.
        smearing_width: Fermi-Dirac width in eV.
        extra_bands: empty bands, as a fraction of the occupied ones (at least four).
        energy_tolerance: SCF criterion, change of the energy over three steps, eV per valence electron.
        density_tolerance: SCF criterion, integrated change of the density, electrons per valence electron.
        eigenstates_tolerance: SCF criterion, squared residual, eV^2 per valence electron.
        max_scf_iterations: SCF steps before an attempt counts as failed.
        ladder: names of those of the :data:`RUNGS` that are tried, in the order there, when an SCF does not converge.
            Without any a result has the key of a gpaw engine that had no ladder.
        eos_volumes: sampled volumes, in units of the given cell's volume.
        eos_range: where the minimum of the equation of state must lie, in the same unit. Sampling silicon 14-18 % away
            from its minimum moves B0 by 9-13 %, 7-9 % away by 2 %, so a minimum outside this range means little.
        eos_further: volumes that may be calculated besides, where the minimum lies beyond those; without any, a modulus
            there is extrapolated, and says so. 0 leaves no trace in keys.
        nstep: largest number of ionic steps of the relaxation before a density.
        fmax: forces and generalised stress (eV/Å) below which the relaxation stops early.
        min_distance_factor: atoms closer than this fraction of the sum of their covalent radii are refused.
        min_distance: atoms closer than this (Å) are refused.
    """

    engine = "gpaw"
    method_version = METHOD_VERSION
    presets = PRESETS
    per_property = ("cutoff", "kppa")
    shared_settings = _SHARED_SETTINGS
    own_settings = _OWN_SETTINGS
    spin = False

    name: str = dataclasses.field(default=engine, init=False)
    band_gap_cutoff: float = 600.0
    band_gap_kppa: float = 1000.0
    bulk_modulus_cutoff: float = 800.0
    bulk_modulus_kppa: float = 1000.0
    density_cutoff: float = 800.0
    density_kppa: float = 1000.0
    sampling: str = "lattice"
    kpoint_length: float = 12.0
    hard_elements: tuple[tuple[str, float], ...] = (("F", 1500.0),)
    smearing_width: float = 0.05
    extra_bands: float = 0.1
    energy_tolerance: float = 1e-5
    density_tolerance: float = 1e-5
    eigenstates_tolerance: float = 4e-8
    max_scf_iterations: int = 100
    ladder: tuple[str, ...] = names_of(RUNGS)
    eos_volumes: tuple[float, ...] = (0.98, 0.99, 1.0, 1.01, 1.02)
    eos_range: tuple[float, float] = (0.8, 1.25)
    eos_further: int = MOST_FURTHER
    nstep: int = 5
    fmax: float = 0.05
    min_distance_factor: float = 0.3
    min_distance: float = 0.6

    def __post_init__(self) -> None:
        check_choice("sampling", self.sampling, RULES)
        check_ladder(self.ladder, RUNGS)

    def fingerprint(self, property_name: str) -> dict[str, Any]:
        """Everything that can change the number of this property: versions, data sets, settings (JSON-able)."""
        import ase
        import gpaw

        return self._fingerprint(
            property_name,
            gpaw=gpaw.__version__,
            ase=ase.__version__,
            datasets=datasets_digest(_setup_paths()),
            xc="PBE",
            spin=self.spin,
            **described(self.rungs()[1:]),
        )

    def rungs(self) -> list[GpawRung]:
        """What is tried for an SCF, in order."""
        return [GpawRung(AS_SET), *chosen(self.ladder, RUNGS, fixed=False)]

    def preflight(self) -> None:
        """Raise :class:`EngineNotReady` if GPAW, its compiled extension or its data sets are missing."""
        try:
            import gpaw
            import gpaw.cgpaw  # noqa: F401  (needs the compiled extension `_gpaw`)
        except ImportError as error:
            raise EngineNotReady(f"GPAW cannot be imported ({error}); {INSTALL_HINT}") from error
        if dataset("O", _setup_paths()) is None:
            raise EngineNotReady(f"GPAW {gpaw.__version__} finds no PBE data sets; {INSTALL_HINT}")

    def compute(self, crystal: Crystal, property_name: str) -> Result:
        """Run the calculation in this process; a failure is a result with its status and message."""
        start = time.process_time()
        refusal = self.refuse(crystal, property_name)
        if refusal is not None:
            return dataclasses.replace(refusal, seconds=time.process_time() - start)
        climb = Climb(self.rungs())
        inner, operation = self._shortest(crystal)
        try:
            with warnings.catch_warnings():
                # GPAW says so when it enlarges its real-space grid to match the symmetry; that is what it should do.
                warnings.filterwarnings("ignore", message="Initial realspace grid|Using symmetrized grid")
                result = self._as_given(getattr(self, f"_{property_name}")(inner, climb), operation)
        except ScfFailure as failed:
            result = Result.failure(failed.status, str(failed))
        except Exception as error:  # the outermost edge: whatever else GPAW raises is kept with its type
            if about_the_machine(error):
                raise
            text = f"{type(error).__name__}: {error}"[:_MAX_UNKNOWN_MESSAGE]
            status = Status.INVALID_RESULT if "NaN" in text else Status.ENGINE_ERROR
            climb.fail(status, text)
            result = Result.failure(status, text)
        result = dataclasses.replace(result, details={**result.details, **climb.facts})
        return self._finished(result, crystal, property_name, time.process_time() - start)

    def _lacking(self, symbols: Sequence[str]) -> str:
        missing = sorted({s for s in symbols if dataset(s, _setup_paths()) is None})
        return f"no PBE data set for {', '.join(missing)} in {list(_setup_paths())}" if missing else ""

    def _needs_pairs(self, property_name: str) -> bool:
        return property_name == "band_gap"  # there is always a smearing

    def _electrons(self, symbols: Sequence[str]) -> int:
        return valence_electrons(symbols)

    def _sampling_settings(self, property_name: str) -> dict[str, bool]:
        return {"even": True, "special": self.sampling == "lattice" and property_name == "band_gap"}

    def _mesh(self, crystal: Crystal, property_name: str) -> tuple[int, int, int]:
        return self.sampling_of(property_name).mesh(crystal.lattice, len(crystal.numbers))[0]

    # One method per property, named after it.

    def _band_gap(self, crystal: Crystal, climb: Climb[GpawRung]) -> Result:
        """max(0, LUMO - HOMO) in eV over mesh and special points, bands counted from the valence electrons.

        Smearing only steers the SCF: with fixed occupations 6 of 10 random perovskites, all metals, did not converge in
        60 iterations, with smearing all did in 20 or fewer; KMgF3's gap is the same within 0.0001 eV.
        """
        occupied = valence_electrons(symbols_of(crystal)) // 2
        sampling = self.sampling_of("band_gap")
        extra = sampling.points_beyond_mesh(crystal.lattice, crystal.frac_coords, crystal.numbers)

        def attempt(rung: GpawRung) -> tuple[Calculator, np.ndarray, float]:
            atoms, calculator = to_atoms(crystal), self._calculator(crystal, "band_gap", rung, bands=occupied + 1)
            self._energy(atoms, calculator, rung)
            with self._scf(rung):
                pressure = float(-atoms.get_stress()[:3].mean() / GPa)
            bands = calculator.eigenvalues()[0]  # [k, band] in eV
            if len(extra):
                with self._scf(rung):
                    fixed = calculator.fixed_density(kpts=extra, symmetry="off", txt=None)
                bands = np.concatenate([bands, fixed.eigenvalues()[0]])
            return calculator, bands, pressure

        calculator, bands, pressure = climb.run(attempt)
        homo, lumo = float(bands[:, occupied - 1].max()), float(bands[:, occupied].min())
        details = {
            "rung": climb.rung.name,
            **self._facts(crystal, "band_gap"),
            "iterations": calculator.get_number_of_iterations(),
            "homo": homo,
            "lumo": lumo,
            "raw_gap": lumo - homo,
            "direct_gap": float((bands[:, occupied] - bands[:, occupied - 1]).min()),
            "pressure": pressure,
        }
        return Result(max(0.0, lumo - homo), Status.OK, details=details)

    def _bulk_modulus(self, crystal: Crystal, climb: Climb[GpawRung]) -> Result:
        """B0 in GPa of a Murnaghan fit to volumes around the given cell, scaled uniformly, ions not relaxed.

        It is the modulus at the fitted minimum V0; ``modulus_at_cell`` in the details is that at the given volume. The
        cut-off scales as V^(-2/3), so every volume has the same plane waves and E(V) has no steps. (With one cut-off
        for all volumes MgO's fit has no minimum at 500 eV and reads 70 GPa at 600 eV, with the same plane waves 254 and
        190; at 800 eV they read 152 and 153, at 1,000 eV both 151.)
        """
        volume = abs(float(np.linalg.det(crystal.lattice)))
        iterations = []

        def attempt(rung: GpawRung, scale: float) -> tuple[float, int]:
            atoms = to_atoms(dataclasses.replace(crystal, lattice=crystal.lattice * scale ** (1 / 3)))
            # The calculator is that of the given cell, so that every volume has the same k-points.
            calculator = self._calculator(crystal, "bulk_modulus", rung, cutoff_factor=scale ** (-2 / 3))
            return self._energy(atoms, calculator, rung), calculator.get_number_of_iterations()

        def energy(scale: float) -> float:
            found, steps = climb.run(functools.partial(attempt, scale=scale))
            iterations.append(steps)
            return found

        sampled = sample(energy, self.eos_volumes, self.further, self.eos_range)
        facts = self._facts(crystal, "bulk_modulus")
        details = {"rung": climb.rung.name, **facts, "iterations": iterations}
        return self._modulus(*sampled, volume, details)

    def _density(self, crystal: Crystal, climb: Climb[GpawRung]) -> Result:
        """g/cm3 after at most ``nstep`` ionic steps that move atoms and cell (BFGS, GPAW's stress)."""

        def attempt(rung: GpawRung) -> tuple[Atoms, dict[str, Any]]:
            atoms = to_atoms(crystal)
            atoms.calc = self._calculator(crystal, "density", rung)
            with self._scf(rung):
                return atoms, relax(atoms, self.nstep, self.fmax)

        atoms, path = climb.run(attempt)
        details = {"rung": climb.rung.name, **self._facts(crystal, "density"), **path}
        return Result(density_of(atoms), Status.OK, details=details)

    @contextlib.contextmanager
    def _scf(self, rung: GpawRung) -> Iterator[None]:
        """Raise :class:`ScfFailure` for what GPAW says of an SCF that it cannot do."""
        from gpaw import KohnShamConvergenceError
        from gpaw.utilities import AtomsTooClose

        try:
            yield
        except KohnShamConvergenceError as error:
            message = f"no self-consistency within {rung.steps * self.max_scf_iterations} iterations"
            raise ScfFailure(Status.NOT_CONVERGED, message) from error
        except np.linalg.LinAlgError as error:
            raise ScfFailure(Status.NOT_CONVERGED, f"the eigensolver broke down: {error}") from error
        except AtomsTooClose as error:
            raise ScfFailure(Status.ATOMS_TOO_CLOSE, str(error)) from error

    def _energy(self, atoms: Atoms, calculator: Calculator, rung: GpawRung) -> float:
        """eV per cell."""
        atoms.calc = calculator
        with self._scf(rung):
            return float(atoms.get_potential_energy())

    def _cutoff(self, crystal: Crystal, property_name: str) -> float:
        """Plane-wave cut-off in eV for this crystal: gaps tolerate a low one, pressures near a hard element do not."""
        cutoff = getattr(self, f"{property_name}_cutoff")
        if property_name == "band_gap":
            return cutoff
        present = symbols_of(crystal)
        return max([cutoff, *(hard for symbol, hard in self.hard_elements if symbol in present)])

    def _facts(self, crystal: Crystal, property_name: str) -> dict[str, Any]:
        """The part of ``details`` that every property shares."""
        return {
            "valence_electrons": valence_electrons(symbols_of(crystal)),
            "kpoints": list(self._mesh(crystal, property_name)),
            "cutoff": self._cutoff(crystal, property_name),
        }

    def _calculator(
        self,
        crystal: Crystal,
        property_name: str,
        rung: GpawRung,
        bands: int | None = None,
        cutoff_factor: float = 1.0,
    ) -> Calculator:
        """A silent GPAW calculator; ``bands`` is the number of bands the SCF must converge, by default the occupied."""
        from gpaw import GPAW, PW

        occupied = math.ceil(valence_electrons(symbols_of(crystal)) / 2)
        return GPAW(
            mode=PW(cutoff_factor * self._cutoff(crystal, property_name)),
            xc="PBE",
            kpts={"size": self._mesh(crystal, property_name), "gamma": True},
            occupations={"name": "fermi-dirac", "width": self.smearing_width},
            nbands=occupied + max(4, math.ceil(self.extra_bands * occupied)),
            spinpol=False,
            maxiter=rung.steps * self.max_scf_iterations,
            **rung.parameters,
            convergence={
                "energy": self.energy_tolerance,
                "density": self.density_tolerance,
                "eigenstates": self.eigenstates_tolerance,
                "bands": bands or "occupied",
            },
            txt=None,
        )


# GPAW's data sets


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A PAW data set: valence electrons and the SHA-256 of its (uncompressed) text."""

    valence: int
    sha256: str


def _setup_paths() -> tuple[str, ...]:
    """GPAW's search path for data sets (``gpaw-data`` and GPAW_SETUP_PATH)."""
    import gpaw

    return tuple(os.fspath(path) for path in gpaw.setup_paths)


@functools.cache
def dataset(symbol: str, setup_paths: tuple[str, ...]) -> Dataset | None:
    """The PBE data set that GPAW picks for an element, or ``None`` if there is none."""
    for folder in setup_paths:
        for name in (f"{symbol}.PBE.gz", f"{symbol}.PBE"):
            path = Path(folder, name)
            if path.is_file():
                return _read_dataset(path)
    return None


def _read_dataset(path: Path) -> Dataset:
    """Read the header of a data set and hash all of it."""
    raw = path.read_bytes()
    text = gzip.decompress(raw) if path.suffix == ".gz" else raw
    found = re.search(rb'<atom\s[^>]*valence="([0-9.]+)"', text)
    if found is None:
        raise ValueError(f"{path} is not a GPAW data set: it has no <atom ... valence=...>; reinstall gpaw-data")
    return Dataset(round(float(found[1])), hashlib.sha256(text).hexdigest())


@functools.cache
def datasets_digest(setup_paths: tuple[str, ...]) -> str:
    """SHA-256 over the PBE data sets of all elements that GPAW would use."""
    digest = hashlib.sha256()
    for symbol in chemical_symbols[1:]:
        found = dataset(symbol, setup_paths)
        if found is not None:
            digest.update(f"{symbol} {found.sha256}\n".encode())
    return digest.hexdigest()


def valence_electrons(symbols: Sequence[str]) -> int:
    """Electrons outside the frozen cores; raises ``ValueError`` for an element without a data set."""
    total = 0
    for symbol in symbols:
        found = dataset(symbol, _setup_paths())
        if found is None:
            raise ValueError(f"GPAW has no PBE data set for {symbol}")
        total += found.valence
    return total
