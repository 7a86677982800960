"""Malformed inputs at every door of the package; ``python -m benchmarks fuzz`` tries ten thousand."""

from __future__ import annotations

import tempfile

import pytest

from benchmarks import fuzzing

COUNT = 200
"""Inputs over all doors."""


@pytest.mark.parametrize("name", fuzzing.TARGETS)
def test_malformed_inputs_are_refused_clearly(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tally = fuzzing.fuzz(name, max(5, round(COUNT * fuzzing.TARGETS[name].share)))
    assert tally["refused"] > 0


@pytest.mark.parametrize("name", fuzzing.TARGETS)
def test_what_is_sound_is_accepted(name):
    for value in fuzzing.TARGETS[name].sound:
        fuzzing.TARGETS[name].door(value)


def test_an_unclear_error_is_found(monkeypatch):
    def door(value):
        raise KeyError(value)

    monkeypatch.setitem(fuzzing.TARGETS, "broken", fuzzing.Target(fuzzing.TARGETS["cif"].inputs, door, 1.0, ()))
    with pytest.raises(KeyError):
        fuzzing.fuzz("broken", 3)
