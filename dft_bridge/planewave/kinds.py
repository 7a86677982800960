"""Which crystals can share a compiled program, and the solver for them.

A :class:`Kind` is everything but the elements: skeleton, symmetry, k-points, cut-off and the numerical settings.
Crystals of one kind go through one :class:`~crystaljax.dft_bridge.planewave.solver.Solver`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ase.units import Bohr

from crystaljax.dft_bridge.kpoints import (
    Symmetry,
    find_symmetry,
    half_points,
    reduce_points,
    rule_points,
    special_points,
)
from crystaljax.dft_bridge.planewave.basis import Basis, make_basis, nearest_waves
from crystaljax.dft_bridge.planewave.potentials import SpeciesTables, channels_for, species_tables
from crystaljax.dft_bridge.planewave.pseudopotentials import PseudoSet
from crystaljax.dft_bridge.planewave.scf import Problem, ScfSettings
from crystaljax.dft_bridge.planewave.solver import ExtraPoints, Solver

_BAND_STEPS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of bands that programs are compiled for."""
_REMEMBERED = 12
"""Solvers; the plane waves of one take some 50 MB."""
MOST_LANES = 64
"""On an H200 they get 0.94 as much done in a second as 128 would, and fewer of them wait for the last crystals."""
_MOST_MAPS = 30_000
"""Linux gives a process 65,530 memory maps; each program that XLA compiles for a CPU keeps hundreds, then it aborts."""
_MEMORY_SHARE = 0.5
"""Of the device's memory; the rest is for what is worked out from converged crystals, and for the compiler's copies."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """What crystals of one program have in common.

    Attributes:
        lattice: [3, 3] Å, as nested tuples.
        frac_coords: [N, 3], as nested tuples.
        colours: of the sites; sites of one colour are alike to the symmetry that is used.
        cutoff: Ha.
        mesh: subdivisions of the k-point mesh.
        shift: 1 to move it by half a step along an axis.
        stretch: see :func:`~crystaljax.dft_bridge.planewave.basis.make_basis`.
        light: whether every element has projectors up to l = 2 only.
        settings: of the SCF.
        rule: for k-points, one of :data:`~crystaljax.dft_bridge.kpoints.RULES`.
    """

    lattice: tuple[tuple[float, ...], ...]
    frac_coords: tuple[tuple[float, ...], ...]
    colours: tuple[int, ...]
    cutoff: float
    mesh: tuple[int, int, int]
    shift: tuple[int, int, int]
    stretch: float
    light: bool
    settings: ScfSettings
    rule: str = "cell"

    @property
    def symmetry(self) -> Symmetry:
        """The operations that reduce k-points and symmetrise the density."""
        return find_symmetry(np.array(self.lattice), np.array(self.frac_coords), self.colours)


def band_count(electrons: int, share: float) -> int:
    """Bands for so many electrons: occupied plus ``share`` of them, at least four, rounded up to a compiled number."""
    occupied = -(-electrons // 2)
    wanted = occupied + max(4, int(np.ceil(share * occupied)))
    return next((n for n in _BAND_STEPS if n >= wanted), wanted)


def _memory_maps() -> int:
    """How many memory maps this process has, as far as the system says."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


def is_light(pseudopotentials: PseudoSet, symbols: Sequence[str]) -> bool:
    """Whether no element has f projectors."""
    return all(max(pseudopotentials[s].angular_momenta, default=0) < 3 for s in symbols)


def bytes_of_crystal(basis: Basis, tables: SpeciesTables, settings: ScfSettings, atoms: int) -> int:
    """Estimated memory of one crystal in an SCF step: what a lane holds, and the work space at one k-point."""
    k, p, g, bands = basis.n_kpoints, basis.n_waves, basis.n_density, settings.bands
    size = settings.complex_type.itemsize
    radial, members = len(tables.channels), sum(2 * momentum + 1 for momentum in tables.channels)
    harmonics = (max(tables.channels, default=0) + 1) ** 2
    # Waves, phases, radial projectors, harmonics, kinetic energy and mask; double precision on the density's vectors.
    held = k * p * size * (bands + atoms + (atoms * radial + harmonics + 2) / 2) + g * (2 * settings.history + 8) * 16
    # Three blocks of the Davidson space with H applied, projectors, boxes before and after a transform, and xc fields.
    space = p * size * (2 * (settings.expansions + 1) * bands + atoms * members)
    boxes = 2 * min(bands, settings.bands_per_fft) * size * math.prod(basis.box) + 12 * 8 * math.prod(basis.box)
    return int(held + space + boxes)


