"""CHGNet in JAX: the authors' answers, what must not change them, and the surrogate made of it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase.data import atomic_numbers
from ase.units import GPa

import crystaljax
from crystaljax.agents.chgnet.evaluator import FITTED, CHGNetEvaluator, birch_murnaghan, solve
from crystaljax.agents.chgnet.geometry import at_scale, cells_of, find_neighbours, measure, stack_neighbours
from crystaljax.agents.chgnet.model import CHGNet
from crystaljax.agents.chgnet.weights import pretrained
from crystaljax.agents.networks import count_parameters
from crystaljax.dft_bridge.engines.equation_of_state import fit_murnaghan
from crystaljax.elements import masses
from crystaljax.evaluators import AVOGADRO, Problem
from crystaljax.library import benchmark, rocksalt
from crystaljax.status import Status

CRYSTALS = json.loads((Path(__file__).parent / "fixtures" / "chgnet.json").read_text())
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiles in half the time."""


def numbers_of(symbols):
    return jnp.array([atomic_numbers[symbol] for symbol in symbols])


def plain_energy(numbers, cell, scale=1.0):
    return CHGNet().apply({"params": pretrained()}, numbers, at_scale(cell, scale))


energy = quick_jit(plain_energy)


@pytest.fixture(scope="module")
def antiperovskite():
    """C7, Yb3SnO, with its neighbours."""
    skeleton = benchmark("C7")
    return numbers_of(skeleton.species), find_neighbours(skeleton.lattice, skeleton.frac_coords)


def test_energies_forces_and_stresses_are_those_of_the_authors_model():
    cells = stack_neighbours([find_neighbours(np.array(c["lattice"]), np.array(c["frac_coords"])) for c in CRYSTALS])
    sites = cells.sites.shape[1]
    numbers = np.array([np.pad(c["numbers"], (0, sites - len(c["numbers"]))) for c in CRYSTALS])

    def deformed(strain, shifts, numbers, cell):
        lattice = cell.lattice @ (jnp.eye(3) + strain)
        geometry = measure(cell, cell.frac_coords @ lattice + shifts, lattice)
        return CHGNet().apply({"params": pretrained()}, numbers, geometry)

    def answer(given):
        still = jnp.zeros((3, 3)), jnp.zeros((sites, 3))
        energy, (stress, forces) = jax.value_and_grad(deformed, (0, 1))(*still, *given)
        return energy, -forces, stress / jnp.abs(jnp.linalg.det(given[1].lattice)) / GPa

    found = quick_jit(partial(jax.lax.map, answer))((numbers, jax.tree.map(jnp.asarray, cells)))
    for crystal, energy, forces, stress in zip(CRYSTALS, *map(np.asarray, found), strict=True):
        own = len(crystal["numbers"])
        assert abs(energy / own - crystal["energy"]) < 1e-5
        np.testing.assert_allclose(forces[:own], crystal["forces"], atol=1e-4)
        np.testing.assert_allclose(stress, crystal["stress"], atol=2e-3)
        assert not forces[own:].any(), "padding feels no force"
    assert len(CRYSTALS) == 20 and max(np.abs(c["forces"]).max() for c in CRYSTALS) > 1.0, "some are far from rest"


def test_the_shipped_weights_are_those_of_the_model(antiperovskite):
    numbers, cell = antiperovskite
    shapes = jax.eval_shape(CHGNet().init, jax.random.key(0), numbers, at_scale(cell))["params"]
    assert jax.tree.map(jnp.shape, pretrained()) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    # All of the original's but its last angle update (two layers 256 x 64, two norms) and its magnetic moments.
    assert count_parameters(pretrained()) == 412_525 - 2 * (256 * 64 + 64 + 128) - 65


def test_names_and_choice_of_the_cell_change_nothing(antiperovskite):
    numbers, _ = antiperovskite
    skeleton = benchmark("C7")
    lattice, sites = skeleton.lattice, skeleton.frac_coords
    expected = float(energy(numbers, find_neighbours(lattice, sites)))
    order = np.random.default_rng(0).permutation(len(sites))
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    same = {
        "other order": (numbers[order], find_neighbours(lattice, sites[order])),
        "other origin": (numbers, find_neighbours(lattice, sites + [0.3, -0.2, 5.1])),
        "turned": (numbers, find_neighbours(lattice @ turn, sites)),
        "longer list": (numbers, find_neighbours(lattice, sites, shrink=0.9)),
    }
    for name, (numbers_, cell) in same.items():
        assert float(energy(numbers_, cell)) == pytest.approx(expected, abs=5e-5), name
    double = np.concatenate([sites * [0.5, 1, 1], sites * [0.5, 1, 1] + [0.5, 0, 0]])
    cell = find_neighbours(lattice * [[2], [1], [1]], double)
    assert float(energy(jnp.tile(numbers, 2), cell)) == pytest.approx(2 * expected, abs=1e-4)


