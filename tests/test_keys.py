"""Keys: one per crystal however it is described, another for every other crystal, property or setting."""

from __future__ import annotations

import itertools
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from crystaljax import library, structures
from crystaljax.dft_bridge import keys as keys_module
from crystaljax.dft_bridge.engines.base import Crystal
from crystaljax.dft_bridge.keys import KeyRing, Keys, Request
from crystaljax.dft_bridge.standard_form import LENGTH_BIN, RATIO_BIN, standard_form
from crystaljax.skeleton import Skeleton
from crystaljax.symmetry import canonical_numbers

ELEMENTS = np.array([3, 11, 8, 17, 26, 82])
FINGERPRINT = {"engine": "fake", "version": "1.0", "cutoff": 400.0}
HEXAGONAL = Skeleton(
    "wurtzite",
    np.array([[3.25, 0, 0], [-1.625, 3.25 * np.sqrt(0.75), 0], [0, 0, 5.207]]),
    np.array([[1 / 3, 2 / 3, 0], [2 / 3, 1 / 3, 0.5], [1 / 3, 2 / 3, 0.382], [2 / 3, 1 / 3, 0.882]]),
    ("Zn", "Zn", "O", "O"),
)
TRICLINIC = Skeleton(
    "triclinic",
    np.array([[5.1, 0, 0], [0.7, 5.6, 0], [-0.9, 1.3, 6.2]]),
    np.array([[0.1, 0.2, 0.3], [0.4, 0.75, 0.62], [0.85, 0.35, 0.9]]),
    ("Na", "Cl", "O"),
)
ENANTIOMORPH = Skeleton(
    "quartz's silicon", HEXAGONAL.lattice, np.array([[0.47, 0, 0], [0, 0.47, 2 / 3], [0.53, 0.53, 1 / 3]]), ("Si",) * 3
)
BENCHMARKS = [library.benchmark(f"C{i}") for i in range(1, 8)]
SKELETONS = [*BENCHMARKS, library.perovskite(), library.rocksalt(), HEXAGONAL, TRICLINIC, ENANTIOMORPH]

shears = st.lists(st.tuples(st.permutations(range(3)), st.integers(-2, 2)), max_size=4)
rotations = st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 0.1)
fractions = st.lists(st.floats(-1, 1), min_size=3, max_size=3)


def key(skeleton, numbers, fingerprint=FINGERPRINT, property_name="band_gap"):
    request = Request.of(skeleton, numbers, property_name)
    return Keys(skeleton, property_name, fingerprint).key(request.numbers)


def described(skeleton, steps=(), quaternion=(0, 0, 0, 1), shift=(0, 0, 0), order=None, mirror=False, noise=None):
    """The same skeleton in other words."""
    change = np.eye(3)
    for (row, other, _), factor in steps:
        change[row] += factor * change[other]
    axes = Rotation.from_quat(quaternion).as_matrix() * (-1 if mirror else 1)
    order = np.arange(skeleton.n_sites) if order is None else np.asarray(order)
    lattice = change @ skeleton.lattice @ axes
    sites = ((skeleton.frac_coords + shift) @ np.linalg.inv(change))[order] % 1.0
    if noise is not None:
        lattice = lattice + noise.uniform(-1, 1, (3, 3)) * 1e-7 / 3
        sites = sites + noise.uniform(-1, 1, sites.shape) * 1e-7 / 3 @ np.linalg.inv(lattice)
    return Skeleton("again", lattice, sites, tuple(skeleton.species[i] for i in order)), order


@pytest.mark.parametrize("skeleton", SKELETONS, ids=lambda s: s.name)
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_other_words_for_a_crystal_give_the_same_key(skeleton, data):
    numbers = np.array(
        data.draw(st.lists(st.sampled_from(ELEMENTS), min_size=skeleton.n_sites, max_size=skeleton.n_sites))
    )
    again, order = described(
        skeleton,
        data.draw(shears),
        data.draw(rotations),
        data.draw(fractions),
        data.draw(st.permutations(range(skeleton.n_sites))),
        data.draw(st.booleans()),
        np.random.default_rng(data.draw(st.integers(0, 99))),
    )
    assert key(again, numbers[order]) == key(skeleton, numbers)


@pytest.mark.parametrize("skeleton", SKELETONS, ids=lambda s: s.name)
def test_keys_tell_crystals_apart_exactly_as_the_symmetry_does(skeleton):
    rng = np.random.default_rng(0)
    again, order = described(
        skeleton,
        [((2, 0, 1), 1), ((0, 1, 2), -1)],
        rng.normal(size=4),
        rng.random(3),
        rng.permutation(skeleton.n_sites),
    )
    labelings = np.array(list(itertools.product([8, 11], repeat=skeleton.n_sites)))
    classes = [labels.tobytes() for labels in canonical_numbers(labelings, skeleton.permutations)]
    keys, keys_again = Keys(skeleton, "density", {}), Keys(again, "density", {})
    found = [keys.key(labels) for labels in labelings]
    assert found == [keys_again.key(labels[order]) for labels in labelings]
    assert len(set(classes)) == len(set(found)) == len(set(zip(classes, found, strict=True)))


def test_no_two_skeletons_share_a_key():
    skeletons = [*library.five_site(), *SKELETONS]
    unlike = [s for s in skeletons if s.n_sites == 5]
    keys = {}
    for skeleton in unlike:
        keys.setdefault(key(skeleton, [3, 3, 3, 3, 3]), []).append(skeleton)
    for group in keys.values():  # the five-site set holds benchmark crystals; such a pair is one geometry
        for skeleton in group[1:]:
            np.testing.assert_allclose(skeleton.parameters, group[0].parameters, atol=2e-3)
    assert len(keys) > 90