def lanes_for(basis: Basis, tables: SpeciesTables, settings: ScfSettings, atoms: int, bytes_limit: int) -> int:
    """How many crystals a device with so much memory takes at once, a power of two."""
    fitting = int(_MEMORY_SHARE * bytes_limit / bytes_of_crystal(basis, tables, settings, atoms))
    return min(MOST_LANES, 1 << max(fitting.bit_length() - 1, 0))


class Workbench:
    """Solvers by kind, for one set of pseudopotentials; the last ones are kept.

    Args:
        lanes: crystals calculated at once; ``None`` for up to 64, as the device's memory allows.
    """

    def __init__(self, pseudopotentials: PseudoSet, lanes: int | None = 1):
        self.pseudopotentials = pseudopotentials
        self.lanes = lanes
        self.solver = functools.lru_cache(_REMEMBERED)(self._solver)
        self.special = functools.lru_cache(_REMEMBERED)(self._special)
        self._tables = functools.cache(self._make_tables)

    def _solver(self, kind: Kind) -> Solver:
        """The solver of a kind, over its mesh."""
        if _memory_maps() > _MOST_MAPS:
            jax.clear_caches()
        symmetry = kind.symmetry
        lattice = np.array(kind.lattice)
        points = reduce_points(rule_points(kind.rule, lattice, kind.mesh, kind.shift), symmetry)
        basis = make_basis(lattice / Bohr, kind.cutoff, *points, symmetry, kind.stretch)
        tables, lanes = self._tables(kind.light)[1], self.lanes
        if lanes is None:
            memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
            lanes = lanes_for(basis, tables, kind.settings, len(kind.frac_coords), memory)
        return Solver(basis, tables, kind.settings, lanes)

    def _special(self, kind: Kind) -> ExtraPoints:
        """Plane waves at the special points of a kind; their weights mean nothing.

        Made up to a power of two by points without any (:attr:`.Basis.valid`), so that few programs are compiled.
        """
        symmetry, lattice = kind.symmetry, np.array(kind.lattice)
        chosen = special_points(lattice) if kind.rule == "lattice" else half_points()
        points, _ = reduce_points(chosen, symmetry)
        count, rows = len(points), min(1 << (len(points) - 1).bit_length(), len(chosen))
        points = np.concatenate([points, np.repeat(points[:1], rows - count, axis=0)])
        basis = make_basis(lattice / Bohr, kind.cutoff, points, np.ones(len(points)), symmetry, kind.stretch)
        basis = basis.replace(valid=basis.valid.at[count:].set(False))
        mesh = self.solver(kind).basis
        # The largest arrays, and the same in both: how the symmetry turns the density.
        shared = {name: getattr(mesh, name) for name in ("images", "image_signs", "image_phases")}
        return ExtraPoints(basis.replace(**shared), *nearest_waves(mesh, basis))

    def programs(self, kind: Kind, special: bool) -> Hashable:
        """What the programs of a kind are compiled for: kinds with the same have them in common.

        Args:
            special: whether bands at special points are asked for.
        """
        solver = self.solver(kind)
        given = solver.basis, solver.tables, self.special(kind) if special else None
        leaves, structure = jax.tree.flatten(given)
        return solver.settings, solver.lanes, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)

    def problems(self, kind: Kind, symbols: Sequence[Sequence[str]], scales: Sequence[float] = (1.0,)) -> Problem:
        """Every crystal ([N] symbols) at every volume (relative to the kind's), crystals first."""
        index = self._tables(kind.light)[0]
        species = np.array([[index[s] for s in crystal] for crystal in symbols])
        lattices = np.array([np.array(kind.lattice) / Bohr * scale ** (1 / 3) for scale in scales])
        count = len(species)
        return Problem(
            lattice=np.tile(lattices, (count, 1, 1)),
            frac_coords=np.tile(np.array(kind.frac_coords), (count * len(scales), 1, 1)),
            species=np.repeat(species, len(scales), axis=0),
        )

    def _make_tables(self, light: bool) -> tuple[dict[str, int], SpeciesTables]:
        """All elements in one set of tables, so that programs do not depend on which of them a crystal has."""
        known = [s for s in sorted(self.pseudopotentials.symbols) if not light or is_light(self.pseudopotentials, [s])]
        tables = species_tables(self.pseudopotentials, known, channels_for(self.pseudopotentials, known))
        return {symbol: row for row, symbol in enumerate(known)}, jax.tree.map(jnp.asarray, tables)
