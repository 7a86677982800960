"""The published environment (CrystalGym, PyTorch and DGL) beside ours, DFT left out of both, on one CPU core.

    python -m benchmarks reference --python ~/crystalgym/bin/python [--seconds 1] [--repetitions 10]

CrystalGym is installed by you, from https://github.com/chandar-lab/crystal-gym (the version measured is d4191966), into
an environment of its own (it wants gymnasium 0.28 and torch 2.4, we want newer ones)::

    git clone https://github.com/chandar-lab/crystal-gym && cd crystal-gym
    python3.11 -m venv ~/crystalgym && ~/crystalgym/bin/pip install -r requirements.txt -e .

or, from PyPI alone, with ``--no-deps -e .`` after ``"torch==2.2.1" "dgl==2.1.0" "torchdata==0.7.1" pydantic "numpy<2"
"matgl==0.9.0" "chgnet==0.3.8" "pymatgen==2025.1.9" "ase==3.23.0" "gymnasium==0.28.1" "mendeleev==0.17.0"``: DGL 2.1.0,
the newest one there, loads with torch 2.0.0 to 2.2.1 only.

Neither Quantum ESPRESSO nor its pseudopotentials nor MP-20 are needed: the crystal (C2, RbCaH3) is handed over as CIF,
and the DFT calculation of a finished crystal is replaced by a constant gap, in both; what surrounds it (the crystal
made of the graph, the k-points, the calculator, the reward) is theirs. Their network is built on the CPU (its embedding
names ``cuda`` and takes no other device from outside). Nothing else of theirs is changed.

Measured are CPU seconds of the process:

- episodes of a random policy in CrystalGym: all of it, without ``reset``, and without ``reset`` and what makes the
  reward of a finished crystal;
- the same episodes in our Gymnasium environment, and in a compiled loop, as our agents run it, of 1 and 64 lanes; with
  resets. Our reward is computed in the program; handing crystals to an engine is not part of it;
- the policy network, without gradients, for 1 and 64 observations that are already batched: MEGNetRL as they run it,
  our MEGNet-style network and our default one compiled.

Not measured: learning, replay, CHGNet agents, a GPU.

Each number is the best of the repetitions, as other load on the machine slows them even in CPU time; median and lowest
stand beside it. The last line of the output is one JSON object; ratios above 1 mean that ours is faster.
benchmarks/results/reference.md has a run.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

ONE_CORE = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}
BATCHES = (1, 64)
BESIDE = {
    "gymnasium": ("steps", "steps without reset", "steps without reset and reward"),
    "compiled 1": ("steps", "steps without reset and reward"),
    "compiled 64": ("steps", "steps without reset and reward"),
    "megnet 1": ("forward 1",),
    "megnet 64": ("forward 64",),
    "transformer 1": ("forward 1",),
    "transformer 64": ("forward 64",),
}
"""What of theirs each of ours is compared with."""
MISSING = """CrystalGym cannot be imported by {python}:
  {reason}
