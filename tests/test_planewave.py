"""The plane-wave engine: its parts against closed forms and published numbers, its SCF against symmetry and pw.x."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pickle
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase.data import atomic_masses, atomic_numbers
from ase.units import Bohr, Hartree
from numpy.polynomial.legendre import leggauss, legval
from pymatgen.core import Lattice, Structure
from pymatgen.io.vasp.inputs import Kpoints

from crystaljax import caveats, library
from crystaljax.dft_bridge.engines import planewave as module
from crystaljax.dft_bridge.engines.base import BatchEngine, Crystal, EngineNotReady
from crystaljax.dft_bridge.engines.checks import AMU_PER_A3
from crystaljax.dft_bridge.engines.planewave import PRESETS, PlanewaveEngine
from crystaljax.dft_bridge.engines.registry import make_engine
from crystaljax.dft_bridge.kpoints import (
    IDENTITY,
    find_symmetry,
    half_points,
    kppa_mesh,
    mesh_points,
    reduce_points,
)
from crystaljax.dft_bridge.ladder import Climb
from crystaljax.dft_bridge.planewave import (
    eigensolver,
    fields,
    kinds,
    mixing,
    occupations,
    potentials,
    recovery,
    scf,
    solver,
    xc,
)
from crystaljax.dft_bridge.planewave.basis import fft_size, make_basis, nearest_waves
from crystaljax.dft_bridge.planewave.ewald import ewald_matrix, ewald_sums
from crystaljax.dft_bridge.planewave.hamiltonian import band_density, hamiltonian
from crystaljax.dft_bridge.planewave.kinds import Workbench
from crystaljax.dft_bridge.planewave.properties import energies_of_volumes
from crystaljax.dft_bridge.planewave.pseudopotentials import Q_STEP, PseudoSet, shipped
from crystaljax.dft_bridge.planewave.relaxation import Relaxation, symmetrise
from crystaljax.dft_bridge.planewave.rungs import FOOT, RUNGS
from crystaljax.dft_bridge.planewave.scf import Problem, ScfSettings
from crystaljax.elements import MEDIUM
from crystaljax.properties import PROPERTIES
from crystaljax.status import Status

FCC = np.array([[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
BCC = np.array([[-0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.5, 0.5, -0.5]])
HEXAGONAL = np.array([[1, 0, 0], [-0.5, math.sqrt(3) / 2, 0], [0, 0, 1.6]])
ROCKSALT = np.array([[0, 0, 0], [0.5, 0.5, 0.5]])
ZINCBLENDE = np.array([[0, 0, 0], [0.25, 0.25, 0.25]])
PEROVSKITE = np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
QUARTZ = Structure.from_spacegroup(
    "P3_121", Lattice.hexagonal(4.916, 5.405), ["Si", "O"], [[0.4697, 0, 1 / 3], [0.4133, 0.2672, 0.4521]]
)
SKEW = np.array([[1.0, 0.1, 0.0], [0.3, 1.2, -0.2], [-0.2, 0.1, 0.9]])

# Compiled as a whole, as solvers do it: operation by operation, every shape of each is a program to compile.
anderson, ewald, gaussian = jax.jit(mixing.anderson), jax.jit(ewald_matrix), jax.jit(occupations.gaussian)
interpolate = jax.jit(potentials.interpolate)
orthonormalise = jax.jit(eigensolver.orthonormalise)
real_harmonics = jax.jit(potentials.real_harmonics, static_argnums=1)
symmetrised, to_coefficients, to_points = (
    jax.jit(function) for function in (fields.symmetrise, fields.to_coefficients, fields.to_points)
)

ROUGH = {
    **{f"{name}_cutoff": 10.0 for name in PROPERTIES},
    **{f"{name}_kppa": 20.0 for name in PROPERTIES},  # 2 x 2 x 2 for two atoms
    **{f"{name}_width": 0.002 for name in PROPERTIES},
    "shifted": True,
    "special_points": True,
    "symmetry": "skeleton",
    "tolerance": 1e-9,
    "nstep": 3,
}
"""Settings of the engine that are fast, and good enough for crystals of soft elements such as silicon."""


@pytest.fixture(scope="module", autouse=True)
def double():
    """What the engine switches on for itself."""
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def as_user(double):
    """JAX as it comes."""
    with jax.enable_x64(False), jax.default_matmul_precision(None):
        yield


def zincblende(symbols: str, a: float = 5.43, positions: np.ndarray = ZINCBLENDE) -> Crystal:
    return Crystal(FCC * a, positions, np.array([atomic_numbers[s] for s in symbols.split()]))


def tables_of(*symbols: str) -> potentials.SpeciesTables:
    return potentials.species_tables(shipped(), symbols, potentials.channels_for(shipped(), symbols))


# Exchange and correlation


def density_of_radius(rs):
    return 3 / (4 * math.pi * jnp.asarray(rs) ** 3)


def test_correlation_of_the_uniform_gas_is_the_published_one():
    # Perdew and Wang, Phys. Rev. B 45, 13244 (1992)
    found = xc.correlation_pw92(density_of_radius([2.0, 5.0]))
    np.testing.assert_allclose(found, [-0.04476, -0.02822], atol=1e-5)


def test_correlation_has_the_limit_of_high_density():
    # ((1 - ln 2) / pi^2) ln rs - 0.04664: exact, up to terms that vanish with rs
    rs = 1e-5
    assert float(xc.correlation_pw92(density_of_radius(rs))) == pytest.approx(
        0.0310907 * math.log(rs) - 0.0466, abs=5e-4
    )


def test_exchange_of_the_uniform_gas():
    rs = np.array([0.5, 2.0, 7.0])
    expected = -0.75 / math.pi * np.cbrt(9 * math.pi / 4) / rs
    np.testing.assert_allclose(xc.exchange_uniform(density_of_radius(rs)), expected, rtol=1e-12)


def test_pbe_without_gradient_is_lda():
    n = density_of_radius(jnp.array([0.5, 2.0, 7.0]))
    np.testing.assert_allclose(xc.energy_pbe(n, 0 * n), xc.energy_lda(n), rtol=1e-12)


def test_gradient_terms_of_exchange_and_correlation_cancel_to_second_order():
    # By construction: mu = beta pi^2 / 3, so that the linear response is that of the LDA.
    n = density_of_radius(2.0)
    kf = float(jnp.cbrt(3 * math.pi**2 * n))
    s2 = 1e-4
    change = float(xc.energy_pbe(n, s2 * (2 * kf * n) ** 2) - xc.energy_lda(n))
    exchange_alone = -0.75 * kf / math.pi * 0.21951 * s2
    assert abs(change) < 2e-3 * abs(exchange_alone)


def test_pbe_in_a_steep_gradient_has_the_largest_enhancement_and_no_correlation():
    n = density_of_radius(jnp.array([1.0, 4.0]))
    kf = jnp.cbrt(3 * math.pi**2 * n)
    found = xc.energy_pbe(n, (1e5 * 2 * kf * n) ** 2)
    np.testing.assert_allclose(found, 1.804 * xc.exchange_uniform(n), rtol=1e-6)


def test_helium_has_its_published_energies():
    # Hartree-Fock density of Clementi and Roetti; energies of Kurth, Perdew and Blaha, Int. J. Quantum Chem. 75, 889
    # (1999): exchange -0.8840 (LDA), -1.0136 (PBE), correlation -0.0420 (PBE).
    exponents = np.array([1.41714, 2.37682, 4.39628, 6.52699, 7.94252])
    parts = np.array([0.76838, 0.22346, 0.04082, -0.00994, 0.00230]) * 2 * exponents**1.5 / math.sqrt(4 * math.pi)
    x, weight = leggauss(200)
    r = (1 + x) / (1.001 - x)
    weight = weight * 4 * math.pi * r**2 * 2.001 / (1.001 - x) ** 2

    wave = np.exp(-np.outer(r, exponents)) @ parts
    slope = -np.exp(-np.outer(r, exponents)) @ (parts * exponents)
    density = 2 * wave**2
    charge = weight @ density
    lda = weight @ (density * np.asarray(xc.exchange_uniform(jnp.asarray(density))))
    pbe = weight @ (density * np.asarray(xc.energy_pbe(jnp.asarray(density), jnp.asarray((4 * wave * slope) ** 2))))
    assert charge == pytest.approx(2, abs=1e-4)
    assert lda == pytest.approx(-0.8840, abs=1e-3)
    assert pbe == pytest.approx(-1.0136 - 0.0420, abs=1e-3)


def test_functionals_are_finite_where_there_is_no_density():
    for n in (0.0, -1e-6, 1e-30):
        energy, slopes = jax.value_and_grad(lambda n, g: xc.energy_pbe(n, g), (0, 1))(jnp.asarray(n), jnp.asarray(0.0))
        assert np.isfinite([energy, *slopes]).all()


# Ewald sums


def electrostatic(charges, sums, lattice, positions):
    return 0.5 * charges @ ewald(sums, lattice, positions) @ charges


def madelung(lattice, positions, charges, distance):
    sums = ewald_sums(np.asarray(lattice))
    charges = np.array(charges, float)
    return float(-electrostatic(charges, sums, lattice, positions) * distance)


@pytest.mark.parametrize(
    ("lattice", "positions", "distance", "constant"),
    [
        (FCC * 9.0, ROCKSALT, 4.5, 1.747564594633),
        (np.eye(3) * 7.0, ROCKSALT, 3.5 * math.sqrt(3), 1.762674773071),
        (FCC * 8.0, ZINCBLENDE, 2 * math.sqrt(3), 1.638055053389),
    ],
)
def test_madelung_constants(lattice, positions, distance, constant):
    assert madelung(lattice, positions, [1, -1], distance) == pytest.approx(constant, abs=1e-10)


@pytest.mark.parametrize(
    ("lattice", "sites", "constant"), [(BCC, 2, 0.895929255682), (FCC, 4, 0.895873615195), (np.eye(3), 1, 0.880059442)]
)
def test_a_lattice_of_charges_in_a_background(lattice, sites, constant):
    # Energy of Wigner crystals in units of 1 / rs: the sums must hold for charged cells, as local potentials need them.
    rs = (3 / (4 * math.pi * sites)) ** (1 / 3)
    assert madelung(lattice * 1.0, np.zeros((1, 3)), [1.0], rs) == pytest.approx(constant, abs=1e-9)


def test_ewald_energy_depends_on_the_crystal_alone():
    rng = np.random.default_rng(0)
    lattice, positions, charges = SKEW * 6, rng.random((4, 3)), np.array([1.0, 3.0, 5.0, 2.0])

    def energy(lattice, positions, charges, splitting=1.0):
        sums = ewald_sums(lattice)
        sums = sums.replace(splitting=sums.splitting * splitting)
        return float(electrostatic(charges, sums, lattice, positions))

    expected = energy(lattice, positions, charges)
    assert energy(lattice, positions, charges, 0.85) == pytest.approx(expected, abs=1e-9)
    assert energy(lattice, positions, charges, 1.2) == pytest.approx(expected, abs=1e-9)
    order = np.array([2, 0, 3, 1])
    assert energy(lattice, positions[order], charges[order]) == pytest.approx(expected, abs=1e-9)
    assert energy(lattice, positions + [3, -1, 0.4], charges) == pytest.approx(expected, abs=1e-9)
    change = np.array([[1, 1, 0], [0, 1, 0], [-1, 0, 1]])
    assert energy(change @ lattice, positions @ np.linalg.inv(change), charges) == pytest.approx(expected, abs=1e-9)
    doubled = np.concatenate([positions, positions + [0, 1, 0]]) * [1, 0.5, 1]
    twice = energy(lattice * [[1], [2], [1]], doubled, np.tile(charges, 2))
    assert twice == pytest.approx(2 * expected, abs=1e-8)


def test_derivatives_of_the_ewald_energy():
    rng = np.random.default_rng(1)
    lattice, positions, charges = SKEW * 6, rng.random((3, 3)), np.array([1.0, 3.0, 5.0])
    sums = ewald_sums(lattice)
    slopes = jax.jit(jax.grad(electrostatic, (2, 3)))(charges, sums, lattice, positions)
    moves = rng.normal(size=(3, 3)), rng.normal(size=(3, 3))
    h = 1e-5
    ahead, behind = (
        electrostatic(charges, sums, lattice + s * h * moves[0], positions + s * h * moves[1]) for s in (1, -1)
    )
    expected = float(np.vdot(slopes[0], moves[0]) + np.vdot(slopes[1], moves[1]))
    assert float(ahead - behind) / (2 * h) == pytest.approx(expected, rel=1e-6)


# k-points and symmetry


@pytest.mark.parametrize(
    ("lattice", "mesh", "shift", "count"),
    [
        (FCC, 2, 1, 2),
        (FCC, 4, 1, 10),
        (FCC, 4, 0, 8),
        (np.eye(3), 4, 0, 10),
        (np.eye(3), 6, 0, 20),
        (np.eye(3), 4, 1, 4),
        (BCC, 4, 0, 8),
    ],
)
def test_numbers_of_special_points(lattice, mesh, shift, count):
    symmetry = find_symmetry(lattice * 4.0, np.zeros((1, 3)), [0])
    assert len(symmetry) == 48
    points, weights = reduce_points(mesh_points([mesh] * 3, [shift] * 3), symmetry)
    assert len(points) == len(weights) == count
    assert weights.sum() == pytest.approx(1)
    assert np.all((points > -0.5 - 1e-12) & (points <= 0.5 + 1e-12))


def test_time_reversal_alone_halves_the_mesh():
    assert len(reduce_points(mesh_points([4, 4, 4]), IDENTITY)[0]) == 36
    assert len(reduce_points(mesh_points([2, 2, 2], [1, 1, 1]), IDENTITY)[0]) == 4


@pytest.mark.parametrize(("lattice", "count"), [(np.eye(3), 4), (FCC, 3), (BCC, 3), (HEXAGONAL, 4)])
def test_zone_boundary_points(lattice, count):
    symmetry = find_symmetry(lattice * 4.0, np.zeros((1, 3)), [0])
    assert len(reduce_points(half_points(), symmetry)[0]) == count


def test_the_reduced_mesh_averages_as_the_full_one():
    crystal = QUARTZ
    symmetry = find_symmetry(crystal.lattice.matrix, crystal.frac_coords, crystal.atomic_numbers)
    assert len(symmetry) == 6
    mesh = mesh_points([4, 4, 3])
    points, weights = reduce_points(mesh, symmetry)
    assert len(points) < len(mesh) / 4
    # a sum over a star of lattice vectors, as energies of bands are
    star = np.concatenate([sign * w @ [1, 2, 1] for w in symmetry.rotations for sign in (1, -1)]).reshape(-1, 3)

    def values(k):
        return np.cos(2 * math.pi * k @ star.T).sum(axis=1) ** 2

    assert weights @ values(points) == pytest.approx(values(mesh).mean(), abs=1e-9)


def test_colours_of_sites_decide_the_symmetry():
    lattice = np.eye(3) * 4.0
    assert len(find_symmetry(lattice, PEROVSKITE, [0, 1, 2, 2, 2])) == 48
    assert len(find_symmetry(lattice, PEROVSKITE, [0, 1, 2, 2, 3])) == 16
    assert len(find_symmetry(lattice, PEROVSKITE, range(5))) == 8


@pytest.mark.parametrize("kppa", [20.0, 64.0, 300.0, 1000.0])
@pytest.mark.parametrize(
    "lattice", [np.eye(3) * 4, np.diag([3.9, 3.9, 7.8]), np.diag([3.0, 5.0, 11.0]), np.eye(3) * 14, FCC * 5.6, SKEW * 5]
)
def test_mesh_is_pymatgens(lattice, kppa):
    structure = Structure(lattice, ["Si"] * 2, [[0, 0, 0], [0.4, 0.5, 0.5]])
    (expected,) = Kpoints.automatic_density(structure, kppa).kpts
    assert kppa_mesh(lattice, 2, kppa) == tuple(expected)


# Plane waves


@pytest.fixture(scope="module", params=["diamond", "hcp", "quartz"])
def symmetric(request):
    """Crystals with glide planes and screw axes, and everything that belongs to them."""
    match request.param:
        case "diamond":
            lattice, positions, symbols = FCC * 5.43, ZINCBLENDE, ["Si", "Si"]
        case "hcp":
            lattice, positions, symbols = (
                HEXAGONAL * 3.2,
                np.array([[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]]),
                ["Mg"] * 2,
            )
        case "quartz":
            lattice, positions = QUARTZ.lattice.matrix, QUARTZ.frac_coords
            symbols = [site.specie.symbol for site in QUARTZ]
    colours = [atomic_numbers[s] for s in symbols]
    symmetry = find_symmetry(lattice, positions, colours)
    kinds_of = sorted(set(symbols))
    points = reduce_points(mesh_points([2, 2, 2]), symmetry)
    basis = make_basis(lattice / Bohr, 5.0, *points, symmetry)
    species = np.array([kinds_of.index(s) for s in symbols])
    tables = tables_of(*kinds_of)
    potential = jax.jit(lambda *crystal: potentials.density_potential(basis, tables, *crystal, species))(
        lattice / Bohr, positions
    )
    return SimpleNamespace(
        lattice=lattice / Bohr, positions=positions, symmetry=symmetry, basis=basis, potential=potential
    )


def test_number_of_plane_waves(symmetric):
    basis, volume = symmetric.basis, abs(np.linalg.det(symmetric.lattice))
    average = float(basis.weights @ basis.valid.sum(axis=1))
    assert average == pytest.approx(volume * (2 * basis.cutoff) ** 1.5 / (6 * math.pi**2), rel=0.05)
    vectors = float(basis.density_weights.sum())
    assert vectors == pytest.approx(volume * (8 * basis.cutoff) ** 1.5 / (6 * math.pi**2), rel=0.02)
    reciprocal = 2 * math.pi * np.linalg.inv(symmetric.lattice).T
    energies = 0.5 * np.sum(((basis.millers + basis.kpoints[:, None]) @ reciprocal) ** 2, axis=-1)
    assert float(energies[basis.valid].max()) <= basis.cutoff * (1 + 1e-6)


def test_every_plane_wave_has_its_own_point_in_every_box(symmetric):
    basis = symmetric.basis
    for k in range(basis.n_kpoints):
        count = int(basis.valid[k].sum())
        for box in (basis.to_wave_box[k], basis.to_box[k]):
            filled = np.asarray(box)[np.asarray(box) < basis.n_waves]
            np.testing.assert_array_equal(np.sort(filled), np.arange(count))
        back = np.asarray(basis.to_wave_box[k])[np.asarray(basis.from_wave_box[k])[:count]]
        np.testing.assert_array_equal(back, np.arange(count))
    # products of two waves do not wrap around
    assert all(
        n >= 4 * m + 1 for n, m in zip(basis.box, np.abs(basis.millers[basis.valid]).max(axis=0), strict=True)
    ) or (np.all(np.array(basis.box) >= 2 * np.abs(basis.density_millers).max(axis=0) + 1))


def test_symmetry_maps_the_sphere_onto_itself(symmetric):
    images = np.asarray(symmetric.basis.images)
    assert len(images) in (1, 48) and len(images) % len(symmetric.symmetry) == 0  # every operation equally often
    for row in images:
        pairs = np.asarray(symmetric.basis.density_weights)
        assert set(row) == set(range(len(row))) or pairs.min() == 1  # where third index 0, both of a pair are stored
        assert np.bincount(row, weights=pairs, minlength=len(row)).sum() == pairs.sum()


def test_a_crystals_density_is_symmetric_as_it_is(symmetric):
    density = symmetric.potential.start
    np.testing.assert_allclose(symmetrised(symmetric.basis, density), density, atol=1e-9)


def random_field(basis, seed=0):
    return to_coefficients(basis, jnp.asarray(np.random.default_rng(seed).normal(size=basis.box)))


def test_symmetrising_is_a_projection(symmetric):
    field = random_field(symmetric.basis)
    once = symmetrised(symmetric.basis, field)
    assert float(jnp.abs(once - field).max()) > 1e-3
    np.testing.assert_allclose(symmetrised(symmetric.basis, once), once, atol=1e-12)
    assert complex(once[0]) == pytest.approx(complex(field[0]), abs=1e-12)


def test_points_and_coefficients(symmetric):
    basis = symmetric.basis
    field = random_field(basis)
    points = to_points(basis, field)
    np.testing.assert_allclose(to_coefficients(basis, points), field, atol=1e-12)
    where = (1, 3, 2)
    phases = np.exp(2j * math.pi * np.asarray(basis.density_millers) @ (np.array(where) / basis.box))
    assert float(points[where]) == pytest.approx(float((basis.density_weights * field * phases).real.sum()), abs=1e-9)
    parseval = float(jnp.sum(basis.density_weights * jnp.abs(field) ** 2))
    assert float(jnp.mean(points**2)) == pytest.approx(parseval, rel=1e-9)


def test_boxes_suit_the_fourier_transform():
    assert [fft_size(n) for n in (1, 7, 11, 13, 17, 31, 97)] == [1, 8, 12, 15, 18, 32, 100]


def test_a_stretched_basis_is_that_of_the_largest_cell():
    lattice, points = FCC * 10.0, (np.zeros((1, 3)), np.ones(1))
    small, large = make_basis(lattice, 6.0, *points), make_basis(lattice * 1.03, 6.0, *points)
    stretched = make_basis(lattice, 6.0, *points, stretch=1.03)
    assert small.fixed and not stretched.fixed
    assert small.n_waves < large.n_waves == stretched.n_waves
    tables, here = tables_of("Si"), [np.asarray(x)[0] for x in _points(stretched)]
    acting = jax.jit(
        lambda lattice: potentials.wave_potential(
            stretched, tables, lattice, np.zeros((1, 3)), np.zeros(1, int), *map(jnp.asarray, here)
        )
    )(lattice)
    assert int(np.sum(acting.mask)) == small.n_waves


def _points(basis):
    return basis.kpoints, basis.millers, basis.valid


# Radial tables, harmonics


def test_interpolation():
    q = Q_STEP * np.arange(200)
    table = jnp.asarray(np.stack([np.exp(-(q**2) / 2), np.sin(3 * q)]))
    np.testing.assert_allclose(interpolate(table, jnp.asarray(q)), table, atol=1e-12)
    between = jnp.asarray(np.random.default_rng(0).uniform(0, q[-1], 500))
    expected = np.stack([np.exp(-(between**2) / 2), np.sin(3 * between)])
    np.testing.assert_allclose(interpolate(table, between), expected, atol=2e-9)
    slope = jax.jit(jax.vmap(jax.grad(lambda x: interpolate(table, x[None])[1, 0])))(between)
    np.testing.assert_allclose(slope, 3 * np.cos(3 * between), atol=2e-6)


def test_real_harmonics_are_orthonormal():
    z, weight = leggauss(8)
    phi = 2 * math.pi * np.arange(16) / 16
    rho = np.sqrt(1 - z**2)[:, None]
    directions = np.stack(np.broadcast_arrays(rho * np.cos(phi), rho * np.sin(phi), z[:, None]), axis=-1).reshape(-1, 3)
    values = np.asarray(real_harmonics(jnp.asarray(directions) * 2.5, 3))
    overlap = (values * np.repeat(weight, 16) * 2 * math.pi / 16) @ values.T
    np.testing.assert_allclose(overlap, np.eye(16), atol=1e-12)


def test_addition_theorem_of_the_harmonics():
    a, b = np.random.default_rng(0).normal(size=(2, 3))
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    first, second = np.asarray(real_harmonics(jnp.asarray(np.stack([a, b])), 3)).T
    for momentum in range(4):
        rows = slice(momentum**2, (momentum + 1) ** 2)
        expected = (2 * momentum + 1) / (4 * math.pi) * legval(cosine, np.eye(4)[momentum])
        assert first[rows] @ second[rows] == pytest.approx(expected, abs=1e-12)


def test_harmonics_at_the_origin_have_no_direction():
    values = real_harmonics(jnp.zeros((1, 3)), 3)[:, 0]
    np.testing.assert_allclose(values, np.eye(16)[0] / math.sqrt(4 * math.pi), atol=1e-15)
    slope = jax.jit(jax.jacobian(lambda v: potentials.real_harmonics(v, 3)))(jnp.zeros((1, 3)))
    assert np.isfinite(slope).all()


# Occupations


BANDS = np.array([[-0.5, -0.2, 0.0, 0.3], [-0.45, -0.25, 0.05, 0.2]])
WEIGHTS = np.array([0.25, 0.75])


@pytest.mark.parametrize("electrons", [2.0, 3.0, 4.0, 5.5])
@pytest.mark.parametrize("width", [0.002, 0.05])
def test_smearing_conserves_electrons(electrons, width):
    filled = gaussian(BANDS, WEIGHTS, jnp.asarray(electrons), width)
    assert float(jnp.sum(WEIGHTS[:, None] * filled.numbers)) == pytest.approx(electrons, abs=1e-9)
    assert float(filled.numbers.min()) >= 0 and float(filled.numbers.max()) <= 2
    assert float(filled.minus_ts) <= 0


def test_narrow_smearing_is_fixed_occupation():
    filled = occupations.occupy(BANDS, WEIGHTS, jnp.asarray(4.0), 1e-4)
    whole = occupations.occupy(BANDS, WEIGHTS, jnp.asarray(4.0), 0.0)
    np.testing.assert_array_equal(whole.numbers, [[2, 2, 0, 0]] * 2)
    np.testing.assert_allclose(filled.numbers, whole.numbers, atol=1e-12)
    assert float(whole.fermi_level) == pytest.approx(-0.1)
    assert -0.2 < float(filled.fermi_level) < 0.0
    assert float(whole.minus_ts) == 0 and abs(float(filled.minus_ts)) < 1e-12


def test_smearing_is_wider_while_levels_cross_the_fermi_level():
    errors = jnp.array([0.0, 1e-6, 1e-4, 1e-2, jnp.inf])
    widths = np.asarray(occupations.annealed(0.002, errors))
    assert widths[0] == widths[1] == 0.002 and np.all(np.diff(widths) >= 0) and widths[-1] == widths[-2] == 0.02
    assert float(occupations.annealed(0.05, jnp.inf)) == 0.05
    sharp, wide = (occupations.occupy(BANDS, WEIGHTS, jnp.asarray(5.0), 0.002, error) for error in (0.0, jnp.inf))
    expected = gaussian(BANDS, WEIGHTS, jnp.asarray(5.0), 0.02).numbers
    np.testing.assert_allclose(wide.numbers, expected, atol=1e-12)
    assert np.abs(sharp.numbers - wide.numbers).max() > 1e-3


def test_half_filled_level():
    filled = gaussian(jnp.array([[0.1]]), jnp.ones(1), jnp.asarray(1.0), 0.02)
    assert float(filled.fermi_level) == pytest.approx(0.1)
    assert float(filled.minus_ts) == pytest.approx(-0.02 / math.sqrt(math.pi))


def test_occupations_are_the_slope_of_the_free_energy():
    def free(bands):
        filled = gaussian(bands, WEIGHTS, jnp.asarray(5.0), 0.05)
        return float(jnp.sum(WEIGHTS[:, None] * filled.numbers * bands) + filled.minus_ts)

    numbers = gaussian(BANDS, WEIGHTS, jnp.asarray(5.0), 0.05).numbers
    h = 1e-4
    for k, band in itertools.product(range(2), range(4)):

        def moved(step, place=(k, band)):
            bands = BANDS.copy()
            bands[place] += step
            return bands

        slope = (free(moved(h)) - free(moved(-h))) / (2 * h)
        assert slope == pytest.approx(float(WEIGHTS[k] * numbers[k, band]), abs=1e-6)


# Mixing


def mixed_errors(stiffness: np.ndarray, steps: int, depth: int) -> list[float]:
    """Anderson's errors for output minus input = stiffness (solution - input)."""
    rng = np.random.default_rng(0)
    solution, density = (jnp.asarray(rng.normal(size=(len(stiffness), 2)) @ [1, 1j]) for _ in range(2))
    history = mixing.History.empty(depth, len(stiffness), density.dtype)
    metric = jnp.asarray(rng.uniform(0.1, 2.0, len(stiffness)))
    errors = []
    for _ in range(steps):
        density, history = anderson(history, density, stiffness * (solution - density), metric, 0.5)
        errors.append(float(jnp.abs(density - solution).max()))
    return errors


