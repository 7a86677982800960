"""A second witness: the planewave engine against ABINIT on three crystals of ``dft_cases.py``.

    python -m benchmarks dft-witness [--names NaCl C1-KMgF3 C1-MnSiFHC] [--inputs FOLDER]

Needs ABINIT (Debian package ``abinit``), and pw.x unless ``--cache`` has its results. ABINIT 9 reads no UPF version 2,
so the UPF files are rewritten as psp8, with the same radial mesh and the same numbers (the model core's derivatives,
which psp8 wants too, come from a spline). ``--inputs`` keeps the input files. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import numpy as np
from ase.data import atomic_numbers
from ase.units import Bohr, Hartree
from scipy.interpolate import make_interp_spline

from benchmarks.dft_accuracy import kind
from benchmarks.dft_cases import Case, cases
from benchmarks.pwx import run, upf_folder
from crystaljax.dft_bridge.planewave.kinds import Workbench
from crystaljax.dft_bridge.planewave.pseudofile import PseudoFile, read_pseudopotential
from crystaljax.dft_bridge.planewave.pseudopotentials import shipped
from crystaljax.dft_bridge.planewave.solver import energies

NAMES = ("NaCl", "C1-KMgF3", "C1-MnSiFHC")
POINTS = 1001  # of the radial mesh, to 10 bohr: pw.x integrates no further either
_ALLOWED = {"OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def psp8(file: PseudoFile) -> str:
    """A pseudopotential in ABINIT's format 8, on the first :data:`POINTS` of its linear mesh."""
    r = file.r[:POINTS]
    if not np.allclose(np.diff(r), r[1] - r[0]):
        raise ValueError(f"{file.path} has no linear mesh, as psp8 needs")
    if not np.allclose(file.dij, np.diag(np.diag(file.dij))):
        raise ValueError(f"{file.path} has coupled projectors, which psp8 cannot hold")
    channels: dict[int, list[int]] = {}
    for i, projector in enumerate(file.projectors):
        channels.setdefault(projector.angular_momentum, []).append(i)
    core = file.rho_core is not None
    lines = [
        f"{file.symbol} from {Path(file.path).name}",
        f"{atomic_numbers[file.symbol]:.4f} {file.valence:.4f} 0 zatom,zion,pspd",
        f"8 11 {max(channels)} 4 {len(r)} 0 pspcod,pspxc,lmax,lloc,mmax,r2well",
        f"{r[-1] if core else 0:.8f} {float(core):.8f} 0 rchrg fchrg qchrg",
        " ".join(str(len(channels.get(momentum, []))) for momentum in range(5)) + " nproj",
        "0 extension_switch",
    ]
    for momentum, members in sorted(channels.items()):
        values = np.zeros((len(r), len(members)))
        for column, i in enumerate(members):
            projector = file.projectors[i]
            count = min(projector.cutoff, len(projector.values), len(r))
            values[:count, column] = projector.values[:count]
        lines.append(f"{momentum} " + " ".join(_number(file.dij[i, i]) for i in members))
        lines += [f"{n + 1} {_number(r[n])} " + " ".join(map(_number, row)) for n, row in enumerate(values)]
    lines.append("4")
    lines += [f"{n + 1} {_number(r[n])} {_number(v)}" for n, v in enumerate(file.v_local[: len(r)])]
    if core:
        spline = make_interp_spline(file.r, 4 * np.pi * file.rho_core, k=7)
        rows = np.stack([spline(r, nu) for nu in range(5)], axis=1)
        lines += [f"{n + 1} {_number(r[n])} " + " ".join(map(_number, row)) for n, row in enumerate(rows)]
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return f"{value:.14E}"


def abinit_input(case: Case) -> str:
    """The input file of a case."""
    elements = tuple(dict.fromkeys(case.symbols))
    occupations = "occopt 1" if case.kind == "insulator" else f"occopt 7 tsmear {case.width}"
    shift = " ".join(str(0.5 * s) for s in case.shift)

    def rows(array: np.ndarray) -> str:
        return "\n  ".join(" ".join(f"{x:.12f}" for x in row) for row in array)

    return f"""pp_dirpath "./"
pseudos "{", ".join(f"{e}.psp8" for e in elements)}"
acell 3*1.0
rprim
  {rows(case.lattice / Bohr)}
natom {len(case.symbols)} ntypat {len(elements)} typat {" ".join(str(elements.index(s) + 1) for s in case.symbols)}
znucl {" ".join(str(atomic_numbers[e]) for e in elements)}
xred
  {rows(case.frac_coords)}
ecut {case.cutoff} ngkpt {" ".join(map(str, case.mesh))} nshiftk 1 shiftk {shift}
kptopt 1 chksymbreak 0
nband {case.bands()} {occupations}
toldfe 1e-9 nstep 100 optforces 0 optstress 0
prtwf 0 prtden 0 prteig 0 prtgsr 0 prtebands 0
"""


def abinit_energy(case: Case, keep: Path | None = None) -> float:
    """Ha per cell; raises ``RuntimeError`` if ABINIT is missing or stops."""
    executable = shutil.which("abinit")
    if executable is None:
        raise RuntimeError("abinit is not on the PATH: on Debian or Ubuntu, `apt-get install abinit`")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for symbol in set(case.symbols):
            (folder / f"{symbol}.psp8").write_text(psp8(read_pseudopotential(upf_folder() / f"{symbol}.upf")))
        (folder / "run.abi").write_text(abinit_input(case))
        if keep is not None:
            shutil.copytree(folder, keep / case.name, dirs_exist_ok=True)
        with open(folder / "log", "w") as log:
            subprocess.run([executable, "run.abi"], cwd=folder, env=os.environ | _ALLOWED, stdout=log, stderr=log)
        output = folder / "run.abo"
        text = output.read_text() if output.exists() else ""
        found = re.findall(r"^\s*etotal\s+([-+.\dE]+)", text, re.MULTILINE)
        if not found or "was not enough SCF cycles" in text:
            raise RuntimeError(f"abinit failed on {case.name}: {(folder / 'log').read_text()[-800:]}")
        return float(found[-1])


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="*", default=list(NAMES))
    parser.add_argument("--cache", type=Path, help="folder of pw.x results")
    parser.add_argument("--inputs", type=Path, help="folder that keeps ABINIT's input files")
    arguments = parser.parse_args()
    bench, result = Workbench(shipped()), {}
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        for case in (case for case in cases() if case.name in arguments.names):
            chosen = kind(case)
            ours = float(bench.solver(chosen).solve(bench.problems(chosen, [case.symbols]), energies).extra.free[0])
            theirs, third = abinit_energy(case, arguments.inputs), run(case.job(), arguments.cache).energy
            unit = 1000 * Hartree / len(case.symbols)
            result[case.name] = {
                "abinit_ha": theirs,
                "ours_minus_abinit_mev_per_atom": round((ours - theirs) * unit, 4),
                "pwx_minus_abinit_mev_per_atom": round((third - theirs) * unit, 4),
            }
            print(case.name, result[case.name], flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
