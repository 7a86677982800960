"""The store: durable, one row per key, readable with ASE's own tools, clear about what is wrong."""

from __future__ import annotations

import contextlib
import math
import sqlite3
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import ase.db
import numpy as np
import pytest
from ase import Atoms

from crystaljax.status import Status
from dft_bridge.engines.base import Crystal, Result
from dft_bridge.store import PATH_VARIABLE, Record, Store, StoreError, default_path

NACL = Crystal(
    np.array([[0, 2.8, 2.8], [2.8, 0, 2.8], [2.8, 2.8, 0]]), np.array([[0, 0, 0], [0.5, 0.5, 0.5]]), np.array([11, 17])
)
GOOD = Result(5.1, Status.OK, 12.5, "", {"kpoints": [4, 4, 4], "iterations": 9})
BAD = Result.failure(Status.NOT_CONVERGED, "no self-consistency within 60 iterations", 80.0, iterations=60)


def record(key, result=GOOD, crystal=NACL):
    return Record(key, crystal, "band_gap", result, "fake 1.0, fast", {"engine": "fake", "cutoff": 400.0})


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "deep" / "results.db")


def test_what_is_written_comes_back(store):
    store.write([record("cj0a"), record("cj0b", BAD)])
    found = Store(store.path).read(["cj0a", "cj0b", "cj0c"])
    assert set(found) == {"cj0a", "cj0b"} and len(store) == 2
    assert found["cj0a"] == GOOD
    assert math.isnan(found["cj0b"].value)
    assert found["cj0b"].status is Status.NOT_CONVERGED
    assert found["cj0b"].message == BAD.message and found["cj0b"].details == {"iterations": 60}


def test_a_key_keeps_its_first_row(store):
    store.write([record("cj0a"), record("cj0a", BAD)])
    store.write([record("cj0a", BAD), record("cj0b")])
    assert len(store) == 2 and store.read(["cj0a"])["cj0a"] == GOOD


def test_many_keys_in_one_lookup(store):
    keys = [f"cj{i:064x}" for i in range(1200)]
    store.write([record(key, Result(float(i), Status.OK)) for i, key in enumerate(keys)])
    found = store.read([*keys, *(f"cjmissing{i}" for i in range(40_000))])
    assert [found[key].value for key in keys] == list(range(1200))
    assert store.read([]) == {}


def test_rows_are_ase_rows(store):
    store.write([record("cj0a"), record("cj0b", BAD)])
    database = ase.db.connect(store.path)
    row = database.get(status="OK")
    assert row.formula == "NaCl" and row.value == 5.1 and row.engine == "fake 1.0, fast" and row.seconds == 12.5
    assert row.data["fingerprint"] == {"engine": "fake", "cutoff": 400.0} and row.data["message"] == ""
    atoms = row.toatoms()
    assert atoms.pbc.all()
    np.testing.assert_allclose(atoms.cell, NACL.lattice)
    np.testing.assert_allclose(atoms.get_scaled_positions(), NACL.frac_coords)
    assert row.volume == pytest.approx(atoms.get_volume()) and row.mass == pytest.approx(atoms.get_masses().sum())
    assert database.count("Na,Cl=1,property=band_gap") == 2 and database.count("Na=2") == 0
    assert database.count("value>0") == 1, "a failure has no value to select by"


def test_ase_command_line_lists_it(store):
    store.write([record("cj0a"), record("cj0b", BAD)])
    columns = "formula,property,value,status,engine"
    command = [sys.executable, "-m", "ase", "db", str(store.path), "-c", columns]
    listing = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert listing.returncode == 0, listing.stderr
    for text in ("NaCl", "band_gap", "5.1", "OK", "NOT_CONVERGED", "fake 1.0"):
        assert text in listing.stdout


WRITER = """
    import sys
    sys.path.insert(0, {tests!r})
    from test_store import BAD, GOOD, record
    from dft_bridge.store import Store

    store = Store({path!r})
    for start in range(0, 100, 10):
        store.write([record(f"cj{{i}}x") for i in range(start, start + 10)])
"""


def test_processes_that_start_on_no_file_write_no_key_twice(store, tmp_path):
    code = textwrap.dedent(WRITER.format(tests=str(Path(__file__).parent), path=str(store.path)))
    writers = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for writer in writers:
        assert writer.wait(120) == 0, writer.stderr.read()
    assert len(store) == 100 and len(store.read([f"cj{i}x" for i in range(100)])) == 100


def test_threads_may_share_a_store(store):
    def write(thread):
        for i in range(10):
            store.write([record(f"cj{i}t{thread}"), record(f"cj{i}shared")])

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store) == 50


def test_sqlite_itself_refuses_a_key_twice(store):
    store.write([record("cj0a")])
    with pytest.raises(sqlite3.IntegrityError):
        ase.db.connect(store.path).write(Atoms("H"), key="cj0a")


def test_a_failed_write_leaves_nothing_behind(store):
    store.open()
    broken = record("cj0b", Result(1.0, Status.OK, details={"not JSON": object()}))
    with pytest.raises(AttributeError):
        store.write([record("cj0a"), broken])
    assert len(store) == 0


def test_unusable_paths_are_explained(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("this is no database, only a few lines of text\n" * 100)
    with pytest.raises(StoreError, match="not a database.*move it away.*" + PATH_VARIABLE):
        Store(text).open()
    with pytest.raises(StoreError, match="cannot use the store.*" + PATH_VARIABLE):
        Store(text / "results.db").open()
    with pytest.raises(StoreError, match="cannot be opened"):
        Store(tmp_path).open()


def test_a_full_disk_is_explained(store, monkeypatch):
    store.open()
    real = store.database.transaction

    @contextlib.contextmanager
    def small_disk(write):
        with real(write) as connection:
            connection.execute("PRAGMA max_page_count=1")  # SQLite then answers as on a full disk
            yield connection

    monkeypatch.setattr(store.database, "transaction", small_disk)
    with pytest.raises(StoreError, match="disk is full; free some space"):
        store.write([record(f"cj{i}") for i in range(200)])
    monkeypatch.undo()
    assert len(store) == 0


def test_default_path(monkeypatch, tmp_path):
    monkeypatch.delenv(PATH_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == str(tmp_path / "crystaljax" / "results.db")
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path / "mine.db"))
    assert Store().path == tmp_path / "mine.db"
