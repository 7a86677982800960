"""One calculation with ``pw.x`` of Quantum ESPRESSO: which program, its input, its run, its output.

The input is ASE's; numbers come from the XML file, in full precision, and the text says what went wrong. Every
calculation has a folder of its own, so no output of an earlier one can be read, and the folder is removed afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import spglib
from ase import Atoms
from ase.calculators.espresso import EspressoProfile
from ase.io.espresso import write_espresso_in
from ase.units import Bohr, GPa, Hartree

from crystaljax.dft_bridge.engines.base import MACHINE_RETURNS, EngineNotReady
from crystaljax.dft_bridge.engines.upf import UpfFile
from crystaljax.dft_bridge.ladder import ScfFailure
from crystaljax.status import Status

OLDEST = (6, 7)
"""First version of ``pw.x`` whose XML file is read here."""
QEPY_HOME = Path("~/.local/share/crystaljax/qepy").expanduser()
"""A virtual environment of its own for the wheel ``qepy``, which needs an older NumPy than JAX."""
INSTALL_HINT = "run `apt-get install quantum-espresso`, or `crystaljax doctor --install espresso` for the wheel qepy"

_T = TypeVar("_T")
_NO_POINTS = np.zeros((0, 3))
_GPA = Hartree / Bohr**3 / GPa  # GPa per Ha/bohr^3
_SYMPREC = 1e-4  # Å
_LOG_CHARACTERS = 2000
_MESSAGE_CHARACTERS = 300
_PREFIX = "x"

FAILURES: tuple[tuple[str, Status, str], ...] = (
    (r"convergence NOT achieved after +(\d+)", Status.NOT_CONVERGED, r"no self-consistency within \1 iterations"),
    (r"charge is wrong: smearing is needed", Status.ODD_ELECTRONS, "fixed occupations do not hold the electrons"),
    (r"charge is wrong", Status.NOT_CONVERGED, "the electrons of the density do not add up"),
    (r"atoms # *(\d+) and # *(\d+) overlap", Status.ATOMS_TOO_CLOSE, r"atoms \1 and \2 overlap"),
    (
        r"(too many bands are not converged|eigenvectors failed to converge|S matrix not positive definite"
        r"|(?:problems computing|error in) cholesky|[cr]diaghg\w* \(\d+\))",
        Status.NOT_CONVERGED,
        r"the diagonalisation broke down: \1",
    ),
    (r"(Not enough space allocated for radial FFT)", Status.NOT_CONVERGED, r"the cell changed too much: \1"),
)
"""What ``pw.x`` writes, which outcome that is, and what to say; the first that is found counts."""
_MACHINE = (
    r"(?i)(file \S+ not found|no space left on device|disk quota exceeded|read-only file system|permission denied"
    r"|error (?:while )?(?:writing|opening)[^\n]*|out-of-resource|\w*_init failed|an error occurred in MPI_Init"
    r"|cannot allocate memory|would exceed memory limit|insufficient virtual memory"
    r"|error while loading shared libraries[^\n]*|symbol lookup error[^\n]*"
    r"|(?-i:ImportError|ModuleNotFoundError|OSError)\b[^\n]*)"
)
"""What ``pw.x``, Fortran and MPI write when files or memory run out, and a loader or Python when a part is missing."""


class PwxFailure(ScfFailure):
    """A calculation without a result: the outcome, a line for people, and the end of the output."""

    def __init__(self, status: Status, message: str, log: str):
        super().__init__(status, message)
        self.log = log[-_LOG_CHARACTERS:]


@dataclasses.dataclass(frozen=True)
class Program:
    """A ``pw.x`` that runs here: its command and its version, such as ``7.2``."""

    command: tuple[str, ...]
    version: str


@dataclasses.dataclass(frozen=True, eq=False)
class PwxOutput:
    """What ``pw.x`` found, of the last cell if it relaxed one.

    Attributes:
        energy: eV per cell; the free energy when smeared.
        eigenvalues: float64 [K, B], eV.
        occupations: float64 [K, B], 0 to 1.
        electrons: valence electrons per cell.
        lattice: float64 [3, 3], Å.
        frac_coords: float64 [N, 3].
        pressure: GPa, positive when the cell wants to expand; None if no stress was asked for.
        iterations: SCF steps (of the last SCF).
        ionic_steps: SCF calculations of a relaxation, 1 otherwise.
        relaxed: whether a relaxation ended before its steps were used up.
        extra_eigenvalues: float64 [K', B], eV, at points outside the mesh, in the density of the SCF.
    """

    energy: float
    eigenvalues: np.ndarray
    occupations: np.ndarray
    electrons: float
    lattice: np.ndarray
    frac_coords: np.ndarray
    pressure: float | None
    iterations: int
    ionic_steps: int
    relaxed: bool
    extra_eigenvalues: np.ndarray | None = None

    @property
    def bands(self) -> np.ndarray:
        """float64 [K + K', B], eV, at all points."""
        extra = () if self.extra_eigenvalues is None else (self.extra_eigenvalues,)
        return np.concatenate([self.eigenvalues, *extra])


@functools.cache
def find_program(command: str) -> Program:
    """The program of a command; of an empty one ``pw.x`` on the PATH or else the wheel ``qepy``.

    Raises:
        EngineNotReady: there is none, it does not start, or it is too old.
    """
    python = QEPY_HOME / "bin" / "python"
    if not command and shutil.which("pw.x"):
        command = "pw.x"
    elif not command and python.exists():
        command = shlex.join([str(python), "-m", "qepy", "--pw.x"])
    elif not command:
        raise EngineNotReady(f"pw.x is not on the PATH; {INSTALL_HINT}")
    try:
        words = tuple(shlex.split(command))
        version = EspressoProfile(command, pseudo_dir="").version()
    except (OSError, AssertionError, ValueError) as error:
        why = str(error) or "it does not say its version"
        raise EngineNotReady(f"`{command}` is not a pw.x that runs ({why}); {INSTALL_HINT}") from error
    number = re.match(r"(\d+)\.(\d+)", version)
    if number is None or tuple(map(int, number.groups())) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise EngineNotReady(f"pw.x is version {version}, but {oldest} or later is needed; {INSTALL_HINT}")
    return Program(words, version)


def oriented(atoms: Atoms) -> Atoms:
    """The crystal rotated to the usual axes of its crystal system, where ``pw.x`` finds all of its symmetry."""
    cell = (atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers)
    dataset = spglib.get_symmetry_dataset(cell, symprec=_SYMPREC)
    turned = atoms.copy()
    if dataset is not None:
        turned.set_cell(atoms.cell.array @ dataset.std_rotation_matrix.T, scale_atoms=True)
    return turned


def calculate(
    program: Program,
    atoms: Atoms,
    settings: Mapping[str, Mapping[str, Any]],
    mesh: tuple[int, int, int],
    files: Mapping[str, UpfFile],
    extra: np.ndarray = _NO_POINTS,
) -> PwxOutput:
    """Run one calculation on one core, in a folder that exists only meanwhile.

    Args:
        program: from :func:`find_program`.
        atoms: the crystal.
        settings: entries by namelist, in the units of ``pw.x``; files and folders are added here.
        mesh: subdivisions of a k-point mesh that holds Gamma.
        files: pseudopotentials by element.
        extra: [K', 3], fractional: more k-points for bands, in a second run with the density of the first.

    Raises:
        PwxFailure: the calculation has no result.
        OSError, MemoryError: the machine is to blame, not the crystal.
    """
    with tempfile.TemporaryDirectory(prefix="crystaljax-pwx-") as scratch:
        folder = Path(scratch)
        write_input(folder, atoms, settings, mesh, files)
        done = execute(program, folder)
        xml = folder / f"{_PREFIX}.xml"
        found = read(done.stdout, xml.read_bytes() if xml.exists() else None, done.returncode)
        if not len(extra):
            return found
        xml.unlink()
        only_bands = {**settings, "control": {**settings["control"], "calculation": "bands", "tstress": False}}
        write_input(folder, atoms, only_bands, extra, files)
        done = execute(program, folder)
        bands = read_bands(done.stdout, xml.read_bytes() if xml.exists() else None, done.returncode)
        if bands.shape != (len(extra), found.eigenvalues.shape[1]):
            raise PwxFailure(Status.ENGINE_ERROR, f"pw.x found bands of shape {bands.shape}", done.stdout)
        return dataclasses.replace(found, extra_eigenvalues=bands)


def write_input(
    folder: Path,
    atoms: Atoms,
    settings: Mapping[str, Mapping[str, Any]],
    kpoints: tuple[int, int, int] | np.ndarray,
    files: Mapping[str, UpfFile],
) -> None:
    """Write the input file, with links to the pseudopotentials beside it: ``pw.x`` would look elsewhere, too.

    ``kpoints`` are the subdivisions of a mesh, or a list [K, 3] of points.
    """
    names = {symbol: f"{symbol}.upf" for symbol in dict.fromkeys(atoms.get_chemical_symbols())}
    for symbol, name in names.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(files[symbol].path.resolve())
    own = {"prefix": _PREFIX, "outdir": "./", "pseudo_dir": "./", "disk_io": "low"}  # others write no XML
    entries = {**settings, "control": {**own, **settings["control"]}}
    listed = isinstance(kpoints, np.ndarray)
    mesh = None if listed else kpoints
    text = io.StringIO()
    write_espresso_in(text, atoms, entries, pseudopotentials=names, kpts=mesh, crystal_coordinates=True)
    content = text.getvalue()
    if listed:
        points = "".join(" ".join(f"{x:.12f}" for x in point) + " 1.0\n" for point in kpoints)
        content = content.replace("K_POINTS gamma\n", f"K_POINTS crystal\n{len(kpoints)}\n{points}")
    (folder / "pw.in").write_text(content, encoding="utf-8")


def execute(program: Program, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the program in a folder. It ends with this process, however that ends (where ``setpriv`` is, so on Linux)."""
    guard = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    return subprocess.run(
        [*guard, *program.command, "-in", "pw.in"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},  # MPI leaves files there when it is killed
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def read(text: str, xml: bytes | None, returncode: int = 0) -> PwxOutput:
    """What a finished calculation found.

    Args:
        text: standard output and error.
        xml: content of the XML file, None if there is none.
        returncode: as of :mod:`subprocess`, negative for a signal.

    Raises:
        PwxFailure: it found nothing that can be used.
        OSError, MemoryError: the machine is to blame, not the crystal.
    """
    output = _parsed(lambda root: _parse(root, text), text, xml, returncode)
    numbers = [output.energy, output.electrons, output.pressure or 0.0, output.eigenvalues, output.lattice]
    if not all(np.isfinite(value).all() for value in numbers):
        raise PwxFailure(Status.INVALID_RESULT, "pw.x found numbers that are not finite", text)
    return output


def read_bands(text: str, xml: bytes | None, returncode: int = 0) -> np.ndarray:
    """The eigenvalues [K, B] in eV of a calculation of bands; arguments and errors as of :func:`read`."""
    bands = _parsed(lambda root: _eigenvalues(_child(root, "output/band_structure"))[0], text, xml, returncode)
    if not np.isfinite(bands).all():
        raise PwxFailure(Status.INVALID_RESULT, "pw.x found numbers that are not finite", text)
    return bands


def _parsed(parse: Callable[[ElementTree.Element], _T], text: str, xml: bytes | None, returncode: int) -> _T:
    """What is read from the XML file; raises as :func:`read`."""
    # A failed SCF ends with JOB DONE too, and with exit status 2; a relaxation that used up its steps with 3.
    if xml is None or "JOB DONE" not in text or "convergence NOT achieved" in text:
        raise failure(text, returncode)
    try:
        return parse(ElementTree.fromstring(xml))
    except (ElementTree.ParseError, ValueError, LookupError, OverflowError) as error:
        raise PwxFailure(Status.ENGINE_ERROR, f"the XML file of pw.x cannot be read ({error})", text) from error


def failure(text: str, returncode: int) -> PwxFailure:
    """What the output of a calculation without a result means.

    Raises:
        OSError, MemoryError: the machine is to blame, not the crystal.
    """
    for pattern, status, message in FAILURES:
        found = re.search(pattern, text)
        if found:
            return PwxFailure(status, found.expand(message), text)
    machine = re.search(_MACHINE, text)
    if machine:
        raise (MemoryError if "memory" in machine[1].lower() else OSError)(f"pw.x: {machine[1]}")
    if returncode in MACHINE_RETURNS:
        how = f"was ended by {signal.Signals(-returncode).name}" if returncode < 0 else f"cannot be run ({returncode})"
        raise ChildProcessError(f"pw.x {how}: out of memory, ended by hand, or not installed for this machine")
    reported = re.search(r"%{20,}\s*(\S.*?)\s*%{20,}", text, re.DOTALL)
    if reported:
        message = " ".join(reported[1].split())
    elif returncode < 0:
        message = f"pw.x died of signal {-returncode}"
    else:
        message = f"pw.x ended with exit status {returncode} and without a result"
    return PwxFailure(Status.ENGINE_ERROR, message[:_MESSAGE_CHARACTERS], text)


def _parse(root: ElementTree.Element, text: str) -> PwxOutput:
    """Read the XML file; raises ``ValueError`` where something is missing or garbled."""
    out = _child(root, "output")
    bands, structure = _child(out, "band_structure"), _child(out, "atomic_structure")
    lattice = np.array([_numbers(_child(structure, f"cell/{name}"), 3) for name in ("a1", "a2", "a3")])
    positions = np.array([_numbers(atom, 3) for atom in structure.iter("atom")])
    if not len(positions) or not abs(np.linalg.det(lattice)) > 0:
        raise ValueError("no atoms, or a flat cell")
    electrons = float(_numbers(_child(bands, "nelec"), 1)[0])
    count = round(electrons) // 2 + 1 if np.isfinite(electrons) else 1
    eigenvalues, occupations = _eigenvalues(bands)
    if eigenvalues.ndim != 2 or eigenvalues.shape != occupations.shape or eigenvalues.shape[1] < count:
        raise ValueError(f"eigenvalues of shape {eigenvalues.shape}, occupations {occupations.shape}")
    stress = out.find("stress")
    return PwxOutput(
        energy=float(_numbers(_child(out, "total_energy/etot"), 1)[0]) * Hartree,
        eigenvalues=eigenvalues,
        occupations=occupations,
        electrons=electrons,
        lattice=lattice * Bohr,
        frac_coords=positions @ np.linalg.inv(lattice),
        pressure=None if stress is None else float(np.trace(_numbers(stress, 9).reshape(3, 3)) / 3 * _GPA),
        iterations=int(_numbers(_child(out, "convergence_info/scf_conv/n_scf_steps"), 1)[0]),
        ionic_steps=max(len(root.findall("step")), 1),
        relaxed="bfgs converged" in text,
    )


def _eigenvalues(bands: ElementTree.Element) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues in eV and occupations, both [K, B] where the file is sound."""
    levels = bands.findall("ks_energies")
    eigenvalues, occupations = (
        np.array([_numbers(_child(level, name)) for level in levels]) for name in ("eigenvalues", "occupations")
    )
    return eigenvalues * Hartree, occupations


def _child(node: ElementTree.Element, path: str) -> ElementTree.Element:
    child = node.find(path)
    if child is None:
        raise ValueError(f"no {path}")
    return child


def _numbers(node: ElementTree.Element, count: int | None = None) -> np.ndarray:
    values = np.array((node.text or "").split(), dtype=np.float64)
    if count is not None and len(values) != count:
        raise ValueError(f"{len(values)} numbers in {node.tag} instead of {count}")
    return values