@pytest.mark.parametrize("skeleton", SKELETONS, ids=lambda s: s.name)
def test_geometry_beyond_the_tolerance_is_another_crystal(skeleton):
    numbers = ELEMENTS[np.arange(skeleton.n_sites) % 2]
    shortest = np.linalg.norm(skeleton.lattice, axis=1).min()
    for stretch in (1.01 * LENGTH_BIN / shortest, -1.01 * LENGTH_BIN / shortest):
        longer = Skeleton("longer", skeleton.lattice * (1 + stretch), skeleton.frac_coords, skeleton.species)
        assert key(longer, numbers) != key(skeleton, numbers)
    sites = skeleton.frac_coords.copy()
    sites[-1, 0] += 2.5 * RATIO_BIN
    moved = Skeleton("moved", skeleton.lattice, sites, skeleton.species)
    assert key(moved, numbers) != key(skeleton, numbers)


def test_decimals_lie_inside_their_bins():
    """Lengths and coordinates as people write them do not change key by noise, whatever the last digit."""
    for a in np.random.default_rng(1).integers(3_000_000, 9_000_000, 400) / 1e6:
        forms = {
            standard_form((a + noise) * np.eye(3), np.zeros((1, 3))).geometry.tobytes() for noise in (-1e-7, 0, 1e-7)
        }
        assert len(forms) == 1, a
    for x in np.random.default_rng(2).integers(100_000, 900_000, 400) / 1e6:
        sites = [np.array([[0, 0, 0], [x + noise, 0.5, 0.5]]) for noise in (-2.5e-8, 0, 2.5e-8)]  # 1e-7 Å of 4 Å
        assert len({standard_form(4 * np.eye(3), s).geometry.tobytes() for s in sites}) == 1, x


def test_noise_seldom_moves_arbitrary_digits_over_an_edge():
    rng = np.random.default_rng(3)
    lengths = rng.uniform(3, 9, 4000)
    moved = [
        (
            standard_form(a * np.eye(3), np.zeros((1, 3))).geometry
            != standard_form((a + 1e-7) * np.eye(3), np.zeros((1, 3))).geometry
        ).any()
        for a in lengths
    ]
    assert np.mean(moved) < 0.005


def test_a_file_and_its_copies_share_keys(tmp_path):
    """The same crystal from a conventional CIF, from ASE's primitive cell and from the library."""
    from ase.spacegroup import crystal

    a = 5.63931
    primitive = crystal(
        ["Na", "Cl"], [(0, 0, 0), (0.5, 0.5, 0.5)], spacegroup=225, cellpar=[a, a, a, 90, 90, 90], primitive_cell=True
    )
    primitive.write(tmp_path / "salt.cif")
    ours = key(library.rocksalt(), [11, 17])
    for source in (primitive, tmp_path / "salt.cif"):
        skeleton = structures.to_skeleton(source)
        assert key(skeleton, primitive.numbers if skeleton.species[0] == "Na" else primitive.numbers[::-1]) == ours


def test_every_setting_and_the_property_are_in_the_key():
    numbers = [20, 22, 8, 8, 8]
    changes = [{"cutoff": 401.0}, {"version": "1.1"}, {"engine": "other"}, {"new": None}]
    keys = {key(library.perovskite(), numbers, FINGERPRINT | change) for change in [{}, *changes]}
    keys.add(key(library.perovskite(), numbers, property_name="density"))
    assert len(keys) == 6
    reordered = dict(reversed(FINGERPRINT.items()))
    assert key(library.perovskite(), numbers, reordered) == key(library.perovskite(), numbers)


def test_a_key_can_be_recomputed_from_the_finished_crystal():
    ring = KeyRing()
    for skeleton in SKELETONS:
        request = Request.of(skeleton, ELEMENTS[np.arange(skeleton.n_sites) % 3], "band_gap")
        # As a row of the store has it: Cartesian positions, a fingerprint that was JSON.
        sites = request.crystal.frac_coords @ skeleton.lattice @ np.linalg.inv(skeleton.lattice)
        row = Crystal(skeleton.lattice, sites, request.crystal.numbers)
        assert ring.key(row, "band_gap", json.loads(json.dumps(FINGERPRINT))) == key(skeleton, request.numbers)


def test_keys_of_large_crystals_take_bounded_memory(monkeypatch):
    sites = np.stack(np.meshgrid(*[np.arange(4) / 4] * 3, indexing="ij"), -1).reshape(-1, 3)
    crystals = [Crystal(np.eye(3) * edge, sites, np.arange(64) % 5 + 3) for edge in (12.0, 12.5, 13.0)]
    one = 4 * 48 * 64 * 64  # bytes
    monkeypatch.setattr(keys_module, "MOST_KEPT", 2 * one)
    ring = KeyRing()
    tracemalloc.start()
    found = [ring.key(crystal, "band_gap", {}) for crystal in [*crystals, *crystals]]
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found[:3] == found[3:] and len(set(found)) == 3
    assert kept < 3 * one and most < 50e6


def test_wrong_labelings_are_refused():
    with pytest.raises(ValueError, match="needs 5 atomic numbers"):
        Request.of(library.perovskite(), [1, 2], "band_gap")
