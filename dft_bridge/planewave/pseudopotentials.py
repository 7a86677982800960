"""Radial Fourier transforms of pseudopotentials on a uniform grid of wave numbers, and sets of them.

The integrals over the radial mesh are those of Quantum ESPRESSO's pw.x, so that total energies compare on
identical files: Simpson's rule with the file's dr/di, the local potential, core and atomic densities up to the first
point beyond 10 bohr, projectors up to the largest cut-off index of the file, always an odd number of points.

Everything is float64 NumPy on the host, in Hartree atomic units (Ha, bohr, electrons).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from scipy.special import erf, spherical_jn

from crystaljax.dft_bridge.planewave.pseudofile import ADVICE, SUFFIXES, PseudoError, PseudoFile, read_pseudopotential

__all__ = [
    "Q_MAX_DENSITY",
    "Q_MAX_PROJECTOR",
    "Q_STEP",
    "SHIPPED_FILE",
    "SHIPPED_NAME",
    "PseudoError",
    "PseudoSet",
    "RadialTables",
    "load_folder",
    "q_grid",
    "radial_tables",
    "read_set",
    "shipped",
    "tables_from_file",
    "write_set",
]

Q_STEP = 0.02
"""Distance of the wave numbers, 1/bohr."""

Q_MAX_PROJECTOR = 16.0
"""Largest wave number of the projectors, 1/bohr: plane waves up to 128 Ha."""

Q_MAX_DENSITY = 32.0
"""Largest wave number of the local potential and the densities, 1/bohr."""

R_MAX = 10.0
"""Integrals of the local potential and the densities end at the first mesh point beyond this radius, bohr."""

SHIPPED_NAME = "pseudodojo-0.4-pbe-standard"
SHIPPED_FILE = Path(__file__).with_name("data") / f"{SHIPPED_NAME}.npz"

_GAUSSIAN_WIDTH = 1.0  # bohr, standard deviation of the atomic density of a file without one
_SET_FORMAT = 2


@dataclasses.dataclass(frozen=True, eq=False)
class RadialTables:
    """Radial Fourier transforms of one element. NQ = 1601 wave numbers (:func:`q_grid`), NQB = 801.

    Attributes:
        symbol: chemical symbol.
        valence: number of valence electrons Z.
        local: float64 [NQ] Ha bohr^3, 4 pi int r^2 (v_local(r) + Z erf(r)/r) j0(qr) dr. The rest of the local
            potential is -4 pi Z exp(-q^2/4)/q^2, whose finite part at q = 0 is pi Z.
        core: float64 [NQ] electrons, 4 pi int r^2 rho_core(r) j0(qr) dr; zeros without a model core.
        density: float64 [NQ] electrons, the same of the free atom's valence density, scaled so that density[0] = Z;
            a Gaussian for a file without one.
        angular_momenta: int64 [P] of the projectors.
        energies: float64 [P] Ha; the non-local potential is sum_p |beta_p> energies_p <beta_p|.
        projectors: float64 [P, NQB], int r^2 j_l(qr) beta(r) dr.
        orbital_momenta: int64 [O], angular momentum of each orbital of the free atom that the file has.
        orbital_energies: float64 [O] Ha.
        orbitals: float16 [O, NQB], int r^2 j_l(qr) chi(r) dr with int r^2 chi^2 dr = 1: good enough to start from.
        functional: such as ``"PBE"``.
        source: where it is from: ``file`` (name), ``sha256`` (of the file), ``set`` (name of the set).
    """

    symbol: str
    valence: int
    local: np.ndarray
    core: np.ndarray
    density: np.ndarray
    angular_momenta: np.ndarray
    energies: np.ndarray
    projectors: np.ndarray
    orbital_momenta: np.ndarray
    orbital_energies: np.ndarray
    orbitals: np.ndarray
    functional: str
    source: dict[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class PseudoSet:
    """Pseudopotentials of some elements, one each, all for the same functional.

    Attributes:
        name: for people.
        tables: by chemical symbol.

    Raises:
        PseudoError: for no tables, or tables of different functionals.
    """

    name: str
    tables: Mapping[str, RadialTables]

    def __post_init__(self) -> None:
        if not self.tables:
            raise PseudoError(f"{self.name}: no pseudopotentials")
        by_functional: dict[str, list[str]] = {}
        for table in self.tables.values():
            by_functional.setdefault(table.functional, []).append(table.source["file"])
        if len(by_functional) > 1:
            mixture = "; ".join(f"{functional}: {', '.join(files)}" for functional, files in by_functional.items())
            raise PseudoError(f"{self.name}: pseudopotentials of different functionals ({mixture}); use files of one")

    @property
    def functional(self) -> str:
        """The functional of all the pseudopotentials, such as ``"PBE"``."""
        return next(iter(self.tables.values())).functional

    @property
    def symbols(self) -> tuple[str, ...]:
        """The elements, sorted by symbol."""
        return tuple(sorted(self.tables))

    @functools.cached_property
    def digest(self) -> str:
        """sha256 over the elements and the hashes of their files, hexadecimal; the name of the set is no part."""
        lines = [f"{symbol} {self.tables[symbol].source['sha256']}\n" for symbol in self.symbols]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def valence(self, symbol: str) -> int:
        """Number of valence electrons; raises :class:`PseudoError` for an unknown element."""
        return self[symbol].valence

    def __getitem__(self, symbol: str) -> RadialTables:
        """The tables of an element; raises :class:`PseudoError` for one that the set does not have."""
        try:
            return self.tables[symbol]
        except KeyError:
            known = " ".join(self.symbols)
            raise PseudoError(
                f"{self.name} has no pseudopotential for {symbol}; it has {known}. "
                "Use these elements, or a folder of files that has it"
            ) from None

    def __contains__(self, symbol: object) -> bool:
        return symbol in self.tables

    def __iter__(self) -> Iterator[str]:
        return iter(self.symbols)

    def __len__(self) -> int:
        return len(self.tables)


def q_grid(q_max: float) -> np.ndarray:
    """float64 [round(q_max / Q_STEP) + 1] wave numbers from 0 to ``q_max``, 1/bohr."""
    return Q_STEP * np.arange(round(q_max / Q_STEP) + 1)


def tables_from_file(path: str | Path, set_name: str = "") -> RadialTables:
    """The tables of a UPF version 2 or psp8 file; ``set_name`` goes to ``source["set"]``.

    Raises:
        PseudoError: see :func:`read_pseudopotential` and :func:`radial_tables`.
    """
    return radial_tables(read_pseudopotential(path), set_name)


def radial_tables(file: PseudoFile, set_name: str = "") -> RadialTables:
    """Transforms what a file holds.

    Raises:
        PseudoError: if the matrix D mixes angular momenta.
    """
    points = _odd(int(np.argmax(file.r > R_MAX)) + 1 if file.r[-1] > R_MAX else len(file.r))
    r = file.r[:points]
    weights = _simpson_weights(file.rab[:points])
    q = q_grid(Q_MAX_DENSITY)
    waves = np.sinc(np.outer(q / math.pi, r))  # j0(qr), [NQ, points]

    product = r * file.v_local[:points]
    local = 4 * math.pi * (waves @ (weights * r * (product + file.valence * erf(r))))
    # At q = 0 Quantum ESPRESSO integrates the difference to -Z/r itself; pi Z is the analytic rest.
    local[0] = 4 * math.pi * (weights @ (r * (product + file.valence))) - math.pi * file.valence
    if file.rho_core is None:
        core = np.zeros_like(q)
    else:
        core = 4 * math.pi * (waves @ (weights * r**2 * file.rho_core[:points]))
    density = np.zeros_like(q) if file.rho_atom is None else waves @ (weights * file.rho_atom[:points])
    if density[0] <= 0:
        density = np.exp(-((_GAUSSIAN_WIDTH * q) ** 2) / 2)
    energies, projectors = _diagonal(file, _projector_tables(file))
    return RadialTables(
        symbol=file.symbol,
        valence=file.valence,
        local=local,
        core=core,
        density=density * (file.valence / density[0]),
        angular_momenta=np.array([p.angular_momentum for p in file.projectors], dtype=np.int64),
        energies=energies,
        projectors=projectors,
        orbital_momenta=np.array([o.angular_momentum for o in file.orbitals], dtype=np.int64),
        orbital_energies=np.array([o.energy for o in file.orbitals], dtype=np.float64),
        orbitals=_orbital_tables(file, r, weights),
        functional=file.functional,
        source={"file": Path(file.path).name, "sha256": file.sha256, "set": set_name},
    )


def load_folder(folder: str | Path) -> PseudoSet:
    """The pseudopotentials of all ``.upf`` and ``.psp8`` files in a folder (not below it), named after the folder.

    Raises:
        PseudoError: for a folder without such files, two files for one element, a file that cannot be used, or files
            of different functionals.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PseudoError(f"{folder}: no such folder; name one that holds {' or '.join(SUFFIXES)} files")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise PseudoError(f"{folder}: holds no {' or '.join(SUFFIXES)} files; {ADVICE}")
    name = folder.resolve().name
    tables: dict[str, RadialTables] = {}
    for path in paths:
        table = tables_from_file(path, name)
        if table.symbol in tables:
            both = f"{tables[table.symbol].source['file']} and {path.name}"
            raise PseudoError(f"{folder}: {both} are both for {table.symbol}; keep one of them")
        tables[table.symbol] = table
    return PseudoSet(name, tables)


