"""What all engines share: presets and their fingerprints, which stored results are found by."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest

from crystaljax import library
from crystaljax.dft_bridge.engines.registry import ENGINES
from crystaljax.properties import PROPERTIES

DIGESTS = {
    ("planewave", "crystalgym"): ["9f6b646bfa1a13c5", "61bd92681531a01e", "9f3d3fa1989656cf"],
    ("planewave", "fast"): ["34f9d5e07197fa2a", "839b0ab6f96a435d", "166bc249ea392b05"],
    ("espresso", "crystalgym"): ["93f8fa5ba0d1ab41", "245eb4f9ce309e7f", "8805acddc0a68a71"],
    ("espresso", "standard"): ["8f14998a3b119fe7", "b76a4147d2d93c2d", "421f60f6cf6ef387"],
    ("espresso", "fast"): ["9edc90830a0c790c", "e34c71a437fdae90", "738e5752e294b895"],
    ("gpaw", "standard"): ["c3c04879b343cf51", "fde07a390d61f205", "5e02f2ef88dcdb2a"],
    ("gpaw", "fast"): ["a9e7f7d5ce4ee55d", "cf20b5980ca9f950", "f9d9140779b6a41f"],
    ("ase", "fast"): ["34b26bcefb137e81", "136d06bdc0759e93", "52fa219913f0bdc7"],
    ("ase", "standard"): ["34b26bcefb137e81", "136d06bdc0759e93", "9f5ab23cea7314fa"],
}
"""SHA-256 of the settings of each property. Change one only together with a preset: results are found by them."""


def digest(table: dict) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.parametrize(("engine", "preset"), DIGESTS)
def test_settings_in_fingerprints_are_those_of_stored_results(engine, preset):
    made = ENGINES[engine].preset(preset)
    assert [digest(made.settings_of(name)) for name in PROPERTIES] == DIGESTS[engine, preset]


@pytest.mark.parametrize(
    ("property_name", "expected"),
    [("band_gap", "3f54440bd4944bf1"), ("bulk_modulus", "9f02096e62f15ca4"), ("density", "aab1e71ce47be796")],
)
def test_fingerprints_of_planewave_are_those_of_stored_results(property_name, expected):
    """All of it, pseudopotentials and cut-offs included, as the package ships them.

    A ladder is one more entry, and so are further volumes, of a bulk modulus alone.
    """
    engine = ENGINES["planewave"].preset("fast")
    crystal = library.perovskite()  # its k-points are those of earlier versions
    fingerprint = engine.fingerprint_of(crystal.lattice, crystal.frac_coords, property_name)
    assert fingerprint.pop("ladder") == [dataclasses.asdict(rung) for rung in engine.rungs(property_name)[1:]]
    assert fingerprint.pop("eos_further", 0) == (3 if property_name == "bulk_modulus" else 0)
    before = dataclasses.replace(engine, ladder=(), eos_further=0)
    without = before.fingerprint_of(crystal.lattice, crystal.frac_coords, property_name)
    assert digest(without) == digest(fingerprint) == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_unknown_presets_are_refused_with_the_known_ones(engine):
    with pytest.raises(ValueError, match=f"no preset 'moon' of the {engine} engine; choose one of .*fast"):
        ENGINES[engine].preset("moon")


@pytest.mark.parametrize("engine", ENGINES)
def test_unknown_properties_are_refused(engine):
    with pytest.raises(ValueError, match="no property 'colour'; choose one of band_gap"):
        ENGINES[engine].preset("fast").settings_of("colour")


@pytest.mark.parametrize(("engine", "preset"), [("planewave", "crystalgym"), ("espresso", "crystalgym")])
def test_moduli_of_crystalgym_keep_their_volumes_and_keys(engine, preset):
    made = ENGINES[engine].preset(preset)
    assert made.further == 0 and made.eos_volumes == (0.98, 0.99, 1.0, 1.01, 1.02)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_modulus_at_the_given_cell_needs_no_further_volumes(engine):
    fast = ENGINES[engine].preset("fast")
    assert fast.further == 3
    if engine != "gpaw":
        assert dataclasses.replace(fast, modulus_at="cell").further == 0
