"""One store on an NFS folder, written by two hosts at once: nothing may be lost, doubled or damaged.

The hosts are Linux kernels of their own (User Mode Linux on this machine's files), each with a network card to this
machine, where NFS-Ganesha serves a folder by NFS 4.1. So locks go over the network, as they do between real hosts. Each
host evaluates the same crystals in an order of its own, by a bridge with an engine that answers at once; then the store
is checked here. Needs root and the packages of Debian, and takes about two minutes:

    apt-get install user-mode-linux kmod iproute2 nfs-common nfs-ganesha nfs-ganesha-vfs
    python tests/cluster/nfs_store.py [--crystals 200]

The last line of the output is one JSON object; the exit status is 0 if everything arrived once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from crystaljax import library
from crystaljax.dft_bridge import Bridge, Request, Store
from crystaljax.dft_bridge.store.verify import verify
from crystaljax.dft_bridge.testing import FakeEngine, fake_value
from crystaljax.status import Status

HOSTS = 2
PORT = 12049
AT_ONCE = 5
"""Crystals that a host asks for at a time, so one or two transactions each."""
BOOT_SECONDS = 600.0
MODULES = Path("/usr/lib/uml/modules")

GANESHA = """
NFS_CORE_PARAM {{ Protocols = 4; NFS_Port = {port}; Enable_NLM = false; Enable_RQUOTA = false; }}
NFSv4 {{ RecoveryBackend = fs; RecoveryRoot = {folder}/recovery; Graceless = true; Minor_Versions = 1; }}
EXPORT {{ Export_Id = 1; Path = {folder}/shared; Pseudo = /shared; Access_Type = RW; Squash = No_Root_Squash;
    SecType = sys; Protocols = 4; Transports = TCP; FSAL {{ Name = VFS; }} }}
"""
INIT = """#!/bin/bash
# Process 1 of host {host}; sees this machine's files, and the shared folder by NFS only.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root OMP_NUM_THREADS=1 JAX_PLATFORMS=cpu PYTHONPATH={path}
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs tmpfs /mnt
export TMPDIR=/mnt
ip link set lo up; ip address add 10.99.{host}.2/24 dev vec0; ip link set vec0 up
modprobe -d {folder} nfsv4 && mkdir /mnt/shared &&
    mount -t nfs4 -o port={port},vers=4.1 10.99.{host}.1:/shared /mnt/shared && grep nfs4 /proc/mounts &&
    {python} {script} --host {host} --crystals {crystals}
