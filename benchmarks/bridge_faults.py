"""What the bridge loses when things go wrong: nothing.

Each scenario runs crystals through real worker processes and a real store while something breaks, then goes on as a
user would, and compares with the run that nothing happened to:

- *lost*: answers that had been given, and are not in the store or were calculated again; wrong answers;
- *duplicates*: rows of the store with the same key;
- *orphans*: processes that outlived the run, of workers and of the programs they ran, and scratch folders.

    python -m benchmarks bridge-faults [--kills 50] [--only kill_main ...]

The last line of the output is one JSON object; the exit status is 1 unless all of it is zero.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import psutil

import benchmarks
from crystaljax import library
from crystaljax.dft_bridge import Bridge, Limits, Request
from crystaljax.dft_bridge.engines.base import EngineNotReady, Result
from crystaljax.dft_bridge.store import Store, StoreError
from crystaljax.dft_bridge.store.repair import repair
from crystaljax.dft_bridge.store.schema import SCHEMA
from crystaljax.dft_bridge.store.verify import Findings, verify
from crystaljax.dft_bridge.testing import CompiledEngine, FakeEngine, FaultyEngine, fake_value
from crystaljax.status import Status

C1 = library.benchmark("C1")
CARBON, NEON = 6, 10
CRYSTALS = 30
WORKERS = 2
DEATH_SECONDS = 10.0
"""Within it, workers and programs must have ended after the main process."""
INTERRUPT_SECONDS = 5.0
PAGE = 4096
"""Bytes, of SQLite and of most disks."""


class Skipped(Exception):
    """A scenario cannot run here; the message says why."""


@dataclasses.dataclass
class Damage:
    """What a scenario has cost."""

    lost: int = 0
    duplicates: int = 0
    orphans: int = 0

    def __add__(self, other: Damage) -> Damage:
        return Damage(self.lost + other.lost, self.duplicates + other.duplicates, self.orphans + other.orphans)


def some(count: int = CRYSTALS, element: int = CARBON) -> list[Request]:
    """Requests for distinct crystals that hold the element."""
    return [Request.of(C1, [element, 20 + i, 8, 8, 8], "band_gap") for i in range(count)]


class Scene:
    """A folder with a store and the logs of an engine."""

    def __init__(self, folder: Path):
        self.folder, self.store = folder, folder / "results.db"
        self.answers, self.programs = folder / "answers", folder / "programs"
        self.scratch = folder / "scratch"
        self.scratch.mkdir()

    def engine(self, **faults: object) -> FaultyEngine:
        return FaultyEngine(log=str(self.folder / "calculations"), programs=str(self.programs), **faults)

    def bridge(self, engine: FakeEngine, **options: object) -> Bridge:
        return Bridge(engine, self.store, WORKERS, **options)

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """Scratch folders of workers are made in ours."""
        with mock.patch.object(tempfile, "tempdir", str(self.scratch)):
            yield

    def start(self, sleep: float, count: int = CRYSTALS, environment: dict[str, str] | None = None) -> subprocess.Popen:
        """Another process that evaluates crystals and notes every answer it is given; it has begun on return."""
        command = benchmarks.command("bridge_faults", "--child", str(self.folder), str(sleep), str(count))
        environment = {**os.environ, "TMPDIR": str(self.scratch), **(environment or {})}
        process = subprocess.Popen(
            command,
            cwd=benchmarks.ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            stderr=subprocess.DEVNULL,
        )
        process.stdout.readline()
        return process

    def given(self) -> dict[tuple[int, ...], float]:
        """The answers noted so far."""
        lines = self.answers.read_text().splitlines() if self.answers.exists() else []
        complete = [json.loads(line) for line in lines if line.endswith("]")]
        return {tuple(numbers): value for numbers, value in complete}

    def damage(self, given: dict[tuple[int, ...], float], requests: list[Request]) -> Damage:
        """Go on with a new bridge to the end, and compare with a run that nothing happened to."""
        before = Counter(self.engine().calculations())
        with Bridge(self.engine(), self.store, executor=ThreadPoolExecutor(1)) as bridge:
            results = bridge.evaluate(requests)
        after = Counter(self.engine().calculations())
        wrong = sum(as_given(requests, results).get(q.numbers) != fake_value(q.numbers) for q in requests)
        again = sum(after[numbers] > before[numbers] for numbers in given)
        changed = sum(value != fake_value(numbers) for numbers, value in given.items())
        return Damage(wrong + again + changed, self.duplicates(), self.orphans())

    def duplicates(self) -> int:
        with contextlib.closing(sqlite3.connect(self.store)) as database:
            query = "SELECT COUNT(value) - COUNT(DISTINCT value) FROM text_key_values WHERE key='key'"
            return database.execute(query).fetchone()[0]

    def orphans(self) -> int:
        """Processes and scratch folders that are left, once they had time to go."""
        logs = [self.folder / "calculations", self.programs]
        pids = {int(line.split()[0]) for log in logs if log.exists() for line in log.read_text().splitlines()}
        deadline = time.monotonic() + DEATH_SECONDS
        while True:
            left = sum(map(alive, pids - {os.getpid()})) + len(list(self.scratch.glob("crystaljax-*")))
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.1)


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def child(folder: str, sleep: str, count: str) -> None:
    """What :meth:`Scene.start` runs."""
    scene = Scene.__new__(Scene)
    scene.folder, scene.store, scene.programs = Path(folder), Path(folder, "results.db"), Path(folder, "programs")
    engine = dataclasses.replace(scene.engine(sleep=float(sleep)), clocks=str(scene.folder / "clocks"))
    requests = some(int(count))
    with scene.bridge(engine, limits=Limits(timeout=60.0)) as bridge, open(Path(folder, "answers"), "a") as answers:
        bridge.submit(requests)
        print("begun", flush=True)
        while bridge.outstanding:
            for ticket, result in bridge.collect(wait=1.0):
                answers.write(json.dumps([requests[ticket].numbers, result.value]) + "\n")
                answers.flush()


def as_given(requests: list[Request], results: list[Result]) -> dict[tuple[int, ...], float]:
    return {q.numbers: r.value for q, r in zip(requests, results, strict=True) if r.status == Status.OK}


def expect(condition: bool, what: str) -> None:
    """A scenario must have happened as it says, or it shows nothing."""
    if not condition:
        raise AssertionError(what)


def kill_worker(scene: Scene, kills: int) -> Damage:
    """kill -9 of a worker, several times."""
    requests = some()
    with scene.here(), scene.bridge(scene.engine(sleep=0.1), limits=Limits(retries=kills)) as bridge:
        stop = threading.Event()
        killed = []

        def kill() -> None:
            while not stop.wait(0.4) and len(killed) < kills:
                for pid in bridge._executor.processes()[:1]:
                    killed.append(pid)
                    os.kill(pid, signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        results = bridge.evaluate(requests)
        stop.set()
        thread.join()
    expect(len(killed) > 0, "no worker was killed")
    return scene.damage(as_given(requests, results), requests)


def kill_main(scene: Scene, kills: int) -> Damage:
    """kill -9 of the main process, at a random moment."""
    total = Damage()
    for kill in range(kills):
        folder = scene.folder / f"kill-{kill}"
        folder.mkdir()
        one = Scene(folder)
        process = one.start(sleep=0.1)
        time.sleep(random.Random(kill).uniform(0.0, 2.5))
        process.kill()
        process.communicate()
        total += one.damage(one.given(), some())
        shutil.rmtree(folder)
    return total


def ctrl_c(scene: Scene, kills: int) -> Damage:
    """Ctrl-C: the end within five seconds."""
    process = scene.start(sleep=1.0)
    time.sleep(2.0)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate()
    took = time.monotonic() - start
    print(f"Ctrl-C ended the program after {took:.1f} s", flush=True)
    expect(took < INTERRUPT_SECONDS, f"Ctrl-C took {took:.1f} s; the limit is {INTERRUPT_SECONDS:g}")
    orphans = len(list(scene.scratch.glob("crystaljax-*")))  # none must be left for later
    return scene.damage(scene.given(), some()) + Damage(orphans=orphans)


def one_bad_crystal(scene: Scene, status: Status, limits: Limits = Limits(), **fault: int) -> Damage:  # noqa: B008
    """A crystal that does something to its worker fails alone, for a reason that is kept; other limits try again."""
    requests, bad = some(), some(1, NEON)
    with scene.here(), scene.bridge(scene.engine(**fault), limits=limits) as bridge:
        *results, failure = bridge.evaluate([*requests, *bad])
    expect(failure.status == status, f"{failure.status.name}, not {status.name}: {failure.message}")
    with scene.bridge(scene.engine(), limits=limits) as bridge:
        expect(bridge.evaluate(bad)[0].status == status, "the failure was not kept")
    damage = scene.damage(as_given(requests, results), requests)
    if "limits" in failure.details:
        with scene.bridge(scene.engine(), limits=Limits(timeout=100.0, memory=50.0)) as bridge:
            expect(bridge.evaluate(bad)[0].status == Status.OK, "other limits did not try again")
    return damage


def hang(scene: Scene, kills: int) -> Damage:
    """A calculation that never ends."""
    return one_bad_crystal(scene, Status.TIMEOUT, Limits(timeout=2.0, retries=1), hang_element=NEON)


def segfault(scene: Scene, kills: int) -> Damage:
    """A calculation that crashes its process."""
    return one_bad_crystal(scene, Status.WORKER_DIED, Limits(retries=1), segfault_element=NEON)


def out_of_memory(scene: Scene, kills: int) -> Damage:
    """A calculation that wants more memory than it may have."""
    return one_bad_crystal(scene, Status.OUT_OF_MEMORY, Limits(memory=0.7), hog_element=NEON)


def garbage(scene: Scene, kills: int) -> Damage:
    """A program that prints garbage."""
    return one_bad_crystal(scene, Status.ENGINE_ERROR, garbage_element=NEON)


def truncated(scene: Scene, kills: int) -> Damage:
    """A program that prints half of its output."""
    return one_bad_crystal(scene, Status.ENGINE_ERROR, truncated_element=NEON)


def not_a_number(scene: Scene, kills: int) -> Damage:
    """A value that is NaN."""
    return one_bad_crystal(scene, Status.INVALID_RESULT, nan_element=NEON)


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of its own."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        raise Skipped("mounting a small file system needs root")
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        raise Skipped(f"no file system could be mounted: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def fill(disk: Path) -> Iterator[None]:
    """Not a byte is free."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    yield
    ballast.unlink()


