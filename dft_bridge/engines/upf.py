"""A folder of UPF pseudopotentials as ``pw.x`` reads them: which elements, how many electrons, of what kind.

Only the headers are read, of UPF version 1 and 2; norm-conserving, ultrasoft and PAW files may be mixed, as in SSSP. A
file or folder that cannot be used is refused by a :class:`UpfError` that names it, the reason and the fix.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from ase.data import chemical_symbols

from crystaljax.errors import CrystalJAXError

ADVICE = "use the scalar-relativistic PBE files of SSSP or PseudoDojo, one per element"
_PBE = ("PBE", "SLA PW PBX PBC", "SLA PW PBE PBE")


class UpfError(CrystalJAXError, ValueError):
    """Pseudopotentials cannot be used; the message says which, why and what to do."""


@dataclasses.dataclass(frozen=True)
class UpfFile:
    """What the header of a pseudopotential says, and the SHA-256 of the file."""

    path: Path
    symbol: str
    valence: int
    norm_conserving: bool
    sha256: str


@functools.cache
def read_folder(folder: str) -> Mapping[str, UpfFile]:
    """The ``.upf`` and ``.UPF`` files of a folder (not below it) by element, read once per process.

    Raises:
        UpfError: no such folder, no such files, several for one element, or a file that cannot be used.
    """
    where = Path(folder).expanduser()
    if not where.is_dir():
        raise UpfError(f"no folder {where} with pseudopotentials")
    files = [read_file(path) for path in sorted(where.iterdir()) if path.suffix.lower() == ".upf"]
    if not files:
        raise UpfError(f"{where} holds no .upf files; {ADVICE}")
    names: dict[str, list[str]] = defaultdict(list)
    for file in files:
        names[file.symbol].append(file.path.name)
    several = [f"{symbol} ({', '.join(found)})" for symbol, found in names.items() if len(found) > 1]
    if several:
        raise UpfError(f"{where} has several files for {'; '.join(several)}; keep one for each element")
    return {file.symbol: file for file in files}


def digest(files: Mapping[str, UpfFile]) -> str:
    """SHA-256 over the contents of all files of a folder."""
    lines = [f"{symbol} {files[symbol].sha256}\n" for symbol in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_file(path: Path) -> UpfFile:
    """The header of a file; raises :class:`UpfError` if it is truncated or not what ``pw.x`` and PBE need."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UpfError(f"{path}: cannot be read ({error.strerror})") from error
    text = content.decode("utf-8", errors="replace")
    if "<UPF version" in text:
        header, end = _header_2(path, text), "</UPF>"
    elif "<PP_HEADER>" in text:
        header, end = _header_1(path, text), "</PP_RHOATOM>"
    else:
        _refuse(path, "not a pseudopotential in UPF version 1 or 2")
    if end not in text:
        _refuse(path, f"no {end}, as in a truncated file")
    symbol = header["element"].strip().capitalize()
    if symbol not in chemical_symbols[1:]:
        _refuse(path, f"{header['element'].strip()!r} is not a chemical element")
    functional = " ".join(re.split(r"[\s+-]+", header["functional"].strip().upper()))
    if functional not in _PBE:
        _refuse(path, f"for the functional {functional or 'unknown'}, not PBE")
    kind = header["pseudo_type"].strip().upper()
    if kind not in ("NC", "SL", "US", "USPP", "PAW"):
        _refuse(path, f"of type {kind or 'unknown'}, not norm-conserving, ultrasoft or PAW")
    if header["has_so"].strip(" .").upper().startswith("T"):
        _refuse(path, "fully relativistic (spin-orbit)")
    return UpfFile(path, symbol, _valence(path, header["z_valence"]), kind in ("NC", "SL"), _sha256(content))


def _header_2(path: Path, text: str) -> dict[str, str]:
    found = re.search(r"""<PP_HEADER((?:[^>"']|"[^"]*"|'[^']*')*)>""", text)
    if found is None:
        _refuse(path, "no PP_HEADER, as in a truncated file")
    entries = re.findall(r"""(\w+)\s*=\s*(["'])(.*?)\2""", found[1])
    header = defaultdict(str, {name: value for name, _, value in entries})
    if header["is_coulomb"].strip(" .").upper().startswith("T"):
        header["pseudo_type"] = "Coulomb"
    return header


def _header_1(path: Path, text: str) -> dict[str, str]:
    """Lines of a value and what it means; see the converter ``upfconv.x`` of Quantum ESPRESSO."""
    lines = text.split("<PP_HEADER>", 1)[1].splitlines()[1:7]
    if len(lines) < 6:
        _refuse(path, "a truncated PP_HEADER")
    _, element, kind, _, functional, valence = lines
    first = [line.split()[:1] for line in (element, kind, valence)]
    element, kind, valence = (words[0] if words else "" for words in first)
    return {
        "element": element,
        "pseudo_type": kind,
        "functional": " ".join(functional.split()[:4]),
        "z_valence": valence,
        "has_so": "T" if "<PP_ADDINFO>" in text else "F",
    }


def _valence(path: Path, word: str) -> int:
    try:
        value = float(word)
    except ValueError:
        _refuse(path, f"{word!r} as the number of valence electrons")
    if not 0.5 < value < 200 or abs(value - round(value)) > 1e-6:
        _refuse(path, f"{value} valence electrons, not a positive integer")
    return round(value)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _refuse(path: Path, reason: str) -> NoReturn:
    raise UpfError(f"{path}: {reason}; {ADVICE}")
