"""The ``planewave`` engine: our own plane-wave PBE in JAX, batched over crystals
(:mod:`crystaljax.dft_bridge.planewave`).

It needs nothing but this package: pseudopotentials are shipped, there is no compiler and no other program. JAX is
imported by the methods that need it, so importing this module is cheap. The presets are data (:data:`PRESETS`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms

from crystaljax.dft_bridge.engines.base import Crystal, EngineNotReady, Result
from crystaljax.dft_bridge.engines.checks import (
    check_choice,
    check_property,
    density_of,
    symbols_of,
)
from crystaljax.dft_bridge.engines.equation_of_state import MOST_FURTHER, further_volume
from crystaljax.dft_bridge.engines.presets import PresetEngine
from crystaljax.dft_bridge.kpoints import RULES
from crystaljax.dft_bridge.ladder import check_ladder, chosen, described
from crystaljax.dft_bridge.planewave.pseudopotentials import SHIPPED_NAME, PseudoError, PseudoSet, load_folder, shipped
from crystaljax.dft_bridge.planewave.rungs import FOOT, RUNGS, ScfRung
from crystaljax.status import Status

if TYPE_CHECKING:
    from crystaljax.dft_bridge.planewave.kinds import Kind, Workbench
    from crystaljax.dft_bridge.planewave.properties import BandEdges, Outcome, RelaxedCell, Volumes

logger = logging.getLogger(__name__)

METHOD_VERSION = 1
"""Raised when the code of the engine changes a number that the settings do not show."""

CUTOFF_FILE = Path(__file__).parents[1] / "planewave" / "data" / "cutoffs.json"
"""Measured cut-offs by name and element; ``python -m benchmarks planewave-convergence`` makes it."""

_MILLI_RYDBERG = 0.0005  # Ha

PRESETS: dict[str, dict[str, Any]] = {
    "crystalgym": {
        "band_gap_cutoff": "tight",
        "band_gap_kppa": 1000.0,
        "band_gap_width": 0.0,
        "bulk_modulus_cutoff": "tight",
        "bulk_modulus_kppa": 1000.0,
        "bulk_modulus_width": _MILLI_RYDBERG,
        "density_cutoff": "tight",
        "density_kppa": 1000.0,
        "density_width": _MILLI_RYDBERG,
        "sampling": "cell",
        "kpoint_length": 0.0,
        "shifted": False,
        "special_points": False,
        "symmetry": "crystal",
        "tolerance": 1e-8,
        "max_scf_iterations": 300,
        "ladder": (),
        "eos_further": 0,
    },
    "fast": {
        "band_gap_cutoff": "loose",
        "band_gap_kppa": 50.0,
        "band_gap_width": 0.002,
        "bulk_modulus_cutoff": "tight",
        "bulk_modulus_kppa": 50.0,
        "bulk_modulus_width": 0.004,
        "density_cutoff": "tight",
        "density_kppa": 50.0,
        "density_width": 0.004,
        "sampling": "lattice",
        "kpoint_length": 7.5,
        "shifted": True,
        "special_points": True,
        "symmetry": "crystal",
        "tolerance": 1e-7,
        "band_tolerance": 1e-2,
        "max_scf_iterations": 120,
        "ladder": ("smaller mixing",),
    },
}
"""Settings by preset name; every key is a field of :class:`PlanewaveEngine`."""

_OWN_SETTINGS: dict[str, tuple[str, ...]] = {
    "band_gap": ("special_points", "band_tolerance"),
    "bulk_modulus": ("eos_volumes", "eos_same_waves", "eos_range", "modulus_at"),
    "density": ("nstep", "largest_force", "largest_stress"),
}
_SHARED_SETTINGS = (
    "functional",
    "shifted",
    "symmetry",
    "tolerance",
    "max_scf_iterations",
    "extra_bands",
    "double",
    "min_distance_factor",
    "min_distance",
)
_BATCHES_PER_JOB = 4  # lanes are refilled within a job
_WORKER_GROWTH = str(2 * 10**9)  # bytes; loky ends workers that grow by more, and compiled programs stay in memory
_PROGRESS_SECONDS = 10.0
_STRETCH = 1.05  # a minimum within the allowed range has a neighbour a little beyond
_CUTOFF_STEP = 5.0  # Ha; cut-offs are rounded up to a multiple, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class PlanewaveEngine(PresetEngine):
    """Band gap, bulk modulus and density from batched plane-wave DFT, without spin.

    Attributes:
        functional: ``PBE`` or ``LDA``; must be that of the pseudopotentials.
        pseudopotentials: name of the shipped set, or a folder of UPF v2 or psp8 files.
        band_gap_cutoff, bulk_modulus_cutoff, density_cutoff: Ha for all elements, or the name of a column of the
            measured cut-offs (:data:`CUTOFF_FILE`), of which the largest among a crystal's elements is taken.
        band_gap_kppa, bulk_modulus_kppa, density_kppa: k-points per reciprocal atom.
        band_gap_width, bulk_modulus_width, density_width: Gaussian smearing in Ha; 0 for fixed occupations. A gap is
            counted by whole bands in both cases.
        sampling: how k-points are chosen: ``cell`` as CrystalGym does, from the lengths of the given cell vectors;
            ``lattice`` with the symmetry and the special points of the lattice, see
            :mod:`crystaljax.dft_bridge.kpoints`.
        kpoint_length: Å: with ``lattice`` a mesh stands for a supercell whose edges are at least so long.
        shifted: move the k-point mesh off Gamma by half a step, with ``lattice`` where that saves points for the same
            accuracy of a density.
        total_energy: a band gap comes with the total energy of its SCF too (in the details), which other properties
            always have. Changes no number, but compiles for longer; results with it have keys of their own.
        special_points: look for band edges at special points too, at no weight in the density: with ``cell`` at the
            points with coordinates 0 and 1/2.
        symmetry: ``crystal`` uses all symmetry an assignment of elements has (fewest k-points), ``skeleton`` the part
            that all assignments share, so that a skeleton needs one program only.
        tolerance: Ha per atom, and
        band_tolerance: Ha, see :class:`~crystaljax.dft_bridge.planewave.scf.ScfSettings`.
        max_scf_iterations: SCF steps before an attempt counts as failed.
        ladder: names of those of the :data:`~crystaljax.dft_bridge.planewave.rungs.RUNGS` that are tried, in the order
            there, when an SCF does not converge; other crystals keep their numbers, bit for bit. Without any a result
            has the key of a planewave engine that had no ladder. The last, ``smearing``, is only for fixed occupations.
            Its result stands where it is the one that was asked for: where all occupations come out as those of an
            insulator, and for a gap also where bands overlap on the mesh. Otherwise the crystal counts as not
            converged.
        extra_bands: empty bands, as a fraction of the occupied ones (at least four).
        double: wave functions in double precision, for verification.
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
        batch: crystals calculated at once in one worker; 0 for one on a CPU and up to 64 on a GPU, as its memory
            allows. Changes no number.
    """

    engine = "planewave"
    method_version = METHOD_VERSION
    presets = PRESETS
    per_property = ("cutoff", "kppa", "width")
    shared_settings = _SHARED_SETTINGS
    own_settings = _OWN_SETTINGS
    spin = False

    name: str = dataclasses.field(default=engine, init=False)
    functional: str = "PBE"
    pseudopotentials: str = SHIPPED_NAME
    band_gap_cutoff: float | str = "tight"
    band_gap_kppa: float = 1000.0
    band_gap_width: float = 0.0
    bulk_modulus_cutoff: float | str = "tight"
    bulk_modulus_kppa: float = 1000.0
    bulk_modulus_width: float = _MILLI_RYDBERG
    density_cutoff: float | str = "tight"
    density_kppa: float = 1000.0
    density_width: float = _MILLI_RYDBERG
    sampling: str = "cell"
    kpoint_length: float = 0.0
    shifted: bool = False
    special_points: bool = False
    total_energy: bool = False
    symmetry: str = "crystal"
    tolerance: float = 1e-8
    band_tolerance: float = 1e-3
    max_scf_iterations: int = 100
    ladder: tuple[str, ...] = ()
    extra_bands: float = 0.1
    double: bool = False
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
    batch: int = 0

    def __post_init__(self) -> None:
        check_choice("symmetry", self.symmetry, ("crystal", "skeleton"))
        check_choice("modulus_at", self.modulus_at, ("cell", "relaxed"))
        check_choice("sampling", self.sampling, RULES)
        check_choice("functional", self.functional, ("PBE", "LDA"))
        check_ladder(self.ladder, RUNGS)

    def fingerprint(self, property_name: str) -> dict[str, Any]:
        """Everything that can change the number of this property (JSON-able)."""
        check_property(property_name)
        cutoff = getattr(self, f"{property_name}_cutoff")
        with_energy = {"total_energy": True} if self.total_energy and property_name == "band_gap" else {}
        return self._fingerprint(
            property_name,
            pseudopotentials=self.pseudo_set().name,
            pseudopotential_files=self.pseudo_set().digest,
            spin=self.spin,
            **({"cutoff_table": cutoff_table(cutoff)} if isinstance(cutoff, str) else {}),
            **with_energy,
            **described(self.rungs(property_name)[1:]),
        )

    def rungs(self, property_name: str) -> list[ScfRung]:
        """What is tried for an SCF of this property, in order."""
        fixed = getattr(self, f"{property_name}_width") == 0.0
        return [FOOT, *chosen(self.ladder, RUNGS, fixed)]

    def pseudo_set(self) -> PseudoSet:
        """The pseudopotentials, read once per process."""
        return _pseudo_set(self.pseudopotentials)

    def preflight(self) -> None:
        """Raise :class:`EngineNotReady` if the pseudopotentials cannot be read or are for another functional."""
        try:
            found = self.pseudo_set()
        except (PseudoError, OSError) as error:
            raise EngineNotReady(str(error)) from error
        if found.functional.upper() != self.functional:
            raise EngineNotReady(
                f"the pseudopotentials {found.name} are for {found.functional}, the engine is for {self.functional}; "
                f"set functional={found.functional!r} or name a folder of {self.functional} files"
            )

    def compute(self, crystal: Crystal, property_name: str) -> Result:
        """Run one calculation in this process; a failure is a result with its status and message."""
        return self.compute_many([crystal], property_name)[0]

    def compute_many(self, crystals: Sequence[Crystal], property_name: str) -> list[Result]:
        """Run many: those of one kind share a program and a batch. Results are in the order of the crystals.

        Double precision is switched on inside, for this thread only.
        """
        import jax

        results: dict[int, Result] = {}
        with jax.enable_x64(True), jax.default_matmul_precision("highest"):
            for kind, members in self.kinds(crystals, property_name, results).items():
                begin = time.process_time()
                found = self._run(kind, [crystals[i] for i in members], property_name)
                seconds = (time.process_time() - begin) / len(members)
                for i, result in zip(members, found, strict=True):
                    given = self._as_given(result, self._shortest(crystals[i])[1])
                    results[i] = self._finished(given, crystals[i], property_name, seconds)
        return [results[i] for i in range(len(crystals))]

    def group(self, crystals: Sequence[Crystal], property_name: str) -> list[list[int]]:
        """Jobs: one crystal each on a CPU, else several batches of one kind.

        First jobs of different kinds, so that workers compile different programs, and later load those of the others.
        """
        from crystaljax.dft_bridge.planewave.kinds import MOST_LANES

        groups: dict[Any, list[int]] = defaultdict(list)
        for i, crystal in enumerate(crystals):
            try:
                groups[self.kind(crystal, property_name)].append(i)
            except ValueError:  # for the calculation to explain
                groups[i].append(i)
        if _on_cpu():
            largest = _BATCHES_PER_JOB * self.batch if self.batch > 1 else 1
        else:
            share = -(-len(crystals) // (self.workers() or 1))
            largest = min(_BATCHES_PER_JOB * (self.batch or MOST_LANES), share)
        jobs = []
        for kind, members in groups.items():
            parts = np.array_split(members, -(-len(members) // largest))
            jobs += [(i, -_cost(kind) * len(part), part.tolist()) for i, part in enumerate(parts)]
        return [job for *_, job in sorted(jobs)]

    def workers(self) -> int | None:
        """One worker per GPU; ``None``, which means one per core, where there is none."""
        import jax

        return None if _on_cpu() else jax.local_device_count()

    def worker_environment(self, index: int) -> dict[str, str]:
        """One core or one GPU for each worker, and compiled programs kept on disk."""
        given = os.environ
        defaults = {
            "JAX_COMPILATION_CACHE_DIR": str(_own_cache()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
            "LOKY_MAX_MEMORY_LEAK_SIZE": _WORKER_GROWTH,
        }
        environment = {name: given.get(name) or value for name, value in defaults.items()}
        count = self.workers()
        if count is None:
            return environment | {"JAX_PLATFORMS": "cpu"}
        visible = given.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(count)]
        gpu = gpus[index % len(gpus)]
        return environment | {"CUDA_VISIBLE_DEVICES": gpu, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

    def start_worker(self) -> None:
        """Start JAX as if there were one CPU core, and with compiled programs that are checked when they are loaded.

        A thread pool as wide as the machine only slows a worker down.
        """
        import jax

        from crystaljax.dft_bridge.planewave import program_cache

        if folder := jax.config.jax_compilation_cache_dir:
            bound = jax.config.jax_compilation_cache_max_size
            program_cache.use(Path(folder), program_cache.MOST_BYTES if bound < 0 else bound)
            if Path(folder) == _own_cache():
                program_cache.drop_unchecked(Path(folder))
        if os.getenv("JAX_PLATFORMS") != "cpu" or not hasattr(os, "sched_setaffinity"):
            return
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        jax.devices()  # the width of XLA's thread pool is settled here
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cores)

    def kinds(
        self, crystals: Sequence[Crystal], property_name: str, refused: dict[int, Result] | None = None
    ) -> dict[Kind, list[int]]:
        """Which crystals (by position) go together; those that are refused go into ``refused``."""
        groups: dict[Kind, list[int]] = defaultdict(list)
        for i, crystal in enumerate(crystals):
            refusal = self.refuse(crystal, property_name)
            if refusal is None:
                groups[self.kind(crystal, property_name)].append(i)
            elif refused is not None:
                refused[i] = refusal
        return dict(groups)

    def kind(self, crystal: Crystal, property_name: str) -> Kind:
        """Everything about a calculation but the elements on the sites."""
        from crystaljax.dft_bridge.planewave.kinds import Kind, band_count, is_light
        from crystaljax.dft_bridge.planewave.scf import ScfSettings

        symbols, (crystal, _) = symbols_of(crystal), self._shortest(crystal)
        width = getattr(self, f"{property_name}_width")
        bands = band_count(self._electrons(symbols), self.extra_bands)
        settings = ScfSettings(
            bands=bands,
            functional=self.functional,
            width=width,
            tolerance=self.tolerance,
            band_tolerance=self.band_tolerance,
            max_iterations=self.max_scf_iterations,
            double=self.double,
            bands_per_fft=1 if _on_cpu() else bands,
        )
        mesh, shift = self.sampling_of(property_name).mesh(crystal.lattice, len(symbols))
        stretch = self._stretch(max(self.eos_volumes)) if property_name == "bulk_modulus" else 1.0
        colours = range(len(symbols)) if self.symmetry == "skeleton" else map(sorted(set(symbols)).index, symbols)
        return Kind(
            lattice=tuple(map(tuple, np.asarray(crystal.lattice, float).tolist())),
            frac_coords=tuple(map(tuple, np.asarray(crystal.frac_coords, float).tolist())),
            colours=_renumbered(colours),
            cutoff=self.cutoff(symbols, property_name),
            mesh=mesh,
            shift=shift,
            stretch=stretch,
            light=is_light(self.pseudo_set(), symbols),
            settings=settings,
            rule=self.sampling,
        )

    def _stretch(self, largest: float) -> float:
        """Of the lattice, to volumes up to ``largest`` of the given one: a constant cut-off needs waves for them."""
        return 1.0 if self.eos_same_waves else largest ** (1 / 3)

    def cutoff(self, symbols: Sequence[str], property_name: str) -> float:
        """Ha, for a crystal of these elements.

        Raises:
            ValueError: an element has no measured cut-off (pseudopotentials other than those shipped).
        """
        chosen = getattr(self, f"{property_name}_cutoff")
        if not isinstance(chosen, str):
            return float(chosen)
        table = cutoff_table(chosen)
        unknown = sorted(set(symbols) - set(table))
        if unknown:
            raise ValueError(
                f"no measured cut-off for {', '.join(unknown)}; set {property_name}_cutoff to a number of Ha"
            )
        return _CUTOFF_STEP * math.ceil(max(table[s] for s in symbols) / _CUTOFF_STEP)

    def _sampling_settings(self, property_name: str) -> dict[str, bool]:
        return {"shifted": self.shifted, "special": self._cell_rule_special(property_name)}

    def _cell_rule_special(self, property_name: str) -> bool:
        return self.special_points and property_name == "band_gap"

    def _lacking(self, symbols: Sequence[str]) -> str:
        missing = sorted({s for s in symbols if s not in self.pseudo_set()})
        return f"{self.pseudo_set().name} has no {', '.join(missing)}" if missing else ""

    def _electrons(self, symbols: Sequence[str]) -> int:
        return sum(self.pseudo_set().valence(s) for s in symbols)

    def _run(self, kind: Kind, crystals: Sequence[Crystal], property_name: str) -> list[Result]:
        """The results for crystals of one kind."""
        from crystaljax.dft_bridge.planewave import properties

        bench = _workbench(self.pseudopotentials, self.batch)
        symbols = [symbols_of(crystal) for crystal in crystals]
        progress, rungs = _Progress(property_name, kind), self.rungs(property_name)
        if property_name == "band_gap":
            found = properties.band_edges(bench, kind, symbols, self.special_points, self.total_energy, progress, rungs)
            finish = self._gap
        elif property_name == "bulk_modulus":
            found = properties.energies_of_volumes(bench, kind, symbols, self.eos_volumes, progress, rungs)
            further = dataclasses.replace(kind, stretch=self._stretch(_STRETCH * self.eos_range[1]))
            found = properties.sample_further(bench, further, symbols, found, self._further_volume, progress)
            finish = self._modulus_of
        else:
            bounds = self.nstep, self.largest_force, self.largest_stress
            found = properties.relax(bench, kind, symbols, *bounds, progress, rungs)
            finish = self._density
        results = []
        for names, outcome in zip(symbols, found, strict=True):
            details = self._facts(kind, names, bench, outcome)
            if outcome.converged:
                results.append(finish(names, outcome, {"rung": outcome.climb.rung.name} | details))
            else:
                message = outcome.climb.failed_attempts[-1]["message"]
                results.append(Result.failure(Status.NOT_CONVERGED, message, **details))
        return results

    def _facts(self, kind: Kind, symbols: Sequence[str], bench: Workbench, outcome: Outcome) -> dict[str, Any]:
        """The part of ``details`` that every property shares."""
        return {
            "valence_electrons": self._electrons(symbols),
            "kpoints": list(kind.mesh),
            "irreducible_kpoints": bench.solver(kind).basis.n_kpoints,
            "cutoff": kind.cutoff,
            "bands": kind.settings.bands,
            "iterations": outcome.iterations,
            "energy": outcome.energy if math.isfinite(outcome.energy) else None,
            "pseudopotentials": self.pseudo_set().name,
            **outcome.climb.facts,
        }

    def _gap(self, symbols: Sequence[str], edges: BandEdges, details: dict[str, Any]) -> Result:
        """max(0, LUMO - HOMO) in eV."""
        gap = edges.lumo - edges.homo
        details |= {"homo": edges.homo, "lumo": edges.lumo, "raw_gap": gap, "direct_gap": edges.direct}
        details |= {"pressure": edges.pressure, "pulay_pressure": edges.pulay_pressure}
        return Result(max(0.0, gap), Status.OK, details=details)

    def _further_volume(self, samples: Volumes) -> float | None:
        planned = len(self.eos_volumes)
        return further_volume(samples.scales, samples.energies.tolist(), planned, self.further, self.eos_range)

    def _modulus_of(self, symbols: Sequence[str], samples: Volumes, details: dict[str, Any]) -> Result:
        """Bulk modulus in GPa of a Murnaghan fit, at the given cell or at the fitted minimum."""
        return self._modulus(samples.scales, samples.energies, samples.volume, details)

    def _density(self, symbols: Sequence[str], cell: RelaxedCell, details: dict[str, Any]) -> Result:
        """g/cm3 of the relaxed cell."""
        details |= {
            "relaxed": cell.relaxed,
            "ionic_steps": cell.steps,
            "lattice": cell.lattice.tolist(),
            "frac_coords": cell.frac_coords.tolist(),
            "pressure": cell.pressure,
        }
        return Result(density_of(Atoms(symbols, cell=cell.lattice)), Status.OK, details=details)


@functools.cache
def cutoff_table(name: str) -> dict[str, float]:
    """Ha by element, of a column of the measured cut-offs; raises ``ValueError`` for an unknown one."""
    tables = json.loads(CUTOFF_FILE.read_text())["cutoffs"]
    if name not in tables:
        raise ValueError(f"no cut-offs {name!r}; choose {', '.join(tables)} or a number of Ha")
    return tables[name]


@functools.cache
def _pseudo_set(where: str) -> PseudoSet:
    return shipped() if where == SHIPPED_NAME else load_folder(os.path.expanduser(where))


@functools.cache
def _workbench(pseudopotentials: str, batch: int) -> Workbench:
    from crystaljax.dft_bridge.planewave.kinds import Workbench

    return Workbench(_pseudo_set(pseudopotentials), batch or (1 if _on_cpu() else None))


def _own_cache() -> Path:
    """Where compiled programs are kept unless the user names another folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "crystaljax", "xla")


