"""Which k-points crystals get: special points of their lattice, meshes with its symmetry, keys that stay."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from ase.lattice import all_variants
from pymatgen.core import Structure
from pymatgen.io.vasp.inputs import Kpoints

from crystaljax import library, tables
from crystaljax.dft_bridge.engines.base import Crystal, CrystalFingerprint, Result
from crystaljax.dft_bridge.engines.planewave import PlanewaveEngine
from crystaljax.dft_bridge.keys import Keys
from crystaljax.dft_bridge.kpoints import (
    IDENTITY,
    Sampling,
    covers,
    find_symmetry,
    half_points,
    holohedry,
    kppa_mesh,
    mesh_of_lattice,
    reduce_points,
    rule_points,
    shortest_cell,
    special_points,
)
from crystaljax.properties import PROPERTIES
from crystaljax.skeleton import Skeleton
from crystaljax.status import Status

FCC = np.array([[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
HEXAGONAL = np.array([[1.0, 0, 0], [-0.5, np.sqrt(0.75), 0], [0, 0, 1]])
LATTICES = {lattice.variant: np.array(lattice.tocell()) for lattice in all_variants() if lattice.ndim == 3}
"""One of each variant of the Bravais lattices, Å, in the cell of Setyawan and Curtarolo."""


def images(points: np.ndarray, rotations: np.ndarray) -> set[tuple[int, ...]]:
    """All points that rotations and time reversal make of these, modulo reciprocal lattice vectors."""
    both = np.concatenate([rotations, -rotations])
    # Off the halves, where fractions such as 25/64 would be rounded up or down by noise.
    return {tuple(name) for name in np.rint(((points @ both) % 1.0).reshape(-1, 3) * 1e5 + 0.01).astype(int) % 100_000}


def unimodular(rng: np.random.Generator) -> np.ndarray:
    """Another choice of cell vectors, mostly a skewed one."""
    chosen = np.eye(3, dtype=int)
    for _ in range(4):
        step, (i, j) = np.eye(3, dtype=int), rng.choice(3, 2, replace=False)
        step[i, j] = rng.integers(-2, 3)
        chosen = step @ chosen
    return chosen


def hexagonal(a: float, c: float) -> np.ndarray:
    return HEXAGONAL * [a, a, c]


GRAPHITE = Crystal(
    hexagonal(2.46, 6.7),
    np.array([[0, 0, 0.25], [0, 0, 0.75], [1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]]),
    np.array([6, 6, 6, 6]),
)
GRAPHENE = Crystal(hexagonal(2.46, 7.6), np.array([[1 / 3, 2 / 3, 0.5], [2 / 3, 1 / 3, 0.5]]), np.array([6, 6]))
BERYLLIUM = Crystal(hexagonal(2.27, 3.57), np.array([[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]]), np.array([4, 4]))
BORON_NITRIDE = dataclasses.replace(GRAPHENE, lattice=hexagonal(2.51, 7.6), numbers=np.array([5, 7]))


# Special points


@pytest.mark.parametrize("variant", LATTICES)
def test_special_points_hold_those_of_the_tables(variant: str) -> None:
    (lattice,) = [found for found in all_variants() if found.variant == variant and found.ndim == 3]
    cell, published = LATTICES[variant], np.array(list(lattice.get_special_points().values()))
    mine, theirs = images(special_points(cell), holohedry(cell)), images(published, holohedry(cell))
    missing = [point for point in theirs if min(_distance(point, other) for other in mine) > 10]
    assert not missing
    # No more where edges sit at corners of the zone, middles of its edges and faces; elsewhere a few more.
    if variant in ("CUB", "FCC", "TET", "ORC", "ORCC", "HEX", "RHL1", "MCL"):
        assert len(mine) == len(theirs)


def _distance(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    apart = np.abs(np.subtract(one, other))
    return int(np.minimum(apart, 100_000 - apart).max())


def test_special_points_of_cubic_cells_are_those_there_were() -> None:
    assert special_points(np.eye(3) * 3.795).tolist() == half_points().tolist()


@pytest.mark.parametrize("variant", LATTICES)
def test_special_points_do_not_depend_on_the_cell(variant: str) -> None:
    lattice, rng = LATTICES[variant], np.random.default_rng(0)
    expected = images(special_points(lattice), IDENTITY.rotations)
    for _ in range(5):
        other = unimodular(rng)
        found = images(special_points(other @ lattice) @ np.linalg.inv(other).T, IDENTITY.rotations)
        assert all(min(_distance(point, p) for p in expected) <= 1 for point in found) and len(found) == len(expected)


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-4, 1e-3, 1e-2, 3e-2])
def test_the_corner_of_a_hexagonal_zone_is_followed_through_a_distortion(size: float) -> None:
    """A classification of lattices would lose it where its tolerance ends, and a gap would jump."""
    for seed in range(5):
        strain = np.eye(3) + size * np.random.default_rng(seed).uniform(-1, 1, (3, 3))
        apart = special_points(hexagonal(2.46, 6.7) @ strain) - [1 / 3, 1 / 3, 0]
        assert np.abs(apart - np.rint(apart)).max(axis=1).min() < 0.01 + 2 * size


def test_points_cover_the_special_points_or_not() -> None:
    cubic, symmetry = np.eye(3) * 4.0, find_symmetry(np.eye(3) * 4.0, np.zeros((1, 3)), [1])
    assert covers(Sampling("cell", 60.0).points(cubic, 5), special_points(cubic))  # 2 x 2 x 2
    assert not covers(Sampling("cell", 1000.0).points(cubic, 8), special_points(cubic))  # 5 x 5 x 5
    assert not covers(half_points(), special_points(hexagonal(2.46, 6.7)))
    reduced = reduce_points(half_points(), symmetry)[0]
    assert covers(reduced, special_points(cubic), symmetry) and not covers(reduced, special_points(cubic))


# Meshes


@pytest.mark.parametrize(("kppa", "sites"), [(40.0, 5), (54.0, 2), (1000.0, 8), (50.0, 1), (135.0, 5)])
def test_a_mesh_does_not_jump_on_rounding_noise(kppa: float, sites: int) -> None:
    lattices = [np.eye(3) * 3.795 * (1 + noise) for noise in np.random.default_rng(0).uniform(-1e-9, 1e-9, 50)]
    lattices += [lattice @ np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0] for lattice in lattices]
    assert len({mesh_of_lattice(lattice, sites, kppa) for lattice in lattices}) == 1
    fewest = round((kppa / sites) ** (1 / 3) - 1e-3)
    assert min(mesh_of_lattice(lattices[0], sites, kppa)[0]) >= min(fewest, (kppa / sites) ** (1 / 3) - 1)


def test_the_rule_of_the_cell_does_jump() -> None:
    noise = np.random.default_rng(0).uniform(-1e-9, 1e-9, (50, 3))
    assert len({kppa_mesh(np.diag(3.795 * (1 + row)), 5, 40.0) for row in noise}) > 1
    assert len({mesh_of_lattice(np.diag(3.795 * (1 + row)), 5, 40.0) for row in noise}) == 1


@pytest.mark.parametrize("kppa", [1.0, 50.0, 400.0])
@pytest.mark.parametrize("variant", LATTICES)
def test_points_have_the_symmetry_of_the_lattice(variant: str, kppa: float) -> None:
    lattice = shortest_cell(LATTICES[variant]) @ LATTICES[variant]
    for settings in ({"shifted": True}, {"even": True}):
        points = Sampling("lattice", kppa, 7.5, **settings).points(lattice, 2)
        assert len(images(points, holohedry(lattice))) == len(images(points, IDENTITY.rotations))


@pytest.mark.parametrize("variant", LATTICES)
def test_a_mesh_stands_for_a_large_enough_supercell(variant: str) -> None:
    for scale in (1.0, 2.3, 4.1):
        lattice = shortest_cell(LATTICES[variant]) @ LATTICES[variant] * scale
        size, shift = mesh_of_lattice(lattice, 10, 1.0, 7.5, shifted=True)
        assert (size * np.linalg.norm(lattice, axis=1) >= 7.5 * 0.999).all()
        assert max(size) > 1 or any(shift)


@pytest.mark.parametrize("edges", [(5.38, 5.44, 7.64), (8.0, 8.0, 8.0), (9.0, 12.0, 15.0), (20.0, 20.0, 20.0)])
def test_a_mesh_of_one_is_not_left_at_gamma(edges: tuple[float, float, float]) -> None:
    lattice = np.diag(edges)
    assert kppa_mesh(lattice, 20, 50.0) == (1, 1, 1) or max(edges) == 20.0
    points = Sampling("lattice", 50.0, 7.5, shifted=True).points(lattice, 200)
    assert (np.abs(points - np.rint(points)).max(axis=1) > 0.2).all()


def test_hexagonal_meshes_hold_gamma_in_the_plane() -> None:
    for crystal in (GRAPHITE, GRAPHENE, BERYLLIUM):
        size, shift = mesh_of_lattice(crystal.lattice, len(crystal.numbers), 50.0, 7.5, shifted=True)
        assert size[0] == size[1] >= 3 and shift[:2] == (0, 0)


@pytest.mark.parametrize("variant", LATTICES)
def test_all_cells_of_a_crystal_get_the_same_points(variant: str) -> None:
    lattice, rng = LATTICES[variant], np.random.default_rng(3)
    found = []
    for _ in range(6):
        other = unimodular(rng)
        operation = shortest_cell(other @ lattice)
        for settings in ({"shifted": True}, {"even": True}):
            points = Sampling("lattice", 60.0, 7.5, **settings).points(operation @ other @ lattice, 3)
            found.append(images(points @ np.linalg.inv(operation @ other).T, holohedry(lattice)))
    assert found[::2] == [found[0]] * 6 and found[1::2] == [found[1]] * 6


@pytest.mark.parametrize("kppa", [40.0, 300.0, 1000.0])
@pytest.mark.parametrize("lengths", [(4.0, 4.0, 4.0), (3.9, 3.9, 7.8), (3.0, 5.0, 11.0), (12.0, 12.0, 12.0)])
def test_the_rule_of_the_cell_is_pymatgens_made_even(kppa: float, lengths: tuple[float, float, float]) -> None:
    structure = Structure(np.diag(lengths), ["Si"] * 2, [[0, 0, 0], [0.4, 0.5, 0.5]])
    (expected,) = Kpoints.automatic_density(structure, kppa).kpts
    mesh, _ = Sampling("cell", kppa, even=True).mesh(np.diag(lengths), 2)
    assert mesh == tuple(n + n % 2 for n in expected)


def test_a_symmetric_mesh_averages_exactly_what_its_period_allows() -> None:
    """A plane wave of the lattice averages to zero unless it has the period of the mesh's supercell."""
    lattice = FCC * 5.64
    points = rule_points("lattice", lattice, (2, 2, 2), (1, 1, 1))
    for vector in ([1, 0, 0], [1, -1, 0], [1, 1, -1], [3, 0, 0]):
        assert abs(np.exp(2j * np.pi * points @ vector).mean()) < 1e-12
    # Even of those with that period the nearest cancel: Chadi and Cohen's points of the face-centred lattice.
    assert abs(np.exp(2j * np.pi * points @ [2, 0, 0]).mean()) < 1e-12