umount /mnt/shared; sleep 1; echo o > /proc/sysrq-trigger; sleep 60
"""


def crystals(count: int) -> list[Request]:
    """Distinct crystals, the same for all hosts."""
    skeleton = library.benchmark("C1")
    return [Request.of(skeleton, [6 + i // 80, 10 + i % 80, 8, 8, 8], "band_gap") for i in range(count)]


def be_a_host(host: int, count: int) -> None:
    """What runs on each host."""
    shared = Path("/mnt/shared")
    requests = crystals(count)
    random.Random(host).shuffle(requests)
    # Both begin at the same time, for locks to matter.
    (shared / f"ready-{host}").touch()
    while len(list(shared.glob("ready-*"))) < HOSTS:
        time.sleep(0.1)
    start, given = time.monotonic(), {}
    with Bridge(FakeEngine(), shared / "results.db", executor=ThreadPoolExecutor(1)) as bridge:
        for first in range(0, count, AT_ONCE):
            some = requests[first : first + AT_ONCE]
            for request, result in zip(some, bridge.evaluate(some), strict=True):
                if result.status == Status.OK:
                    given[str(request.numbers)] = result.value
        calls = bridge.stats().calls
    told = {"given": given, "calls": calls, "seconds": round(time.monotonic() - start, 1)}
    (shared / f"host-{host}.json").write_text(json.dumps(told))


@contextlib.contextmanager
def nfs_server(folder: Path) -> Iterator[None]:
    """Ganesha, and a network card for each host."""
    for name in ("recovery", "shared", "lib"):
        (folder / name).mkdir()
    (folder / "lib" / "modules").symlink_to(MODULES)  # where modprobe looks
    conf = folder / "ganesha.conf"
    conf.write_text(GANESHA.format(folder=folder, port=PORT))
    Path("/var/run/ganesha").mkdir(exist_ok=True)
    command = ["ganesha.nfsd", "-F", "-f", str(conf), "-L", f"{folder}/ganesha.log", "-p", f"{folder}/ganesha.pid"]
    with contextlib.ExitStack() as stack:
        for host in range(1, HOSTS + 1):
            card = card_of(host)
            subprocess.run(["ip", "tuntap", "add", card, "mode", "tap"], check=True)
            stack.callback(subprocess.run, ["ip", "link", "delete", card], check=True)
            subprocess.run(["ip", "address", "add", f"10.99.{host}.1/24", "dev", card], check=True)
            subprocess.run(["ip", "link", "set", card, "up"], check=True)
        server = subprocess.Popen(command)
        stack.callback(server.wait)
        stack.callback(server.kill)
        time.sleep(3.0)
        if server.poll() is not None:
            raise RuntimeError(f"ganesha.nfsd ended: {(folder / 'ganesha.log').read_text()[-2000:]}")
        yield


def card_of(host: int) -> str:
    return f"nfstest{host}"


def boot(folder: Path, host: int, count: int) -> subprocess.Popen:
    """Start a host; it goes off by itself."""
    init = folder / f"init-{host}.sh"
    init.write_text(
        INIT.format(
            host=host,
            port=PORT,
            path=os.pathsep.join(filter(None, sys.path)),
            folder=folder,
            python=sys.executable,
            script=Path(__file__).resolve(),
            crystals=count,
        )
    )
    command = ["linux.uml", "quiet", "mem=2500M", "rootfstype=hostfs", "rootflags=/", "ro", "init=/bin/bash"]
    command += [f"vec0:transport=tap,ifname={card_of(host)},depth=128,gro=1", "con=null", "con0=null,fd:1"]
    with open(folder / f"console-{host}", "w") as console:
        return subprocess.Popen(
            [*command, "--", str(init)], stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crystals", type=int, default=200)
    parser.add_argument("--host", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.host is not None:
        be_a_host(options.host, options.crystals)
        return 0
    with tempfile.TemporaryDirectory(prefix="nfs-store-") as name, nfs_server(Path(name)):
        folder, shared = Path(name), Path(name, "shared")
        hosts = [boot(folder, host, options.crystals) for host in range(1, HOSTS + 1)]
        for process in hosts:
            process.wait(BOOT_SECONDS)
        told = {}
        for host in range(1, HOSTS + 1):
            answer = shared / f"host-{host}.json"
            if not answer.exists():
                print((folder / f"console-{host}").read_text()[-3000:])
                raise RuntimeError(f"host {host} did not finish")
            told[host] = json.loads(answer.read_text())
        requests = crystals(options.crystals)
        store = Store(shared / "results.db")
        stored = len(store)
        with Bridge(FakeEngine(), store, executor=ThreadPoolExecutor(1)) as bridge:
            results = bridge.evaluate(requests)
            again = bridge.stats().calls
        wrong = sum(
            {str(r.numbers): fake_value(r.numbers) for r in requests} != answer["given"] for answer in told.values()
        )
        wrong += sum(result.value != fake_value(r.numbers) for r, result in zip(requests, results, strict=True))
        damage = verify(store).problems
    summary = {
        "crystals": len(requests),
        "stored": stored,
        "results_lost": again + wrong,
        "duplicates": stored - len(requests),
        "damage": len(damage),
        "calls": [answer["calls"] for answer in told.values()],
        "seconds": [answer["seconds"] for answer in told.values()],
    }
    print(json.dumps(summary))
    return int(any(summary[name] for name in ("results_lost", "duplicates", "damage")))


if __name__ == "__main__":
    sys.exit(main())
