"""How fast everything is on this machine: one Markdown table and its plots.

    python -m benchmarks throughput [--quick] [--sections environment devices ...] [--out benchmarks/results]

Environment (batch by batch), several devices, gate and bridge, DFT and training are measured one after the other, each
in a process of its own, on whatever JAX finds: a CPU, a GPU, a TPU, or several. ``JAX_PLATFORMS=cpu`` chooses the CPU
of a machine that has more. ``throughput_KIND.md`` names the machine and the versions, ``throughput_KIND.png`` shows the
two curves.

On a CPU, rates are per CPU second of one core, so that a busy machine does not change them much; on an accelerator they
are per second. *Several devices*: episodes on the device (rewards from a table) whose lanes are split over the devices
by ``jax.sharding``, as many lanes for each as for one alone (weak scaling). Lanes share nothing, so the time of a step
should stay the same. On a CPU the devices are virtual ones, at least four, each with a core of its own as long as there
are any: the CPU time of a step per device says what splitting costs, and so does the wall time where all devices have
a core and the cores are idle.

The last line of the output is one JSON object, with the rows of the table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import benchmarks

ONE_CORE = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "OMP_NUM_THREADS": "1",
}
BATCHES = (1, 64, 1024, 8192, 65536)
ENVIRONMENTS = {"flat observation": "flat", "graph observation": "graph"}
DENSITY, TABLE = "Density-C1-v0", "BandGap-PerovskiteABX3-v0"
LANES_PER_DEVICE = 8192
VIRTUAL_DEVICES = 4
"""On a CPU with fewer cores too."""


class Row(NamedTuple):
    """A line of the table."""

    section: str
    what: str
    setting: str
    value: float
    unit: str


# Several devices


def lanes(env: Any, params: Any, steps: int) -> Callable:
    """A pure function: keys [L] to the returns, float32 [L], of ``steps`` random steps with auto-reset in each lane.

    Lanes share nothing, not even their random numbers, so they may be anywhere.
    """
    import jax

    def lane(key: Any) -> Any:
        reset_key, key = jax.random.split(key)
        _, state = env.reset(reset_key, params)

        def step(carry: tuple[Any, Any], index: Any) -> tuple[tuple[Any, Any], None]:
            state, total = carry
            action_key, step_key = jax.random.split(jax.random.fold_in(key, index))
            action = jax.random.randint(action_key, (), 0, env.num_actions)
            _, state, reward, *_ = env.step(step_key, state, action, params)
            return (state, total + reward), None

        return jax.lax.scan(step, (state, jax.numpy.float32(0)), jax.numpy.arange(steps))[0][1]

    return jax.vmap(lane)


def split_over(devices: list[Any], function: Callable) -> Callable:
    """A function of arrays [L, ...], compiled with the first axis of arguments and results split over devices."""
    import jax
    import numpy as np

    mesh = jax.sharding.Mesh(np.array(devices), ("lanes",))
    by_lane = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("lanes"))
    return jax.jit(function, in_shardings=by_lane, out_shardings=by_lane)


def table_environment() -> tuple[Any, Any]:
    """The perovskite task with (made-up) rewards from a table."""
    import crystaljax
    from benchmarks.train_speed import table_evaluator

    return crystaljax.make(TABLE, table_evaluator())


def time_on_devices(count: int, lanes_per_device: int, steps: int, repetitions: int) -> dict[str, float]:
    """Microseconds of a step of all lanes on the first ``count`` devices: on the wall, and of CPU for each device."""
    import jax

    env, params = table_environment()
    keys = jax.random.split(jax.random.key(0), count * lanes_per_device)
    run = split_over(jax.devices()[:count], lanes(env, params, steps)).lower(keys).compile()
    run(keys).block_until_ready()
    walls, cpus = [], []
    for _ in range(repetitions):
        wall, cpu = time.perf_counter(), time.process_time()
        run(keys).block_until_ready()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {"wall": 1e6 * min(walls) / steps, "cpu": 1e6 * min(cpus) / steps / count}


# Sections, each in a process of its own: settings to rows


def environment(quick: bool) -> list[Row]:
    """Steps of random policies."""
    import jax

    import crystaljax
    from benchmarks.env_throughput import build

    on_cpu = jax.default_backend() == "cpu"
    clock, unit = (time.process_time, "steps per CPU second") if on_cpu else (time.perf_counter, "steps/s")
    rows = []
    for name, observation in ENVIRONMENTS.items():
        env, params = crystaljax.make(DENSITY, "unrelaxed-density", observation=observation)
        for batch in (64, 8192) if quick else BATCHES:
            length = max(16, min(2 ** (18 if quick else 21) // batch, 20_000))
            run, inputs = build(env, params, batch, length)
            run(*inputs).block_until_ready()
            seconds = []
            for _ in range(2 if quick else 5):
                start = clock()
                run(*inputs).block_until_ready()
                seconds.append(clock() - start)
            rows.append(Row("environment", f"{DENSITY}, {name}", f"batch {batch}", batch * length / min(seconds), unit))
    return rows


def devices(quick: bool) -> list[Row]:
    """Weak scaling of episodes on the device, over 1, 2, 4 ... devices."""
    import jax

    on_cpu = jax.default_backend() == "cpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(cores, VIRTUAL_DEVICES) if on_cpu else jax.device_count()
    size, rows, first = (LANES_PER_DEVICE // (8 if quick else 1), [], {})
    for count in [2**i for i in range(most.bit_length())]:
        numbers = (count, size, 64 if quick else 256, 3 if quick else 10)
        if on_cpu:  # a process has the number of virtual devices that it starts with
            flags = f"--xla_force_host_platform_device_count={count} --xla_cpu_multi_thread_eigen=false"
            took = child({**os.environ, "XLA_FLAGS": flags}, "--on-devices", *map(str, numbers))
        else:
            took = time_on_devices(*numbers)
        first = first or took
        setting = f"{count} x {size} lanes"
        clocks = {"cpu": "CPU time"} if on_cpu else {}
        if not on_cpu or count <= cores:
            clocks["wall"] = "wall time"
        for clock, name in clocks.items():
            per_device = f"µs of {name} per step" + (" and device" if clock == "cpu" else "")
            rows.append(Row("devices", TABLE, setting, took[clock], per_device))
            rows.append(Row("devices", f"weak scaling, {name}", setting, first[clock] / took[clock], "of one device"))
    return rows


def bridge(quick: bool) -> list[Row]:
    """Gate and bridge, with engines that cost nothing."""
    some = ["--episodes", "1024", "--batch", "256", "--workers", "2", "--tasks", "BandGap-C1-v0"] if quick else []
    calls = child(None, *some, benchmark="host_calls")
    some = ["--requests", "512", "--workers", "2", "--sleep", "0.05", "--many", "8192"] if quick else []
    flow = child(None, *some, benchmark="bridge_throughput")
    setting = "batch 256" if quick else "batch 1,024"
    return [
        Row("gate", "host calls", setting, calls["host_calls_per_1000_episodes"], "per 1,000 episodes"),
        Row("bridge", "own cost, new crystal", setting, calls["ms_per_distinct"], "ms of wall time"),
        Row("bridge", "own cost, crystal in the store", setting, calls["ms_per_distinct_in_store"], "ms of wall time"),
        Row("bridge", "wall time, sleeping engine", f"{2 if quick else 8} workers", flow["ratio_to_ideal"], "of ideal"),
    ]


def dft(quick: bool) -> list[Row]:
    """Band gaps of random perovskites by the planewave engine; on a CPU with pw.x, its SCFs beside ours too."""
    import jax
    import numpy as np

    from crystaljax import library
    from crystaljax.dft_bridge import Request, open_bridge
    from crystaljax.elements import get_vocabulary

    on_cpu = jax.default_backend() == "cpu"
    numbers, perovskite = get_vocabulary("small").numbers[:-1], library.perovskite()
    count = (4 if on_cpu else 32) if quick else (16 if on_cpu else 256)
    drawn = np.random.default_rng(0).choice(numbers, (8 * count, 3))
    requests = [Request.of(perovskite, [a, b, x, x, x], "band_gap") for a, b, x in drawn]
    with tempfile.TemporaryDirectory() as folder, open_bridge("planewave", store=f"{folder}/x.db", workers=1) as opened:
        # Refused ones cost nothing; the first half compiles.
        possible = [request for request in requests if opened.engine.refuse(request.crystal, "band_gap") is None]
        opened.evaluate(possible[:count])
        before, start = opened.stats(), time.perf_counter()
        opened.evaluate(possible[count : 2 * count])
        wall, after = time.perf_counter() - start, opened.stats()
    calls, what = after.calls - before.calls, "planewave fast, band gap of ABX3"
    if not on_cpu:
        return [Row("DFT", what, f"{calls} crystals", calls / wall, "crystals/s")]
    seconds = (after.core_seconds - before.core_seconds) / calls
    rows = [Row("DFT", what, f"{calls} crystals", seconds, "core-seconds each")]
    if shutil.which("pw.x") and not quick:
        ratio = child(None, benchmark="dft_speed")["median_ratio_to_pwx"]
        rows.append(Row("DFT", "SCF, CPU time, median of six crystals", "batches 1 and 8", ratio, "of pw.x"))
    return rows


def training(quick: bool) -> list[Row]:
    """PPO on rewards from a table, compiled as a whole; beside rejax if it is installed."""
    import jax

    import crystaljax
    from benchmarks.train_speed import BATCHES as batches
    from benchmarks.train_speed import STEPS, fastest, ours, table_evaluator, theirs

    on_cpu = jax.default_backend() == "cpu"
    clock, unit = (time.process_time, "steps per CPU second") if on_cpu else (time.perf_counter, "steps/s")
    makers = {"PPO, MLP": ours} | ({"rejax' PPO, same MLP": theirs} if importlib.util.find_spec("rejax") else {})
    env, params = crystaljax.make(TABLE, table_evaluator(), observation="flat")
    rows = []
    for batch in batches[:1] if quick else batches:
        updates = max(1, 2 ** (16 if quick else 19) // (batch * STEPS))
        programs = {name: jax.jit(make(env, params, batch, updates)) for name, make in makers.items()}
        best = fastest(programs, 3 if quick else 6, clock)  # the first of them compiles
        rows += [
            Row("training", name, f"batch {batch}", updates * batch * STEPS / took, unit) for name, took in best.items()
        ]
    return rows


def machine(quick: bool) -> dict[str, Any]:
    """What is measured on."""
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = jax.devices()[0].device_kind
    versions = {name: metadata.version(name) for name in ("crystaljax", "jax", "jaxlib", "numpy")}
    return {
        "kind": jax.default_backend(),
        "CPU": f"{cpu_model()}, {cores} cores",
        "devices": f"{jax.device_count()} x {kind} ({jax.default_backend()})",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


SECTIONS = {function.__name__: function for function in (environment, devices, bridge, dft, training)}


# The suite


def cpu_model() -> str:
    """The name of the CPU."""
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if line.startswith("model name")] if path.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def child(settings: dict[str, str] | None, *arguments: str, benchmark: str = "throughput") -> Any:
    """What a benchmark says in its last line; raises ``CalledProcessError`` if it fails."""
    started = benchmarks.command(benchmark, *arguments)
    done = subprocess.run(started, cwd=benchmarks.ROOT, env=settings, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def markdown(facts: dict[str, Any], rows: list[Row], failed: list[str], command: str, picture: str) -> str:
    """The report."""
    text = [f"# Throughput, {facts['kind'].upper()}", "", f"Written by `{command}` on", ""]
    text += [f"- {name}: {fact}" for name, fact in facts.items() if name != "kind"]
    text += ["", "| | what | setting | | |", "|---|---|---|---:|---|"]
    text += [f"| {row.section} | {row.what} | {row.setting} | {row.value:,.4g} | {row.unit} |" for row in rows]
    text += ["", *(f"Not measured, as it failed: {name}." for name in failed)]
    return "\n".join([*text, *([f"![curves]({picture})"] if picture else []), ""])


def draw(rows: list[Row], path: Path) -> bool:
    """Steps against batch, and weak scaling; false if there is neither."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves: dict[tuple[int, str], list[tuple[int, float]]] = {}
    for row in rows:
        if row.section == "environment":
            curves.setdefault((0, row.what), []).append((int(row.setting.split()[1]), row.value))
        elif row.what.startswith("weak scaling"):
            curves.setdefault((1, row.what), []).append((int(row.setting.split()[0]), row.value))
    if not curves:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for (panel, label), points in curves.items():
        axes[panel].plot(*zip(*points, strict=True), "o-", label=label)
        axes[panel].legend(fontsize="small")
    axes[0].set(xscale="log", yscale="log", xlabel="lanes", ylabel="steps per second")
    axes[1].set(xlabel="devices", ylabel="speed per device, of one device", ylim=(0, 1.2))
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--sections", nargs="+", choices=tuple(SECTIONS), default=list(SECTIONS))
    parser.add_argument(
        "--out", type=Path, default=benchmarks.ROOT / "benchmarks" / "results", help="folder of table and plots"
    )
    parser.add_argument("--one", choices=(*SECTIONS, "machine"), help=argparse.SUPPRESS)
    parser.add_argument("--on-devices", nargs=4, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.on_devices:
        if hasattr(os, "sched_setaffinity"):  # a device alone would use several cores, and be no measure for many
            os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: options.on_devices[0]]))
        print(json.dumps(time_on_devices(*options.on_devices)))
        return 0
    if options.one:
        print(json.dumps({**SECTIONS, "machine": machine}[options.one](options.quick)))
        return 0
    # A section's process and those that it starts share an accelerator.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    quick = ["--quick"] if options.quick else []
    chosen = [] if options.sections == list(SECTIONS) else ["--sections", *options.sections]
    facts = child(None, "--one", "machine")
    # Two sections start programs that choose their own threads.
    alone = {**os.environ, **ONE_CORE} if facts["kind"] == "cpu" else None
    rows, failed = [], []
    for section in options.sections:
        start = time.perf_counter()
        try:
            settings = alone if section in ("environment", "training") else None
            rows += [Row(*row) for row in child(settings, "--one", section, *quick)]
        except (subprocess.CalledProcessError, ValueError) as error:  # its own words are on stderr already
            print(f"{section}: {error}", file=sys.stderr)
            failed.append(section)
        print(f"{section}: {time.perf_counter() - start:.0f} s", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"throughput_{facts['kind']}"
    drawn = draw(rows, options.out / f"{name}.png")
    command = " ".join(["python -m benchmarks throughput", *quick, *chosen])
    text = markdown(facts, rows, failed, command, f"{name}.png" if drawn else "")
    (options.out / f"{name}.md").write_text(text)
    print(text)
    print(json.dumps({"machine": facts, "rows": [row._asdict() for row in rows], "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
