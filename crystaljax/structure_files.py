"""Structure files of many formats, read as data: bounded in size and in work, with nothing of them run.

A file gives its cell and its sites. It is never handed to a reader that imports what the file names (pymatgen's JSON
does), builds what its head announces before it has seen it, or guesses elements. Each format is read up to its sites;
what follows (velocities, grids, energies) does not matter.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from crystaljax import cif
from crystaljax.cif import Crystal, Unreadable

MAX_BYTES = 32 * 2**20
"""Largest file that is read, unpacked."""
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".lzma": lzma.open}


def read(path: Path, max_sites: int) -> Crystal:
    """The crystal in a file, by the format that its name tells; ``.gz``, ``.bz2`` and ``.xz`` are unpacked.

    Args:
        path: the file.
        max_sites: refuse larger cells.

    Raises:
        Unreadable: if the file is too large, of an unknown format, or does not describe one crystal completely.
        OSError: if the file cannot be read.
    """
    packed = path.suffix.lower() in _OPENERS
    reader = _reader(path.stem if packed else path.name)
    return reader(decode(read_bytes(path)), max_sites)


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The bytes of a file, unpacked.

    Raises:
        Unreadable: if they are more than ``limit``, or damaged.
        OSError: if the file cannot be read.
    """
    opener = _OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            data = file.read(limit + 1)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise Unreadable(f"cannot be unpacked ({error}); pack it again") from error
    except OSError as error:
        if error.errno is None:  # bz2's way of saying that the data is damaged
            raise Unreadable(f"cannot be unpacked ({error}); pack it again") from error
        raise
    if len(data) > limit:
        raise Unreadable(f"is larger than {limit // 2**20} MiB; give the structure alone, as a CIF")
    return data