# Engines


def test_what_a_gap_of_a_cubic_lattice_lacked() -> None:
    rocksalt, perovskite = library.rocksalt(), library.perovskite()
    for skeleton, points in ((rocksalt, 1), (perovskite, 0)):
        sampling = Sampling("lattice", 100.0, 7.5, even=True, special=True)
        beyond = sampling.points_beyond_mesh(skeleton.lattice, skeleton.frac_coords, range(skeleton.n_sites))
        assert len(beyond) == points  # K; a mesh of four holds W
    beyond = Sampling("lattice", 100.0, 7.5, even=True, special=True).points_beyond_mesh(
        GRAPHITE.lattice, GRAPHITE.frac_coords, GRAPHITE.numbers
    )
    assert any(np.allclose(np.abs(point), [1 / 3, 1 / 3, 0]) for point in beyond)


@pytest.mark.parametrize("name", tables.shipped())
def test_keys_of_tables_are_those_of_the_engine(name: str) -> None:
    """Results whose k-points are as before have the key they had, and gaps of face-centred lattices a new one."""
    table = tables.load(name)
    calculated, skeleton = table.origin["calculated_as"], table.skeleton
    engine = PlanewaveEngine.preset(table.origin["preset"])
    facts = engine.fingerprint_of(skeleton.lattice, skeleton.frac_coords, calculated)
    face_centred = skeleton.name in ("RocksaltAB", "ZincblendeAB", "FluoriteAX2")
    assert ("sampling" in facts) == (calculated == "band_gap" and face_centred)
    assert table.origin["settings"].get("sampling") == facts.get("sampling")


