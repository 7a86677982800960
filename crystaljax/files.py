"""Files that are whole or not there, and that are where their name says: links are not followed.

A folder that comes from somebody else may hold links to files of yours, pipes that never end, and names that are
chosen to be overwritten. What is read here is an ordinary file of bounded size, and what is written replaces whatever
had the name, never what that pointed to.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import stat
from pathlib import Path

from crystaljax.errors import CrystalJAXError

LARGEST = 1 << 30
"""Bytes of the largest file that is read."""


class FileRefused(CrystalJAXError, ValueError):
    """Something that is not an ordinary file or folder, or a file without end; the message names it and says why."""


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """The contents of an ordinary file.

    Args:
        path: of the file. Folders above it may be links; the file itself may not.
        largest: bytes that it may have.

    Raises:
        FileNotFoundError: there is none.
        FileRefused: a link, a pipe, a device, a folder, or a file that is too large.
    """
    try:
        # Without O_NONBLOCK the opening of a pipe waits for somebody who writes into it.
        descriptor = os.open(path, os.O_RDONLY | _flag("O_NOFOLLOW") | _flag("O_NONBLOCK") | _flag("O_CLOEXEC"))
    except OSError as error:
        if path.is_symlink():
            raise FileRefused(f"{path} is a link; put the file itself there") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileRefused(f"{path} is not an ordinary file; put one there")
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise FileRefused(f"{path} has more than {largest} bytes; give a smaller file")
    return content


def read_text(path: Path, largest: int = LARGEST) -> str:
    """The text of an ordinary file in UTF-8, as :func:`read_bytes`; ``FileRefused`` for other encodings too."""
    try:
        return read_bytes(path, largest).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileRefused(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start})") from error


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file such that whoever reads it, also after a crash, finds the old contents or the new ones.

    A link of that name is replaced by the file. The temporary file beside it has a name that nobody can foresee.
    """
    partial = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _flag("O_CLOEXEC"), 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a crash may leave the new name without the contents
        os.replace(partial, path)
    except BaseException:  # also of Ctrl-C nothing is left
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def replace_text(path: Path, text: str) -> None:
    """:func:`replace_bytes` of text in UTF-8."""
    replace_bytes(path, text.encode("utf-8"))


def open_to_append(path: Path) -> io.TextIOWrapper:
    """An ordinary file in UTF-8, made if it is not there, to append to; raises ``FileRefused`` for a link."""
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | _flag("O_NOFOLLOW") | _flag("O_NONBLOCK") | _flag("O_CLOEXEC")
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise FileRefused(f"{path} is a link; nothing is written through it") from error
        raise
    return os.fdopen(descriptor, "a", encoding="utf-8")


def make_folder(path: Path) -> Path:
    """The folder, made if it is not there; raises ``FileRefused`` for a link or a file in its place."""
    refuse_link(path)
    path.mkdir(exist_ok=True)
    return path


def refuse_link(path: Path) -> None:
    """Raise ``FileRefused`` if a name in a folder is a link, as what is written there would end up elsewhere."""
    if path.is_symlink():
        raise FileRefused(f"{path} is a link; nothing is written through it: put a folder or a file there")


def _flag(name: str) -> int:
    return getattr(os, name, 0)  # not every system has all of them
