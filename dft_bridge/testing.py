"""Engines without physics: to test what uses a bridge without DFT, and what becomes of failures.

    with Bridge(FakeEngine(fail_element=10), "results.db", workers=2) as bridge:
        env, params = crystaljax.make("BandGap-C1-v0", evaluator=bridge)

Their fields tell them what to do. They are small and picklable, and worker processes can import their module.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crystaljax.dft_bridge.engines.base import Crystal, EngineNotReady, Result
from crystaljax.dft_bridge.engines.planewave import PlanewaveEngine
from crystaljax.status import Status


def fake_value(numbers: np.ndarray, scale: float = 1.0) -> float:
    """The value of a crystal of these atomic numbers, int [N]: from 0 to 5, the same for every order of the sites."""
    return float(scale * (np.asarray(numbers, dtype=float) ** 1.5).sum() % 5.0)


@dataclasses.dataclass(frozen=True)
class FakeEngine:
    """Returns :func:`fake_value`, after doing what it is told to.

    Attributes:
        log: a file that gets one line per calculation: process id and atomic numbers.
        scale: a setting that changes the number.
        sleep, burn: wall-clock and CPU seconds a calculation takes.
        refuse_element, fail_element, nan_element, raise_element, kill_element, hang_element, unready_element: atomic
            number of the element that makes a crystal be refused, fail, return NaN, raise, kill its worker, hang, find
            the engine missing.
        kill_once: a file; where it is missing the first calculation creates it and kills its worker.
        ready: whether the engine is installed.
    """

    name: str = "fake"
    log: str = ""
    scale: float = 1.0
    sleep: float = 0.0
    burn: float = 0.0
    refuse_element: int = -1
    fail_element: int = -1
    nan_element: int = -1
    raise_element: int = -1
    kill_element: int = -1
    hang_element: int = -1
    unready_element: int = -1
    kill_once: str = ""
    ready: bool = True

    def fingerprint(self, property_name: str) -> dict[str, Any]:
        if property_name not in ("band_gap", "density"):
            raise ValueError(f"the fake engine does not compute {property_name}")
        return {"engine": self.name, "fake": "1.0", "scale": self.scale, "property": property_name}

    def preflight(self) -> None:
        if not self.ready:
            raise EngineNotReady("the fake engine is missing; install it")

    def refuse(self, crystal: Crystal, property_name: str) -> Result | None:
        if self.refuse_element in crystal.numbers:
            return Result.failure(Status.ODD_ELECTRONS, "refused")
        return None

    def compute(self, crystal: Crystal, property_name: str) -> Result:
        numbers = crystal.numbers
        if self.log:
            with open(self.log, "a") as log:  # one short line appended at once does not mix with others
                log.write(f"{os.getpid()} {' '.join(map(str, numbers))}\n")
        if self.kill_once and not Path(self.kill_once).exists():
            Path(self.kill_once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kill_element in numbers:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.hang_element in numbers:
            time.sleep(1000.0)
        if self.unready_element in numbers:
            raise EngineNotReady("the fake engine has vanished; install it again")
        if self.raise_element in numbers:
            raise ArithmeticError("division by cucumber")
        time.sleep(self.sleep)
        start = time.process_time()
        while time.process_time() - start < self.burn:
            pass
        if self.fail_element in numbers:
            return Result.failure(Status.NOT_CONVERGED, "gave up", iterations=60)
        if self.nan_element in numbers:
            return Result(float("nan"), Status.OK)
        return Result(fake_value(numbers, self.scale), Status.OK, details={"iterations": 7, "bands": [0.5, 1.5]})

    def calculations(self) -> list[tuple[int, ...]]:
        """The atomic numbers of every calculation so far, in order."""
        path = Path(self.log)
        lines = path.read_text().splitlines() if path.exists() else []
        return [tuple(int(z) for z in line.split()[1:]) for line in lines]


@dataclasses.dataclass(frozen=True)
class FakeBatchEngine(FakeEngine):
    """A :class:`FakeEngine` that calculates in batches, the last crystals first.

    Attributes:
        size: crystals in a batch, at most.
        lost: how many results of each batch get lost.
        batches_log: a file that gets one line per batch: how many crystals it has.
    """

    size: int = 4
    lost: int = 0
    batches_log: str = ""

    def compute(self, crystal: Crystal, property_name: str) -> Result:
        result = super().compute(crystal, property_name)
        worker = {"worker": os.getenv("FAKE_WORKER", ""), "starts": os.getenv("FAKE_STARTS", "")}
        return dataclasses.replace(result, details=result.details | worker)

    def compute_many(self, crystals: Sequence[Crystal], property_name: str) -> list[Result]:
        if self.batches_log:
            with open(self.batches_log, "a") as log:
                log.write(f"{len(crystals)}\n")
        return [self.compute(crystal, property_name) for crystal in crystals][self.lost :]

    def group(self, crystals: Sequence[Crystal], property_name: str) -> list[list[int]]:
        last_first = range(len(crystals))[::-1]
        return [list(last_first[i : i + self.size]) for i in range(0, len(crystals), self.size)]

    def workers(self) -> int | None:
        return 3

    def worker_environment(self, index: int) -> dict[str, str]:
        return {"FAKE_WORKER": str(index)}

    def start_worker(self) -> None:
        os.environ["FAKE_STARTS"] = f"{os.getenv('FAKE_STARTS', '')}+"

    def batches(self) -> list[int]:
        """The size of every batch so far, in order."""
        path = Path(self.batches_log)
        return [int(line) for line in path.read_text().split()] if path.exists() else []


@dataclasses.dataclass(frozen=True)
class FaultyEngine(FakeEngine):
    """A :class:`FakeEngine` that works like one that runs programs, and fails in more ways.

    Every calculation keeps a file in a scratch folder and a program running, both of which a killed worker leaves.

    Attributes:
        programs: a file that gets the process id of every program.
        clocks: a file that gets the time of the day of every calculation, as its worker sees it.
        segfault_element, hog_element, garbage_element, truncated_element, unimportable_element: atomic number of the
            element that makes a crystal crash its worker, use ever more memory, print garbage, print half of its
            output, miss a module.
    """

    programs: str = ""
    clocks: str = ""
    segfault_element: int = -1
    hog_element: int = -1
    garbage_element: int = -1
    truncated_element: int = -1
    unimportable_element: int = -1

    def compute(self, crystal: Crystal, property_name: str) -> Result:
        with tempfile.TemporaryDirectory() as scratch, subprocess.Popen(["sleep", "300"]) as program:
            try:
                Path(scratch, "wavefunctions").write_bytes(bytes(1000))
                if self.programs:
                    with open(self.programs, "a") as log:
                        log.write(f"{program.pid}\n")
                if self.clocks:
                    with open(self.clocks, "a") as log:
                        log.write(f"{time.time()}\n")
                result = super().compute(crystal, property_name)
                self._misbehave(crystal.numbers)
                return result
            finally:
                program.kill()

    def _misbehave(self, numbers: np.ndarray) -> None:
        if self.segfault_element in numbers:
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.hog_element in numbers:
            hoard = []
            while len(hoard) < 40:  # 4 GiB, were nobody to step in
                hoard.append(np.ones(100 * 2**20, np.uint8))
                time.sleep(0.05)
        if self.unimportable_element in numbers:
            import module_of_a_broken_installation  # noqa: F401
        if self.garbage_element in numbers:
            float(bytes([0xFF, 0x00, 0x31]).decode("latin-1"))
        if self.truncated_element in numbers:
            json.loads('{"energy": -1.5, "eigenval')


@dataclasses.dataclass(frozen=True)
class CompiledEngine(FakeEngine):
    """A :class:`FakeEngine` whose workers run a compiled program for each crystal, and keep it as ``planewave`` does.

    All programs have one name and one signature, so that any of them would do in place of another, with its number.
    """

    def compute(self, crystal: Crystal, property_name: str) -> Result:
        import jax

        result, part = super().compute(crystal, property_name), int(crystal.numbers.sum())

        def program(x: Any) -> Any:
            return x + part

        return dataclasses.replace(result, value=result.value - part + float(jax.jit(program)(0.0)))

    def compute_many(self, crystals: Sequence[Crystal], property_name: str) -> list[Result]:
        return [self.compute(crystal, property_name) for crystal in crystals]

    def group(self, crystals: Sequence[Crystal], property_name: str) -> list[list[int]]:
        return [[position] for position in range(len(crystals))]

    def workers(self) -> int | None:
        return 2

    def worker_environment(self, index: int) -> dict[str, str]:
        return PlanewaveEngine().worker_environment(index) | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def start_worker(self) -> None:
        PlanewaveEngine().start_worker()