def test_a_key_does_not_depend_on_the_cell() -> None:
    engine, rng = PlanewaveEngine.preset("fast"), np.random.default_rng(0)
    assert isinstance(engine, CrystalFingerprint)
    for crystal in (library.perovskite(), library.rocksalt(), library.fluorite()):
        for property_name in PROPERTIES:
            keys = set()
            for other in [np.eye(3, dtype=int)] + [unimodular(rng) for _ in range(4)]:
                lattice, coords = other @ crystal.lattice, crystal.frac_coords @ np.linalg.inv(other)
                facts = engine.fingerprint_of(lattice, coords, property_name)
                skeleton = Skeleton("any", lattice, coords, crystal.species)
                keys.add(Keys(skeleton, property_name, facts).key(range(1, crystal.n_sites + 1)))
            assert len(keys) == 1


def test_a_large_or_hexagonal_crystal_has_a_new_key() -> None:
    engine = PlanewaveEngine.preset("fast")
    large = np.diag([5.38, 5.44, 7.64]), np.random.default_rng(0).uniform(size=(20, 3))
    for lattice, coords in (large, (GRAPHITE.lattice, GRAPHITE.frac_coords)):
        for property_name in PROPERTIES:
            assert "sampling" in engine.fingerprint_of(lattice, coords, property_name)
    plain = PlanewaveEngine.preset("crystalgym")
    assert plain.fingerprint_of(*large, "band_gap") == plain.fingerprint("band_gap")


