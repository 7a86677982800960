"""Twenty pw.x calculations through a batch system, one of whose jobs is killed midway: all twenty must arrive.

Starts a Slurm cluster of one node on this machine, from the packages of Debian, in a temporary folder and on free
ports: munged, slurmctld, slurmd; then Dask workers as its jobs by ``dask-jobqueue``, and a bridge on them. With
``--commands pbs`` the jobs are handed in as to PBS or Torque (``qsub``, ``qdel``), which the package
``slurm-wlm-torque`` has for Slurm. Needs root:

    apt-get install slurm-wlm slurm-wlm-torque munge quantum-espresso && pip install 'crystaljax[dask]'
    python tests/cluster/batch_pwx.py --pseudo FOLDER_WITH_A_UPF_OF_SILICON [--commands pbs]

The last line of the output is one JSON object; the exit status is 0 if everything arrived.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ase.build import bulk
from dask_jobqueue import PBSCluster, SLURMCluster
from dask_jobqueue.core import JobQueueCluster

from crystaljax.dft_bridge import Request, Store, open_bridge
from crystaljax.status import Status
from crystaljax.structures import to_skeleton

CRYSTALS = 20
JOBS = 2
KILL_AFTER = 5
"""Results after which a job is killed."""
START_SECONDS = 60.0

SLURM_CONF = """
ClusterName=sandbox
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={daemon_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={jobs} RealMemory=8000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, what: str, seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} within {seconds:g} s")
        time.sleep(0.2)


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[None]:
    """Munge and Slurm on this machine; ``sbatch`` finds them by the environment."""
    host = socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    os.chmod(folder, 0o755)
    conf, key = folder / "slurm.conf", folder / "munge.key"
    ports = {"controller_port": free_port(), "daemon_port": free_port()}
    conf.write_text(SLURM_CONF.format(host=host, folder=folder, jobs=JOBS, **ports))
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    os.environ["SLURM_CONF"] = str(conf)
    munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munged += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    daemons = [munged, ["slurmctld", "-D", "-f", str(conf)], ["slurmd", "-D", "-f", str(conf), "-N", host]]
    with contextlib.ExitStack() as stack:
        for command in daemons:
            with open(folder / f"{command[0]}.output", "w") as output:
                daemon = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)
            time.sleep(1.0)
            if daemon.poll() is not None:
                log = (folder / f"{command[0]}.output").read_text()
                raise RuntimeError(f"{command[0]} ended with {daemon.returncode}: {log}")
        wait_for(lambda: "idle" in shell("sinfo", "-h", "-o", "%T"), "the node was not ready")
        yield
        shell("scancel", "--user=root")


def shell(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def cluster_of(commands: str, folder: Path) -> JobQueueCluster:
    """A Dask cluster whose workers are jobs, one process on one core each; none has started yet."""
    by_commands = {"slurm": SLURMCluster, "pbs": functools.partial(PBSCluster, resource_spec="nodes=1:ppn=1")}
    return by_commands[commands](
        cores=1,
        processes=1,
        memory="2GiB",
        walltime="00:30:00",
        interface="lo",
        python=sys.executable,
        log_directory=str(folder),
        local_directory=str(folder),
        scheduler_options={"dashboard_address": None},
    )


def silicons() -> list[Request]:
    """The band gap of silicon at as many volumes."""
    cells = [bulk("Si", "diamond", a=5.2 + 0.02 * i) for i in range(CRYSTALS)]
    return [Request.of(to_skeleton(cell), cell.numbers, "band_gap") for cell in cells]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pseudo", required=True, help="folder with a UPF file of silicon")
    parser.add_argument("--commands", choices=("slurm", "pbs"), default="slurm", help="how jobs are handed in")
    options = parser.parse_args()
    pseudo = str(Path(options.pseudo).absolute())
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as name, slurm(Path(name)):
        folder = Path(name)
        os.chdir(folder)  # where qsub leaves the output of jobs
        with cluster_of(options.commands, folder) as cluster:
            cluster.adapt(minimum_jobs=JOBS, maximum_jobs=JOBS, interval="2s")
            with open_bridge(
                "espresso",
                store=folder / "results.db",
                scheduler=cluster.scheduler_address,
                timeout=120.0,
                pseudopotentials=pseudo,
                band_gap_cutoff=12.0,
            ) as bridge:
                tickets = bridge.submit(silicons())
                answers = []
                while len(answers) < KILL_AFTER:
                    answers += bridge.collect(wait=START_SECONDS)
                job = shell("squeue", "-h", "-t", "running", "-o", "%i").split()[0]
                shell("scancel", "--signal=KILL", "--full", job)
                print(f"killed job {job} after {len(answers)} results", flush=True)
                answers += bridge.collect(wait=None)
                stats = bridge.stats()
            jobs = shell("squeue", "-h", "-t", "all", "-o", "%i %T").splitlines()
        stored = len(Store(folder / "results.db"))
        print("jobs:", *jobs, sep="\n  ")
        print("gaps:", *(f"{answer.result.value:.3f}" for answer in sorted(answers)))
    delivered = {answer.ticket for answer in answers if answer.result.status == Status.OK}
    print(json.dumps({"delivered": len(delivered), "stored": stored, "calls": stats.calls, "failed": stats.failures}))
    return int(delivered != set(tickets) or stored != CRYSTALS)


if __name__ == "__main__":
    sys.exit(main())
