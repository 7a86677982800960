"""Compiled programs on disk, shared by workers and runs, such that a damaged file costs a compilation and nothing else.

JAX's own cache believes its files: an entry under another one's name is run as if it were that program, a half-written
one is compiled again by every process, since nothing there is ever written anew, and nothing ends its growth. Here a
file says which program it holds and for which processor, with a SHA-256 over all of it. One that is not what it should
be is deleted and made again.

A compiled program is run, so the folder must be the user's own: one that others may write to is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

MOST_BYTES = 2 * 2**30
"""Of all programs together, unless ``JAX_COMPILATION_CACHE_MAX_SIZE`` says otherwise; a program has about 0.2 MB."""
_KEPT = 0.9  # of the bound, after programs were deleted: not one deletion for each new program
_SUFFIX, _PARTIAL = ".program", ".partial"
_MAGIC = b"crystaljax program 1\n"
_ABANDONED_SECONDS = 3600.0  # a file is written within seconds; its writer was killed
_HEADER_BYTES = len(_MAGIC) + 2 * hashlib.sha256().digest_size + 1
_OF_A_PROCESSOR = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")


class ProgramCache:
    """Programs by key, in a folder; what JAX asks of a cache. Any number of processes may use a folder.

    Attributes:
        folder: that of programs for this machine's processor, within the given one.
        most_bytes: bound of the size of all programs in the given folder; the least recently used ones go first.
    """

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES):
        """Makes the folder.

        Raises:
            OSError: it cannot be made.
            PermissionError: others may write to it, or it belongs to somebody else.
        """
        self._path = self.folder = folder / processor_digest()
        self._root, self.most_bytes = folder, most_bytes
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, "geteuid"):
            found = self.folder.stat()
            if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise PermissionError(f"others may write to {self.folder}, and programs are run; chmod 700 it")

    def get(self, key: str) -> bytes | None:
        """The program, as it was given to :meth:`put`, or ``None``; a damaged file, or one of another key, is gone."""
        path = self._file(key)
        try:
            content = path.read_bytes()
        except OSError:  # there is none, or it cannot be read
            return None
        program = content[_HEADER_BYTES:]
        if content[:_HEADER_BYTES] != _header(key, program):
            logger.warning("a compiled program on disk is damaged, so it is compiled again: %s", path.name)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used just now
        return program

    def put(self, key: str, value: bytes) -> None:
        """Keep a program, whole or not at all, in place of any other of that key; old ones give way to it.

        Raises:
            OSError: it cannot be written; JAX then warns and goes on.
        """
        if len(value) > self.most_bytes:
            return
        path = self._file(key)
        partial = path.with_suffix(f".{uuid.uuid4().hex}{_PARTIAL}")
        try:
            partial.write_bytes(_header(key, value) + value)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # deleted by somebody else who made room
            self._make_room(path.stat().st_mtime)

    def _make_room(self, now: float) -> None:
        """Delete the least recently used programs beyond the bound, and what killed processes left half-written.

        All times are those of files, as the file system has them; a clock that jumps costs compilations only.
        """
        files = []
        for path, found in _listed(self._root):
            if path.suffix == _PARTIAL and now - found.st_mtime > _ABANDONED_SECONDS:
                _delete(path)
            elif path.suffix == _SUFFIX:
                files.append((found.st_mtime, found.st_size, path))
        total = sum(size for _, size, _ in files)
        if total <= self.most_bytes:
            return
        for _, size, path in sorted(files):
            if total <= _KEPT * self.most_bytes:
                return
            _delete(path)
            total -= size

    def _file(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}{_SUFFIX}"


def use(folder: Path, most_bytes: int = MOST_BYTES) -> bool:
    """Have JAX keep the programs of this process in a folder; ``False``, with a warning, if it cannot: it then keeps
    none, so every process compiles its own."""
    import jax

    try:
        cache = ProgramCache(folder, most_bytes)
        from jax._src import compilation_cache

        # JAX has no public way to name a cache of one's own; a version that keeps it elsewhere has no such names.
        if not all(hasattr(compilation_cache, name) for name in ("_cache", "_cache_initialized")):
            raise ImportError(f"JAX {jax.__version__} keeps its cache in another way")
    except (OSError, ImportError) as error:
        logger.warning("compiled programs are not kept on disk: %s", error)
        jax.config.update("jax_compilation_cache_dir", None)
        return False
    jax.config.update("jax_compilation_cache_dir", str(folder))
    compilation_cache.reset_cache()
    compilation_cache._cache, compilation_cache._cache_initialized = cache, True
    return True


def drop_unchecked(folder: Path) -> None:
    """Delete what JAX itself kept in a folder of ours: nothing says whether such a file is sound."""
    for path in (*folder.glob("*-cache"), *folder.glob("*-atime")):
        _delete(path)


def processor_digest() -> str:
    """Names the kind of this machine's processor: programs use its instructions, and others end with SIGILL."""
    facts = [platform.system(), platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        processor = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        entries = (line.partition(":") for line in processor.splitlines())
        facts += [
            f"{name.strip()}={' '.join(sorted(value.split()))}"
            for name, _, value in entries
            if name.strip() in _OF_A_PROCESSOR
        ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _header(key: str, program: bytes) -> bytes:
    """What comes before a program in its file."""
    name = key.encode()
    signed = hashlib.sha256(len(name).to_bytes(8, "big") + name + program).hexdigest().encode()
    return _MAGIC + signed + b"\n"


def _listed(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Our files under a folder, for whatever processor; others may delete them meanwhile."""
    for path in root.glob("*/*"):
        if path.suffix in (_SUFFIX, _PARTIAL):
            with contextlib.suppress(OSError):
                yield path, path.lstat()


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):  # somebody else was faster
        path.unlink()