def test_a_relaxed_cell_is_given_back_in_the_cell_that_was_given() -> None:
    engine, other = PlanewaveEngine.preset("fast"), np.array([[1, 0, 0], [3, 1, 0], [-2, 1, 1]])
    lattice, coords = other @ GRAPHITE.lattice, GRAPHITE.frac_coords @ np.linalg.inv(other)
    inner, operation = engine._shortest(Crystal(lattice, coords, GRAPHITE.numbers))
    assert np.allclose(np.sort(np.linalg.norm(inner.lattice, axis=1)), [2.46, 2.46, 6.7])
    details = {"lattice": inner.lattice.tolist(), "frac_coords": inner.frac_coords.tolist()}
    given = engine._as_given(Result(1.0, Status.OK, details=details), operation).details
    assert np.allclose(given["lattice"], lattice) and np.allclose(given["frac_coords"], coords)
    assert (
        PlanewaveEngine.preset("crystalgym")._shortest(Crystal(lattice, coords, GRAPHITE.numbers))[0].lattice is lattice
    )


@pytest.mark.slow
def test_gaps_at_the_corner_of_a_hexagonal_zone() -> None:
    """Graphene has none; without K it had 2.0 eV. Layers of BN have 4.33 eV, 4.70 at K (pw.x); without K 5.22."""
    graphene, boron_nitride = PlanewaveEngine.preset("fast").compute_many([GRAPHENE, BORON_NITRIDE], "band_gap")
    assert graphene.status == boron_nitride.status == Status.OK
    assert graphene.value < 0.02
    assert boron_nitride.value == pytest.approx(4.33, abs=0.05)
    assert boron_nitride.details["direct_gap"] == pytest.approx(4.70, abs=0.05)


@pytest.mark.slow
def test_beryllium_is_a_metal_in_any_cell() -> None:
    """Without K it had a gap of 3 eV."""
    other = np.array([[1, 0, 0], [2, 1, 0], [0, 1, 1]])
    skewed = Crystal(other @ BERYLLIUM.lattice, BERYLLIUM.frac_coords @ np.linalg.inv(other), BERYLLIUM.numbers)
    results = PlanewaveEngine.preset("fast").compute_many([BERYLLIUM, skewed], "band_gap")
    assert [result.value for result in results] == [0.0, 0.0]
    raw = [result.details["raw_gap"] for result in results]
    assert raw[0] == pytest.approx(raw[1], abs=0.02) and raw[0] < 0
