"""Built-in skeletons: the benchmark crystals, the five-site set and cubic prototypes.

The benchmark crystals and the five-site set are rows of the MP-20 validation split, from the Materials Project
(CC-BY 4.0); ids are in the data file and in each skeleton's ``source``.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np

from crystaljax.skeleton import Skeleton

DATA_FILE = Path(__file__).parent / "data" / "skeletons.json"

BENCHMARK_ROWS = {"C1": 3403, "C2": 630, "C3": 2271, "C4": 8666, "C5": 8906, "C6": 8354, "C7": 2190}
"""Row in the MP-20 validation set of each benchmark crystal."""
MIXED = ("C2", "C3", "C6", "C4", "C5")
"""The crystals of the mixed tasks; C1 and C7 are held out."""

PEROVSKITE_A = 3.795
"""Å; the cubic perovskite prototype CaTiO3, AFLOW AB3C_cP5_221_a_c_b."""
ROCKSALT_A = 5.63931
"""Å, conventional cell; the rocksalt prototype NaCl, AFLOW AB_cF8_225_a_b."""
ZINCBLENDE_A = 5.40930
"""Å, conventional cell; the zincblende prototype ZnS, AFLOW AB_cF8_216_c_a."""
CSCL_A = 4.07925
"""Å; the prototype CsCl, AFLOW AB_cP2_221_b_a."""
FLUORITE_A = 5.46310
"""Å, conventional cell; the fluorite prototype CaF2, AFLOW AB2_cF12_225_a_c."""


@functools.cache
def _rows() -> dict[int, Skeleton]:
    names = {row: name for name, row in BENCHMARK_ROWS.items()}
    return {
        entry["row"]: Skeleton(
            name=names.get(entry["row"], f"{entry['formula']}-{entry['row']}"),
            lattice=np.array(entry["lattice"]),
            frac_coords=np.array(entry["frac_coords"]),
            species=tuple(entry["species"]),
            source=entry["material_id"],
        )
        for entry in json.loads(DATA_FILE.read_text())["entries"]
    }


def benchmark(name: str) -> Skeleton:
    """One of C1-C7; raises ``ValueError`` for another name."""
    if name not in BENCHMARK_ROWS:
        raise ValueError(f"unknown benchmark crystal {name!r}: use one of {', '.join(BENCHMARK_ROWS)}")
    return _rows()[BENCHMARK_ROWS[name]]


def five_site() -> tuple[Skeleton, ...]:
    """The 94 cubic five-site crystals, by row."""
    return tuple(skeleton for _, skeleton in sorted(_rows().items()) if skeleton.n_sites == 5)


@functools.cache
def perovskite() -> Skeleton:
    """Cubic perovskite ABX3 (CaTiO3's prototype cell): A on the corner, B in the centre, X on the faces."""
    sites = [[0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]]
    species = ("Ca", "Ti", "O", "O", "O")
    source = "AFLOW AB3C_cP5_221_a_c_b"
    return Skeleton("PerovskiteABX3", PEROVSKITE_A * np.eye(3), np.array(sites), species, source)


# The Niggli-reduced primitive cell of the face-centred cubic lattice: three 60 degree angles.
_FCC = np.array([[0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])


@functools.cache
def rocksalt() -> Skeleton:
    """Binary rocksalt AB (NaCl's prototype cell), primitive."""
    sites = np.array([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5]])
    return Skeleton("RocksaltAB", ROCKSALT_A * _FCC, sites, ("Na", "Cl"), "AFLOW AB_cF8_225_a_b")


@functools.cache
def zincblende() -> Skeleton:
    """Binary zincblende AB (ZnS's prototype cell), primitive."""
    sites = np.array([[0.0, 0.0, 0.0], [0.25, 0.25, 0.25]])
    return Skeleton("ZincblendeAB", ZINCBLENDE_A * _FCC, sites, ("Zn", "S"), "AFLOW AB_cF8_216_c_a")


@functools.cache
def cscl() -> Skeleton:
    """Binary AB in the structure of CsCl (its prototype cell)."""
    sites = np.array([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5]])
    return Skeleton("CsClAB", CSCL_A * np.eye(3), sites, ("Cs", "Cl"), "AFLOW AB_cP2_221_b_a")


@functools.cache
def fluorite() -> Skeleton:
    """Fluorite AX2 (CaF2's prototype cell), primitive: A on the corner, X on both tetrahedral sites."""
    sites = np.array([[0.0, 0.0, 0.0], [0.25, 0.25, 0.25], [0.75, 0.75, 0.75]])
    return Skeleton("FluoriteAX2", FLUORITE_A * _FCC, sites, ("Ca", "F", "F"), "AFLOW AB2_cF12_225_a_c")


PROTOTYPES = {
    "PerovskiteABX3": perovskite,
    "RocksaltAB": rocksalt,
    "ZincblendeAB": zincblende,
    "CsClAB": cscl,
    "FluoriteAX2": fluorite,
}
"""The skeletons of prototypes, by name."""


def crystals(name: str) -> tuple[Skeleton, ...]:
    """The skeletons of a task: ``C1`` ... ``C7``, ``Mixed``, ``Five``, or one of :data:`PROTOTYPES`.

    Raises:
        ValueError: for another name.
    """
    if name in BENCHMARK_ROWS:
        return (benchmark(name),)
    if name in PROTOTYPES:
        return (PROTOTYPES[name](),)
    sets = {"Mixed": lambda: tuple(benchmark(member) for member in MIXED), "Five": five_site}
    if name not in sets:
        raise ValueError(f"unknown crystals {name!r}: use one of {', '.join([*BENCHMARK_ROWS, *sets, *PROTOTYPES])}")
    return sets[name]()
