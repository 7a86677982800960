"""Does the planewave engine converge whatever it is given? Random elements on all seven skeletons of the benchmark.

    python -m benchmarks dft-robustness [--count 300] [--seed 0] [--processes N]

Every site of C1 ... C7 gets a random element of the medium vocabulary, at the skeleton's own cell, however little the
elements like each other there: most are metals under pressure or stretched. One smeared SCF each with the settings of
the ``fast`` preset for densities, but 20 Ha and 20 k-points per reciprocal atom, which costs less and is no easier to
converge. Crystals are calculated in batches of four lanes, and a tenth of them once more alone: the energies must be
the same. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections import Counter

import loky
import numpy as np
from ase.data import atomic_numbers

from crystaljax import library
from crystaljax.dft_bridge.engines.base import Crystal
from crystaljax.dft_bridge.engines.checks import symbols_of
from crystaljax.dft_bridge.engines.planewave import PlanewaveEngine
from crystaljax.elements import MEDIUM

ENGINE = PlanewaveEngine.preset("fast", density_cutoff=20.0, density_kppa=20.0)
LANES = 4
SKELETONS = tuple(f"C{i}" for i in range(1, 8))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one crystal.

    Attributes:
        name: skeleton and elements.
        refused: the status of a crystal that is not calculated, else empty.
        converged, iterations: of the SCF.
        energy: Ha per atom in a batch.
        alone: Ha per atom when calculated alone; NaN if it was not.
    """

    name: str
    refused: str = ""
    converged: bool = False
    iterations: int = 0
    energy: float = float("nan")
    alone: float = float("nan")


def assignments(count: int, seed: int) -> dict[str, list[Crystal]]:
    """Random crystals by skeleton, as many on each as the number allows."""
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[Crystal]] = {name: [] for name in SKELETONS}
    for i in range(count):
        name = SKELETONS[i % len(SKELETONS)]
        skeleton = library.benchmark(name)
        numbers = np.array([atomic_numbers[s] for s in rng.choice(MEDIUM.symbols, skeleton.n_sites)])
        drawn[name].append(Crystal(skeleton.lattice, skeleton.frac_coords, numbers))
    return drawn


def run(skeleton: str, crystals: list[Crystal]) -> list[Outcome]:
    """All crystals of one program, in a worker."""
    import jax

    from crystaljax.dft_bridge.planewave.kinds import Workbench
    from crystaljax.dft_bridge.planewave.solver import energies

    outcomes, refused = [], {}
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        for kind, members in ENGINE.kinds(crystals, "density", refused).items():
            symbols = [symbols_of(crystals[i]) for i in members]
            sites = len(symbols[0])
            batch, single = Workbench(ENGINE.pseudo_set(), LANES), Workbench(ENGINE.pseudo_set(), 1)
            found = batch.solver(kind).solve(batch.problems(kind, symbols), energies)
            again = symbols[: -(-len(symbols) // 10)] if len(symbols) > 1 else []
            alone = single.solver(kind).solve(single.problems(kind, again), energies).extra.free if again else []
            for i, names in enumerate(symbols):
                outcomes.append(
                    Outcome(
                        name=f"{skeleton} {' '.join(names)}",
                        converged=bool(found.converged[i]),
                        iterations=int(found.iterations[i]),
                        energy=float(found.extra.free[i]) / sites,
                        alone=float(alone[i]) / sites if i < len(alone) else float("nan"),
                    )
                )
    return outcomes + [
        Outcome(f"{skeleton} {' '.join(symbols_of(crystals[i]))}", refused=result.status.name)
        for i, result in refused.items()
    ]


def jobs_of(drawn: dict[str, list[Crystal]]) -> list[tuple[str, list[Crystal]]]:
    """Crystals that share a program, together; large ones first."""
    jobs = []
    for name, crystals in drawn.items():
        groups = ENGINE.kinds(crystals, "density", refused := {})
        jobs += [(name, [crystals[i] for i in members]) for members in groups.values()]
        jobs += [(name, [crystals[i]]) for i in refused]
    return sorted(jobs, key=lambda job: -len(job[1]) * len(job[1][0].numbers))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=loky.cpu_count())
    arguments = parser.parse_args()
    environment = {**ENGINE.worker_environment(0), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    begin = time.perf_counter()
    outcomes: list[Outcome] = []
    with loky.ProcessPoolExecutor(arguments.processes, initializer=ENGINE.start_worker, env=environment) as pool:
        futures = [pool.submit(run, *job) for job in jobs_of(assignments(arguments.count, arguments.seed))]
        for future in futures:
            outcomes += future.result()
            for outcome in outcomes[-len(future.result()) :]:
                if not outcome.converged:
                    print(f"{outcome.name}: {outcome.refused or f'not converged in {outcome.iterations} steps'}")
            print(f"{len(outcomes)} done after {time.perf_counter() - begin:.0f} s", flush=True)
    calculated = [o for o in outcomes if not o.refused]
    converged = [o for o in calculated if o.converged]
    steps = np.array([o.iterations for o in converged])
    differences = [abs(o.energy - o.alone) for o in converged if np.isfinite(o.alone)]
    print("SCF steps of the converged: " + ", ".join(f"{q} % {np.percentile(steps, q):.0f}" for q in (5, 50, 95, 100)))
    print(
        json.dumps(
            {
                "assignments": len(outcomes),
                "refused": dict(Counter(o.refused for o in outcomes if o.refused)),
                "converged_share": round(len(converged) / len(calculated), 4),
                "not_converged": len(calculated) - len(converged),
                "not_finite": sum(not np.isfinite(o.energy) for o in converged),
                "median_steps": float(np.median(steps)),
                "most_steps": int(steps.max()),
                "compared_with_single": len(differences),
                "max_batch_minus_single_ha_per_atom": max(differences),
                "seconds": round(time.perf_counter() - begin),
            }
        )
    )


if __name__ == "__main__":
    main()
