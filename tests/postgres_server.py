"""A PostgreSQL server of the tests' own, in a temporary folder, reached by a socket there."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

SUPERUSER = "crystal"


def programs() -> Path | None:
    """The folder of ``initdb`` and ``pg_ctl``; Debian keeps it out of the search path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    anywhere = shutil.which("initdb")
    return found[-1].parent if found else Path(anywhere).parent if anywhere else None


@contextlib.contextmanager
def server(folder_of_programs: Path) -> Iterator[Callable[[], str]]:
    """A running server; gives the URL of a new, empty schema of a database at every call."""
    # The server refuses to run as root. A socket's path has at most 107 characters, so pytest's folders are too deep.
    other_user = {"user": "nobody"} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        if other_user:
            shutil.chown(folder, **other_user)

        def run(program: str, *arguments: str) -> None:
            command = [str(folder_of_programs / program), *arguments]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, **other_user)
            assert done.returncode == 0, done.stdout + done.stderr

        data = f"{folder}/data"
        run("initdb", "-D", data, "-U", SUPERUSER, "--auth=trust", "--no-sync", "--locale=C.UTF-8")
        options = f"-k {folder} -c listen_addresses= -c fsync=off"
        # A log of its own: the server would keep our pipe open for as long as it lives.
        run("pg_ctl", "-D", data, "-l", f"{folder}/log", "-o", options, "-w", "start")
        names = (f"test{number}" for number in itertools.count())

        def new_schema() -> str:
            name = next(names)
            run("psql", "-h", folder, "-U", SUPERUSER, "-d", "postgres", "-qc", f"CREATE SCHEMA {name}")
            return f"postgresql://{SUPERUSER}:no-secret@/postgres?host={folder}&options=-csearch_path%3D{name}"

        try:
            yield new_schema
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