Install it as `python -m benchmarks reference --help` says, and name its interpreter with --python."""


def rates(works: dict[str, Callable[[], int]], seconds: float, repetitions: int) -> dict[str, list[float]]:
    """What each of ``works`` does (a number that it returns) per CPU second, in rounds; first calls are not counted."""
    for work in works.values():
        work()
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repetitions):
        for name, work in works.items():
            done, start = 0, time.process_time()
            while (spent := time.process_time() - start) < seconds:
                done += work()
            found[name].append(done / spent)
    return found


def episode(env: Any, sites: int) -> int:
    """A random policy from a reset to the end of the episode, through the Gymnasium interface; the steps taken."""
    env.reset()
    for _ in range(sites):
        env.step(env.action_space.sample())
    return sites


def theirs(csv: str, seconds: float, repetitions: int) -> dict[str, Any]:
    """Rates of CrystalGym, versions, and the size of its network; imports nothing of ours."""
    import crystal_gym.env.crystal_env as environment
    import dgl
    import torch
    from crystal_gym.agents import agents

    torch.set_num_threads(1)
    agents.EmbeddingBlockDev = functools.partial(agents.EmbeddingBlockDev, device="cpu")
    no_files = Path(csv).with_suffix(".pkl")
    no_files.write_bytes(pickle.dumps({}))
    qe = {"pseudodict": str(no_files), "pseudo_dir": ".", "qe_dir": ".", "kppa": 1000}
    settings = {"data_path": csv, "mode": "single", "index": 0, "seed": 0, "run_name": "benchmark", "agent": "MEGNetRL"}
    settings |= {"property": "band_gap", "p_hat": 1.12, "vocab": "small", "substitution": False, "reward_min": -5.0}
    env = environment.CrystalGymEnv({"env": settings, "qe": qe})
    env.calculate_band_gap = lambda atoms: (1.0, 0)  # gap in eV, no error
    bare = environment.CrystalGymEnv({"env": settings, "qe": qe})
    bare.compute_reward = lambda: (0.5, 1.0, 0, 0.0)  # reward, gap in eV, no error, no time
    observation, _ = bare.reset()

    def without_reset(env: Any, start: Any) -> int:
        env.state, env.t = start, 0  # a step changes a copy of the state
        for _ in range(env.n_sites):
            env.step(env.action_space.sample())
        return env.n_sites

    works = {
        "steps": functools.partial(episode, env, env.n_sites),
        "steps without reset": functools.partial(without_reset, env, env.reset()[0]),
        "steps without reset and reward": functools.partial(without_reset, bare, observation),
    }
    network = agents.MEGNetRL(num_actions=env.vocab_size, device="cpu").eval()
    for batch in BATCHES:
        graph = dgl.batch([observation] * batch)
        graph.focus = torch.cat([observation.focus] * batch)
        features = torch.cat([observation.lengths_angles_focus] * batch)

        def forward(graph=graph, features=features, batch=batch) -> int:
            with torch.no_grad():
                values = network(graph, graph.edata["e_feat"], graph.ndata["atomic_number"], features)
            assert values.numel() == batch * env.vocab_size
            return batch

        works[f"forward {batch}"] = forward
    versions = {name: metadata.version(name) for name in ("torch", "dgl", "matgl", "pymatgen", "gymnasium", "numpy")}
    size = sum(weights.numel() for weights in network.parameters())
    return {"rates": rates(works, seconds, repetitions), "versions": versions, "parameters": size}


def ours(seconds: float, repetitions: int) -> dict[str, Any]:
    """Rates of CrystalJAX on the same crystal, and the sizes of its networks by name."""
    import jax

    import crystaljax
    from benchmarks.env_throughput import build
    from crystaljax.adapters import GymnasiumEnv
    from crystaljax.agents.networks import QValues, count_parameters, make_trunk

    nothing = crystaljax.FunctionEvaluator(lambda numbers, skeleton: jax.numpy.float32(1.0), "constant")
    env, params = crystaljax.make("BandGap-C2-v0", nothing)
    works = {"gymnasium": functools.partial(episode, GymnasiumEnv(env, params), env.max_sites)}
    for batch in BATCHES:
        length = 4096 // batch
        run, inputs = build(env, params, batch, length)

        def steps(run=run, inputs=inputs, done=batch * length) -> int:
            run(*inputs).block_until_ready()
            return done

        works[f"compiled {batch}"] = steps
    sizes = {}
    for name in ("megnet", "transformer"):
        network = QValues(make_trunk(env, name), env.num_actions)
        observation, _ = env.reset(jax.random.key(0), params)
        weights = network.init(jax.random.key(1), observation)
        sizes[name] = count_parameters(weights)
        for batch in BATCHES:
            observations, _ = jax.vmap(env.reset, (0, None))(jax.random.split(jax.random.key(2), batch), params)
            apply = jax.jit(jax.vmap(network.apply, (None, 0)))

            def forward(apply=apply, weights=weights, observations=observations, batch=batch) -> int:
                apply(weights, observations).block_until_ready()
                return batch

            works[f"{name} {batch}"] = forward
    return {"rates": rates(works, seconds, repetitions), "parameters": sizes}


def ask(python: str, options: list[str]) -> dict[str, Any]:
    """:func:`theirs` in another interpreter; ``SystemExit`` with what to do if CrystalGym is not there."""
    from pymatgen.core import Structure

    from crystaljax import library

    there = [python, "-c", "import crystal_gym.env, crystal_gym.agents"]
    found = subprocess.run(there, capture_output=True, text=True, check=False)
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SystemExit(MISSING.format(python=python, reason=reason))
    with tempfile.TemporaryDirectory() as folder:
        skeleton = library.benchmark("C2")
        crystal = Structure(skeleton.lattice, skeleton.species, skeleton.frac_coords)
        cif = crystal.to(fmt="cif").replace('"', "'")
        csv = Path(folder, "crystal.csv")
        csv.write_text(f'cif,spacegroup.number\n"{cif}",221\n')
        command = [python, str(Path(__file__).resolve()), "--theirs", str(csv), *options]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def summary(found: list[float]) -> str:
    """The best, and beside it the median and the lowest."""
    return f"{max(found):,.0f} ({median(found):,.0f}, {min(found):,.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter that has CrystalGym (default: this one)")
    parser.add_argument("--seconds", type=float, default=1.0, help="CPU seconds of each measurement (default: 1)")
    parser.add_argument("--repetitions", type=int, default=10, help="measurements of each (default: 10)")
    parser.add_argument("--theirs", metavar="CSV", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ |= ONE_CORE  # before torch or JAX is imported
    if options.theirs:
        print(json.dumps(theirs(options.theirs, options.seconds, options.repetitions)))
        return
    given = ["--seconds", str(options.seconds), "--repetitions", str(options.repetitions)]
    reference = ask(options.python, given)
    mine = ours(options.seconds, options.repetitions)
    from benchmarks.throughput import machine

    facts = machine(quick=False) | {"CrystalGym with": ", ".join(f"{n} {v}" for n, v in reference["versions"].items())}
    facts |= {"parameters": f"MEGNetRL {reference['parameters']:,}"}
    facts["parameters"] += "".join(f", {name} {size:,}" for name, size in mine["parameters"].items())
    print("".join(f"- {name}: {fact}\n" for name, fact in facts.items()))
    print("| ours / CrystalGym | ours, per CPU second | CrystalGym, per CPU second | ratio |\n|---|---:|---:|---:|")
    ratios = {}
    for name, others in BESIDE.items():
        found = mine["rates"][name]
        for other in others:
            before = reference["rates"][other]
            ratio = ratios[f"{name} / {other}"] = round(max(found) / max(before), 2)
            print(f"| {name} / {other} | {summary(found)} | {summary(before)} | {ratio:,.1f} |")
    print(json.dumps({"ratio_to_crystalgym": ratios}))


if __name__ == "__main__":
    main()