def test_mixing_solves_a_linear_problem_in_as_many_steps_as_it_has_stiffnesses():
    # Simple mixing diverges along the stiff one and hardly moves along the soft one.
    stiffness = np.repeat([0.02, 1.0, 8.0], 5)
    errors = mixed_errors(stiffness, 5, 7)
    assert errors[2] > 1e-2
    assert min(errors[3:]) < 1e-5


def test_mixing_goes_on_when_the_history_is_full():
    errors = mixed_errors(np.linspace(0.1, 2.0, 12), 30, 4)
    assert errors[-1] < 0.05 * errors[3]


def test_mixing_starts_with_a_simple_step():
    (error,) = mixed_errors(np.full(3, 2.0), 1, 4)
    assert error < 1e-12  # 0.5 * 2 of the way


# Eigensolver


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.complex64, 2e-5), (np.complex128, 1e-11)])
def test_davidson_finds_the_lowest_eigenvalues(dtype, tolerance):
    rng = np.random.default_rng(0)
    size, bands = 120, 8
    kinetic = np.sort(rng.uniform(0, 12, size)) ** 1.2
    matrix = rng.normal(size=(size, size)) + 1j * rng.normal(size=(size, size))
    matrix = (0.12 * (matrix + matrix.conj().T) + np.diag(kinetic)).astype(dtype)
    start = ((rng.normal(size=(2, bands, size)).T @ [1, 1j]).T / (1 + kinetic**2)).astype(dtype)
    real = np.zeros(1, dtype).real.dtype

    @jax.jit
    def improve(waves):
        return eigensolver.davidson(lambda x: x @ matrix.T, jnp.asarray(kinetic, real), waves, 2)

    waves, above = jnp.asarray(start), []
    exact, vectors = np.linalg.eigh(matrix.astype(complex))
    for _ in range(25):
        found = improve(waves)
        waves = found.waves
        above.append(float(found.eigenvalues.sum()))
    assert found.eigenvalues.dtype == real and found.waves.dtype == dtype
    np.testing.assert_allclose(found.eigenvalues[:-1], exact[: bands - 1], atol=tolerance)
    assert np.all(np.diff(above) < 20 * tolerance)  # never gets worse
    np.testing.assert_allclose(found.waves.conj() @ found.waves.T, np.eye(bands), atol=10 * tolerance)
    overlap = np.linalg.norm(np.asarray(found.waves)[:3].conj() @ vectors[:, :3], axis=1)  # rows: psi^T
    np.testing.assert_allclose(overlap, 1, atol=100 * tolerance)
    assert float(found.residuals[:3].max()) < 100 * math.sqrt(tolerance)


