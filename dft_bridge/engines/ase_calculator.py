"""The ``ase`` engine: any ASE calculator by its import path, be it DFT, a force field or a neural network.

A value that does not come from DFT says so wherever its source is shown: it is labelled ``surrogate``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import tempfile
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.calculators.calculator import BaseCalculator, SCFError

from crystaljax.dft_bridge.engines.base import Crystal, EngineNotReady, Result, about_the_machine
from crystaljax.dft_bridge.engines.checks import (
    check_choice,
    check_property,
    density_of,
    relax,
    to_atoms,
)
from crystaljax.dft_bridge.engines.equation_of_state import MOST_FURTHER, sample
from crystaljax.dft_bridge.engines.presets import PresetEngine
from crystaljax.status import Status

PREFIX = "ase:"
"""``ase:module.path.Class`` names the engine together with its calculator."""
SURROGATE = "surrogate"
_ASE_DFT = "abinit aims castep cp2k dmol elk espresso exciting fleur nwchem octopus onetep openmx siesta vasp".split()
DFT_MODULES = ("gpaw", *(f"ase.calculators.{code}" for code in _ASE_DFT))
"""Where calculators are DFT; everything else is a surrogate unless its ``label`` says otherwise."""

METHOD_VERSION = 1
"""Raised when the code of the engine changes a number that the settings do not show."""

PRESETS: dict[str, dict[str, Any]] = {"fast": {"nstep": 5, "fmax": 0.05}, "standard": {"nstep": 200, "fmax": 0.01}}
"""Settings by preset name; every key is a field of :class:`AseEngine`."""

_SHARED_SETTINGS = ("min_distance_factor", "min_distance")
_OWN_SETTINGS: dict[str, tuple[str, ...]] = {
    "band_gap": (),
    "bulk_modulus": ("eos_volumes", "eos_range", "modulus_at"),
    "density": ("nstep", "fmax"),
}
_MESSAGE_CHARACTERS = 300
MAKERS = ("gpaw.GPAW",)
"""Functions that make calculators without saying so; others say it by the type that they are annotated to return."""
_EXAMPLE = f"`{PREFIX}ase.calculators.emt.EMT`"


@dataclasses.dataclass(frozen=True)
class AseEngine(PresetEngine):
    """Bulk modulus and density from energies and stresses of an ASE calculator, gaps if it has eigenvalues.

    Attributes:
        calculator: import path of its class, such as ``ase.calculators.emt.EMT``, or of a function that is annotated to
            return one. Anything else is not called.
        arguments: its keyword arguments, JSON-able. Of a file that one names, the contents count as a setting.
        label: what kind of method it is, shown with every value; by default ``DFT`` for calculators in
            :data:`DFT_MODULES` and ``surrogate`` for all others.
        eos_volumes: sampled volumes, in units of the given cell's volume.
        eos_range: where the minimum of the equation of state must lie, in the same unit.
        eos_further: volumes that may be calculated besides, where the minimum lies beyond those; without any, a modulus
            there is extrapolated, and says so. Only for a modulus at the minimum. 0 leaves no trace in keys.
        modulus_at: ``cell``: the modulus at the given cell; ``relaxed``: at the fitted minimum.
        nstep: largest number of ionic steps of the relaxation before a density.
        fmax: forces and generalised stress (eV/Å) below which the relaxation stops early.
        min_distance_factor: atoms closer than this fraction of the sum of their covalent radii are refused.
        min_distance: atoms closer than this (Å) are refused.
    """

    engine = "ase"
    method_version = METHOD_VERSION
    presets = PRESETS
    shared_settings = _SHARED_SETTINGS
    own_settings = _OWN_SETTINGS

    calculator: str = ""
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    label: str = ""
    eos_volumes: tuple[float, ...] = (0.98, 0.99, 1.0, 1.01, 1.02)
    eos_range: tuple[float, float] = (0.8, 1.25)
    eos_further: int = MOST_FURTHER
    modulus_at: str = "relaxed"
    nstep: int = 5
    fmax: float = 0.05
    min_distance_factor: float = 0.3
    min_distance: float = 0.6

    def __post_init__(self) -> None:
        check_choice("modulus_at", self.modulus_at, ("cell", "relaxed"))
        try:
            json.dumps(dict(self.arguments))
        except (TypeError, ValueError) as error:
            raise ValueError(f"arguments of a calculator must be plain data by name ({error})") from error
        if not self.label:
            known = any(self.calculator.startswith(f"{module}.") for module in DFT_MODULES)
            object.__setattr__(self, "label", "DFT" if known else SURROGATE)

    @property
    def name(self) -> str:
        """What kind of method it is, and the calculator, such as ``surrogate EMT``."""
        return f"{self.label} {self.calculator.rpartition('.')[2]}"

    def fingerprint(self, property_name: str) -> dict[str, Any]:
        """Everything that can change the number of this property (JSON-able).

        Raises:
            ValueError: the calculator has not what this property needs.
        """
        check_property(property_name)
        calculator = self._calculator()
        offered = getattr(calculator, "implemented_properties", None)
        if property_name == "band_gap" and not hasattr(calculator, "get_eigenvalues"):
            raise ValueError(f"{self.calculator} has no eigenvalues, so no band gap; choose another property or engine")
        if property_name == "density" and offered is not None and "stress" not in offered:
            raise ValueError(f"{self.calculator} has no stress, so no relaxed density; choose another property")
        maker = _maker(self.calculator)
        # A function of the user's sets things that the class of what it makes does not show.
        by_function = {} if isinstance(maker, type) else {"function_source": _source_digest(maker)}
        return self._fingerprint(
            property_name,
            **{self.name: _version(self.calculator)},
            **by_function,
            calculator=self.calculator,
            source=_source_digest(type(calculator)),
            arguments={name: _contents(value) for name, value in self.arguments.items()},
            ase=metadata.version("ase"),
        )

    def preflight(self) -> None:
        """Raise :class:`EngineNotReady` if the calculator cannot be imported and made."""
        self._calculator()

    def compute(self, crystal: Crystal, property_name: str) -> Result:
        """Run the calculation in this process; a failure is a result with its status and message."""
        start = time.process_time()
        result = self.refuse(crystal, property_name)
        if result is None:
            atoms = to_atoms(crystal)
            atoms.calc = self._calculator()
            try:
                with _scratch_folder():
                    result = getattr(self, f"_{property_name}")(atoms)
            except SCFError as error:
                result = Result.failure(Status.NOT_CONVERGED, _one_line(error))
            except Exception as error:  # the outermost edge: a calculator may raise anything, kept with its type
                if about_the_machine(error):
                    raise
                # ASE's own calculators raise the bare class for an element without parameters.
                status = Status.UNSUPPORTED_ELEMENT if type(error) is NotImplementedError else Status.ENGINE_ERROR
                result = Result.failure(status, _one_line(error))
        return self._finished(result, crystal, property_name, time.process_time() - start)

    def _needs_pairs(self, property_name: str) -> bool:
        return False  # of electrons the calculator knows

    # One method per property, named after it.

    def _band_gap(self, atoms: Atoms) -> Result:
        """Smallest difference in eV between levels above and below the Fermi level, 0 for a metal."""
        from ase.dft.bandgap import bandgap

        atoms.get_potential_energy()
        return Result(float(bandgap(atoms.calc)[0]), Status.OK)

    def _bulk_modulus(self, atoms: Atoms) -> Result:
        """Bulk modulus in GPa of a Murnaghan fit to volumes around the given cell, scaled uniformly, ions at rest."""
        cell, volume = atoms.cell.array.copy(), float(atoms.get_volume())

        def energy(scale: float) -> float:
            atoms.set_cell(cell * scale ** (1 / 3), scale_atoms=True)
            return float(atoms.get_potential_energy())

        sampled = sample(energy, self.eos_volumes, self.further, self.eos_range)
        return self._modulus(*sampled, volume, {})

    def _density(self, atoms: Atoms) -> Result:
        """g/cm3 after at most ``nstep`` ionic steps that move atoms and cell (BFGS)."""
        details = relax(atoms, self.nstep, self.fmax)
        return Result(density_of(atoms), Status.OK, details=details)

    def _calculator(self) -> Any:
        return _make_calculator(self.calculator, json.dumps(dict(self.arguments), sort_keys=True))


def _maker(path: str) -> Callable[..., Any]:
    """The class or function at an import path, seen to make calculators before it is called.

    Raises:
        EngineNotReady: there is none, or it is something else.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise EngineNotReady(f"name the calculator of the ase engine by its import path, such as {_EXAMPLE}")
    try:
        make = getattr(importlib.import_module(module_name), name, None)
    except ImportError as error:
        advice = "install its package, or put its folder on PYTHONPATH"
        raise EngineNotReady(f"{module_name} cannot be imported ({error}); {advice}") from error
    if make is None:
        raise EngineNotReady(f"{module_name} has no calculator {name}; give an import path such as {_EXAMPLE}")
    if path not in MAKERS and not _is_calculator(make) and not _is_calculator(_returned(make)):
        raise EngineNotReady(
            f"{path} is not an ASE calculator, so it is not called; give the import path of a class, such as "
            f"{_EXAMPLE}, or of a function annotated to return one"
        )
    return make


