"""Reads norm-conserving pseudopotential files: UPF version 2 (Quantum ESPRESSO) and psp8 (ABINIT).

Everything is float64 on the host, in Hartree atomic units. What a file holds is kept as it stands; Fourier
transforms are in :mod:`crystaljax.dft_bridge.planewave.pseudopotentials`. A file that cannot be used is refused by a
:class:`PseudoError` that names the file, the reason and what to use instead.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from ase.data import chemical_symbols

from crystaljax.errors import CrystalJAXError

SUFFIXES = (".upf", ".psp8")
"""Names of pseudopotential files end like this, in small or capital letters."""

MAX_ANGULAR_MOMENTUM = 3

ADVICE = (
    "use a scalar-relativistic norm-conserving file in UPF version 2 or psp8 format, "
    "for example PseudoDojo's (http://www.pseudo-dojo.org)"
)

_FUNCTIONALS = {
    "PBE": "PBE",
    "SLA PW PBX PBC": "PBE",
    "SLA PW PBE PBE": "PBE",
    "PBESOL": "PBEsol",
    "SLA PW PSX PSC": "PBEsol",
    "LDA": "LDA",
    "PW": "LDA",
    "PZ": "LDA-PZ",
    "SLA PW NOGX NOGC": "LDA",
    "SLA PZ NOGX NOGC": "LDA-PZ",
}
_PSP8_FUNCTIONALS = {11: "PBE", -101130: "PBE", -130101: "PBE", -116133: "PBEsol", 7: "LDA", -1012: "LDA"}
_MIN_MESH = 5


class PseudoError(CrystalJAXError, ValueError):
    """A pseudopotential cannot be used; the message says which, why and what to do."""


class Projector(NamedTuple):
    """A radial projector beta(r) as the file holds it.

    Attributes:
        angular_momentum: 0 to 3.
        values: [M'] r * beta(r) on the first points of the file's mesh.
        cutoff: number of mesh points after which the projector is to be taken as zero.
    """

    angular_momentum: int
    values: np.ndarray
    cutoff: int


class Orbital(NamedTuple):
    """A bound orbital chi(r) of the pseudo-atom.

    Attributes:
        angular_momentum: 0 to 3.
        values: [M'] r * chi(r) on the first points of the file's mesh.
        energy: Ha, of the orbital in the free atom; -0.5 where the file does not say.
    """

    angular_momentum: int
    values: np.ndarray
    energy: float


@dataclasses.dataclass(frozen=True, eq=False)
class PseudoFile:
    """The content of a norm-conserving pseudopotential file. All arrays are float64, in Hartree atomic units.

    Attributes:
        symbol: chemical symbol.
        valence: number of valence electrons.
        functional: such as ``"PBE"``; the file's own words where they are not known.
        r: [M] radial mesh, increasing.
        rab: [M] dr/di, the weight of each point in an integral over the mesh.
        v_local: [M] Ha, ends as ``-valence / r``.
        projectors: P radial projectors.
        dij: [P, P] symmetric; sum_ij |beta_i> dij <beta_j| is the non-local potential in Ha.
        rho_core: [M] electrons per bohr^3, density of the model core, or None.
        rho_atom: [M] 4 pi r^2 rho(r) of the valence electrons of the free atom, or None.
        path: name of the file.
        sha256: of the file's bytes, hexadecimal.
        orbitals: of the free atom, those that the file has; psp8 has none.
    """

    symbol: str
    valence: int
    functional: str
    r: np.ndarray
    rab: np.ndarray
    v_local: np.ndarray
    projectors: tuple[Projector, ...]
    dij: np.ndarray
    rho_core: np.ndarray | None
    rho_atom: np.ndarray | None
    path: str
    sha256: str
    orbitals: tuple[Orbital, ...] = ()


def read_pseudopotential(path: str | Path) -> PseudoFile:
    """Reads a UPF version 2 or a psp8 file; the content decides which, not the name.

    Raises:
        PseudoError: for a file that cannot be read, is of another format, truncated or inconsistent, or holds
            something else than a scalar-relativistic norm-conserving pseudopotential up to l = 3.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PseudoError(f"{path}: cannot be read ({error.strerror or error}); {ADVICE}") from error
    text = content.decode("utf-8", errors="replace")
    reader = _reader(path, text)
    try:
        file = reader(path, text, hashlib.sha256(content).hexdigest())
    except PseudoError:
        raise
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        _refuse(path, f"truncated or garbled ({error})")
    _check(path, file)
    return file


def _reader(path: Path, text: str):
    if re.search(r"<UPF\s+version\s*=\s*[\"']\s*2\.", text):
        return _read_upf
    if "qe_pp:pseudo" in text:
        _refuse(path, "UPF in the schema format of Quantum ESPRESSO 7, not UPF version 2")
    if "<UPF" in text or "<PP_HEADER" in text:
        _refuse(path, "UPF, but not version 2 (upfconv.x -u of Quantum ESPRESSO converts version 1)")
    lines = text.splitlines()
    if len(lines) > 2 and re.match(r"\s*8\s+-?\d+\s+\d+\s+\d+\s+\d+", lines[2]):
        return _read_psp8
    _refuse(path, "neither UPF version 2 nor psp8")


def _refuse(path: Path, reason: str) -> NoReturn:
    raise PseudoError(f"{path}: {reason}; {ADVICE}")


def _check(path: Path, file: PseudoFile) -> None:
    """What holds in both formats."""
    mesh = len(file.r)
    if mesh < _MIN_MESH:
        _refuse(path, f"a radial mesh of {mesh} points")
    if file.r[0] < 0 or np.any(np.diff(file.r) <= 0) or np.any(file.rab <= 0):
        _refuse(path, "the radial mesh does not increase from zero or above")
    arrays = {"local potential": file.v_local, "core density": file.rho_core, "atomic density": file.rho_atom}
    for name, array in arrays.items():
        if array is not None and len(array) != mesh:
            _refuse(path, f"{len(array)} numbers of the {name} for a mesh of {mesh} points")
    for index, projector in enumerate(file.projectors, 1):
        if not 0 <= projector.angular_momentum <= MAX_ANGULAR_MOMENTUM:
            _refuse(path, f"projector {index} has angular momentum {projector.angular_momentum}, not 0 to 3")
        if not _MIN_MESH <= projector.cutoff <= len(projector.values) <= mesh:
            _refuse(
                path,
                f"projector {index} has {len(projector.values)} numbers and ends at point {projector.cutoff} "
                f"of a mesh of {mesh}",
            )
    for index, orbital in enumerate(file.orbitals, 1):
        if not 0 <= orbital.angular_momentum <= MAX_ANGULAR_MOMENTUM:
            _refuse(path, f"atomic orbital {index} has angular momentum {orbital.angular_momentum}, not 0 to 3")
        if not _MIN_MESH <= len(orbital.values) <= mesh:
            _refuse(path, f"atomic orbital {index} has {len(orbital.values)} numbers for a mesh of {mesh}")
    scale = np.max(np.abs(file.dij), initial=0.0)
    if np.any(np.abs(file.dij - file.dij.T) > 1e-8 * scale):
        _refuse(path, "the matrix D of the projectors is not symmetric")
    if abs(file.r[-1] * file.v_local[-1] + file.valence) > 0.05 * file.valence:
        _refuse(path, f"the local potential does not end as -{file.valence}/r")


def _numbers(path: Path, name: str, text: str, count: int | None = None) -> np.ndarray:
    """float64 [count] of Fortran's notation; refuses a wrong count and numbers that are not finite."""
    words = text.split()
    try:
        values = np.array(words, dtype=np.float64)
    except ValueError:
        # 1.0D+00 and, for three-digit exponents, 1.0-100 are what Fortran also writes.
        repaired = [re.sub(r"(?<=[\d.])([+-]\d{3})$", r"E\1", re.sub("[dD]", "E", word)) for word in words]
        try:
            values = np.array(repaired, dtype=np.float64)
        except ValueError as error:
            _refuse(path, f"garbled numbers of {name} ({error})")
    if count is not None and len(values) != count:
        _refuse(path, f"{len(values)} numbers of {name} instead of {count}, as in a truncated file")
    if not np.all(np.isfinite(values)):
        _refuse(path, f"numbers of {name} that are not finite")
    return values


def _symbol(path: Path, word: str) -> str:
    symbol = word.strip().capitalize()
    if symbol not in chemical_symbols[1:]:
        _refuse(path, f"{word.strip()!r} is not a chemical element")
    return symbol


def _valence(path: Path, value: float) -> int:
    if not math.isfinite(value) or abs(value - round(value)) > 1e-6 or round(value) < 1:
        _refuse(path, f"a valence of {value} electrons, not a positive integer")
    return round(value)


# UPF version 2 ------------------------------------------------------------------------------------------------------


def _read_upf(path: Path, text: str, sha256: str) -> PseudoFile:
    root = _upf_root(path, text)
    header = _child(path, root, "PP_HEADER")
    _refuse_other_kinds(path, header, root)
    mesh_node = _child(path, root, "PP_MESH")
    # Quantum ESPRESSO's order: the mesh section's own number of points goes before the header's.
    mesh = _integer(path, mesh_node.get("mesh", header.get("mesh_size", "")), "mesh points")
    if mesh < _MIN_MESH:
        _refuse(path, f"a radial mesh of {mesh} points")
    count = _integer(path, header.get("number_of_proj", ""), "projectors")
    if count < 0:
        _refuse(path, f"{count} projectors")
    functional = " ".join(re.split(r"[\s+-]+", header.get("functional", "").strip().upper()))
    core = _array(path, root, "PP_NLCC", mesh) if _true(header, "core_correction") else None
    atom = _array(path, root, "PP_RHOATOM", mesh) if root.find("PP_RHOATOM") is not None else None
    projectors, dij = _upf_nonlocal(path, root, count, mesh)
    return PseudoFile(
        symbol=_symbol(path, header.get("element", "")),
        valence=_valence(path, float(_numbers(path, "z_valence", header.get("z_valence", ""), 1)[0])),
        functional=_FUNCTIONALS.get(functional, functional),
        r=_array(path, mesh_node, "PP_R", mesh),
        rab=_array(path, mesh_node, "PP_RAB", mesh),
        v_local=_array(path, root, "PP_LOCAL", mesh) / 2,
        projectors=projectors,
        dij=dij,
        rho_core=core,
        rho_atom=atom if atom is not None and np.any(atom) else None,
        path=str(path),
        sha256=sha256,
        orbitals=_upf_orbitals(path, root),
    )


def _upf_root(path: Path, text: str) -> ElementTree.Element:
    start, end = text.find("<UPF"), text.rfind("</UPF>")
    if end < start:
        _refuse(path, "no </UPF> at the end, as in a truncated file")
    text = text[start:end] + "</UPF>"
    # Sections for people hold what is not XML: stray brackets, ampersands, double hyphens in comments.
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<PP_INFO\b.*?</PP_INFO\s*>", "", text, flags=re.DOTALL)
    text = re.sub(r"&(?!\w+;|#\d+;|#x[0-9a-fA-F]+;)", "&amp;", text)
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        _refuse(path, f"not well-formed ({error}), as in a truncated file")


def _refuse_other_kinds(path: Path, header: ElementTree.Element, root: ElementTree.Element) -> None:
    kind = header.get("pseudo_type", "").strip().upper()
    if _true(header, "is_paw") or kind == "PAW":
        _refuse(path, "projector augmented waves (PAW)")
    if _true(header, "is_ultrasoft") or kind in ("US", "USPP"):
        _refuse(path, "ultrasoft")
    if _true(header, "is_coulomb") or kind == "1/R":
        _refuse(path, "a bare Coulomb potential")
    if kind == "SL" or (root.find("PP_SEMILOCAL") is not None and root.find("PP_NONLOCAL/PP_BETA.1") is None):
        _refuse(path, "semilocal, without projectors")
    if kind != "NC":
        _refuse(path, f"of type {kind or 'unknown'!r}, not norm-conserving ('NC')")
    if _true(header, "has_so") or header.get("relativistic", "").strip().lower().startswith("full"):
        _refuse(path, "fully relativistic (spin-orbit)")


def _upf_nonlocal(
    path: Path, root: ElementTree.Element, count: int, mesh: int
) -> tuple[tuple[Projector, ...], np.ndarray]:
    if count == 0:
        return (), np.zeros((0, 0))
    section = _child(path, root, "PP_NONLOCAL")
    projectors = []
    for index in range(1, count + 1):
        node = _child(path, section, f"PP_BETA.{index}")
        values = _numbers(path, f"PP_BETA.{index}", node.text or "", _size(path, node))
        cutoff = _integer(path, node.get("cutoff_radius_index", "0"), "points of a projector")
        momentum = _integer(path, node.get("angular_momentum", ""), "angular momentum")
        projectors.append(Projector(momentum, values, cutoff if cutoff > 0 else len(values)))
    # Rydberg: sum_ij |beta_i> D_ij <beta_j| is twice the energy in Ha, with the same projectors.
    dij = _array(path, section, "PP_DIJ", count**2).reshape(count, count) / 2
    return tuple(projectors), dij


def _upf_orbitals(path: Path, root: ElementTree.Element) -> tuple[Orbital, ...]:
    """Those that the atom binds: others have a negative occupation, and may be anything."""
    section = root.find("PP_PSWFC")
    nodes = [] if section is None else [node for node in section if node.tag.startswith("PP_CHI")]
    orbitals = []
    for node in nodes:
        occupation = _numbers(path, f"the occupation of {node.tag}", node.get("occupation", "0"), 1)[0]
        values = _numbers(path, node.tag, node.text or "", _size(path, node))
        energy = _numbers(path, f"the energy of {node.tag}", node.get("pseudo_energy", "-1"), 1)[0] / 2
        if occupation >= 0 and np.any(values):
            momentum = _integer(path, node.get("l", ""), f"angular momentum of {node.tag}")
            orbitals.append(Orbital(momentum, values, float(energy) if energy < 0 else -0.5))
    return tuple(orbitals)


def _child(path: Path, node: ElementTree.Element, name: str) -> ElementTree.Element:
    child = node.find(name)
    if child is None:
        _refuse(path, f"no section {name}")
    return child


def _array(path: Path, node: ElementTree.Element, name: str, count: int) -> np.ndarray:
    child = _child(path, node, name)
    return _numbers(path, name, child.text or "", count)


def _size(path: Path, node: ElementTree.Element) -> int | None:
    return _integer(path, node.get("size", ""), "size") if "size" in node.attrib else None


def _integer(path: Path, word: str, name: str) -> int:
    try:
        return int(word)
    except ValueError:
        _refuse(path, f"{word!r} as the number of {name}")


def _true(node: ElementTree.Element, name: str) -> bool:
    return node.get(name, "F").strip().lstrip(".").upper().startswith("T")


# psp8 ---------------------------------------------------------------------------------------------------------------


class _Lines:
    """The lines of a psp8 file, one after the other."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.lines, self.at = path, text.splitlines(), 0

    def next(self, name: str) -> list[str]:
        if self.at >= len(self.lines):
            _refuse(self.path, f"ends before {name}, as a truncated file does")
        self.at += 1
        return self.lines[self.at - 1].split()

    def numbers(self, name: str, count: int) -> np.ndarray:
        """[count] the first numbers of the next line."""
        return _numbers(self.path, name, " ".join(self.next(name)[:count]), count)

    def integers(self, name: str, count: int) -> list[int]:
        """[count] the first integers of the next line."""
        return [_integer(self.path, word, name) for word in self.next(name)[:count]]

    def table(self, name: str, rows: int, columns: int) -> np.ndarray:
        """[rows, columns] without the index that starts each row."""
        block = [self.next(name) for _ in range(rows)]
        if any(len(row) <= columns for row in block) or [row[0] for row in block] != [str(i + 1) for i in range(rows)]:
            _refuse(self.path, f"garbled rows of {name}")
        text = " ".join(" ".join(row[1 : columns + 1]) for row in block)
        return _numbers(self.path, name, text, rows * columns).reshape(rows, columns)

    def block_header(self, name: str, momentum: int, count: int) -> np.ndarray:
        """[count] the energies on the line that opens the block of an angular momentum."""
        words = self.next(name)
        if not words or words[0] != str(momentum):
            _refuse(self.path, f"no block of {name} where it should be")
        return _numbers(self.path, name, " ".join(words[1 : count + 1]), count)


def _read_psp8(path: Path, text: str, sha256: str) -> PseudoFile:
    lines = _Lines(path, text)
    lines.next("the title")
    number, valence = lines.numbers("zatom and zion", 2)
    _, functional, lmax, lloc, mesh = lines.integers("pspcod,pspxc,lmax,lloc,mmax", 5)
    model_core = lines.numbers("rchrg and fchrg", 2)[1]
    if mesh < _MIN_MESH:
        _refuse(path, f"a radial mesh of {mesh} points")
    if not 0 <= lmax <= MAX_ANGULAR_MOMENTUM:
        _refuse(path, f"angular momenta up to {lmax}, not up to {MAX_ANGULAR_MOMENTUM}")
    counts = lines.integers("nproj", lmax + 1)
    if len(counts) != lmax + 1 or min(counts) < 0:
        _refuse(path, f"numbers of projectors {counts} for angular momenta up to {lmax}")
    extension = lines.integers("extension_switch", 1)
    if extension not in ([0], [1]):
        _refuse(path, f"extension_switch {extension}: spin-orbit projectors, or an extension that is not known")

    v_local = None
    blocks, projectors, energies = [], [], []
    for momentum in [*range(lmax + 1), *([lloc] if lloc > lmax else [])]:
        if momentum == lloc:
            lines.block_header("the local potential", momentum, 0)
            block = lines.table("the local potential", mesh, 2)
            v_local = block[:, 1]
        elif counts[momentum]:
            name = f"the projectors of l = {momentum}"
            energies.extend(lines.block_header(name, momentum, counts[momentum]))
            block = lines.table(name, mesh, 1 + counts[momentum])
            projectors.extend(Projector(momentum, column.copy(), mesh) for column in block.T[1:])
        else:
            continue
        blocks.append(block)
    if v_local is None:
        _refuse(path, f"no local potential (lloc is {lloc})")
    rho_core = rho_atom = None
    if model_core > 0:
        blocks.append(lines.table("the model core density", mesh, 2))
        rho_core = blocks[-1][:, 1] / (4 * math.pi)
    if extension == [1]:
        blocks.append(lines.table("the valence density", mesh, 2))
        rho_atom = blocks[-1][:, 0] ** 2 * blocks[-1][:, 1]
    r = blocks[0][:, 0]
    if any(not np.array_equal(block[:, 0], r) for block in blocks) or not np.allclose(np.diff(r), r[1] - r[0]):
        _refuse(path, "the blocks do not share one linear radial mesh")
    if number != round(number) or not 1 <= number < len(chemical_symbols):
        _refuse(path, f"{number} is not the number of a chemical element")
    return PseudoFile(
        symbol=chemical_symbols[int(number)],
        valence=_valence(path, float(valence)),
        functional=_PSP8_FUNCTIONALS.get(functional, f"pspxc {functional}"),
        r=r,
        rab=np.full(mesh, r[1] - r[0]),
        v_local=v_local,
        projectors=tuple(projectors),
        dij=np.diag(np.array(energies, dtype=np.float64)),
        rho_core=rho_core,
        rho_atom=rho_atom if rho_atom is not None and np.any(rho_atom) else None,
        path=str(path),
        sha256=sha256,
    )
