"""The plane-wave engine against pw.x of Quantum ESPRESSO on the same pseudopotential files."""

from __future__ import annotations

import shutil

import pytest

from benchmarks import dft_accuracy as accuracy


@pytest.mark.slow
@pytest.mark.pwx
@pytest.mark.skipif(shutil.which("pw.x") is None, reason="pw.x is not installed (Debian: quantum-espresso)")
def test_agrees_with_pwx(tmp_path):
    found = accuracy.compare(list(accuracy.SHORT), tmp_path, few=True)
    assert found["crystals"] == found["converged"] == len(accuracy.SHORT)
    assert found["max_insulator_mev_per_atom"] < 0.05
    assert found["max_metal_mev_per_atom"] < 0.3
    assert found["max_gap_ev"] < 0.005
    assert found["max_bulk_modulus_percent"] < 0.5
    assert found["max_stress_gpa"] < 0.05
    assert found["max_density_percent"] < 0.2