def test_orthonormalising_keeps_the_space():
    rng = np.random.default_rng(0)
    waves = (rng.normal(size=(2, 4, 30)).T @ [1, 1j]).T
    found = np.asarray(orthonormalise(jnp.asarray(waves, jnp.complex64)))
    np.testing.assert_allclose(found.conj() @ found.T, np.eye(4), atol=1e-13)
    np.testing.assert_allclose(waves @ found.conj().T @ found, waves, atol=1e-5)


# Hamiltonian


def dense(lattice, positions, symbols, kpoint, cutoff=4.0, bands_per_fft=10**6):
    """H at a k-point in the potential of the atoms' densities, and H as a matrix; lattice in bohr."""
    basis = make_basis(lattice, cutoff, np.array([kpoint], float), np.ones(1))
    names = sorted(set(symbols))
    tables, species = tables_of(*names), np.array([names.index(s) for s in symbols])

    @jax.jit
    def assemble(lattice, positions):
        acting = potentials.density_potential(basis, tables, lattice, positions, species)
        potential = fields.effective_potential(basis, "PBE", acting, acting.start)
        here = (x[0] for x in _points(basis))
        waves = potentials.wave_potential(basis, tables, lattice, positions, species, *here)
        strengths = potentials.projector_energies(acting.energies, tables.channels)
        maps = basis.to_wave_box[0], basis.from_wave_box[0]
        h = hamiltonian(basis, waves, tables.channels, strengths, potential, *maps, bands_per_fft)
        return acting, h, h(jnp.eye(basis.n_waves) + 0j)

    acting, h, matrix = assemble(jnp.asarray(lattice), jnp.asarray(positions))
    return SimpleNamespace(basis=basis, h=h, acting=acting, matrix=np.asarray(matrix))


