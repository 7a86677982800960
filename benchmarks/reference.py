"""The published environment (CrystalGym, PyTorch and DGL) beside ours, DFT left out of both, on one CPU core.

    python benchmarks/reference.py --python ~/crystalgym/bin/python [--seconds 10]

CrystalGym is installed by you, from https://github.com/chandar-lab/crystal-gym, into an environment of its own (it
wants gymnasium 0.28 and torch 2.4, we want newer ones)::

    git clone https://github.com/chandar-lab/crystal-gym && cd crystal-gym
    python3.11 -m venv ~/crystalgym && ~/crystalgym/bin/pip install -r requirements.txt -e .

Neither Quantum ESPRESSO nor its pseudopotentials nor MP-20 are needed: the crystal (C2, RbCaH3) is handed over as CIF,
and a finished crystal gets a constant reward, in both. Measured are steps of a random policy with resets, in CPU
seconds of the process, and forward passes of the policy network at batch 1 and 64 (theirs: MEGNetRL; ours: the
MEGNet-style network, and the default one). Where there is no GPU, CrystalGym's fixed device ``cuda`` is replaced.

This has not been tried against the original yet: it was written against the interface of its repository as of early
2025 (``crystal_gym.env.CrystalGymEnv``, ``crystal_gym.agents.agents.MEGNetRL``). Without it the script says so and
measures nothing. The last line of the output is one JSON object; ratios above 1 mean that ours is faster.
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
from pathlib import Path

ONE_CORE = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}
BATCHES = (1, 64)
MISSING = """CrystalGym cannot be imported by {python}:
  {reason}
Install it as `python benchmarks/reference.py --help` says, and name its interpreter with --python."""


def rate(work: Callable[[], int], seconds: float) -> float:
    """What ``work`` does (a number that it returns) per CPU second; the first call is not counted."""
    work()
    done, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        done += work()
    return done / (time.process_time() - start)


def theirs(csv: str, seconds: float) -> dict[str, float]:
    """Rates of CrystalGym; imports nothing of ours."""
    import crystal_gym.env.crystal_env as environment
    import dgl
    import torch
    from crystal_gym.agents import agents

    torch.set_num_threads(1)
    environment.collate_function_crysrl = functools.partial(environment.collate_function_crysrl, device="cpu")
    agents.EmbeddingBlockDev = functools.partial(agents.EmbeddingBlockDev, device="cpu")
    no_files = Path(csv).with_suffix(".pkl")
    no_files.write_bytes(pickle.dumps({}))
    qe = {"pseudodict": str(no_files), "pseudo_dir": ".", "qe_dir": ".", "kppa": 1000}
    settings = {"data_path": csv, "mode": "single", "index": 0, "seed": 0, "run_name": "benchmark", "agent": "MEGNetRL"}
    settings |= {"property": "band_gap", "p_hat": 1.12, "vocab": "small", "substitution": False, "reward_min": -5.0}
    env = environment.CrystalGymEnv({"env": settings, "qe": qe})
    env.compute_reward = lambda: (0.5, 1.0, 0, 0.0)  # reward, band gap, no error, no time

    def episode() -> int:
        env.reset()
        for _ in range(env.n_sites):
            env.step(env.action_space.sample())
        return env.n_sites

    rates = {"steps": rate(episode, seconds)}
    observation, _ = env.reset()
    network = agents.MEGNetRL(num_actions=env.vocab_size, ntypes_state=env.vocab_size, device="cpu").eval()
    for batch in BATCHES:
        graph = dgl.batch([observation] * batch)
        graph.focus = torch.cat([observation.focus] * batch)
        features = torch.cat([observation.lengths_angles_focus] * batch)

        def forward(graph=graph, features=features, batch=batch) -> int:
            with torch.no_grad():
                network(graph, graph.edata["e_feat"], graph.ndata["atomic_number"], features)
            return batch

        rates[f"forward {batch}"] = rate(forward, seconds)
    return rates


def ours(seconds: float) -> dict[str, float]:
    """Rates of CrystalJAX on the same crystal; networks by name."""
    import jax
    from env_throughput import build

    import crystaljax
    from agents.networks import QValues, make_trunk

    nothing = crystaljax.FunctionEvaluator(lambda numbers, skeleton: jax.numpy.float32(1.0), "constant")
    env, params = crystaljax.make("BandGap-C2-v0", nothing)
    rates = {}
    for batch in BATCHES:
        length = 4096 // batch
        run, inputs = build(env, params, batch, length)

        def steps(run=run, inputs=inputs, done=batch * length) -> int:
            run(*inputs).block_until_ready()
            return done

        rates[f"steps {batch}"] = rate(steps, seconds)
    for name in ("megnet", "transformer"):
        network = QValues(make_trunk(env, name), env.num_actions)
        observation, _ = env.reset(jax.random.key(0), params)
        weights = network.init(jax.random.key(1), observation)
        for batch in BATCHES:
            observations, _ = jax.vmap(env.reset, (0, None))(jax.random.split(jax.random.key(2), batch), params)
            apply = jax.jit(jax.vmap(network.apply, (None, 0)))

            def forward(apply=apply, weights=weights, observations=observations, batch=batch) -> int:
                apply(weights, observations).block_until_ready()
                return batch

            rates[f"{name} {batch}"] = rate(forward, seconds)
    return rates


def ask(python: str, seconds: float) -> dict[str, float]:
    """:func:`theirs` in another interpreter; ``SystemExit`` with what to do if CrystalGym is not there."""
    from pymatgen.core import Structure

    from crystaljax import library

    found = subprocess.run([python, "-c", "import crystal_gym.env"], capture_output=True, text=True, check=False)
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SystemExit(MISSING.format(python=python, reason=reason))
    with tempfile.TemporaryDirectory() as folder:
        skeleton = library.benchmark("C2")
        crystal = Structure(skeleton.lattice, skeleton.species, skeleton.frac_coords)
        cif = crystal.to(fmt="cif").replace('"', "'")
        csv = Path(folder, "crystal.csv")
        csv.write_text(f'cif,spacegroup.number\n"{cif}",221\n')
        command = [python, str(Path(__file__).resolve()), "--theirs", str(csv), "--seconds", str(seconds)]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter that has CrystalGym (default: this one)")
    parser.add_argument("--seconds", type=float, default=10.0, help="CPU seconds of each measurement (default: 10)")
    parser.add_argument("--theirs", metavar="CSV", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ |= ONE_CORE  # before torch or JAX is imported
    if options.theirs:
        print(json.dumps(theirs(options.theirs, options.seconds)))
        return
    reference = ask(options.python, options.seconds)
    mine = ours(options.seconds)
    beside = {name: f"forward {name.split()[1]}" for name in mine}
    beside |= {name: "steps" for name in mine if name.startswith("steps")}
    ratios = {name: mine[name] / reference[other] for name, other in beside.items()}
    print("| | CrystalGym, per CPU second | ours | ratio |\n|---|---:|---:|---:|")
    for name, ratio in ratios.items():
        print(f"| {name} | {reference[beside[name]]:,.0f} | {mine[name]:,.0f} | {ratio:,.1f} |")
    print(json.dumps({"ratio_to_crystalgym": {name: round(ratio, 2) for name, ratio in ratios.items()}}))


if __name__ == "__main__":
    main()
