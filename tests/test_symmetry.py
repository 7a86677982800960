"""The site-permutation group, orbits and the canonical form."""

from __future__ import annotations

import itertools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crystaljax import library, symmetry
from crystaljax.skeleton import Skeleton, stack

canonical = jax.jit(symmetry.canonical)
canonical_all = jax.jit(jax.vmap(symmetry.canonical, (0, None)))
ALL = (*library.BENCHMARK_ROWS, "PerovskiteABX3", "RocksaltAB")


@pytest.mark.parametrize("name", ALL)
def test_permutations_are_a_group(name: str) -> None:
    group = {tuple(p) for p in library.crystals(name)[0].permutations}
    assert tuple(range(len(next(iter(group))))) in group
    for p, q in itertools.product(group, repeat=2):
        assert tuple(p[i] for i in q) in group


def grid(count: int) -> np.ndarray:
    """[count^3, 3]: simple cubic sites."""
    return np.stack(np.meshgrid(*[np.arange(count) / count] * 3, indexing="ij"), -1).reshape(-1, 3)


def test_a_supercell_has_the_operations_of_its_sites_in_bounded_memory() -> None:
    tracemalloc.start()
    permutations = symmetry.site_permutations(np.eye(3) * 12.0, grid(4))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 20e6  # [P, N, N, 3] numbers are 300 MB
    assert permutations.shape == (48 * 64, 64) and (permutations[0] == np.arange(64)).all()
    # Each keeps distances between nearest neighbours, which a cubic lattice has six of.
    offsets = grid(4)[:, None] - grid(4)[None]
    near = np.linalg.norm(offsets - np.round(offsets), axis=-1) < 0.26
    assert (near.sum(axis=1) == 7).all()
    for p in permutations[::97]:
        assert (near[p][:, p] == near).all()


@pytest.mark.parametrize("name", ["C1", "C5", "PerovskiteABX3"])
def test_permutations_do_not_depend_on_the_shape_of_the_cell(name: str) -> None:
    first = library.crystals(name)[0]
    slanted = np.array([[1, 0, 0], [7, 1, 0], [-5, 9, 1]])
    coords = first.frac_coords @ np.linalg.inv(slanted) + np.array([0.3, -1e-17, 2.0])
    assert (symmetry.site_permutations(slanted @ first.lattice, coords) == first.permutations).all()


@pytest.mark.parametrize("name", ["C1", "C2", "C7", "PerovskiteABX3"])
def test_perovskites_have_369360_distinct_labelings_of_18_to_the_5(name: str) -> None:
    assert symmetry.count_distinct(library.crystals(name)[0].permutations, 18) == 369_360


def test_canonical_forms_of_all_perovskite_labelings_are_as_many_as_burnside_says() -> None:
    permutations = library.perovskite().permutations
    labels = np.stack(np.meshgrid(*[np.arange(18, dtype=np.int8)] * 5, indexing="ij"), -1).reshape(-1, 5)
    forms = canonical_all(jnp.asarray(labels), permutations)
    codes = np.asarray(forms, dtype=np.int64) @ 18 ** np.arange(5)
    assert len(labels) == 18**5
    assert len(np.unique(codes)) == 369_360


def test_rocksalt_has_171_distinct_pairs() -> None:
    assert symmetry.count_distinct(library.rocksalt().permutations, 18) == 171


@pytest.mark.parametrize("name", ALL)
def test_equivalent_labelings_share_a_canonical_form(name: str) -> None:
    skeleton = library.crystals(name)[0]
    permutations = skeleton.permutations
    random = np.random.default_rng(0)
    for _ in range(20):
        labels = random.integers(0, 4, skeleton.n_sites)
        forms = np.asarray(canonical_all(jnp.asarray(labels[permutations]), permutations))
        assert (forms == forms[0]).all()
        assert sorted(forms[0]) == sorted(labels)
        assert tuple(forms[0]) == min(map(tuple, labels[permutations]))


def test_canonical_form_is_idempotent_and_ignores_padding() -> None:
    table = stack(library.crystals("Mixed"))
    random = np.random.default_rng(1)
    for row, skeleton in enumerate(library.crystals("Mixed")):
        labels = np.zeros(8, int)
        labels[: skeleton.n_sites] = random.integers(1, 9, skeleton.n_sites)
        padded = canonical(jnp.asarray(labels), table.permutations[row])
        alone = canonical(jnp.asarray(labels[: skeleton.n_sites]), skeleton.permutations)
        assert (padded[: skeleton.n_sites] == alone).all()
        assert (padded[skeleton.n_sites :] == 0).all()
        assert (canonical(padded, table.permutations[row]) == padded).all()


def test_orbits_respect_the_prototype_colours() -> None:
    assert library.perovskite().orbits.tolist() == [0, 1, 2, 2, 2]
    assert library.rocksalt().orbits.tolist() == [0, 1]
    assert library.benchmark("C5").orbits.max() + 1 == 3  # a Heusler crystal is XYZ2


def test_permutations_do_not_depend_on_the_choice_of_axes_or_origin() -> None:
    first = library.perovskite()
    swap = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    moved = Skeleton("moved", swap @ first.lattice, (first.frac_coords @ swap.T + 0.37) % 1.0, first.species)
    assert {tuple(p) for p in moved.permutations} == {tuple(p) for p in first.permutations}