@pytest.fixture(scope="module")
def tilted():
    """A low-symmetry cell of GaAs with d projectors."""
    positions = np.array([[0.02, 0.01, -0.03], [0.27, 0.22, 0.26]])
    return dense(SKEW * 6, positions, ["Ga", "As"], [0.1, -0.3, 0.2])


def test_hamiltonian_is_hermitian(tilted):
    off_diagonal = np.abs(tilted.matrix - np.diag(np.diag(tilted.matrix))).max()
    assert off_diagonal > 0.1
    np.testing.assert_allclose(tilted.matrix, tilted.matrix.conj().T, atol=1e-13)


def test_bands_may_be_transformed_in_any_number(tilted):
    rng = np.random.default_rng(0)
    waves = jnp.asarray((rng.normal(size=(2, 5, tilted.basis.n_waves)).T @ [1, 1j]).T)
    expected = waves @ tilted.matrix
    for at_once in (1, 2, 5):
        found = tilted.h.replace(bands_per_fft=at_once)(waves)
        np.testing.assert_allclose(found, expected, atol=1e-11)


def test_a_constant_potential_shifts_all_levels(tilted):
    shifted = tilted.h.replace(potential=tilted.h.potential + 0.37)(jnp.eye(tilted.basis.n_waves) + 0j)
    np.testing.assert_allclose(shifted - tilted.matrix, 0.37 * np.eye(len(shifted)), atol=1e-12)


def test_empty_lattice(tilted):
    nothing = tilted.h.replace(potential=0 * tilted.h.potential, strengths=0 * tilted.h.strengths)
    reciprocal = 2 * math.pi * np.linalg.inv(SKEW * 6).T
    expected = 0.5 * np.sum(((np.asarray(tilted.basis.millers[0]) + [0.1, -0.3, 0.2]) @ reciprocal) ** 2, axis=1)
    np.testing.assert_allclose(nothing(jnp.eye(len(expected)) + 0j), np.diag(expected), atol=1e-12)


def test_the_density_is_what_the_potential_acts_on(tilted):
    # <psi|V|psi> from H equals the integral of V n, and the density holds the electrons.
    basis = tilted.basis
    rng = np.random.default_rng(0)
    waves = orthonormalise(jnp.asarray((rng.normal(size=(2, 3, basis.n_waves)).T @ [1, 1j]).T))
    numbers = jnp.array([2.0, 1.0, 0.3])
    smooth = np.all(np.abs(basis.density_millers) <= 1, axis=1)  # whose products fit into the smaller box
    potential = random_field(basis) * smooth
    acting = tilted.h.replace(
        potential=fields.to_wave_points(basis, potential),
        strengths=0 * tilted.h.strengths,
        kinetic=0 * tilted.h.kinetic,
    )
    expected = float(numbers @ jnp.einsum("bp,bp->b", waves.conj(), acting(waves)).real)
    for at_once in (1, 3):
        points = band_density(basis, basis.to_box[0], waves, numbers, at_once)
        density = to_coefficients(basis, points)
        assert complex(density[0]) == pytest.approx(3.3, abs=1e-12)
        assert float(jnp.sum(basis.density_weights * (density.conj() * potential).real)) == pytest.approx(
            expected, abs=1e-11
        )


@pytest.mark.parametrize("functional", ["PBE", "LDA"])
def test_the_potential_is_the_slope_of_the_energy(tilted, functional):
    basis, acting = tilted.basis, tilted.acting
    change = random_field(basis) * np.all(np.abs(basis.density_millers) <= 2, axis=1) * 1e-3
    change = change.at[0].set(1e-4)

    def energy(step):
        return float(
            jax.jit(fields.density_energy, static_argnums=1)(basis, functional, acting, acting.start + step * change)
        )

    h = 1e-2
    potential = jax.jit(fields.effective_potential, static_argnums=1)(basis, functional, acting, acting.start)
    expected = float(jnp.mean(potential * fields.to_wave_points(basis, change)) * acting.volume)
    assert (energy(h) - energy(-h)) / (2 * h) == pytest.approx(expected, rel=1e-6)


def test_levels_do_not_depend_on_the_choice_of_lattice_vectors():
    lattice = SKEW * 7
    positions, kpoint = np.array([[0.02, 0.01, -0.03], [0.47, 0.52, 0.56]]), np.array([0.1, -0.3, 0.2])
    change = np.array([[1, 1, 0], [0, 1, 0], [-1, 0, 1]])
    first = dense(lattice, positions, ["Al", "P"], kpoint)
    second = dense(change @ lattice, positions @ np.linalg.inv(change), ["Al", "P"], change @ kpoint)
    assert first.basis.box != second.basis.box
    np.testing.assert_allclose(np.linalg.eigvalsh(first.matrix)[:8], np.linalg.eigvalsh(second.matrix)[:8], atol=5e-5)


def test_bands_fold_in_a_supercell():
    lattice, positions = FCC * 10.26, ZINCBLENDE
    symbols = ["Al", "P"]
    folded = np.concatenate(
        [np.linalg.eigvalsh(dense(lattice, positions, symbols, k).matrix)[:6] for k in ([0, 0, 0], [0.5, 0, 0])]
    )
    doubled = np.concatenate([positions, positions + [1, 0, 0]]) * [0.5, 1, 1]
    large = np.linalg.eigvalsh(dense(lattice * [[2], [1], [1]], doubled, symbols * 2, [0, 0, 0]).matrix)
    np.testing.assert_allclose(large[:8], np.sort(folded)[:8], atol=5e-5)


# Self-consistent fields


ENGINE = PlanewaveEngine(**ROUGH)
KIND = ENGINE.kind(zincblende("Si Si"), "band_gap")


def solve(chosen, problems, finish=solver.energies):
    found = jax.tree.map(np.asarray, chosen.solve(problems, finish))
    assert found.converged.all()
    return found


