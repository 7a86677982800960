"""The throughput suite runs, and lanes split over devices do what they do on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import benchmarks

SPLIT = """
import json

import jax
import numpy as np

import crystaljax
from benchmarks.throughput import lanes, split_over, table_environment

keys = jax.random.split(jax.random.key(0), 32)
found = {}
density = crystaljax.make("Density-Mixed-v0", "unrelaxed-density")
for name, (env, params) in {"table": table_environment(), "density": density}.items():
    play = lanes(env, params, 12)
    alone = jax.jit(play)(keys)
    compiled = split_over(jax.devices(), play).lower(keys).compile()
    split = compiled(keys)
    found[name] = {
        "equal": bool((np.asarray(alone) == np.asarray(split)).all()),
        "different lanes": len(np.unique(np.asarray(alone))),
        "devices": len(split.sharding.device_set),
        "lanes of each": [shard.data.shape[0] for shard in split.addressable_shards],
        "talks": any(word in compiled.as_text() for word in ("all-reduce", "all-gather", "collective", "all-to-all")),
    }
print(json.dumps(found))
"""


def run(command, **settings):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", **settings}
    done = subprocess.run(
        command, cwd=benchmarks.ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_lanes_split_over_four_devices_earn_what_they_earn_on_one():
    found = run([sys.executable, "-c", SPLIT], XLA_FLAGS="--xla_force_host_platform_device_count=4")
    assert set(found) == {"table", "density"}
    for name, facts in found.items():
        assert facts["equal"] and facts["different lanes"] > 8, name
        assert facts["devices"] == 4 and facts["lanes of each"] == [8] * 4 and not facts["talks"], name


@pytest.mark.slow
def test_the_suite_writes_a_table_with_the_machine_named(tmp_path):
    command = benchmarks.command("throughput", "--quick", "--out", str(tmp_path))
    found = run([*command, "--sections", "environment", "devices"])
    assert not found["failed"] and {row["section"] for row in found["rows"]} == {"environment", "devices"}
    assert all(row["value"] > 0 for row in found["rows"])
    text = (tmp_path / "throughput_cpu.md").read_text()
    for fact in (found["machine"]["CPU"], found["machine"]["devices"], "jax ", "batch 8192", "weak scaling, CPU time"):
        assert fact in text
    assert (tmp_path / "throughput_cpu.png").stat().st_size > 10_000


def test_the_comparison_with_crystalgym_says_how_to_install_it():
    command = benchmarks.command("reference", "--seconds", "0.1")
    done = subprocess.run(command, cwd=benchmarks.ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1 and not done.stdout and "Traceback" not in done.stderr
    assert "No module named 'crystal_gym'" in done.stderr and "--help" in done.stderr
