"""Nothing is lost, doubled or left behind, whatever breaks: the scenarios of ``benchmarks/bridge_faults.py``."""

from __future__ import annotations

import pytest

from benchmarks import bridge_faults

KILLS = 2
"""Enough here; the benchmark kills 50 times."""


@pytest.mark.faults
@pytest.mark.parametrize("name", bridge_faults.SCENARIOS)
def test_nothing_is_lost_doubled_or_left_behind(name):
    try:
        damage = bridge_faults.run(name, KILLS)
    except bridge_faults.Skipped as reason:
        pytest.skip(str(reason))
    assert damage == bridge_faults.Damage(lost=0, duplicates=0, orphans=0)