@pytest.fixture(scope="module")
def alone(double):
    """Energies (Ha) of crystals on the skeleton of :data:`KIND`, one after the other, in single precision."""
    names = ["Si Si", "Al P", "P Al", "B P", "Li F"]
    bench = Workbench(shipped(), 1)
    found = solve(bench.solver(KIND), bench.problems(KIND, [n.split() for n in names]))
    return {name: jax.tree.map(lambda x, i=i: x[i], found) for i, name in enumerate(names)}


@pytest.fixture(scope="module")
def together(double):
    """Three lanes, and so few SCF steps that not all crystals converge."""
    engine = dataclasses.replace(ENGINE, batch=3, max_scf_iterations=16)
    kind = engine.kind(zincblende("Si Si"), "bulk_modulus")
    return SimpleNamespace(engine=engine, kind=kind, bench=module._workbench(engine.pseudopotentials, 3))


def test_energy_parts_add_up(alone):
    for found in alone.values():
        energy = found.extra
        parts = energy.kinetic + energy.nonlocal_part + energy.density_part + energy.minus_ts
        assert float(energy.free) == pytest.approx(float(parts), abs=1e-12)
        assert energy.kinetic > 0 and energy.minus_ts == found.minus_ts <= 0


def test_occupations_hold_the_electrons(alone):
    for name, found in alone.items():
        electrons = sum(shipped().valence(s) for s in name.split())
        assert float((found.numbers.sum(axis=1) * [0.25, 0.75]).sum()) == pytest.approx(electrons, abs=1e-6)


def test_inverting_the_crystal_changes_nothing(alone):
    assert float(alone["P Al"].extra.free) == pytest.approx(float(alone["Al P"].extra.free), abs=1e-6)


@pytest.mark.slow
def test_a_crystal_does_not_feel_its_neighbours(alone, together):
    names = ["Li F", "V H", "Al P", "Si Si", "nothing", "B P"]
    problems = together.bench.problems(together.kind, [(n if " " in n else "Si Si").split() for n in names])
    problems.frac_coords[names.index("nothing")] = np.nan
    chosen = together.bench.solver(together.kind)
    assert chosen.lanes == 3
    seen = []
    found = chosen.solve(problems, solver.energies, progress=lambda done, busy: seen.append((done, busy)))
    assert seen[-1] == (len(names), 0) and max(busy for _, busy in seen) == 3
    assert sorted(done for done, _ in seen) == [done for done, _ in seen]
    for i, name in enumerate(names):
        if name in alone:
            assert float(found.extra.free[i]) == pytest.approx(float(alone[name].extra.free), abs=1e-6), name
            np.testing.assert_allclose(found.eigenvalues[i][:, :4], alone[name].eigenvalues[:, :4], atol=2e-5)
    expected = [name in alone for name in names]
    assert found.converged.tolist() == expected
    assert found.iterations[names.index("V H")] == 16
    backwards = chosen.solve(jax.tree.map(lambda x: x[::-1], problems), solver.energies)
    np.testing.assert_array_equal(backwards.converged[::-1], expected)
    np.testing.assert_allclose(backwards.extra.free[::-1][expected], found.extra.free[expected], atol=1e-8)
    np.testing.assert_array_equal(backwards.iterations[::-1], found.iterations)


