"""What a test asks of a worker process; in a module that workers can import."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def worker_facts() -> tuple[list[str], str, bool, bool]:
    """Heavy modules loaded in a worker with GPAW's engine, its thread count, and whether it is isolated."""
    import crystaljax.dft_bridge.engines.gpaw  # noqa: F401

    heavy = [name for name in ("jax", "flax", "gymnax", "pytest") if name in sys.modules]
    return heavy, os.environ["OMP_NUM_THREADS"], os.getpgid(0) == os.getpid()


def xla_threads() -> tuple[set[int], int]:
    """The cores this process may run on, and the width of XLA's thread pool in it."""
    import jax

    jax.numpy.ones(3).block_until_ready()
    names = [Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task")]
    return os.sched_getaffinity(0), sum("XLAEigen" in name for name in names)
