"""The caveats of a result, from its crystal, its facts and the settings of its engine, new or stored."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from crystaljax import caveats
from crystaljax.caveats import Caveat
from crystaljax.dft_bridge.engines.base import Crystal, Result
from crystaljax.dft_bridge.kpoints import Symmetry, covers, find_symmetry, mesh_points, reduce_points
from crystaljax.status import Status


def with_caveats(result: Result, crystal: Crystal, property_name: str, settings: Mapping[str, Any]) -> Result:
    """The result with all caveats that follow, besides its own if it has any; unchanged if it has no value.

    Args:
        result: of the crystal that was given.
        settings: of the engine, as its fingerprint has them.
    """
    if result.status != Status.OK:
        return result
    sites = crystal.lattice, crystal.frac_coords, crystal.numbers
    found = {*(result.caveats or ()), *caveats.derive(*sites, property_name, result.details, settings)}
    if property_name == "band_gap" and _misses_special_points(crystal, result.details, settings):
        found.add(Caveat.FEW_KPOINTS)
    return dataclasses.replace(result, caveats=tuple(caveat for caveat in Caveat if caveat in found))


def _misses_special_points(crystal: Crystal, details: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a gap was read off k-points without all special points of the lattice.

    A ``sampling`` by the lattice has all of them, with ``special_points`` where that is a setting.
    """
    if settings.get("sampling"):
        return not settings.get("special_points", True)
    mesh = details.get("kpoints")
    if not (isinstance(mesh, list | tuple) and len(mesh) == 3 and all(type(n) is int and 0 < n < 1000 for n in mesh)):
        return False
    points = mesh_points(mesh, [int(settings.get("shifted", False) and n > 1) for n in mesh])
    if settings.get("special_points"):
        points = np.concatenate([points, list(itertools.product((0.0, 0.5), repeat=3))])
    symmetry = find_symmetry(crystal.lattice, crystal.frac_coords, crystal.numbers)
    return not covers(points, held_points(crystal.lattice), symmetry)


def held_points(lattice: np.ndarray) -> np.ndarray:
    """The points [n, 3] that the symmetry of a lattice holds in place, one of each star: Gamma, X, K, W ...

    Band edges are often there, as all levels are stationary. Other points that have names, ends of lines such as U of a
    face-centred cubic lattice, are not among them; :func:`crystaljax.dft_bridge.kpoints.special_points` has those too.

    Args:
        lattice: [3, 3] Å.
    """
    rotations = find_symmetry(lattice, np.zeros((1, 3)), [1]).rotations
    group = np.concatenate([rotations, -rotations])  # with time reversal, k and -k have the same levels
    every = np.array(list(itertools.product((0, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4), repeat=3)))
    moves = every @ group - every  # [S, n, 3]
    kept = np.abs(moves - np.rint(moves)).max(axis=2) < 1e-6
    # Points nearby that share all the symmetry of a point differ by eigenvectors of the mean of its group.
    means = np.einsum("sn,sij->nij", kept, group) / kept.sum(axis=0)[:, None, None]
    fixed = every[np.abs(means).max(axis=(1, 2)) < 1e-6]
    return reduce_points(fixed, Symmetry(rotations, np.zeros((len(rotations), 3))))[0]