@pytest.mark.slow
def test_crystals_that_do_not_converge_climb_and_leave_the_others_alone(together):
    names = ["Li F", "V H", "Al P", "nothing", "V H"]
    problems = together.bench.problems(together.kind, [(n if " " in n else "Si Si").split() for n in names])
    problems.frac_coords[names.index("nothing")] = np.nan
    chosen = together.bench.solver(together.kind)
    as_set = chosen.solve(problems, solver.energies)
    assert as_set.converged.tolist() == [True, False, True, False, False]
    more_steps = next(rung for rung in RUNGS if rung.name == "more steps")
    climbs = [Climb([FOOT, more_steps]) for _ in names]
    found = recovery.solve(chosen, problems, climbs, "bulk_modulus", solver.energies)
    assert found.converged.tolist() == [True, True, True, False, True]
    for before, after in zip(jax.tree.leaves(as_set), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(before[[0, 2]], after[[0, 2]])
    # The same settings converge too, in more steps than they were given.
    bench = Workbench(shipped(), 1)
    patient = solve(bench.solver(KIND), bench.problems(KIND, [["V", "H"]]))
    assert patient.iterations[0] > 16 and abs(as_set.extra.free[1] - patient.extra.free[0]) > 1e-5
    np.testing.assert_allclose(found.extra.free[[1, 4]], patient.extra.free[0], atol=1e-6)
    assert [climb.rung.name for climb in climbs] == ["as set", "more steps", "as set", "more steps", "more steps"]
    assert [len(climb.failed_attempts) for climb in climbs] == [0, 1, 0, 2, 1]


@pytest.mark.slow
def test_batches_through_the_engine(together, alone, as_user, monkeypatch):
    # Bands enough for all of them, so that they are of one kind.
    monkeypatch.setattr(kinds, "band_count", lambda electrons, share: 8)
    crystals = [zincblende(n) for n in ("Si Si", "V H", "Al P")]
    engine = dataclasses.replace(together.engine, ladder=("smaller mixing",))
    silicon, bad, phosphide = engine.compute_many(crystals, "bulk_modulus")
    assert bad.status == Status.NOT_CONVERGED and math.isnan(bad.value) and "16 iterations" in bad.message
    assert "rung" not in bad.details
    assert [tried["rung"] for tried in bad.details["failed_attempts"]] == ["as set", "smaller mixing"]
    assert silicon.status == phosphide.status == Status.OK
    assert silicon.value == pytest.approx(88.8, rel=0.08)  # published PBE
    for name, result in {"Si Si": silicon, "Al P": phosphide}.items():
        assert result.details["energies"][2] == pytest.approx(float(alone[name].extra.free) * Hartree, abs=3e-5)
        json.dumps(result.details, allow_nan=False)
        assert result.details["rung"] == "as set" and "failed_attempts" not in result.details


# Derivatives: whole stars of k-points, double precision, no symmetry


def whole_stars(points, weights, rotations):
    """All k-points that symmetry makes of some, one of each pair k and -k, with their share of the weight."""
    stars = []
    for point, weight in zip(points, weights, strict=True):
        images = {max(map(tuple, (k + 0.0, -k + 0.0))) for k in np.round(point @ rotations, 9)}
        stars += [(image, weight / len(images)) for image in sorted(images)]
    points, weights = zip(*stars, strict=True)
    return np.array(points), np.array(weights)


@pytest.fixture(scope="module")
def free_standing(double):
    """A solver without symmetry, and what it finds for AlP, ideal and distorted in many ways."""
    settings = dataclasses.replace(KIND.settings, double=True, tolerance=1e-14)
    ideal = np.array(KIND.lattice) / Bohr
    points = whole_stars(*reduce_points(mesh_points(KIND.mesh, KIND.shift), KIND.symmetry), KIND.symmetry.rotations)
    tables = tables_of("Al", "P")
    chosen = solver.Solver(make_basis(ideal, KIND.cutoff, *points), tables, settings, 1)
    rng = np.random.default_rng(0)
    lattice = ideal @ (np.eye(3) + np.array([[0.02, 0.01, 0], [0, -0.01, 0.015], [-0.01, 0, 0.01]]))
    positions = ZINCBLENDE + np.array([[0.01, -0.02, 0.015], [0, 0.01, -0.01]])
    move, strain = rng.normal(size=(2, 3)), rng.normal(size=(3, 3))
    strain, h = (strain + strain.T) / 2, 5e-4
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    shift = move @ np.linalg.inv(lattice)
    cases = {
        "ideal": (ideal, ZINCBLENDE, [0, 1]),
        "distorted": (lattice, positions, [0, 1]),
        "moved ahead": (lattice, positions + h * shift, [0, 1]),
        "moved back": (lattice, positions - h * shift, [0, 1]),
        "strained ahead": (lattice @ (np.eye(3) + h * strain), positions, [0, 1]),
        "strained back": (lattice @ (np.eye(3) - h * strain), positions, [0, 1]),
        "turned": (lattice @ turn, positions, [0, 1]),
        "permuted": (lattice, positions[::-1] + [1, 0, -2], [1, 0]),
        "inverted": (lattice, -positions, [0, 1]),
    }
    problems = Problem(*(np.stack(arrays) for arrays in zip(*cases.values(), strict=True)))
    found = solve(chosen, problems, solver.derivatives)
    rows = {name: jax.tree.map(lambda x, i=i: x[i], found.extra) for i, name in enumerate(cases)}
    return SimpleNamespace(
        **{name.replace(" ", "_"): row for name, row in rows.items()},
        lattice=lattice,
        turn=turn,
        move=move,
        strain=strain,
        h=h,
    )


@pytest.mark.slow
def test_reduced_k_points_and_single_precision_change_no_energy(free_standing, alone):
    assert float(free_standing.ideal.free) == pytest.approx(float(alone["Al P"].extra.free), abs=1e-6)


@pytest.mark.slow
def test_forces_are_the_slope_of_the_energy(free_standing):
    slope = (free_standing.moved_ahead.free - free_standing.moved_back.free) / (2 * free_standing.h)
    assert abs(slope) > 1e-3
    assert -np.vdot(free_standing.distorted.forces, free_standing.move) == pytest.approx(slope, abs=1e-5)


@pytest.mark.slow
def test_stress_is_the_slope_of_the_energy(free_standing):
    slope = (free_standing.strained_ahead.free - free_standing.strained_back.free) / (2 * free_standing.h)
    volume = abs(np.linalg.det(free_standing.lattice))
    assert abs(slope) > 1e-2
    assert volume * np.vdot(free_standing.distorted.stress, free_standing.strain) == pytest.approx(slope, abs=3e-5)


@pytest.mark.slow
def test_symmetry_forbids_forces_and_shear(free_standing):
    np.testing.assert_allclose(free_standing.ideal.forces, 0, atol=1e-5)
    stress = free_standing.ideal.stress
    np.testing.assert_allclose(stress, np.eye(3) * stress[0, 0], atol=1e-7)
    assert np.abs(free_standing.distorted.forces).max() > 1e-2


@pytest.mark.slow
def test_nothing_pushes_the_whole_crystal(free_standing):
    total = np.asarray(free_standing.distorted.forces).sum(axis=0)
    np.testing.assert_allclose(total, 0, atol=2e-4)  # exchange-correlation on points in space


@pytest.mark.slow
def test_a_turned_crystal_has_turned_forces(free_standing):
    first, second, turn = free_standing.distorted, free_standing.turned, free_standing.turn
    assert float(second.free) == pytest.approx(float(first.free), abs=1e-9)
    np.testing.assert_allclose(second.forces, first.forces @ turn, atol=1e-6)
    np.testing.assert_allclose(second.stress, turn.T @ first.stress @ turn, atol=1e-8)


@pytest.mark.slow
def test_the_order_of_sites_does_not_matter(free_standing):
    first, second = free_standing.distorted, free_standing.permuted
    assert float(second.free) == pytest.approx(float(first.free), abs=1e-9)
    np.testing.assert_allclose(second.forces, first.forces[::-1], atol=1e-6)


@pytest.mark.slow
def test_an_inverted_crystal_has_opposite_forces(free_standing):
    first, second = free_standing.distorted, free_standing.inverted
    assert float(second.free) == pytest.approx(float(first.free), abs=1e-9)
    np.testing.assert_allclose(second.forces, -first.forces, atol=1e-6)


# Relaxation on the host


def test_symmetrised_forces_and_stress():
    symmetry = find_symmetry(np.eye(3) * 4.0, PEROVSKITE, [0, 1, 2, 2, 2])
    rng = np.random.default_rng(0)
    arguments = symmetry.rotations, symmetry.translations, np.eye(3) * 7.5, PEROVSKITE
    forces, stress = symmetrise(*arguments, rng.normal(size=(5, 3)), np.diag([1.0, 2.0, 6.0]))
    np.testing.assert_allclose(forces, 0, atol=1e-12)
    np.testing.assert_allclose(stress, 3 * np.eye(3), atol=1e-12)


def test_symmetrising_leaves_symmetric_forces_alone():
    lattice, positions = QUARTZ.lattice.matrix / Bohr, QUARTZ.frac_coords
    symmetry = find_symmetry(QUARTZ.lattice.matrix, positions, QUARTZ.atomic_numbers)
    charges = np.array([4.0 if site.specie.symbol == "Si" else -2.0 for site in QUARTZ])

    def energy(strain, positions):
        strained = lattice @ (jnp.eye(3) + 0.5 * (strain + strain.T))
        return electrostatic(charges, ewald_sums(lattice), strained, positions)

    stress, slopes = jax.jit(jax.grad(energy, (0, 1)))(jnp.zeros((3, 3)), jnp.asarray(positions))
    forces = np.asarray(-slopes @ np.linalg.inv(lattice).T)
    assert np.abs(forces).max() > 0.1
    found = symmetrise(symmetry.rotations, symmetry.translations, lattice, positions, forces, np.asarray(stress))
    np.testing.assert_allclose(found[0], forces, atol=1e-6)
    np.testing.assert_allclose(found[1], stress, atol=1e-6)


def test_relaxation_of_a_spring_model():
    # One pair of springs and an elastic cell, of other stiffness than the first guess.
    best = np.eye(3) * 8.0
    path = Relaxation(np.eye(3) * 8.4, np.array([[0, 0, 0], [0.53, 0.5, 0.48]]))
    for _ in range(12):
        lattice, positions = path.lattice, path.frac_coords
        strain = lattice @ np.linalg.inv(best) - np.eye(3)
        forces = -0.25 * (positions - ROCKSALT) @ lattice
        path.step(forces, 0.004 * strain)
    np.testing.assert_allclose(path.lattice, best, atol=1e-3)
    np.testing.assert_allclose(path.frac_coords, ROCKSALT, atol=1e-3)


# Engine: bookkeeping


def test_is_a_small_picklable_batch_engine():
    engine = make_engine("planewave")
    assert isinstance(engine, BatchEngine)
    assert engine == PlanewaveEngine.preset("fast") == pickle.loads(pickle.dumps(engine))
    engine.preflight()


def test_presets():
    fields_of = {field.name for field in dataclasses.fields(PlanewaveEngine)}
    for name, settings in PRESETS.items():
        assert set(settings) <= fields_of
        engine = PlanewaveEngine.preset(name, band_gap_cutoff=33.0)
        assert engine.band_gap_cutoff == 33.0
        assert all(getattr(engine, key) == value for key, value in settings.items() if key != "band_gap_cutoff")
    with pytest.raises(ValueError, match="crystalgym, fast"):
        PlanewaveEngine.preset("precise")


@pytest.mark.parametrize(
    "setting", [{"symmetry": "all"}, {"modulus_at": "here"}, {"functional": "SCAN"}, {"ladder": ("x",)}]
)
def test_refuses_unknown_settings(setting):
    with pytest.raises(ValueError, match="choose"):
        PlanewaveEngine(**setting)


CHANGED = {
    "functional": "LDA",
    **{f"{name}_{what}": 17.0 for name in PROPERTIES for what in ("cutoff", "kppa", "width")},
    "sampling": "lattice",
    "shifted": False,
    "special_points": False,
    "symmetry": "crystal",
    "tolerance": 1e-5,
    "band_tolerance": 1e-2,
    "max_scf_iterations": 7,
    "ladder": ("smaller mixing",),
    "extra_bands": 0.5,
    "double": True,
    "total_energy": True,
    "eos_volumes": (0.9, 1.0, 1.1, 1.2),
    "eos_further": 2,
    "eos_same_waves": False,
    "eos_range": (0.7, 1.3),
    "modulus_at": "cell",
    "nstep": 9,
    "largest_force": 0.2,
    "largest_stress": 0.2,
    "min_distance_factor": 0.2,
    "min_distance": 0.1,
}


def test_fingerprint_follows_every_setting_of_its_property():
    others = {"name", "batch", "pseudopotentials", "kpoint_length"}
    assert set(CHANGED) | others == {field.name for field in dataclasses.fields(PlanewaveEngine)}
    before = {name: ENGINE.fingerprint(name) for name in PROPERTIES}
    assert json.loads(json.dumps(before)) == before
    special = {
        "special_points": "band_gap",
        "total_energy": "band_gap",
        "band_tolerance": "band_gap",
        "eos_same_waves": "bulk_modulus",
        "modulus_at": "bulk_modulus",
        "nstep": "density",
        "largest_force": "density",
    }
    special |= {
        "eos_further": "bulk_modulus",
        "eos_volumes": "bulk_modulus",
        "eos_range": "bulk_modulus",
        "largest_stress": "density",
    }
    for setting, value in CHANGED.items():
        changed = dataclasses.replace(ENGINE, **{setting: value})
        belongs = special.get(setting) or next((name for name in PROPERTIES if setting.startswith(name)), None)
        for name in PROPERTIES:
            differs = changed.fingerprint(name) != before[name]
            assert differs == (belongs in (None, name)), (setting, name)
    assert {name: dataclasses.replace(ENGINE, batch=5).fingerprint(name) for name in PROPERTIES} == before
    by_lattice = dataclasses.replace(ENGINE, sampling="lattice")
    for name in PROPERTIES:  # a length that counts for the lattice only
        assert dataclasses.replace(ENGINE, kpoint_length=9.0).fingerprint(name) == before[name]
        assert dataclasses.replace(by_lattice, kpoint_length=9.0).fingerprint(name) != by_lattice.fingerprint(name)
    smearing = dataclasses.replace(ENGINE, ladder=("smearing",), density_width=0.0)
    assert {name for name in PROPERTIES if "ladder" in smearing.fingerprint(name)} == {"density"}


def test_fingerprint_follows_the_table_of_cutoffs(monkeypatch):
    engine = PlanewaveEngine(band_gap_cutoff="mine")
    monkeypatch.setattr(module, "cutoff_table", lambda name: {"Si": 11.0, "P": 16.0})
    first = engine.fingerprint("band_gap")
    assert engine.cutoff(["Si", "P"], "band_gap") == 20.0  # the largest, in steps of 5 Ha
    with pytest.raises(ValueError, match="Al.*band_gap_cutoff"):
        engine.cutoff(["Si", "Al"], "band_gap")
    monkeypatch.setattr(module, "cutoff_table", lambda name: {"Si": 12.0, "P": 16.0})
    assert engine.fingerprint("band_gap") != first


def test_unknown_cutoffs_are_refused_with_the_choice():
    engine = dataclasses.replace(ENGINE, band_gap_cutoff="enormous")
    for call in (lambda: engine.fingerprint("band_gap"), lambda: engine.compute(zincblende("Si Si"), "band_gap")):
        with pytest.raises(ValueError, match="enormous.*tight, loose or a number"):
            call()


def test_unknown_property_is_the_callers_mistake():
    for call in (ENGINE.fingerprint, lambda name: ENGINE.compute(zincblende("Si Si"), name)):
        with pytest.raises(ValueError, match="band_gap"):
            call("colour")


def test_pseudopotentials_must_be_those_of_the_functional(tmp_path):
    with pytest.raises(EngineNotReady, match="PBE"):
        PlanewaveEngine(functional="LDA").preflight()
    with pytest.raises(EngineNotReady, match="no such folder"):
        PlanewaveEngine(pseudopotentials=str(tmp_path / "none")).preflight()


def test_refusals():
    odd, close, unknown = zincblende("Si Al"), zincblende("Si Si", 1.4), zincblende("Si U")
    assert ENGINE.refuse(odd, "band_gap").status == Status.ODD_ELECTRONS
    assert ENGINE.refuse(odd, "density") is None
    assert dataclasses.replace(ENGINE, density_width=0.0).refuse(odd, "density").status == Status.ODD_ELECTRONS
    refused = ENGINE.refuse(close, "density")
    assert refused.status == Status.ATOMS_TOO_CLOSE
    assert refused.details["distance"] == pytest.approx(1.4 * math.sqrt(3) / 4, abs=1e-6)
    refused = ENGINE.refuse(unknown, "bulk_modulus")
    assert refused.status == Status.UNSUPPORTED_ELEMENT and "U" in refused.message
    assert ENGINE.refuse(zincblende("Si Si"), "band_gap") is None


def test_kinds():
    crystals = [zincblende(*case) for case in (("Si Si",), ("Al P",), ("Al P", 5.5), ("Mg S",), ("Si Al",))]
    refused = {}
    groups = ENGINE.kinds(crystals, "band_gap", refused)
    assert list(groups.values()) == [[0, 1], [2], [3]]
    assert list(refused) == [4] and refused[4].status == Status.ODD_ELECTRONS
    kind = ENGINE.kind(crystals[0], "band_gap")
    assert kind.mesh == (2, 2, 2) and kind.shift == (1, 1, 1)
    assert len(kind.symmetry) == 24
    assert len(dataclasses.replace(ENGINE, symmetry="crystal").kind(crystals[0], "band_gap").symmetry) == 48
    assert ENGINE.kind(crystals[0], "bulk_modulus").stretch == 1
    same_cutoff = dataclasses.replace(ENGINE, eos_same_waves=False).kind(crystals[0], "bulk_modulus")
    assert same_cutoff.stretch == pytest.approx(1.02 ** (1 / 3))


def test_number_of_bands():
    for electrons, share in itertools.product(range(2, 80, 2), (0.0, 0.1, 0.5)):
        empty = kinds.band_count(electrons, share) - electrons // 2
        assert empty >= max(4, share * electrons // 2)
    assert kinds.band_count(8, 0.1) == 8 and kinds.band_count(10, 0.1) == 12


@pytest.mark.parametrize("batch", [0, 2])
def test_jobs_hold_every_crystal_once_and_the_largest_come_first(batch):
    crystals = [zincblende("Si Si") for _ in range(20)] + [zincblende("Mg S", 6.5), zincblende("Si U")]
    jobs = dataclasses.replace(ENGINE, batch=batch, band_gap_kppa=1.0).group(crystals, "band_gap")
    assert sorted(i for job in jobs for i in job) == list(range(22))
    assert [21] in jobs
    if batch == 0:
        assert max(map(len, jobs)) == 1
        assert jobs[0] == [20]
    else:
        assert max(map(len, jobs)) == 7 and len(jobs) == 5


# Engine: calculations


def test_many_are_as_one_by_one(as_user):
    crystals = [
        zincblende("Si Si"),
        zincblende("Si Al"),
        zincblende("Al P", 5.431),
        zincblende("Al P"),
        zincblende("Si Si", 1.4),
    ]
    together = ENGINE.compute_many(crystals, "band_gap")
    statuses = [Status.OK, Status.ODD_ELECTRONS, Status.OK, Status.OK, Status.ATOMS_TOO_CLOSE]
    assert [result.status for result in together] == statuses
    for crystal, result in zip(crystals, together, strict=True):
        single = ENGINE.compute(crystal, "band_gap")
        np.testing.assert_allclose(single.value, result.value, atol=1e-6)
        assert single.details.keys() == result.details.keys()
        json.dumps(result.details, allow_nan=False)
    assert jnp.zeros(1).dtype == jnp.float32  # the user's precision is as it was

    silicon, phosphide = together[0], together[3]
    # published PBE gaps of silicon at this lattice: 0.71 eV to X, 2.56 eV at Gamma
    assert silicon.value == pytest.approx(0.71, abs=0.1)
    assert silicon.details["direct_gap"] == pytest.approx(2.56, abs=0.1)
    assert silicon.details["irreducible_kpoints"] == 2 and silicon.details["cutoff"] == 10.0
    assert silicon.seconds > 0
    assert 1.2 < phosphide.value < 2.0  # published PBE: 1.6 eV


@pytest.mark.slow
def test_relaxed_cell_is_the_minimum_of_the_energy(as_user, together):
    density = ENGINE.compute(zincblende("Si Si"), "density")
    assert density.status == Status.OK and density.details["relaxed"]
    assert abs(density.details["pressure"]) < ENGINE.largest_stress
    lattice = np.array(density.details["lattice"])
    metric = lattice @ lattice.T
    np.testing.assert_allclose(metric, metric[0, 0] * (np.eye(3) + 1) / 2, rtol=1e-6)  # still fcc
    volume = abs(np.linalg.det(lattice))
    assert density.value == pytest.approx(2 * atomic_masses[14] / volume * AMU_PER_A3, rel=1e-9)
    energies = together.engine.compute(zincblende("Si Si"), "bulk_modulus")
    # The given cell is small: its gap comes with the pressure that E(V) has, with the same plane waves, and more.
    gap = ENGINE.compute(zincblende("Si Si"), "band_gap").details
    held = gap["pressure"] - gap["pulay_pressure"]
    assert held == pytest.approx(energies.details["pressure_at_cell"], abs=0.2)
    assert held > 1.5
    # At 30 Ha, where there is no Pulay pressure to speak of, it is 2.4 GPa.
    assert gap["pulay_pressure"] == pytest.approx(2.42 - held, rel=caveats.PULAY_MARGIN)
    assert volume == pytest.approx(energies.details["v0"], rel=3e-3)
    assert volume > 1.01 * abs(np.linalg.det(FCC * 5.43))


def test_plane_waves_of_other_k_points_are_found_in_the_mesh():
    lattice = np.array(KIND.lattice) / Bohr
    mesh, other = (
        make_basis(lattice, 8.0, *reduce_points(points, KIND.symmetry), KIND.symmetry)
        for points in (mesh_points([2, 2, 2], [1, 1, 1]), half_points())
    )
    nearest, columns = nearest_waves(mesh, other)
    assert nearest.shape == (other.n_kpoints,) and columns.shape == other.valid.shape
    for k, (row, found) in enumerate(zip(nearest, columns, strict=True)):
        there = np.asarray(other.valid[k]) & (found < mesh.n_waves)
        assert there.sum() > 0.8 * np.asarray(other.valid[k]).sum()
        assert np.all(np.asarray(mesh.valid)[row, found[there]])
        step = (other.millers[k][there] + other.kpoints[k]) - (mesh.millers[row][found[there]] + mesh.kpoints[row])
        np.testing.assert_allclose(step, np.broadcast_to(step[0], step.shape), atol=1e-12)
        assert np.abs(step[0]).max() <= 0.5


def test_bands_at_the_points_of_the_mesh_are_those_of_the_scf():
    bench = Workbench(shipped(), 1)
    chosen = bench.solver(KIND)
    basis = chosen.basis
    problems = bench.problems(KIND, [["Al", "P"]])
    extra = solver.ExtraPoints(basis, *nearest_waves(basis, basis))
    found = jax.tree.map(np.asarray, chosen.solve(problems, solver.bands_at, extra))
    assert found.converged.all() and float(found.extra.residual[0]) <= KIND.settings.band_tolerance
    np.testing.assert_allclose(found.extra.eigenvalues[0][:, :5], found.eigenvalues[0][:, :5], atol=2e-5)
    # A point that only fills up the array is not calculated, and changes no other.
    fewer = extra.basis.replace(valid=extra.basis.valid.at[1:].set(False))
    fewer = solver.ExtraPoints(fewer, extra.nearest, extra.waves)
    assert extra.used.all() and fewer.used.tolist() == [True, False]
    part = jax.tree.map(np.asarray, chosen.solve(problems, solver.bands_at, fewer))
    np.testing.assert_array_equal(part.extra.eigenvalues[0][0], found.extra.eigenvalues[0][0])
    assert not part.extra.eigenvalues[0][1].any() and 0 < part.extra.residual[0] <= found.extra.residual[0]


@pytest.mark.slow
def test_sodium_chloride_has_the_energy_of_pwx():
    # pw.x 6.7 with the same pseudopotentials, k-points and cut-off.
    engine = PlanewaveEngine(band_gap_cutoff=40.0, band_gap_kppa=20.0, shifted=True)
    crystal = zincblende("Na Cl", 5.64, ROCKSALT)
    kind = engine.kind(crystal, "band_gap")
    assert kind.mesh == (2, 2, 2) and len(kind.symmetry) == 48
    bench = Workbench(shipped(), 1)
    found = solve(bench.solver(kind), bench.problems(kind, [["Na", "Cl"]]))
    assert float(found.extra.free[0]) == pytest.approx(-62.24637054, abs=2e-6)
    bands = found.eigenvalues[0] * Hartree
    assert bands[:, 8].min() - bands[:, 7].max() == pytest.approx(6.7123, abs=1e-3)


# Interfaces of the solver that only batches use


def test_lanes_follow_the_memory():
    points = reduce_points(mesh_points(KIND.mesh, KIND.shift), KIND.symmetry)
    basis, tables = make_basis(np.array(KIND.lattice) / Bohr, KIND.cutoff, *points, KIND.symmetry), tables_of("Al", "P")
    one = kinds.bytes_of_crystal(basis, tables, KIND.settings, 2)
    assert one > 2 * 8 * 412 * 8 * 2  # more than its wave functions
    counts = [kinds.lanes_for(basis, tables, KIND.settings, 2, n * one) for n in (0, 2, 16, 10**9)]
    assert counts[0] == 1 and counts[1] == 1 and counts[2] == 8 and counts[3] < 10**4


def test_random_waves_are_the_same_every_time():
    points = reduce_points(mesh_points([2, 2, 2], [1, 1, 1]), KIND.symmetry)
    basis = make_basis(np.array(KIND.lattice) / Bohr, 4.0, *points, KIND.symmetry)
    first, second = (scf.random_waves(basis, ScfSettings(bands=8)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.dtype == np.complex64
    assert not np.asarray(first)[np.broadcast_to(~np.asarray(basis.valid)[:, None], first.shape)].any()


# What an SCF starts from


def without_orbitals(symbols):
    """The shipped pseudopotentials, but files of these elements that have no atomic orbitals."""
    none = {"orbital_momenta": np.zeros(0, int), "orbital_energies": np.zeros(0), "orbitals": np.zeros((0, 801))}
    tables = {s: dataclasses.replace(t, **(none if s in symbols else {})) for s, t in shipped().tables.items()}
    return PseudoSet("without", tables)


def converged_and_guess(symbols, pseudopotentials):
    """What the solver finds for a crystal on the skeleton of :data:`KIND`, and the waves that it starts from."""
    bench = Workbench(pseudopotentials, 1)
    chosen, problems = bench.solver(KIND), bench.problems(KIND, [symbols])
    noise = scf.random_waves(chosen.basis, chosen.settings)
    guess = solver._guess(chosen.basis, chosen.tables, chosen.settings, problems, noise)
    return chosen.solve(problems, solver.energies, keep=True), jax.tree.map(lambda x: x[0], guess), chosen


def overlap(guess, found):
    """Share of the occupied waves of a converged crystal that lies in the space of the guess, the worst wave's."""
    space, occupied = scf.final_waves(guess.waves), scf.final_waves(found.guess.waves[0])[:, :4]
    inside = jnp.einsum("kbp,kop->kbo", space.conj(), occupied)
    return float((jnp.abs(inside) ** 2).sum(axis=1).min())


def test_atomic_orbitals_hold_most_of_the_occupied_waves():
    found, guess, chosen = converged_and_guess(["Al", "P"], shipped())
    again, random, _ = converged_and_guess(["Al", "P"], without_orbitals(["Al", "P"]))
    assert found.converged.all() and again.converged.all()
    assert int(guess.warm_up) == 0 and int(random.warm_up) == chosen.settings.warm_up
    assert overlap(guess, found) > 0.93 > 0.6 > overlap(random, found)
    # The same crystal, sooner.
    assert int(found.iterations[0]) <= 0.7 * int(again.iterations[0])
    assert float(found.extra.free[0]) == pytest.approx(float(again.extra.free[0]), abs=2e-7)


def test_random_waves_stand_in_for_the_orbitals_that_a_file_lacks(alone):
    # One element of two without orbitals, and files of which none has any.
    found, guess, chosen = converged_and_guess(["Al", "P"], without_orbitals(["P"]))
    assert found.converged.all() and int(guess.warm_up) == 3
    assert float(found.extra.free[0]) == pytest.approx(float(alone["Al P"].extra.free), abs=2e-7)
    bare = tables_of("Al", "P").replace(orbital_channels=(), orbitals=jnp.zeros((2, 0, 801)))
    bare = bare.replace(orbital_energies=jnp.zeros((2, 0)))
    problem = Problem(np.array(KIND.lattice) / Bohr, ZINCBLENDE, np.array([0, 1]))
    noise = scf.random_waves(chosen.basis, chosen.settings)
    none = jax.jit(lambda problem: scf.atomic_guess(chosen.basis, bare, chosen.settings, problem, noise))(problem)
    np.testing.assert_allclose(none.waves, noise, atol=1e-7)
    assert int(none.warm_up) == 3


def test_hueckel_bonds_before_it_binds_against():
    """Two equal orbitals of overlap S: levels e (1 + 1.75 S) / (1 + S) and e (1 - 1.75 S) / (1 - S)."""
    s = 0.4
    orbitals = jnp.array([[1.0, 0.0], [s, math.sqrt(1 - s * s)], [0.0, 0.0]]) + 0j
    combined = np.asarray(eigensolver.hueckel(orbitals, jnp.array([-0.5, -0.5, 0.0])))
    bonding, antibonding, missing = combined
    assert bonding[0] / bonding[1] == pytest.approx(1, abs=1e-6)
    assert antibonding[0] / antibonding[1] == pytest.approx(-1, abs=1e-6)
    np.testing.assert_allclose(np.abs(missing)[:2], 0, atol=1e-9)


def test_a_crystal_that_starts_from_itself_is_done_at_once():
    found, _, chosen = converged_and_guess(["Al", "P"], shipped())
    problems = Workbench(shipped(), 1).problems(KIND, [["Al", "P"]])
    again = chosen.solve(problems, solver.energies, guesses=[found.guess_of(0)])
    assert again.converged.all() and int(again.iterations[0]) <= 2
    assert float(again.extra.free[0]) == pytest.approx(float(found.extra.free[0]), abs=1e-8)


@pytest.mark.slow
def test_volumes_start_from_the_middle_one(together):
    kind, bench = together.kind, together.bench
    names, scales = [["Li", "F"], ["Al", "P"], ["Si", "Si"]], together.engine.eos_volumes
    found = energies_of_volumes(bench, kind, names, scales)
    cold = solve(bench.solver(kind), bench.problems(kind, names, scales))
    energies, steps = cold.extra.free.reshape(3, -1), cold.iterations.reshape(3, -1)
    for i, volumes in enumerate(found):
        np.testing.assert_allclose(volumes.energies / Hartree, energies[i], atol=5e-7)
        assert volumes.converged and volumes.iterations < steps[i].sum()
    assert sum(volumes.iterations for volumes in found) < 0.85 * steps.sum()
    backwards = energies_of_volumes(bench, kind, names[::-1], scales)[::-1]
    for volumes, others in zip(found, backwards, strict=True):
        np.testing.assert_allclose(volumes.energies, others.energies, atol=1e-7 * Hartree)


@pytest.mark.slow
def test_an_scf_that_fails_from_a_guess_starts_again_from_the_atoms(together):
    chosen, names = together.bench.solver(together.kind), [["Li", "F"], ["Al", "P"], ["Si", "Si"]]
    problems = together.bench.problems(together.kind, names)
    first = chosen.solve(problems, solver.energies, keep=True)
    spoilt = first.guess_of(1).replace(waves=np.full_like(first.guess_of(1).waves, np.nan))
    climbs = [Climb([FOOT]) for _ in names]
    guesses = [first.guess_of(0), spoilt, first.guess_of(2)]
    found = recovery.solve(chosen, problems, climbs, "density", solver.energies, guesses=guesses)
    assert found.converged.all() and not any(climb.failed_attempts for climb in climbs)
    assert found.iterations[1] == first.iterations[1] and max(found.iterations[[0, 2]]) <= 2
    np.testing.assert_allclose(found.extra.free, first.extra.free, atol=2e-7)


def differentiated(basis, tables, settings, lane, extra=None):
    """The slope of :func:`solver.compression` from the energy itself."""
    problem, state = lane.problem, lane.state
    waves = scf.final_waves(state.waves)

    def energy(strain):
        scaled = problem.replace(lattice=problem.lattice * jnp.exp(strain / 3))
        return scf.total_energy(basis, tables, settings, scaled, waves, state.numbers, state.minus_ts).free

    return jax.jvp(energy, (jnp.zeros(()),), (jnp.ones(()),))[1]


def test_the_slope_by_the_volume_is_that_of_the_energy():
    bench, kind = Workbench(shipped(), 1), KIND
    problems = bench.problems(kind, [["Ga", "P"]])  # with a core and d electrons
    found = bench.solver(kind).solve(problems, differentiated, besides=solver.compression)
    assert found.converged.all() and abs(float(found.extra[0])) > 1e-3
    # 1e-10 Ha are 1e-8 GPa in this cell
    assert float(found.besides.slope[0]) == pytest.approx(float(found.extra[0]), abs=1e-10)


# How programs are compiled


def test_assignments_of_a_skeleton_have_few_programs():
    """Kinds differ in symmetry, k-points and settings; a program is compiled for the shapes of their arrays."""
    engine, skeleton = PlanewaveEngine(**PRESETS["fast"]), library.benchmark("C2")
    rng, found = np.random.default_rng(0), set()
    while len(found) < 64:
        numbers = [atomic_numbers[s] for s in rng.choice(MEDIUM.symbols, len(skeleton.frac_coords))]
        crystal = Crystal(np.array(skeleton.lattice), np.array(skeleton.frac_coords), np.array(numbers))
        if engine.refuse(crystal, "band_gap") is None:
            found.add((tuple(numbers), engine.kind(crystal, "band_gap")))
    distinct = {kind for _, kind in found}
    bench = Workbench(shipped(), 1)
    assert len(distinct) > 15
    assert len({bench.programs(kind, special=True) for kind in distinct}) <= 8


def test_an_xla_without_the_quick_options_compiles_as_it_does(monkeypatch):
    assert solver.quick_options.__wrapped__() in (None, {"xla_cpu_use_fusion_emitters": False})
    refused, jit = [], jax.jit

    def old_xla(function, compiler_options=None, **settings):
        refused.append(compiler_options)
        return jit(function, compiler_options=compiler_options and {"xla_no_such_option": True}, **settings)

    monkeypatch.setattr(jax, "jit", old_xla)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert solver.quick_options.__wrapped__() is None and refused == [{"xla_cpu_use_fusion_emitters": False}]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert solver.quick_options.__wrapped__() is None and len(refused) == 1