def full_disk(scene: Scene, kills: int) -> Damage:
    """The disk of the store fills up: one error; once there is space the same program goes on."""
    with small_disk(scene.folder / "disk", 4) as disk:
        scene.store = disk / "results.db"
        requests = some()
        with scene.here(), scene.bridge(scene.engine()) as bridge:
            given = as_given(requests[:5], bridge.evaluate(requests[:5]))
            with fill(disk):
                try:
                    bridge.evaluate(requests)
                    expect(False, "a full disk went unnoticed")
                except StoreError as error:
                    expect("the disk is full" in str(error), str(error))
            given |= as_given(requests, bridge.evaluate(requests))
        again = sum(count > 1 for count in Counter(scene.engine().calculations()).values())
        # What was finished when the disk was full need not be calculated again; what ran then was stopped.
        expect(again <= WORKERS, f"{again} crystals were calculated twice")
        return scene.damage(given, requests)


def full_scratch(scene: Scene, kills: int) -> Damage:
    """The disk that calculations work on fills up: one error, not a failure of each crystal."""
    with small_disk(scene.folder / "disk", 1) as scene.scratch, scene.here(), scene.bridge(scene.engine()) as bridge:
        requests = some()
        given = as_given(requests[:5], bridge.evaluate(requests[:5]))
        with fill(scene.scratch):
            try:
                bridge.evaluate(requests)
                expect(False, "a full disk went unnoticed")
            except EngineNotReady as error:
                expect("TMPDIR" in str(error), str(error))
        given |= as_given(requests, bridge.evaluate(requests))
        bridge.close()
        return scene.damage(given, requests)


