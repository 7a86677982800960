"""Compiled programs on disk: what is damaged or somebody else's costs a compilation, and never a wrong number."""

from __future__ import annotations

import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crystaljax.dft_bridge.planewave import program_cache
from crystaljax.dft_bridge.planewave.program_cache import ProgramCache


@pytest.fixture
def cache(tmp_path):
    return ProgramCache(tmp_path / "programs")


def files(cache):
    return sorted(cache.folder.iterdir())


def test_a_program_comes_back_as_it_was(cache, tmp_path):
    assert cache.get("one") is None
    cache.put("one", b"program")
    cache.put("one", b"newer program")
    cache.put("two", b"")
    assert cache.get("one") == b"newer program" and cache.get("two") == b""
    assert ProgramCache(tmp_path / "programs").get("one") == b"newer program" and len(files(cache)) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: content[:-3] + b"???",
        lambda content: b"?" + content[1:],
        lambda content: os.urandom(len(content)),
    ],
    ids=["empty", "half", "cut", "longer", "changed", "header", "noise"],
)
def test_a_damaged_file_is_no_program_and_gives_way(cache, change):
    cache.put("one", b"program" * 100)
    (path,) = files(cache)
    path.write_bytes(change(path.read_bytes()))
    assert cache.get("one") is None and files(cache) == []
    cache.put("one", b"program")
    assert cache.get("one") == b"program"


def test_a_file_under_the_name_of_another_program_is_not_taken_for_it(cache):
    cache.put("one", b"the first")
    cache.put("two", b"the second")
    one, two = files(cache)
    content = one.read_bytes(), two.read_bytes()
    one.write_bytes(content[1])
    two.write_bytes(content[0])
    assert cache.get("one") is None and cache.get("two") is None and files(cache) == []


def test_programs_for_another_processor_are_not_seen(cache, tmp_path, monkeypatch):
    cache.put("one", b"program")
    monkeypatch.setattr(program_cache, "processor_digest", lambda: "another")
    other = ProgramCache(tmp_path / "programs")
    assert other.get("one") is None and cache.get("one") == b"program"


def test_the_least_recently_used_go_when_there_are_too_many(tmp_path, monkeypatch):
    size = len(program_cache._header("0", b"")) + 100
    cache = ProgramCache(tmp_path, most_bytes=10 * size)
    monkeypatch.setattr(program_cache, "processor_digest", lambda: "another")
    elsewhere = ProgramCache(tmp_path, most_bytes=10 * size)
    elsewhere.put("old", bytes(100))
    for number in range(9):
        cache.put(str(number), bytes(100))
    for age, path in enumerate([*files(cache), *files(elsewhere)]):
        os.utime(path, (0, 1000 - age))  # one is the oldest: the other processor's
    first = next(
        str(n)
        for n in range(9)
        if os.stat(cache._file(str(n))).st_mtime == min(path.stat().st_mtime for path in files(cache))
    )
    assert cache.get(first) is not None, "used just now"
    cache.put("new", bytes(100))
    assert files(elsewhere) == [] and len(files(cache)) == 9
    assert cache.get(first) is not None and cache.get("new") is not None
    assert cache.put("huge", bytes(11 * size)) is None and cache.get("huge") is None


def test_what_a_killed_process_has_left_half_written_goes_in_time(cache):
    old, new = cache.folder / "a.partial", cache.folder / "b.partial"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, time.time() - 2 * program_cache._ABANDONED_SECONDS))
    cache.put("one", b"program")
    assert not old.exists() and new.exists()


def test_a_folder_that_others_may_write_to_is_not_used(cache, tmp_path, caplog):
    cache.folder.chmod(0o777)
    with pytest.raises(PermissionError, match="others may write to .* chmod 700"):
        ProgramCache(tmp_path / "programs")
    before = jax.config.jax_compilation_cache_dir
    try:
        assert not program_cache.use(tmp_path / "programs") and "compiled programs are not kept" in caplog.text
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_what_jax_kept_there_itself_is_dropped_and_nothing_else(tmp_path):
    for name in ("jit_f-0a-cache", "jit_f-0a-atime", "notes.txt"):
        (tmp_path / name).write_text("x")
    program_cache.drop_unchecked(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.fixture
def kept(tmp_path):
    """The folder of programs of this process, every one of them."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    assert program_cache.use(tmp_path)
    yield tmp_path / program_cache.processor_digest()
    for name, value in before.items():
        jax.config.update(name, value)
    assert program_cache.use(Path(before["jax_compilation_cache_dir"])), "that of the other tests"


def compiled(number):
    """A program that adds a number, compiled or loaded anew; all of them have one signature and one name."""

    def program(x):
        return jnp.sin(x) + number

    return jax.jit(program)


def test_swapped_and_damaged_programs_are_compiled_again_and_give_right_numbers(kept):
    x, numbers = jnp.ones(3), (1.0, 2.0)
    for number in numbers:
        compiled(number)(x)
    ours = {path: path.read_bytes() for path in kept.iterdir()}
    assert len(ours) >= 2
    for path, content in zip(ours, [*list(ours.values())[1:], list(ours.values())[0]], strict=True):
        path.write_bytes(content)  # each under the name of another
    found = [float(np.asarray(compiled(number)(x))[0]) for number in numbers]
    assert found == pytest.approx([0.8414710 + number for number in numbers], abs=1e-6)
    assert set(kept.iterdir()) == set(ours), "all are made again"
    written = {path: path.stat().st_ino for path in ours}
    assert [float(np.asarray(compiled(number)(x))[0]) for number in numbers] == found
    assert {path: path.stat().st_ino for path in ours} == written, "and are sound: nothing is compiled a third time"