def decode(data: bytes) -> str:
    """Text in UTF-8 or UTF-16, with a byte-order mark or without, or else in Latin-1.

    Raises:
        Unreadable: if the bytes are no text.
    """
    marks = {b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    encodings = [encoding for mark, encoding in marks.items() if data.startswith(mark)][:1]
    if not encodings and b"\x00" in data[:4]:  # the first characters of all formats are ASCII
        encodings = ["utf-16-be" if data[:1] == b"\x00" else "utf-16-le"]
    for encoding in encodings or ["utf-8-sig", "latin-1"]:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\x00" not in text:
            return text.removeprefix("\ufeff")
    raise Unreadable("is not text; give a CIF file")


def _reader(name: str) -> Callable[[str, int], Crystal]:
    for patterns, reader in _READERS.items():
        if any(fnmatch(name.lower(), pattern) for pattern in patterns):
            return reader
    known = ", ".join(pattern for patterns in _READERS for pattern in patterns)
    raise Unreadable(
        f"not a format that is read by name ({known}); save it as a CIF, or read it with pymatgen or ASE and give the "
        "Structure or Atoms"
    )


def _numbers(texts: Sequence[str], what: str, count: int | None = None) -> np.ndarray:
    """float64 [count], finite."""
    try:
        found = np.array([float(text) for text in texts[:count]], dtype=np.float64)
    except ValueError:
        found = np.array([np.nan])
    if (count is not None and len(found) != count) or not np.isfinite(found).all():
        raise Unreadable(f"{what} is {' '.join(texts)[:60]!r}: {count or 'finite'} numbers are needed; correct it")
    return found


def _whole(text: str, what: str) -> int:
    if not re.fullmatch(r"[+-]?\d{1,12}", text):
        raise Unreadable(f"{what} is {text[:40]!r}, not a whole number; correct it")
    return int(text)


def _limit(count: int, max_sites: int) -> None:
    if count < 1:
        raise Unreadable(f"{count} sites; a structure needs at least one")
    if count > max_sites:
        raise Unreadable(
            f"{count} sites, more than the limit of {max_sites}; reduce it to its primitive cell or raise max_sites"
        )


def _fractional(cartesian: np.ndarray, lattice: np.ndarray) -> np.ndarray:
    """Fractional coordinates [N, 3] from Å."""
    if not np.isfinite(lattice).all() or abs(np.linalg.det(lattice)) < 1e-12:
        raise Unreadable("the cell is flat or missing; give three vectors in Å")
    return cartesian @ np.linalg.inv(lattice)


def _made(lattice: np.ndarray, species: Sequence[str], coords: np.ndarray, notes: Sequence[str] = ()) -> Crystal:
    return Crystal(lattice, tuple(species), coords, tuple(species), tuple(notes))


def _next(lines: Iterator[str], what: str) -> str:
    line = next(lines, None)
    if line is None:
        raise Unreadable(f"ends before {what}; give the whole file")
    return line


# Formats


def _poscar(text: str, max_sites: int) -> Crystal:
    """POSCAR, CONTCAR, and the heads of CHGCAR and LOCPOT. A comment ends the line from # or !."""
    lines = (re.split(r"[#!]", line, maxsplit=1)[0] for line in text.splitlines()[1:])
    factors = _next(lines, "the scale").split()
    scale = _numbers(factors[: 3 if len(factors) >= 3 else 1], "the scale of the cell")
    rows = [_numbers(_next(lines, "the cell").split(), "a cell vector", 3) for _ in range(3)]
    lattice = np.array(rows)
    volume = abs(np.linalg.det(lattice))
    if len(scale) == 1 and scale[0] < 0:  # a negative scale is the volume of the cell
        if volume == 0:
            raise Unreadable("the cell is flat; give three vectors in Å")
        scale = np.array([(-scale[0] / volume) ** (1 / 3)])
    if (scale <= 0).any():
        raise Unreadable(
            f"the scale of the cell is {' '.join(factors[:3])}; give one positive number, or minus the volume"
        )
    lattice = lattice * scale

    words: list[str] = []
    fields = _next(lines, "the elements").split()
    while fields and not fields[0].isdecimal():
        words += fields
        fields = _next(lines, "the numbers of sites").split()
    counts: list[int] = []
    # As many lines as the elements take.
    while fields and all(field.isdecimal() for field in fields) and (not counts or len(counts) < len(words)):
        counts += [_whole(field, "a number of sites") for field in fields]
        fields = _next(lines, "the sites").split()
    if words and len(words) != len(counts):
        raise Unreadable(f"has {len(words)} elements and {len(counts)} numbers of sites; give one for each")
    _limit(sum(counts), max_sites)

    mode = fields[0].lower() if fields else ""
    selective = mode.startswith("s")
    if selective:
        mode = _next(lines, "the sites").strip().lower()
    if not mode.startswith(("c", "k", "d")):
        raise Unreadable(f"the sites are {mode[:20]!r}, neither Direct nor Cartesian; correct that line")
    cartesian = mode.startswith(("c", "k"))
    coords, ends, fixed = [], [], 0
    for index in range(sum(counts)):
        row = _next(lines, f"site {index}").split()
        coords.append(_numbers(row, f"site {index}", 3))
        flags = [flag.strip(".").upper()[:1] for flag in row[3:6]] if selective else []
        fixed += "F" in flags
        ends.append(row[3 + 3 * selective] if len(row) > 3 + 3 * selective else "")
    if words:  # VASP 6 writes the name of the pseudopotential: Mg_pv/f474ac0d
        kinds = [cif.element(re.split(r"[/_]", word)[0]) for word in words]
        species = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
    elif all(ends):
        species = [cif.element(end) for end in ends]
    else:
        raise Unreadable("names no elements (VASP 4); write them in a line above the numbers of sites")
    sites = np.array(coords)
    sites = _fractional(sites * scale, lattice) if cartesian else sites
    return _made(lattice, species, sites, [f"selective dynamics of {fixed} sites are dropped"] if fixed else ())


def _res(text: str, max_sites: int) -> Crystal:
    """SHELX files as AIRSS writes them: all sites listed, LATT -1."""
    lattice, kinds, species, coords, notes, sites_follow = None, [], [], [], [], False
    for line in text.splitlines():
        word, *fields = line.split() or [""]
        word = word.upper()
        if word == "CELL":
            values = _numbers(fields, "CELL", 7)
            lattice = cif.cell(values[1:4], values[4:])
        elif word == "LATT" and fields[:1] != ["-1"] or word == "SYMM":
            raise Unreadable(f"{line[:40]!r}: only .res files that list all sites (LATT -1) are read; save it as a CIF")
        elif word == "SFAC":
            kinds += [cif.element(field) for field in fields]
            sites_follow = True
        elif word in ("END", "HKLF"):
            break
        elif word in ("", "TITL", "REM", "ZERR", "UNIT", "LATT"):
            continue
        elif not sites_follow or len(fields) not in (5, 6):
            raise Unreadable(f"{line[:40]!r} is not understood; save it as a CIF")
        else:
            _limit(len(species) + 1, max_sites)
            where = f"site {len(species)} ({line.split()[0][:20]})"
            number = _whole(fields[0], f"the SFAC number of {where}")
            if not 1 <= number <= len(kinds):
                raise Unreadable(f"{where} has the SFAC number {number}, of {len(kinds)}; correct it")
            occupancy = _numbers(fields[4:5], f"the occupancy of {where}", 1)[0]
            if occupancy not in (1.0, 11.0):  # 10 is added to what is not refined
                raise Unreadable(f"{where} is disordered (occupancy {fields[4]}); give each site one element")
            species.append(kinds[number - 1])
            coords.append(_numbers(fields[1:4], where, 3))
            if len(fields) == 6 and float(_numbers(fields[5:], f"the spin of {where}", 1)[0]):
                notes = ["spins are dropped"]
    if lattice is None or not species:
        raise Unreadable("has no CELL or no sites; give the whole file")
    return _made(lattice, species, np.array(coords), notes)


def _xsf(text: str, max_sites: int) -> Crystal:
    """XCrySDen files: PRIMVEC and PRIMCOORD, in Å."""
    lines = (line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    lattice = None
    for line in lines:
        word = line.split()[0].upper()
        if word in ("MOLECULE", "POLYMER", "SLAB", "ATOMS"):
            raise Unreadable(f"is a {word}; give a crystal that is periodic in three directions")
        if word == "ANIMSTEPS":
            raise Unreadable("holds several structures (ANIMSTEPS); give a file with one")
        if word == "PRIMVEC":
            lattice = np.array([_numbers(_next(lines, "PRIMVEC").split(), "a cell vector", 3) for _ in range(3)])
        elif word == "PRIMCOORD" and lattice is not None:
            count = _whole(_next(lines, "the number of sites").split()[0], "the number of sites")
            _limit(count, max_sites)
            rows = [_next(lines, f"site {index}").split() for index in range(count)]
            species = [_species(row[0]) for row in rows]
            places = np.array([_numbers(row[1:], f"site {index}", 3) for index, row in enumerate(rows)])
            return _made(lattice, species, _fractional(places, lattice))
    raise Unreadable("has no PRIMVEC followed by PRIMCOORD; give the whole file")


def _species(text: str) -> str:
    """An element by its symbol or its atomic number."""
    from ase.data import chemical_symbols

    if text.isdecimal() and len(text) <= 3 and 0 < int(text) < len(chemical_symbols):
        return chemical_symbols[int(text)]
    return cif.element(text)


def _xyz(text: str, max_sites: int) -> Crystal:
    """Extended XYZ, one frame, with its lattice."""
    lines = text.splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    count = _whole(lines[0].strip() if lines else "", "the number of sites")
    _limit(count, max_sites)
    if len(lines) < count + 2:
        raise Unreadable(f"announces {count} sites and has {max(0, len(lines) - 2)}; give the whole file")
    if len(lines) > count + 2:
        raise Unreadable("goes on after its sites; give a file with one structure")
    head = _pairs(lines[1])
    if "lattice" not in head:
        raise Unreadable(
            'no periodic cell: add Lattice="..." with nine numbers to its second line, or save it as a CIF'
        )
    if "F" in head.get("pbc", "T T T").upper():
        raise Unreadable(f"no periodic cell (pbc={head['pbc']}); give a crystal that is periodic in three directions")
    lattice = _numbers(head["lattice"].split(), "Lattice", 9).reshape(3, 3)
    columns, start = {}, 0
    fields = head.get("properties", "species:S:1:pos:R:3").split(":")
    for name, width in zip(fields[::3], fields[2::3], strict=False):
        columns[name.lower()] = start
        start += _whole(width, f"the columns of {name}")
    kind = columns.get("species", columns.get("z", columns.get("numbers")))
    if kind is None or "pos" not in columns:
        raise Unreadable("has no species and pos among its Properties; add them")
    rows = [line.split() for line in lines[2:]]
    if any(len(row) < start for row in rows):
        raise Unreadable(f"has a site with less than its {start} columns; give each site all of them")
    species = [_species(row[kind]) for row in rows]
    at = columns["pos"]
    places = np.array([_numbers(row[at : at + 3], f"site {index}", 3) for index, row in enumerate(rows)])
    dropped = [name for name in ("move_mask", "magmoms", "initial_magmoms") if name in columns]
    notes = [f"{', '.join(dropped)} are dropped"] if dropped else []
    return _made(lattice, species, _fractional(places, lattice), notes)


def _pairs(line: str) -> dict[str, str]:
    """``key=value`` and ``key="a value"`` of the second line of extended XYZ; keys in small letters."""
    found = re.findall(r"""([A-Za-z_]+)=(?:"([^"]*)"|'([^']*)'|(\S*))""", line[:100_000])
    return {key.lower(): double or single or plain for key, double, single, plain in found}


def _json(text: str, max_sites: int) -> Crystal:
    """What pymatgen's ``Structure.as_dict`` gives. Nothing that ``@module`` and ``@class`` name is imported."""
    data = json.loads(text)
    if not isinstance(data, dict) or not isinstance(data.get("sites"), list) or "lattice" not in data:
        raise Unreadable("is not a pymatgen Structure in JSON (lattice and sites); save it as a CIF")
    if not all(isinstance(site, dict) for site in data["sites"]) or not isinstance(data["lattice"], dict):
        raise Unreadable("is not a pymatgen Structure in JSON (lattice and sites); save it as a CIF")
    _limit(len(data["sites"]), max_sites)
    if data["lattice"].get("pbc", [True] * 3) not in ([True] * 3, None):
        raise Unreadable(f"no periodic cell (pbc {data['lattice']['pbc']!r}); give a crystal")
    lattice = _array(data["lattice"].get("matrix"), (3, 3), "the matrix of the lattice")
    species, coords, dropped = [], [], set()
    for index, site in enumerate(data["sites"]):
        kinds = site.get("species")
        if not isinstance(kinds, list) or not kinds or not all(isinstance(kind, dict) for kind in kinds):
            raise Unreadable(f"site {index} has no species; give it one element")
        if len(kinds) > 1 or kinds[0].get("occu", 1) != 1:
            told = ", ".join(
                f"{str(kind.get('element'))[:10]} at {str(kind.get('occu', 1))[:20]}" for kind in kinds[:5]
            )
            raise Unreadable(f"site {index} is disordered ({told}); give each site one element at full occupancy")
        species.append(cif.element(str(kinds[0].get("element"))))
        if site.get("abc") is None and site.get("xyz") is not None:
            coords.append(_fractional(_array(site["xyz"], (3,), f"xyz of site {index}")[None], lattice)[0])
        else:
            coords.append(_array(site.get("abc"), (3,), f"abc of site {index}"))
        properties = site.get("properties") or {}
        if isinstance(properties, dict):
            plain = (None, 0, [True, True, True])
            dropped |= {name for name in ("magmom", "selective_dynamics") if properties.get(name) not in plain}
        if (kinds[0].get("properties") or {}) or kinds[0].get("spin"):
            dropped.add("spin")
    notes = [f"{', '.join(sorted(dropped))} of its sites are dropped"] if dropped else []
    return _made(lattice, species, np.array(coords), notes)


def _array(value: object, shape: tuple[int, ...], what: str) -> np.ndarray:
    try:
        found = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        found = np.array(np.nan)
    if found.shape != shape or not np.isfinite(found).all():
        raise Unreadable(f"{what} is not {' x '.join(map(str, shape))} finite numbers; correct it")
    return found


def _vasprun(text: str, max_sites: int) -> Crystal:
    """The last structure of a vasprun.xml, and the elements of its ``atominfo``."""
    if "<!ENTITY" in text:
        raise Unreadable("defines entities, which VASP never does; give the CONTCAR of the calculation")
    species: list[str] = []
    last = None
    try:
        for _, item in ElementTree.iterparse(io.BytesIO(text.encode("utf-8", errors="replace"))):
            if item.tag == "atominfo":
                rows = item.findall("array[@name='atoms']/set/rc/c[1]")
                _limit(len(rows), max_sites)
                species = [cif.element(row.text or "") for row in rows]
            elif item.tag == "structure":
                basis, places = (
                    [(row.text or "").split() for row in item.findall(f".//varray[@name='{name}']/v")]
                    for name in ("basis", "positions")
                )
                _limit(len(places), max_sites)
                last = basis, places
            if item.tag in ("structure", "calculation", "atominfo", "parameters"):
                item.clear()
    except ElementTree.ParseError as error:
        raise Unreadable(f"is not whole XML ({error}); give the CONTCAR of the calculation") from error
    if last is None or not species or len(last[0]) != 3 or len(last[1]) != len(species):
        raise Unreadable("has no structure with its elements; give the CONTCAR of the calculation")
    lattice = np.array([_numbers(row, "a cell vector", 3) for row in last[0]])
    return _made(lattice, species, np.array([_numbers(row, f"site {i}", 3) for i, row in enumerate(last[1])]))


_READERS: dict[tuple[str, ...], Callable[[str, int], Crystal]] = {
    ("*.cif", "*.mcif"): cif.read,
    ("*.json", "*.mson"): _json,
    ("*.res",): _res,
    ("*.xsf",): _xsf,
    ("*.xyz", "*.extxyz"): _xyz,
    ("vasprun*.xml",): _vasprun,
    ("*poscar*", "*contcar*", "*.vasp", "chgcar*", "locpot*"): _poscar,
}
"""By the name of the file, in small letters; the first that fits."""