def read_only(scene: Scene, kills: int) -> Damage:
    """A store that cannot be written: one error before anything is calculated."""
    with small_disk(scene.folder / "disk", 4) as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with scene.here(), Bridge(scene.engine(), disk / "results.db", WORKERS) as bridge:
            try:
                bridge.evaluate(some())
                expect(False, "a read-only store went unnoticed")
            except StoreError:
                pass
    expect(not scene.engine().calculations(), "something was calculated for nothing")
    return scene.damage({}, some())


def two_processes(scene: Scene, kills: int) -> Damage:
    """Two programs on one store, which want the same crystals."""
    both = [scene.start(sleep=0.05) for _ in range(2)]
    for process in both:
        process.communicate()
    expect(len(scene.given()) == CRYSTALS, "answers are missing")
    return scene.damage(scene.given(), some())


JUMPING_CLOCK = """
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += now->tv_sec * 2654435761u % 200000 - 100000;
    return failed;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *now) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (now) *now = precise.tv_sec;
    return precise.tv_sec;
}
"""
"""A library that is loaded before C's own: the clock of the day jumps every second, up to a day back and forth. Waits
are the kernel's and follow the true clock, so one that is to end at a time of the day ends at once or tomorrow, as it
does when the clock is set. Nobody can set the monotonic clock, so it goes on."""