def _is_calculator(kind: Any) -> bool:
    """Whether a class is one of ASE's calculators; GPAW's new one has their methods without being one of theirs."""
    return isinstance(kind, type) and (issubclass(kind, BaseCalculator) or kind.__name__ == "ASECalculator")


def _returned(make: Any) -> Any:
    """The type that a function says it returns; ``None`` for one that does not, and for anything else."""
    if not inspect.isfunction(make):
        return None
    try:
        return typing.get_type_hints(make).get("return")
    except NameError:  # imported for type checkers only
        return None


@functools.lru_cache(maxsize=1)
def _make_calculator(path: str, arguments: str) -> Any:
    """The calculator, made once per process: some read large files; raises :class:`EngineNotReady`."""
    make = _maker(path)
    try:
        calculator = make(**json.loads(arguments))
    except Exception as error:  # a calculator may raise anything
        why = f"{path} cannot be made with the arguments {arguments}: {_one_line(error)}"
        raise EngineNotReady(f"{why}; correct the setting `arguments`") from error
    if not hasattr(calculator, "get_potential_energy"):
        raise EngineNotReady(f"{path} makes {type(calculator).__name__}, which is not an ASE calculator")
    return calculator


@functools.cache
def _version(path: str) -> str:
    """Version of the distribution that a calculator belongs to, empty if none does.

    Asked once in a process, as what is imported stays: looking through all that is installed takes seconds.
    """
    package = path.partition(".")[0]
    distributions = metadata.packages_distributions().get(package)
    return metadata.version(distributions[0]) if distributions else ""


def _source_digest(maker: Callable[..., Any]) -> str:
    """SHA-256 of the file of a class or function, empty if it has none. Tells versions apart where no number does."""
    try:
        file = inspect.getsourcefile(maker)
    except TypeError:  # compiled
        return ""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def _contents(value: Any) -> Any:
    """An argument, but for a file's name its SHA-256."""
    if isinstance(value, str) and Path(value).is_file():
        return f"sha256 {hashlib.sha256(Path(value).read_bytes()).hexdigest()}"
    return value


@contextlib.contextmanager
def _scratch_folder() -> Iterator[None]:
    """Calculators that write files write them into a folder that exists only meanwhile."""
    with tempfile.TemporaryDirectory(prefix="crystaljax-ase-") as folder, contextlib.chdir(folder):
        yield


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:_MESSAGE_CHARACTERS]
