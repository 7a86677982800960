"""How fast the planewave engine is: CPU seconds per SCF on one core against pw.x, or crystals per second on a GPU.

    python -m benchmarks dft-speed [--names NaCl ...] [--batches 1 8] [--repeats 3]

On a CPU: six crystals of ``dft_cases.py`` (two and five sites, insulators and metals, and three skeletons of the
benchmark), in batches of 1 and of 8 copies, each in a process of its own on one core. pw.x (Debian package
``quantum-espresso``) runs on the same core, with the same pseudopotential files, cut-off, k-points, number of bands and
SCF tolerance (1e-8 Ha per atom), without forces and stress. Runs of ours and of pw.x alternate; the ratio is that of
the medians, batch by batch. Compilation is timed apart. Memory per crystal is the growth of the process's peak from
the smaller batch to the larger, divided by the crystals that it has more. The last line is one JSON object; its
``programs`` are those that 64 random assignments of a skeleton need, its ``compile_cpu_s`` those of one (the median).

On a GPU (JAX finds one): crystals per second for random five-site crystals at 40 Ha and four k-points, once without
symmetry and once with all that a cubic perovskite has, in 32 and in 64 lanes and four times as many crystals; seconds
in each phase; and the rates that the operations and bytes of an SCF step come to (an estimate by hand, without what
stays in caches).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import resource
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from ase.data import atomic_numbers

import benchmarks
from benchmarks.dft_accuracy import kind as kind_of
from benchmarks.dft_cases import Case, cases
from benchmarks.pwx import PwxJob, run
from crystaljax import library
from crystaljax.dft_bridge.engines.base import Crystal
from crystaljax.dft_bridge.engines.planewave import PRESETS, PlanewaveEngine
from crystaljax.dft_bridge.planewave import solver as solver_module
from crystaljax.dft_bridge.planewave.kinds import Kind, Workbench, bytes_of_crystal
from crystaljax.dft_bridge.planewave.pseudopotentials import shipped
from crystaljax.dft_bridge.planewave.scf import ScfSettings
from crystaljax.dft_bridge.planewave.solver import Solver, energies
from crystaljax.elements import MEDIUM

CASES = ("NaCl", "C1-KMgF3", "C1-MnSiFHC", "C5-AlMnCu2", "C6-Na3P", "C3-Al6SiGe")
TOLERANCE = 1e-8
"""Ha per atom, of both codes."""
GPU_BATCHES = (32, 64)
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def median(values: list[float]) -> float:
    """Of CPU seconds."""
    return float(np.median(values))


def our_runs(case: Case, batch: int, repeats: int) -> dict:
    """CPU seconds per crystal of ``repeats`` SCFs at least in this process, pw.x between them; the first compiles."""
    kind = kind_of(case)
    kind = dataclasses.replace(kind, settings=dataclasses.replace(kind.settings, tolerance=TOLERANCE))
    bench = Workbench(shipped(), batch)
    reference = dataclasses.replace(
        case.job(), stress=False, derivatives=False, full_accuracy=False, convergence=2 * TOLERANCE * len(case.symbols)
    )
    seconds, theirs = [], []
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        problems = bench.problems(kind, [case.symbols] * batch)
        for _ in range(1 + -(-repeats // batch)):
            begin = time.process_time()
            found = bench.solver(kind).solve(problems, energies)
            seconds.append(time.process_time() - begin)
            if len(seconds) > 1:
                theirs.append(timed_pwx(reference))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    compilation, *seconds = seconds
    ours = median(seconds) / batch
    return {
        "name": case.name,
        "batch": batch,
        "seconds": ours,
        "pwx": median(theirs),
        "ratio": ours / median(theirs),
        "compilation": compilation - median(seconds),
        "iterations": int(found.iterations[0]),
        "kpoints": found.eigenvalues.shape[1],
        "bands": found.eigenvalues.shape[2],
        "peak": peak,
        "converged": bool(found.converged.all()),
    }


def timed_pwx(job: PwxJob) -> float:
    """CPU seconds of pw.x, nothing cached."""
    with tempfile.TemporaryDirectory() as empty:
        return run(job, Path(empty)).cpu_seconds


def alone(name: str, batch: int, repeats: int) -> dict:
    """:func:`our_runs` in a process on one core, whose peak memory is that of this case."""
    started = benchmarks.command("dft_speed", "--one", name, "--batches", str(batch), "--repeats", str(repeats))
    environment = {**os.environ, **_ONE_THREAD, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(started, cwd=benchmarks.ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def on_cpu(names: list[str], batches: list[int], repeats: int) -> dict:
    """Every case at every batch, a table, and the summary."""
    rows = []
    print("case            batch  k  bands  steps   ours, s  pw.x, s  ratio  compilation, s  peak, MB")
    for name in names:
        for batch in batches:
            row = alone(name, batch, repeats)
            rows.append(row)
            print(
                f"{row['name']:15} {batch:5} {row['kpoints']:2} {row['bands']:6} {row['iterations']:6} "
                f"{row['seconds']:9.2f} {row['pwx']:8.2f} {row['ratio']:6.2f} {row['compilation']:15.1f} "
                f"{row['peak'] / 1e6:9.0f}",
                flush=True,
            )
    ratios = [row["ratio"] for row in rows]
    memory = {}
    for name in names:
        first, last = (next(r for r in rows if (r["name"], r["batch"]) == (name, b)) for b in (batches[0], batches[-1]))
        if last["batch"] > first["batch"]:
            memory[name] = round((last["peak"] - first["peak"]) / (last["batch"] - first["batch"]) / 1e6, 1)
    print(f"MB per crystal: {memory}")
    return {
        "median_ratio_to_pwx": round(float(np.median(ratios)), 3),
        "worst_ratio_to_pwx": round(max(ratios), 3),
        "median_ratio_by_batch": {
            str(b): round(float(np.median([r["ratio"] for r in rows if r["batch"] == b])), 3) for b in batches
        },
        "mb_per_crystal": max(memory.values(), default=None),
        "compile_cpu_s": round(median([row["compilation"] for row in rows]), 1),
        "programs": programs(),
        "converged": all(row["converged"] for row in rows),
    }


def programs(count: int = 64) -> int:
    """Different programs that the gaps of so many random assignments of the skeleton C2 are compiled to."""
    engine, skeleton, rng = PlanewaveEngine(**PRESETS["fast"]), library.benchmark("C2"), np.random.default_rng(0)
    lattice, places, bench, kinds = np.array(skeleton.lattice), np.array(skeleton.frac_coords), Workbench(shipped()), []
    while len(kinds) < count:
        numbers = [atomic_numbers[symbol] for symbol in rng.choice(MEDIUM.symbols, len(places))]
        crystal = Crystal(lattice, places, np.array(numbers))
        if engine.refuse(crystal, "band_gap") is None:
            kinds.append(engine.kind(crystal, "band_gap"))
    with jax.enable_x64(True):
        return len({bench.programs(kind, special=True) for kind in set(kinds)})


def gpu_kind(symmetric: bool) -> Kind:
    """Five sites at 40 Ha and four k-points: a shifted 2x2x2 mesh and no symmetry but time reversal, the sites being
    off their places by some 0.04 Å; or a shifted 4x4x4 mesh and that of the cubic perovskite."""
    case = next(c for c in cases() if c.name == "C1-KMgF3")
    places = np.array(case.frac_coords, float)
    if not symmetric:
        places = places + np.random.default_rng(0).normal(0.0, 0.01, places.shape)
    return Kind(
        lattice=tuple(map(tuple, case.lattice.tolist())),
        frac_coords=tuple(map(tuple, places.tolist())),
        colours=(0, 1, 2, 2, 2) if symmetric else (0, 1, 2, 3, 4),
        cutoff=40.0,
        mesh=(4, 4, 4) if symmetric else (2, 2, 2),
        shift=(1, 1, 1),
        stretch=1.0,
        light=True,
        settings=ScfSettings(bands=32, width=0.004, tolerance=1e-7, max_iterations=60, bands_per_fft=32),
    )


def random_crystals(count: int, symmetric: bool) -> list[list[str]]:
    """Elements of the medium vocabulary for five sites, 56 valence electrons at most (32 bands)."""
    rng, pseudopotentials, crystals = np.random.default_rng(0), shipped(), []
    light = [s for s in MEDIUM.symbols if max(pseudopotentials[s].angular_momenta, default=0) < 3]
    while len(crystals) < count:
        chosen = rng.choice(light, 3 if symmetric else 5).tolist()
        crystal = [*chosen, chosen[2], chosen[2]] if symmetric else chosen
        if sum(map(pseudopotentials.valence, crystal)) <= 56:
            crystals.append(crystal)
    return crystals


@dataclasses.dataclass
class Phases:
    """Wall seconds in each program of the solver, waited for."""

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    calls: dict[str, int] = dataclasses.field(default_factory=dict)

    def watch(self, name: str):
        """The program of that name, timed."""
        program = getattr(solver_module, name)

        def timed(*arguments):
            begin = time.perf_counter()
            result = jax.block_until_ready(program(*arguments))
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
            self.calls[name] = self.calls.get(name, 0) + 1
            return result

        return timed


def work_of_step(solver: Solver) -> tuple[float, float]:
    """Operations and bytes of one SCF step of one crystal: transforms, dense products and passes over the waves."""
    basis, settings = solver.basis, solver.settings
    k, p, bands = basis.n_kpoints, basis.n_waves, settings.bands
    size = settings.complex_type.itemsize
    box, wave_box = math.prod(basis.box), math.prod(basis.wave_box)
    applied = (settings.expansions + 1) * bands
    projectors = 5 * sum(2 * momentum + 1 for momentum in solver.tables.channels)
    space = sum((i + 1) * bands for i in range(settings.expansions + 1))
    transforms = 5 * (2 * applied * wave_box * math.log2(wave_box) + bands * box * math.log2(box))
    products = 8 * p * (2 * applied * projectors + 2 * space * space / 2 + space * bands)
    traffic = size * (applied * (4 * wave_box + 4 * p) + bands * 3 * box + 6 * space * p)
    return k * (transforms + products), k * traffic


def on_gpu(batches: list[int]) -> dict:
    """Crystals per second, phases and rates."""
    device = jax.local_devices()[0]
    print(f"device: {device.device_kind}")
    result: dict = {"device": device.device_kind}
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        for symmetric in (False, True):
            kind = gpu_kind(symmetric)
            for batch in batches:
                bench = Workbench(shipped(), batch)
                solver = bench.solver(kind)
                crystals = random_crystals(4 * batch, symmetric)  # as the engine does: lanes are refilled
                begin = time.perf_counter()
                solver.solve(bench.problems(kind, crystals[:batch]), energies)
                compilation = time.perf_counter() - begin
                phases = Phases()
                programs = {
                    name: getattr(solver_module, name) for name in ("_empty", "_guess", "_fill", "_step", "_finish")
                }
                try:
                    for name in programs:
                        setattr(solver_module, name, phases.watch(name))
                    begin = time.perf_counter()
                    found = solver.solve(bench.problems(kind, crystals), energies)
                    seconds = time.perf_counter() - begin
                finally:
                    for name, program in programs.items():
                        setattr(solver_module, name, program)
                operations, traffic = work_of_step(solver)
                steps = phases.seconds["_step"] / phases.calls["_step"] / solver.lanes
                estimate = bytes_of_crystal(solver.basis, solver.tables, kind.settings, 5)
                label = f"{'cubic symmetry' if symmetric else 'no symmetry'}, {solver.basis.n_kpoints} k, batch {batch}"
                stats = device.memory_stats() or {}
                print(
                    f"{label}: {len(crystals) / seconds:.1f} crystals/s, {found.converged.mean():.3f} converged, "
                    f"{np.median(found.iterations):.0f} steps, first call {compilation:.0f} s; "
                    f"{ {k.strip('_'): round(v, 2) for k, v in phases.seconds.items()} } s; "
                    f"{operations / steps / 1e12:.2f} TFLOP/s, {traffic / steps / 1e9:.0f} GB/s; "
                    f"{estimate / 1e6:.0f} MB per crystal estimated, "
                    f"peak {stats.get('peak_bytes_in_use', 0) / 1e9:.1f} GB",
                    flush=True,
                )
                result[label] = round(len(crystals) / seconds, 2)
    return result


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="*", default=list(CASES))
    parser.add_argument("--batches", nargs="*", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: gpu if JAX finds one")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # pw.x inherits it
        case = next(c for c in cases() if c.name == arguments.one)
        print(json.dumps(our_runs(case, arguments.batches[0], arguments.repeats)))
    elif (arguments.device or jax.default_backend()) == "gpu":
        print(json.dumps(on_gpu(arguments.batches or list(GPU_BATCHES))))
    else:
        print(json.dumps(on_cpu(arguments.names, arguments.batches or [1, 8], arguments.repeats)))


if __name__ == "__main__":
    main()