def jumping_clock(folder: Path) -> dict[str, str]:
    """Environment of processes with :data:`JUMPING_CLOCK`."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        raise Skipped("a clock that jumps needs Linux and a C compiler")
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(JUMPING_CLOCK)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return {"LD_PRELOAD": str(library)}


def clock_jump(scene: Scene, kills: int) -> Damage:
    """The clock of the machine jumps, for the main process and for its workers."""
    process = scene.start(0.1, environment=jumping_clock(scene.folder))
    process.communicate()
    expect(process.returncode == 0 and len(scene.given()) == CRYSTALS, "answers are missing")
    clocks = [float(line) for line in (scene.folder / "clocks").read_text().split()]
    expect(max(clocks) - min(clocks) > 1e4, "the clock of the workers did not jump")
    return scene.damage(scene.given(), some())


def corrupted_page(scene: Scene, kills: int) -> Damage:
    """A page of the store is overwritten: a clear error, or the right answers. `crystaljax store repair` saves all.

    So it does when it is a page of the journal, for then the store has all results.
    """
    requests = some()
    with scene.here(), scene.bridge(scene.engine()) as bridge:
        given = as_given(requests, bridge.evaluate(requests))
    store, lost, noticed, from_file = scene.store, 0, 0, []
    journal = Store(store).database.journal.path
    sound = {path: path.read_bytes() for path in (store, journal)}
    damages = [(path, page) for path, content in sound.items() for page in range(-(-len(content) // PAGE))]
    for damaged, page in damages:
        for rest in scene.folder.glob(f"{store.name}*"):
            rest.unlink()
        for path, content in sound.items():
            path.write_bytes(overwritten(content, page) if path == damaged else content)
        before = len(scene.engine().calculations())
        try:
            with Bridge(scene.engine(), store, executor=ThreadPoolExecutor(1)) as bridge:
                bridge.evaluate(requests)
        except StoreError as error:
            expect(damaged == store and "it is damaged" in str(error), str(error))
            noticed += 1
        findings, _ = repair(Store(store))
        from_file += [findings.good] * (damaged == store)
        with Bridge(scene.engine(), store, executor=ThreadPoolExecutor(1)) as bridge:
            lost += as_given(requests, bridge.evaluate(requests)) != given
        lost += len(scene.engine().calculations()) - before
        lost += verify(Store(store)) != Findings(SCHEMA, CRYSTALS)
    expect(noticed > 0, "no damage was noticed")
    print(
        f"{noticed} of {len(from_file)} pages give a clear error; the file alone still has {min(from_file)} to "
        f"{max(from_file)} of {CRYSTALS}, {sum(from_file) / len(from_file):.1f} on average; with its journal all",
        flush=True,
    )
    return scene.damage(given, requests) + Damage(lost=lost)


def overwritten(content: bytes, page: int) -> bytes:
    """A file with random bytes on a page."""
    start, end = PAGE * page, min(PAGE * (page + 1), len(content))
    return content[:start] + random.Random(page).randbytes(end - start) + content[end:]


def damaged_programs(scene: Scene, kills: int) -> Damage:
    """Compiled programs on disk under the names of others, cut off and overwritten: right numbers, and sound again."""
    requests, wrong = some(6), 0
    engine = CompiledEngine(log=str(scene.folder / "calculations"))
    environment = {"XDG_CACHE_HOME": str(scene.folder / "cache"), "JAX_COMPILATION_CACHE_DIR": ""}

    def programs() -> dict[Path, tuple[int, bytes]]:
        files = (path for path in (scene.folder / "cache").rglob("*") if path.is_file())
        return {path: (path.stat().st_ino, path.read_bytes()) for path in sorted(files)}

    def calculate(name: str) -> int:
        with scene.here(), Bridge(engine, scene.folder / name, WORKERS) as bridge:
            results = bridge.evaluate(requests)
        return sum(as_given(requests, results).get(q.numbers) != fake_value(q.numbers) for q in requests)

    with mock.patch.dict(os.environ, environment):
        wrong += calculate("cold.db")
        sound = programs()
        expect(len(sound) >= len(requests), f"only {len(sound)} programs were kept")
        paths = list(sound)
        for path, other in zip(paths, [*paths[1:], paths[0]], strict=True):
            path.write_bytes(sound[other][1])
        paths[0].write_bytes(sound[paths[0]][1][:100])
        paths[1].write_bytes(overwritten(sound[paths[1]][1], 0))
        wrong += calculate("damaged.db")
        again = programs()
        wrong += calculate("healed.db")
        expect({p: i for p, (i, _) in programs().items()} == {p: i for p, (i, _) in again.items()}, "compiled again")
        expect(set(again) == set(sound), "programs are missing")
    with Bridge(scene.engine(), scene.store, executor=ThreadPoolExecutor(1)) as bridge:
        bridge.evaluate(requests)
    return Damage(lost=wrong, orphans=scene.orphans())


def broken_installation(scene: Scene, kills: int) -> Damage:
    """A module that workers cannot import for a while: one error, and no crystal has failed for ever."""
    requests = some()
    with scene.here(), scene.bridge(scene.engine(unimportable_element=CARBON)) as bridge:
        try:
            bridge.evaluate(requests)
            expect(False, "a missing module went unnoticed")
        except EngineNotReady as error:
            expect("cannot import" in str(error), str(error))
    expect(len(Store(scene.store)) == 0, "a failure of the installation was stored")
    return scene.damage({}, requests)


def repaired_while_written(scene: Scene, kills: int) -> Damage:
    """`crystaljax store repair` and `verify`, over and over, while another program writes to the store."""
    process, findings, repairs = scene.start(sleep=0.05), [], 0
    while process.poll() is None:
        with contextlib.suppress(StoreError):  # the first has to wait for the store
            findings.append(verify(Store(scene.store, create=False)))
            repair(Store(scene.store, create=False))
            repairs += 1
        time.sleep(0.05)
    process.communicate()
    expect(process.returncode == 0 and len(scene.given()) == CRYSTALS, "answers are missing")
    expect(repairs > 1, "the program had ended before")
    expect(not any(f.problems or f.only_in_journal for f in findings), "a sound store was to be repaired")
    expect(verify(Store(scene.store)) == Findings(SCHEMA, CRYSTALS), "the store is not sound")
    return scene.damage(scene.given(), some())


def full_database(scene: Scene, kills: int) -> Damage:
    """Only the database cannot grow any more: one error each time, and the journal repeats nothing."""
    requests = some()
    with Bridge(scene.engine(), scene.store, executor=ThreadPoolExecutor(1)) as bridge:
        given = as_given(requests[:5], bridge.evaluate(requests[:5]))
        journal, before = bridge.store.database.journal.path, resource.getrlimit(resource.RLIMIT_FSIZE)
        size = journal.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (scene.store.stat().st_size, before[1]))
        try:
            for _ in range(3):
                try:
                    bridge.evaluate(requests)
                    expect(False, "a full database went unnoticed")
                except StoreError:
                    expect(journal.stat().st_size == size, "the journal repeats what could not be stored")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        given |= as_given(requests, bridge.evaluate(requests))
    expect(verify(Store(scene.store)) == Findings(SCHEMA, CRYSTALS), "the store is not sound")
    expect(len(journal.read_text().splitlines()) == CRYSTALS, "the journal repeats rows")
    return scene.damage(given, requests)


def damaged_run(scene: Scene, kills: int) -> Damage:
    """One line of a run's files is damaged: a resume stops, names the line and leaves every file as it is.

    With the file restored from a copy it goes on, and calculates nothing again. A last line cut short is no damage.
    """
    # Only here, as other scenarios need no JAX.
    from crystaljax.agents.config import RunConfig
    from crystaljax.agents.hyperparameters import RandomConfig
    from crystaljax.agents.runner import train
    from crystaljax.run_folder import CRYSTALS, EPISODES, METRICS, RunFolderError

    algorithm = RandomConfig(lanes=4, steps=2)
    config = RunConfig(task="BandGap-RocksaltAB-v0", network="mlp", algorithm=algorithm, episodes=32)
    folder = scene.folder / "run"

    def go_on(resume: bool = True) -> int:
        with Bridge(scene.engine(), scene.store, executor=ThreadPoolExecutor(1)) as bridge:
            return train(config, bridge, folder, resume=resume).ledger.episodes

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    episodes = go_on(resume=False)
    calculated, sound, lost = len(scene.engine().calculations()), contents(), 0
    expect(episodes == config.episodes and len(list((folder / CRYSTALS).glob("*.cif"))) > 0, "the run has no results")
    for path in (folder / EPISODES, folder / METRICS):
        lines = sound[path].splitlines(keepends=True)
        for number in sorted({1, 5, len(lines) // 2, len(lines) - 1} & set(range(1, len(lines)))):
            broken = [lines[number - 1][: len(lines[number - 1]) // 2] + b"\n"], []
            for instead in broken:  # half of it, nothing of it
                path.write_bytes(b"".join([*lines[: number - 1], *instead, *lines[number:]]))
                before = contents()
                try:
                    go_on()
                    expect(False, f"line {number} of {path.name} is damaged, and nobody said so")
                except RunFolderError as error:
                    expect(f"{path.name}, line {number} " in str(error), str(error))
                lost += contents() != before
                path.write_bytes(sound[path])
        path.write_bytes(sound[path] + lines[0][:20])
        lost += go_on() != episodes or path.read_bytes() != sound[path]
    after = contents()
    lost += sum(after.get(path) != content for path, content in sound.items() if path.suffix in (".cif", ".jsonl"))
    lost += len(scene.engine().calculations()) - calculated
    return Damage(lost=lost, duplicates=scene.duplicates(), orphans=scene.orphans())


SCENARIOS: dict[str, Callable[[Scene, int], Damage]] = {
    scenario.__name__: scenario
    for scenario in (
        kill_worker,
        kill_main,
        ctrl_c,
        hang,
        segfault,
        out_of_memory,
        garbage,
        truncated,
        not_a_number,
        full_disk,
        full_scratch,
        read_only,
        two_processes,
        clock_jump,
        corrupted_page,
        damaged_programs,
        broken_installation,
        repaired_while_written,
        full_database,
        damaged_run,
    )
}


def run(name: str, kills: int) -> Damage:
    """One scenario, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return SCENARIOS[name](Scene(Path(folder)), kills)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how often processes are killed (default: 50)")
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    options = parser.parse_args()
    # A shell's background jobs, and what they start, ignore Ctrl-C, which one of the scenarios sends.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    total, done = Damage(), 0
    for name in options.only:
        start = time.perf_counter()
        try:
            damage = run(name, options.kills)
        except Skipped as reason:
            print(f"{name:16} skipped: {reason}", flush=True)
            continue
        total, done = total + damage, done + 1
        print(f"{name:16} {damage} in {time.perf_counter() - start:.1f} s", flush=True)
    summary = {"results_lost": total.lost, "duplicates": total.duplicates, "orphans": total.orphans}
    print(json.dumps({"faults": done, **summary}))
    return int(any(summary.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        sys.exit(main())