@functools.cache
def shipped() -> PseudoSet:
    """PseudoDojo 0.4, PBE, scalar-relativistic, standard accuracy: the data of the package, read at the first call.

    Raises:
        PseudoError: if the package was installed without its data.
    """
    return read_set(SHIPPED_FILE)


def write_set(pseudopotentials: PseudoSet, path: str | Path, notes: Mapping[str, str] | None = None) -> None:
    """Writes a set as a compressed ``.npz`` file; the same set gives the same bytes.

    Args:
        pseudopotentials: the set.
        path: of the file, overwritten.
        notes: texts to store beside it, such as the licence.
    """
    tables = [pseudopotentials[symbol] for symbol in pseudopotentials.symbols]
    arrays = {
        "format": np.array(_SET_FORMAT),
        "name": np.array(pseudopotentials.name),
        "functional": np.array(pseudopotentials.functional),
        "grid": np.array([Q_STEP, Q_MAX_PROJECTOR, Q_MAX_DENSITY]),
        "symbols": np.array([t.symbol for t in tables]),
        "files": np.array([t.source["file"] for t in tables]),
        "sha256": np.array([t.source["sha256"] for t in tables]),
        "valence": np.array([t.valence for t in tables], dtype=np.int64),
        "local": np.stack([t.local for t in tables]),
        "core": np.stack([t.core for t in tables]),
        "density": np.stack([t.density for t in tables]),
        "projector_counts": np.array([len(t.energies) for t in tables], dtype=np.int64),
        "angular_momenta": np.concatenate([t.angular_momenta for t in tables]),
        "energies": np.concatenate([t.energies for t in tables]),
        "projectors": np.concatenate([t.projectors for t in tables]),
        "orbital_counts": np.array([len(t.orbitals) for t in tables], dtype=np.int64),
        "orbital_momenta": np.concatenate([t.orbital_momenta for t in tables]),
        "orbital_energies": np.concatenate([t.orbital_energies for t in tables]),
        "orbitals": np.concatenate([t.orbitals for t in tables]),
        **{f"note_{key}": np.array(text) for key, text in (notes or {}).items()},
    }
    with zipfile.ZipFile(path, "w") as archive:
        for key, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            member = zipfile.ZipInfo(f"{key}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.external_attr = 0o644 << 16
            member.create_system = 3
            archive.writestr(member, buffer.getvalue(), zipfile.ZIP_DEFLATED, 9)


def read_set(path: str | Path) -> PseudoSet:
    """Reads what :func:`write_set` wrote.

    Raises:
        PseudoError: for a file that is missing, not such a file, or on another grid of wave numbers.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            data = {key: archive[key] for key in archive.files}
        same_grid = np.array_equal(data["grid"], [Q_STEP, Q_MAX_PROJECTOR, Q_MAX_DENSITY])
        if int(data["format"]) != _SET_FORMAT or not same_grid:
            raise ValueError("made by another version of CrystalJAX")
        name, functional = str(data["name"]), str(data["functional"])
        tables = {}
        for index, symbol in enumerate(data["symbols"].tolist()):
            rows, orbitals = _rows(data["projector_counts"], index), _rows(data["orbital_counts"], index)
            tables[symbol] = RadialTables(
                symbol=symbol,
                valence=int(data["valence"][index]),
                local=data["local"][index],
                core=data["core"][index],
                density=data["density"][index],
                angular_momenta=data["angular_momenta"][rows],
                energies=data["energies"][rows],
                projectors=data["projectors"][rows],
                orbital_momenta=data["orbital_momenta"][orbitals],
                orbital_energies=data["orbital_energies"][orbitals],
                orbitals=data["orbitals"][orbitals],
                functional=functional,
                source={"file": str(data["files"][index]), "sha256": str(data["sha256"][index]), "set": name},
            )
    except (OSError, KeyError, IndexError, ValueError, zipfile.BadZipFile) as error:
        raise PseudoError(
            f"{path}: no set of pseudopotentials ({error}); reinstall crystaljax, or use a folder of UPF or psp8 files"
        ) from error
    return PseudoSet(name, tables)


def _rows(counts: np.ndarray, index: int) -> slice:
    """Where the rows of an element are among those of all."""
    end = int(counts[: index + 1].sum())
    return slice(end - int(counts[index]), end)


def _odd(points: int) -> int:
    return points - 1 + points % 2


def _simpson_weights(rab: np.ndarray) -> np.ndarray:
    """[M] weights of Simpson's rule for an odd number of points at distances ``rab``."""
    weights = np.full(len(rab), 2 / 3)
    weights[1::2] = 4 / 3
    weights[0] = weights[-1] = 1 / 3
    return weights * rab


def _projector_tables(file: PseudoFile) -> np.ndarray:
    """[P, NQB] of the projectors as they stand in the file."""
    q = q_grid(Q_MAX_PROJECTOR)
    tables = np.zeros((len(file.projectors), len(q)))
    points = _odd(max((p.cutoff for p in file.projectors), default=1))
    r = file.r[:points]
    weights = _simpson_weights(file.rab[:points]) * r
    for momentum in {p.angular_momentum for p in file.projectors}:
        waves = spherical_jn(momentum, np.outer(q, r))
        for row, projector in zip(tables, file.projectors, strict=True):
            if projector.angular_momentum == momentum:
                values = projector.values[:points]
                row[:] = waves[:, : len(values)] @ (weights[: len(values)] * values)
    return tables


def _orbital_tables(file: PseudoFile, r: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float16 [O, NQB]; r and weights [M] of the integrals."""
    q = q_grid(Q_MAX_PROJECTOR)
    tables = np.zeros((len(file.orbitals), len(q)))
    for row, orbital in zip(tables, file.orbitals, strict=True):
        points = min(len(r), len(orbital.values))
        values, waves = orbital.values[:points], spherical_jn(orbital.angular_momentum, np.outer(q, r[:points]))
        row[:] = waves @ (weights[:points] * r[:points] * values) / math.sqrt(weights[:points] @ values**2)
    return tables.astype(np.float16)


def _diagonal(file: PseudoFile, tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[P] energies and [P, NQB] projectors that give the same potential with a diagonal matrix D."""
    momenta = np.array([p.angular_momentum for p in file.projectors], dtype=np.int64)
    mixed = momenta[:, None] != momenta
    if np.any(file.dij[mixed]):
        raise PseudoError(f"{file.path}: the matrix D couples projectors of different angular momenta; {ADVICE}")
    energies, rotated = np.diagonal(file.dij).copy(), tables.copy()
    for momentum in np.unique(momenta):
        rows = np.flatnonzero(momenta == momentum)
        block = file.dij[np.ix_(rows, rows)]
        if not np.any(block - np.diag(np.diagonal(block))):
            continue
        energies[rows], vectors = np.linalg.eigh((block + block.T) / 2)
        vectors *= np.sign(vectors[np.argmax(np.abs(vectors), axis=0), np.arange(len(rows))])
        rotated[rows] = vectors.T @ tables[rows]
    return energies, rotated