def test_batches_are_single_crystals(antiperovskite):
    numbers, cell = antiperovskite
    scales = jnp.array([0.95, 1.0, 1.08])
    together = quick_jit(jax.vmap(plain_energy, (None, None, 0)))(numbers, cell, scales)
    np.testing.assert_allclose(together, [energy(numbers, cell, scale) for scale in scales], atol=2e-5)


def test_a_list_for_a_shrunken_cell_is_complete(antiperovskite):
    numbers, _ = antiperovskite
    skeleton = benchmark("C7")
    direct = find_neighbours(skeleton.lattice * 0.85, skeleton.frac_coords)
    shrunken = find_neighbours(skeleton.lattice, skeleton.frac_coords, shrink=0.85)
    assert float(energy(numbers, shrunken, 0.85)) == pytest.approx(float(energy(numbers, direct)), abs=5e-5)


def test_a_site_without_neighbours_is_refused():
    with pytest.raises(ValueError, match="site 0 has no neighbour within 6 Å"):
        find_neighbours(7.0 * np.eye(3), np.zeros((1, 3)))


def test_bonds_are_seen_from_both_ends():
    cell = find_neighbours(rocksalt().lattice, rocksalt().frac_coords)
    near = cell.reverse.shape[1]
    for start in range(2 * near):
        (i, k), (j, back) = divmod(start, near), divmod(int(cell.reverse.flat[start]), near)
        assert (cell.sites[i, k], cell.sites[j, back]) == (j, i)
        np.testing.assert_array_equal(cell.images[i, k], -cell.images[j, back])


def test_the_fit_finds_the_equation_of_state_that_made_the_energies():
    """E(V) of Birch and Murnaghan itself, V0 = 1.02, B0 V = 9 eV, B' = 4.6."""
    eta = (1.02 / FITTED) ** (2 / 3) - 1
    energies = 9 / 8 * 9.0 * 1.02 * eta**2 * (1 + (4.6 - 4) / 2 * eta)
    volume, modulus = birch_murnaghan(jnp.asarray(energies - 30.0, jnp.float32))
    assert float(volume) == pytest.approx(1.02, abs=1e-3) and float(modulus) == pytest.approx(9.0 * 1.02, rel=2e-2)
    assert np.isnan(birch_murnaghan(jnp.asarray(-energies, jnp.float32))[0])


@pytest.fixture(scope="module")
def salt_query():
    """Densities of rocksalts in the cell of NaCl, jitted once for two lanes."""
    bound = CHGNetEvaluator().bind(Problem((rocksalt(),), "density"))
    return bound, quick_jit(jax.vmap(bound.query))


def test_the_surrogate_of_salt(salt_query):
    """NaCl at its equation of state: PBE has 5.69 Å and 24 GPa."""
    skeleton, numbers = rocksalt(), numbers_of(["Na", "Cl"])
    density, modulus = map(float, quick_jit(solve)(numbers, cells_of((skeleton,), 0.84).row(jnp.int32(0))))
    assert density == pytest.approx(4 * (22.99 + 35.45) / 5.69**3 / AVOGADRO, rel=0.02)
    volume = float(masses()[np.array(numbers)].sum()) / density / AVOGADRO
    volumes = volume * np.linspace(0.95, 1.05, 9)
    cell = find_neighbours(skeleton.lattice, skeleton.frac_coords, shrink=0.9)
    fit = fit_murnaghan(volumes, [float(energy(numbers, cell, (v / skeleton.volume) ** (1 / 3))) for v in volumes])
    assert fit.v0 == pytest.approx(volume, rel=0.005)
    assert modulus == pytest.approx(fit.b0 / GPa, rel=0.05) and 20 < modulus < 32


def test_only_pending_lanes_are_evaluated(salt_query):
    bound, query = salt_query
    assert bound.label.startswith("surrogate: CHGNet")
    numbers, skeletons = jnp.stack([numbers_of(["Na", "Cl"])] * 2), jnp.zeros(2, jnp.int32)
    values, statuses = query(numbers, skeletons, jnp.array([False, True]))
    assert (values[0], statuses[0]) == (0.0, Status.OK) and (values[1] > 1.5, statuses[1]) == (True, Status.OK)


def test_failures_have_their_status(salt_query):
    _, query = salt_query
    # MgO wants two fifths of this cell's volume; CHGNet knows no curium.
    numbers = jnp.stack([numbers_of(["Mg", "O"]), numbers_of(["Cm", "O"])])
    _, statuses = query(numbers, jnp.zeros(2, jnp.int32), jnp.array([True, True]))
    assert statuses.tolist() == [Status.FIT_MEANINGLESS, Status.UNSUPPORTED_ELEMENT]


def test_the_surrogate_has_a_name_and_no_band_gap():
    with pytest.raises(ValueError, match="surrogate: CHGNet.* not band_gap"):
        crystaljax.make("BandGap-C1-v0", "chgnet")
    assert crystaljax.make("BulkModulus-C1-v0", "chgnet")[0].evaluator.label.startswith("surrogate")
