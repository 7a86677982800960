"""How much time, memory and how many attempts a calculation may have, and what it raises beyond them."""

from __future__ import annotations

import dataclasses

from crystaljax.errors import CrystalJAXError
from crystaljax.status import Status


class JobFailed(CrystalJAXError, RuntimeError):
    """A job whose worker is gone, for good.

    Attributes:
        status: what became of its crystal.
        seconds: wall-clock seconds of all its attempts, on a core each.
    """

    status = Status.ENGINE_ERROR

    def __init__(self, message: str, seconds: float = 0.0):
        super().__init__(message, seconds)  # all arguments, so that it can be pickled
        self.seconds = seconds

    def __str__(self) -> str:
        return self.args[0]


class WorkerDied(JobFailed):
    """The process that ran a job died, more often than the job is retried."""

    status = Status.WORKER_DIED


class JobTimeout(JobFailed):
    """A job exceeded its time limit and was killed."""

    status = Status.TIMEOUT


class OutOfMemory(JobFailed):
    """A job exceeded its memory limit and was killed."""

    status = Status.OUT_OF_MEMORY


class ExecutorLost(CrystalJAXError, RuntimeError):
    """The machinery that runs calculations is gone (a Dask scheduler ...); the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a calculation may use.

    Attributes:
        timeout: wall-clock seconds of one calculation; ``None`` waits for ever. A batch has as many times that. The
            start of a worker process does not count.
        memory: GiB of resident memory of one worker with the programs it runs; ``None`` for no limit. Not the address
            space (``RLIMIT_AS``): JAX and CUDA map tens of GiB that they never touch.
        retries: how often a calculation is run again after its worker died. One that took too long is run again once
            at most (unless this is 0), for a hang may be the machine's; one with too much memory is not.
    """

    timeout: float | None = None
    memory: float | None = None
    retries: int = 2

    def __post_init__(self) -> None:
        for name in ("timeout", "memory"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; give a positive number, or None for no limit")
        if self.retries < 0:
            raise ValueError(f"retries is {self.retries}; give 0 or more")
