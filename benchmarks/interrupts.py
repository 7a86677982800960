"""How long Ctrl-C takes on a machine that has other things to do: SIGINT to trainings at moments all over their start.

Each training is a process of its own, on DFT by fake engines in two worker processes, and gets one SIGINT. It must end,
workers included; one that has not after ``--limit`` seconds is shown with the stacks of all its threads, and killed.
Busy processes of the same priority make the load.

    python -m benchmarks interrupts [--signals 8] [--load 4] [--latest 40] [--limit 60]

The last line of the output is one JSON object; the exit status is 1 unless all trainings have ended.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

import benchmarks


def child(folder: str) -> None:
    """A training of many updates on slow fake DFT, as the command line runs it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    print("begun", flush=True)
    from crystaljax.agents import runner
    from crystaljax.agents.config import RunConfig
    from crystaljax.agents.hyperparameters import PPOConfig
    from crystaljax.dft_bridge import Bridge
    from crystaljax.dft_bridge.testing import FakeEngine

    algorithm = PPOConfig(lanes=16, steps=5)
    config = RunConfig(task="BandGap-C1-v0", algorithm=algorithm, network="mlp", engine="fake", episodes=100_000)
    engine = FakeEngine(sleep=0.2, log=str(Path(folder, "calculations")))
    with Bridge(engine, Path(folder, "results.db"), workers=2) as bridge:
        result = runner.train(config, bridge, Path(folder, "run"))
    print("interrupted" if result.interrupted else "finished", flush=True)


def one(folder: Path, delay: float, limit: float) -> float | None:
    """Seconds from the signal to the end; ``None`` if it was killed."""
    command = benchmarks.command("interrupts", "--child", str(folder))
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    log = folder / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, cwd=benchmarks.ROOT, env=environment, stdout=subprocess.PIPE, stderr=file, text=True
        )
        process.stdout.readline()
        time.sleep(delay)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # its threads say where they are
            process.communicate()
            print(log.read_text(), flush=True)
            return None
        took = time.monotonic() - begin
    _, left = psutil.wait_procs(family, timeout=10)
    if left:
        raise AssertionError(f"{len(left)} processes have outlived a training that was interrupted")
    return took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=8)
    parser.add_argument("--load", type=int, default=4, help="busy processes (default: 4)")
    parser.add_argument("--latest", type=float, default=40.0, metavar="S", help="seconds after the start (default: 40)")
    parser.add_argument("--limit", type=float, default=60.0, metavar="S", help="seconds to the end (default: 60)")
    options = parser.parse_args()
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.load)]
    took: list[float] = []
    try:
        for number in range(options.signals):
            delay = options.latest * (number + 0.5) / options.signals
            with tempfile.TemporaryDirectory() as folder:
                seconds = one(Path(folder), delay, options.limit)
            print(
                f"SIGINT after {delay:.1f} s: {f'ended {seconds:.1f} s later' if seconds else 'not ended'}", flush=True
            )
            took += [seconds] * (seconds is not None)
    finally:
        for process in load:
            process.kill()
            process.wait()
    slowest = round(max(took, default=0.0), 1)
    print(json.dumps({"signals": options.signals, "not_ended": options.signals - len(took), "slowest_s": slowest}))
    return int(len(took) < options.signals)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        sys.exit(main())