def _on_cpu() -> bool:
    """Whether workers calculate on CPUs: without a GPU; a TPU is for one process and has no double precision."""
    import jax

    return jax.default_backend() != "gpu"


class _Progress:
    """Logs how far a batch is, now and then."""

    def __init__(self, property_name: str, kind: Kind):
        self._what = f"{property_name}, {len(kind.frac_coords)} sites, {kind.cutoff:g} Ha"
        self._last = time.monotonic()

    def __call__(self, done: int, at_work: int) -> None:
        if time.monotonic() - self._last >= _PROGRESS_SECONDS:
            self._last = time.monotonic()
            logger.info("%s: %d SCFs done, %d at work", self._what, done, at_work)


def _cost(kind: Kind | int) -> float:
    """What a crystal of a kind costs, relative to others; 0 if it has none."""
    if isinstance(kind, int):
        return 0.0
    volume = abs(np.linalg.det(np.array(kind.lattice)))
    return math.prod(kind.mesh) * kind.settings.bands * volume * kind.cutoff**1.5


def _renumbered(colours: Any) -> tuple[int, ...]:
    """Colours by first appearance, so that equal patterns are equal whatever the elements."""
    seen: dict[int, int] = {}
    return tuple(seen.setdefault(c, len(seen)) for c in colours)
