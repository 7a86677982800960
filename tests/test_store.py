"""The store: durable, one row per key, readable with ASE's own tools, clear about what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import math
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ase.db
import numpy as np
import postgres_server
import pytest
from ase import Atoms

from crystaljax import library
from crystaljax.dft_bridge.engines.base import Crystal, Result
from crystaljax.dft_bridge.keys import Keys, Request, limited_key
from crystaljax.dft_bridge.store import PATH_VARIABLE, Record, Row, Store, StoreError, default_path
from crystaljax.dft_bridge.store import journal as journal_module
from crystaljax.dft_bridge.store import repair as repair_module
from crystaljax.dft_bridge.store import verify as verify_module
from crystaljax.dft_bridge.store.export import read_file, write_lines
from crystaljax.dft_bridge.store.journal import SUFFIX
from crystaljax.dft_bridge.store.query import Query, tally
from crystaljax.dft_bridge.store.records import LOG_CHARACTERS
from crystaljax.dft_bridge.store.repair import repair
from crystaljax.dft_bridge.store.verify import Findings, verify
from crystaljax.skeleton import Skeleton
from crystaljax.status import Status

NACL = Crystal(
    np.array([[0, 2.8, 2.8], [2.8, 0, 2.8], [2.8, 2.8, 0]]), np.array([[0, 0, 0], [0.5, 0.5, 0.5]]), np.array([11, 17])
)
GOOD = Result(5.1, Status.OK, 12.5, "", {"kpoints": [4, 4, 4], "iterations": 9, "tolerance": 1e-07})
BAD = Result.failure(Status.NOT_CONVERGED, "no self-consistency within 60 iterations", 80.0, "...\nstop", iterations=60)
FINGERPRINT = {"engine": "fake", "cutoff": 400.0}
JOURNAL = f"results.db{SUFFIX}"
VERSION_1 = Path(__file__).parent / "data" / "store_v1.db"
"""Written by the last version whose stores had no schema number: seven results of five crystals, because the rocksalt
and the perovskite are described in two ways each."""


def record(key, result=GOOD, crystal=NACL):
    return Record(key, crystal, "band_gap", result, "fake 1.0, fast", FINGERPRINT)


def real(numbers=(11, 17), result=GOOD, skeleton=None, property_name="band_gap", fingerprint=FINGERPRINT):
    """A record under its real key."""
    skeleton = skeleton or library.rocksalt()
    request = Request.of(skeleton, numbers, property_name)
    key = Keys(skeleton, property_name, fingerprint).key(request.numbers)
    return Record(key, request.crystal, property_name, result, "fake 1.0, fast", fingerprint)


def many(count):
    """Records of different perovskites; their values count up."""
    labelings = itertools.product(range(3, 40), range(41, 80), [8])
    return [
        real([a, b, x, x, x], Result(float(i), Status.OK, 1.0, "", {"text": "x" * 200}), library.perovskite())
        for i, (a, b, x) in enumerate(itertools.islice(labelings, count))
    ]


@pytest.fixture(scope="session")
def new_schema():
    pytest.importorskip("ase_db_backends", reason="needs pip install 'crystaljax[postgres]'")
    if postgres_server.programs() is None:
        pytest.skip("needs the programs of a PostgreSQL server (Debian package postgresql)")
    with postgres_server.server(postgres_server.programs()) as new:
        yield new


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def where(request, tmp_path):
    """Path or URL of a store that does not exist yet."""
    return tmp_path / "deep" / "results.db" if request.param == "sqlite" else request.getfixturevalue("new_schema")()


@pytest.fixture
def store(where):
    return Store(where)


@pytest.fixture
def file(tmp_path):
    """A store in a file."""
    return Store(tmp_path / "results.db")


def lines(store, tmp_path):
    """The export of a store, parsed."""
    with open(tmp_path / "lines.jsonl", "w") as out:
        write_lines(store.rows(), out)
    return [json.loads(line) for line in open(tmp_path / "lines.jsonl")]


def test_what_is_written_comes_back(store, where):
    store.write([record("cj0a"), record("cj0b", BAD)])
    found = Store(where).read(["cj0a", "cj0b", "cj0c"])
    assert set(found) == {"cj0a", "cj0b"} and len(store) == 2
    assert found["cj0a"] == GOOD
    assert math.isnan(found["cj0b"].value)
    assert found["cj0b"].status is Status.NOT_CONVERGED
    assert found["cj0b"].message == BAD.message and found["cj0b"].details == {"iterations": 60}
    assert found["cj0b"].log == "...\nstop"


def test_details_may_hold_nan_and_arrays(store):
    details = {"residual": math.nan, "bound": math.inf, "lattice": np.eye(3), "energies": [1.0, math.nan]}
    store.write([record("cj0a", Result(1.0, Status.OK, details=details))])
    found = store.read(["cj0a"])["cj0a"].details
    assert math.isnan(found["residual"]) and found["bound"] == math.inf and math.isnan(found["energies"][1])
    np.testing.assert_array_equal(found["lattice"], np.eye(3))


def test_of_a_long_log_the_end_is_kept(file):
    log = "".join(f"line {i}\n" for i in range(10_000))
    file.write([record("cj0a", dataclasses.replace(BAD, log=log))])
    assert file.read(["cj0a"])["cj0a"].log == log[-LOG_CHARACTERS:]


def test_a_key_keeps_its_first_row(store):
    store.write([record("cj0a"), record("cj0a", BAD)])
    store.write([record("cj0a", BAD), record("cj0b")])
    assert len(store) == 2 and store.read(["cj0a"])["cj0a"] == GOOD


def test_a_failure_gives_way_to_a_success(store):
    store.write([record("cj0a", BAD)])
    store.write([record("cj0a")])
    assert len(store) == 1 and store.read(["cj0a"])["cj0a"] == GOOD


def test_many_keys_in_one_lookup(store):
    keys = [f"cj{i:064x}" for i in range(1200)]
    store.write([record(key, Result(float(i), Status.OK)) for i, key in enumerate(keys)])
    found = store.read([*keys, *(f"cjmissing{i}" for i in range(40_000))])
    assert [found[key].value for key in keys] == list(range(1200))
    assert store.read([]) == {}


def test_rows_are_ase_rows(store, where):
    store.write([record("cj0a"), record("cj0b", BAD)])
    database = ase.db.connect(where)
    row = database.get(status="OK")
    assert row.formula == "NaCl" and row.value == 5.1 and row.engine == "fake 1.0, fast" and row.seconds == 12.5
    assert row.calculator == "fake" and row.calculator_parameters == FINGERPRINT and row.data["message"] == ""
    atoms = row.toatoms()
    assert atoms.pbc.all()
    np.testing.assert_allclose(atoms.cell, NACL.lattice)
    np.testing.assert_allclose(atoms.get_scaled_positions(), NACL.frac_coords)
    assert row.volume == pytest.approx(atoms.get_volume()) and row.mass == pytest.approx(atoms.get_masses().sum())
    assert database.count("Na,Cl=1,property=band_gap") == 2 and database.count("Na=2") == 0
    assert database.count("value>0") == 1, "a failure has no value to select by"


def test_ase_command_line_lists_it(store, where):
    store.write([record("cj0a"), record("cj0b", BAD)])
    columns = "formula,property,value,status,engine"
    command = [sys.executable, "-m", "ase", "db", str(where), "-c", columns]
    listing = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert listing.returncode == 0, listing.stderr
    for text in ("NaCl", "band_gap", "5.1", "OK", "NOT_CONVERGED", "fake 1.0"):
        assert text in listing.stdout


def test_ase_web_view_shows_it(store, where):
    pytest.importorskip("flask")
    from ase.db.app import DBApp

    store.write([record("cj0a"), record("cj0b", BAD)])
    app = DBApp()
    app.add_project("default", ase.db.connect(where))
    client = app.flask.test_client()
    page = client.get("/")
    assert page.status_code == 200 and "CrystalJAX results" in page.text
    session = re.search(r"update_table\(\s*(\d+)", page.text)[1]
    table = client.get(f"/update/{session}/query/0/?query=status=OK")
    assert table.status_code == 200 and "out of 1" in table.text
    assert "NOT_CONVERGED" not in client.get(f"/update/{session}/toggle/status/").text
    assert "NOT_CONVERGED" in client.get(f"/update/{session}/query/0/?query=status!=OK").text
    row = client.get("/default/row/1")
    assert row.status_code == 200 and "band_gap" in row.text and "5.1" in row.text


WRITER = """
    import sys
    sys.path.insert(0, {tests!r})
    from test_store import BAD, GOOD, record
    from crystaljax.dft_bridge.store import Store

    store = Store({where!r})
    for start in range(0, {count}, 10):
        store.write([record(f"cj{{i}}x") for i in range(start, start + 10)])
        print(start + 10, flush=True)
"""


def writer(where, count):
    code = textwrap.dedent(WRITER.format(tests=str(Path(__file__).parent), where=str(where), count=count))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_start_on_nothing_write_no_key_twice(store, where):
    writers = [writer(where, 100) for _ in range(3)]
    for process in writers:
        assert process.wait(120) == 0, process.stderr.read()
    assert len(store) == 100 and len(store.read([f"cj{i}x" for i in range(100)])) == 100


def test_what_a_killed_process_has_written_is_there(file):
    process = writer(file.path, 10_000)
    for _ in range(5):
        written = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    written = max([written, *(int(line) for line in process.stdout)])
    process.wait(60)
    assert len(file) in (written, written + 10), "the last transaction may be complete without having been reported"
    assert len(file.read([f"cj{i}x" for i in range(written)])) == written
    file.write([record("cjafterwards")])


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


def test_the_database_itself_refuses_a_key_twice(file):
    file.write([record("cj0a")])
    with pytest.raises(sqlite3.IntegrityError):
        ase.db.connect(file.path).write(Atoms("H"), key="cj0a")


@pytest.mark.postgres
def test_postgres_itself_refuses_a_key_twice(new_schema):
    import psycopg2

    url = new_schema()
    Store(url).write([record("cj0a")])
    with pytest.raises(psycopg2.errors.UniqueViolation):
        ase.db.connect(url).write(Atoms("H"), key="cj0a")


def test_a_failed_write_leaves_nothing_behind(store):
    store.open()
    broken = record("cj0b", Result(1.0, Status.OK, details={"not JSON": object()}))
    with pytest.raises((AttributeError, TypeError)):
        store.write([record("cj0a"), broken])
    assert len(store) == 0


def test_clocks_do_not_matter(store, monkeypatch):
    """Rows keep the order in which they were written and are told apart while the clock jumps back."""
    from crystaljax.dft_bridge.store import records

    times = iter([26.0, 10.0, 26.0, -3.0])
    monkeypatch.setattr(records, "now", lambda: next(times))
    for i in range(4):
        store.write([record(f"cj{i}t")])
    assert [row.key for row in store.rows()] == [f"cj{i}t" for i in range(4)]


def test_a_write_ahead_log_is_switched_off(file):
    """It needs memory that all processes share, so it breaks on a folder that several hosts use."""
    file.open()
    with contextlib.closing(sqlite3.connect(file.path)) as connection:
        assert connection.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
    file.write([record("cj0a")])
    with contextlib.closing(sqlite3.connect(file.path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_unusable_paths_are_explained(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("this is no database, only a few lines of text\n" * 100)
    with pytest.raises(StoreError, match="not a database.*move it away.*" + PATH_VARIABLE):
        Store(text).open()
    with pytest.raises(StoreError, match="cannot use the store.*" + PATH_VARIABLE):
        Store(text / "results.db").open()
    with pytest.raises(StoreError, match="cannot be opened"):
        Store(tmp_path).open()
    with pytest.raises(StoreError, match="there is no store"):
        list(Store(tmp_path / "missing.db", create=False).rows())
    assert not (tmp_path / "missing.db").exists()


def test_a_database_of_something_else_is_left_alone(tmp_path):
    ase.db.connect(tmp_path / "mine.db").write(Atoms("H"))
    with pytest.raises(StoreError, match="an ASE database of something else; give the store one of its own"):
        Store(tmp_path / "mine.db").write([record("cj0a")])
    assert ase.db.connect(tmp_path / "mine.db").count() == 1


@pytest.mark.postgres
def test_unusable_servers_are_explained(new_schema):
    url = new_schema()
    with pytest.raises(StoreError, match="does not exist; check the URL") as error:
        Store(url.replace("/postgres?", "/missing?")).open()
    assert "no-secret" not in str(error.value) and "crystal:***@" in str(error.value)
    with pytest.raises(StoreError, match="check the URL and that the server runs"):
        Store("postgresql://crystal@/any?host=/nowhere").open()


def test_a_full_disk_is_explained(file, monkeypatch):
    file.open()
    real_transaction = file.database.transaction

    @contextlib.contextmanager
    def small_disk(write):
        with real_transaction(write) as connection:
            connection.execute("PRAGMA max_page_count=1")  # SQLite then answers as on a full disk
            yield connection

    monkeypatch.setattr(file.database, "transaction", small_disk)
    with pytest.raises(StoreError, match="disk is full; free some space"):
        file.write([record(f"cj{i}") for i in range(200)])
    monkeypatch.undo()
    assert len(file) == 0


def test_default_path(monkeypatch, tmp_path):
    monkeypatch.delenv(PATH_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == str(tmp_path / "crystaljax" / "results.db")
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path / "mine.db"))
    assert Store().path == tmp_path / "mine.db"


# Schema


@pytest.fixture
def version_1(tmp_path):
    return Path(shutil.copy(VERSION_1, tmp_path / "old.db"))


def key_of_planewave(skeleton, numbers, property_name, path):
    (fingerprint,) = {json.dumps(row.fingerprint) for row in Store(path).rows() if row.property == property_name}
    request = Request.of(skeleton, numbers, property_name)
    return Keys(skeleton, property_name, json.loads(fingerprint)).key(request.numbers)


def test_a_store_of_the_first_version_is_brought_up_to_date(version_1):
    salt = key_of_planewave(library.rocksalt(), [17, 11], "band_gap", version_1)
    perovskite = key_of_planewave(library.perovskite(), [20, 22, 8, 8, 8], "band_gap", version_1)
    store = Store(version_1)
    found = store.read([salt, perovskite])
    assert found[salt].value == 5.06, "of two equal crystals the first stays"
    assert found[perovskite].value == 1.87, "of a failure and a success the success stays"
    assert len(store) == 5 and store.version() == 2 and verify(store) == Findings(2, 5, [])
    assert ase.db.connect(version_1).count("Na,Cl") == 1
    store.write([real()])
    assert len(Store(version_1)) == 6


def test_looking_into_an_old_store_does_not_change_it(version_1):
    store = Store(version_1, create=False)
    assert len(list(store.rows())) == 7 and verify(store) == Findings(1, 7, [])
    assert version_1.read_bytes() == VERSION_1.read_bytes()


def test_several_may_bring_a_store_up_to_date_at_once(version_1):
    stores = [Store(version_1) for _ in range(4)]
    threads = [threading.Thread(target=store.open) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(store) for store in stores] == [5] * 4 and not verify(stores[0]).problems


def test_a_newer_store_is_refused(store, where):
    store.write([record("cj0a")])
    with store.transaction(write=True) as connection:
        store.database.execute(connection, "UPDATE information SET value='3' WHERE name='crystaljax_schema'")
    newer = Store(where)
    for use in (newer.open, lambda: newer.read(["cj0a"]), lambda: list(newer.rows()), lambda: verify(newer)):
        with pytest.raises(StoreError, match="schema 3.*pip install --upgrade crystaljax"):
            use()


# Export, import, merge


def test_export_and_import_are_exact(store, tmp_path):
    odd = Result(
        1 / 3, Status.OK, 0.1 + 0.2, "naïve; \n two lines", {"list": [1, 2.5, None, {"a": True}], "tiny": 5e-324}
    )
    store.write([real(), real([12, 8], BAD), real([20, 22, 8, 8, 8], odd, library.perovskite())])
    before = lines(store, tmp_path)
    other = Store(tmp_path / "other.db")
    merged = read_file(other, tmp_path / "lines.jsonl")
    assert (merged.added, merged.known, len(other)) == (3, 0, 3)
    assert lines(other, tmp_path) == before
    assert read_file(store, tmp_path / "lines.jsonl").known == 3 and lines(store, tmp_path) == before


def test_a_crystal_of_many_sites_is_kept_and_moved(file, tmp_path):
    sites = np.stack(np.meshgrid(*[np.arange(6) / 6] * 3, indexing="ij"), -1).reshape(-1, 3)
    skeleton = Skeleton("216 sites", np.eye(3) * 18.0, sites, ("Si",) * 216)
    kept = real(np.arange(216) % 2 + 13, skeleton=skeleton)
    file.write([kept])
    with open(tmp_path / "lines", "w") as exported:
        assert write_lines(file.rows(), exported) == 1
    other = Store(tmp_path / "other.db")
    merged = read_file(other, tmp_path / "lines")
    assert (merged.added, merged.refused) == (1, 0) and other.read([kept.key])[kept.key].value == GOOD.value


def test_an_export_of_the_first_version_can_be_imported(version_1, file, tmp_path):
    old = Store(version_1, create=False)
    with open(tmp_path / "old.jsonl", "w") as out:
        write_lines(old.rows(), out, old.version())
    merged = read_file(file, tmp_path / "old.jsonl")
    assert (merged.added, merged.replaced, merged.known) == (5, 1, 1) and not verify(file).problems


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda line: "{", "line 2 of .* is no result"),
        (lambda line: "[1, 2]", "line 2"),
        (lambda line: line.replace('"seconds"', '"duration"'), "it has no 'seconds'"),
        (lambda line: line.replace('"numbers":[8,12]', '"numbers":[8,16]'), "its key belongs to another crystal"),
        (lambda line: line.replace('"cutoff":400.0', '"cutoff":500.0'), "its key belongs to another crystal"),
        (lambda line: line.replace('"value":null', '"value":1.0'), "its status is NOT_CONVERGED, its value is 1.0"),
        (lambda line: line.replace("NOT_CONVERGED", "MAYBE"), "'MAYBE' is not one of OK"),
        (lambda line: line.replace('"schema":2', '"schema":9'), "schema 9, newer than 2"),
        (lambda line: line.replace('"numbers":[8,12]', '"numbers":[8]'), r"must be \[N\]"),
        (lambda line: line.replace('"numbers":[8,12]', '"numbers":[8,900]'), "atomic numbers must be 1-118"),
        (lambda line: line.replace('"numbers":[8,12]', '"numbers":[8,12.7]'), "a list of whole numbers"),
        (lambda line: line.replace('"numbers":[8,12]', '"numbers":[true,12]'), "a list of whole numbers"),
        (lambda line: line.replace('"numbers":[8,12]', f'"numbers":[8,{"9" * 310}]'), "atomic numbers must be 1-118"),
        (lambda line: line.replace('"numbers":[8,12]', f'"numbers":{[8] * 2000}'), "it has 2000 sites"),
        (lambda line: line.replace('"schema":2', '"schema":1e400'), "its schema is inf"),
        (lambda line: line.replace('"schema":2', '"schema":true'), "its schema is True"),
        (lambda line: line.replace('"seconds":80.0', '"seconds":true'), "its seconds is True, which is no"),
        (lambda line: line.replace('"seconds":80.0', f'"seconds":{"9" * 310}'), "its seconds is 9999.*is no finite"),
        (lambda line: line.replace('"seconds":80.0', f'"seconds":{"9" * 5000}'), "no result"),
        (lambda line: line.replace('"seconds":80.0', '"seconds":Infinity'), "its seconds is inf"),
        (lambda line: re.sub('"created":[^,]*', '"created":"now"', line), "its created is 'now'"),
        (lambda line: re.sub('"created":[^,]*', '"created":NaN', line), "its created is nan"),
        (lambda line: re.sub('"user":[^}]*', '"user":["a"]', line), r"its user is \['a'\]"),
        (lambda line: re.sub('"user":[^}]*', r'"user":"\\ud800"', line), "characters that are none"),
        (lambda line: line.replace('"message":"', r'"message":"\u0000'), "characters that are none"),
        (lambda line: line.replace('"log":"', '"log":["'), "no result"),
        (lambda line: line.replace('"iterations":60', '"x":{"__ndarray__":[[3],"float64",[1,2]]}'), "only ASE may use"),
        (lambda line: line.replace('"iterations":60', '"x":[{"__ase_objtype__":"atoms"}]'), "only ASE may use"),
        (lambda line: line.replace('"iterations":60', '"x":{"__datetime__":"2000"}'), "only ASE may use"),
        (lambda line: line.replace('"cutoff":400.0', '"__complex__":[1,2]'), "only ASE may use"),
        (lambda line: line.replace('"iterations":60', f'"x":{"9" * 310}'), "more than 64 bits"),
        (lambda line: line.replace('"iterations":60', f'"x":{"[" * 50}{"]" * 50}'), "nested more than 30 deep"),
        (lambda line: line.replace('"iterations":60', f'"x":{"[" * 10**5}{"]" * 10**5}'), "nested too deeply"),
        (lambda line: line.replace('"iterations":60', f'"x":"{"y" * 5 * 10**6}"'), "characters and more"),
        (lambda line: line.replace('"cutoff":400.0', '"cutoff":NaN'), "which is no finite number"),
        (lambda line: re.sub('"positions":.*?]]', '"positions":[[1,2],[3,4]]', line), r"must be \[N\]"),
        (lambda line: re.sub('"positions":.*?]]', '"positions":[[1,2,true],[3,4,5]]', line), "its positions is True"),
        (lambda line: re.sub('"cell":.*?]]', f'"cell":[[1,2,{"9" * 310}],[3,4,5],[5,6,7]]', line), "its cell is 9999"),
        (lambda line: re.sub('"cell":.*?]]', '"cell":[[1,0,0],[2,0,0],[0,0,1]]', line), "no result"),
    ],
)
def test_a_changed_line_is_refused(file, tmp_path, change, reason):
    """By its number and the reason; the others are taken over, and whatever is there can be used."""
    path = tmp_path / "lines.jsonl"
    file.write([real(), real([12, 8], BAD)])
    lines(file, tmp_path)
    first, second = path.read_text().splitlines()
    assert change(second) != second
    path.write_text(f"{first}\n{change(second)}\n")
    target = Store(tmp_path / "target.db")
    merged = read_file(target, path)
    assert (merged.added, merged.refused) == (1, 1) and verify(target) == Findings(2, 1)
    (problem,) = merged.problems
    assert problem.startswith(f"line 2 of {path} is no result: ") and len(problem) < 400
    assert re.search(reason, problem)


def test_the_value_of_a_line_must_be_a_number(file, tmp_path):
    path = tmp_path / "lines.jsonl"
    file.write([real()])
    lines(file, tmp_path)
    sound = path.read_text()
    values = ["true", '"5.1"', "[5.1]", "9" * 310, "1e400", "NaN", "null"]
    path.write_text("".join(sound.replace('"value":5.1', f'"value":{value}') for value in values) + sound)
    target = Store(tmp_path / "target.db")
    merged = read_file(target, path)
    assert (merged.added, merged.refused, len(merged.problems)) == (1, len(values), len(values))
    assert [row.value for row in target.rows()] == [5.1]


def test_a_file_without_a_result_is_one_error_and_makes_no_store(file, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(StoreError, match="line 1 of .* is no result.* no line of .* is a result, so nothing was"):
        read_file(file, path)
    assert not file.path.exists()


def poisoned(store, statement):
    """A store with ten rows of which the third is as somebody else may have made it."""
    store.write(many(10))
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as connection:
        connection.execute(f"UPDATE systems SET {statement} WHERE id=3")
    return store


@pytest.mark.parametrize(
    "statement",
    [
        """calculator_parameters='{"__ase_objtype__": "moon", "x": NaN}'""",
        """calculator_parameters='{"__ndarray__": [[9], "float64", [1]], "x": NaN}'""",
        """data=x'0800000000000000' || '{"details":{"__ase_objtype__":"atoms"},"message":"","log":"","x":NaN}'""",
        """data=x'0800000000000000' || '{"details":{"x":{"__ndarray__":[[9],"float64",[1]]}},"message":"","log":""}'""",
        f"""data=x'0800000000000000' || '{{"details":{"[" * 10**5}{"]" * 10**5}}}'""",
        "key_value_pairs='[]'",
        "key_value_pairs=5",
        "key_value_pairs='{}'",
        """key_value_pairs=replace(key_value_pairs, '"value": 2.0', '"value": true')""",
        """key_value_pairs=replace(key_value_pairs, '"status": "OK"', '"status": ["OK"]')""",
        "numbers=zeroblob(4000000)",
        "numbers=NULL",
        "positions='text'",
        "ctime='now'",
        "username=x'ff'",
    ],
)
def test_a_poisoned_row_is_named_and_spoils_nothing_else(file, tmp_path, statement):
    poisoned(file, statement)
    problems = []
    rows = list(file.rows(problems=problems))
    assert len(rows) == 9 and len(problems) == 1 and problems[0].startswith(f"row 3 of {file.path} is no result")
    with pytest.raises(StoreError, match="row 3 of .* is no result.*`repair` drops it"):
        write_lines(file.rows(), open(tmp_path / "lines.jsonl", "w"))
    other = Store(tmp_path / "other.db")
    assert other.merge(file.rows(problems=[])).added == 9
    assert verify(other) == Findings(2, 9) and verify(file).good == 9
    repair(file)
    assert verify(file) == Findings(2, 10), "the row that was written is in the journal"


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("CREATE TRIGGER evil AFTER INSERT ON systems BEGIN DELETE FROM systems; END", "trigger evil"),
        ("CREATE TEMP TABLE x(y); CREATE VIEW evil AS SELECT * FROM systems", "view evil"),
        ("ALTER TABLE keys RENAME TO k; CREATE VIEW keys AS SELECT * FROM k", "view keys"),
        ("CREATE VIRTUAL TABLE evil USING fts5(text)", "table evil"),
    ],
)
def test_programs_in_a_file_of_somebody_else_are_seen_when_it_is_opened(file, statement, what):
    file.write(many(3))
    with contextlib.closing(sqlite3.connect(file.path, isolation_level=None)) as connection:
        connection.executescript(statement)
    foreign = Store(file.path)
    uses = (foreign.open, lambda: foreign.read(["cj0"]), lambda: list(foreign.rows()), lambda: verify(foreign))
    for use in (*uses, lambda: foreign.write(many(4)), lambda: repair(foreign)):
        with pytest.raises(StoreError, match=f"it holds the '{what}', which runs"):
            use()


def test_a_schema_that_is_no_number_is_explained(file):
    file.write(many(1))
    with contextlib.closing(sqlite3.connect(file.path, isolation_level=None)) as connection:
        connection.execute("UPDATE information SET value='9e999' WHERE name='crystaljax_schema'")
    with pytest.raises(StoreError, match="its schema is '9e999', which no CrystalJAX has written"):
        Store(file.path).open()


def test_merge(store, tmp_path):
    ours = [real([11, 17]), real([12, 8], BAD), real([3, 9]), real([19, 17])]
    theirs = [
        real([11, 17], BAD),
        real([12, 8], GOOD),
        real([3, 9], dataclasses.replace(GOOD, value=5.2)),
        real([19, 17], dataclasses.replace(GOOD, value=5.1 * (1 + 1e-9))),
        real([37, 17]),
    ]
    other = Store(tmp_path / "other.db")
    store.write(ours)
    other.write(theirs)
    merged = store.merge(other.rows())
    assert (merged.added, merged.replaced, merged.known, merged.refused) == (1, 1, 3, 0)
    (conflict,) = merged.conflicts
    assert (conflict.key, conflict.formula, conflict.ours, conflict.theirs) == (ours[2].key, "LiF", 5.1, 5.2)
    assert {key: result.value for key, result in store.read([r.key for r in theirs]).items()} == {
        r.key: 5.1 for r in theirs
    }
    again = store.merge(other.rows())
    assert (again.added, again.replaced, again.known) == (0, 0, 5) and len(store) == 5
    assert verify(store) == Findings(2, 5, []) and len(other) == 5
    ids = [row.id for row in store.rows()]
    assert len(set(ids)) == 5 and ids == sorted(ids)


def test_merging_refuses_what_has_a_wrong_key(file, tmp_path):
    other = Store(tmp_path / "other.db")
    other.write([real([11, 17]), record(real([12, 8]).key)])
    merged = file.merge(other.rows())
    assert (merged.added, merged.refused, len(file)) == (1, 1, 1)


def test_a_failure_under_limits_has_a_key_of_its_own(file, tmp_path):
    limits = {"timeout": 3.0, "memory": None}
    plain = real(result=Result.failure(Status.TIMEOUT, "stopped after 3 s", 3.0, limits=limits))
    file.write([dataclasses.replace(plain, key=limited_key(plain.key, limits)), real()])
    assert verify(file) == Findings(2, 2, []) and Store(tmp_path / "other.db").merge(file.rows()).added == 2
    assert limited_key("cj0", limits) != limited_key("cj0", limits | {"timeout": 4.0})


# Verification and rescue


def test_a_sound_store_has_no_problems(store):
    store.write([*many(20), real([12, 8], BAD)])
    assert verify(store) == Findings(2, 21, [])


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE systems SET numbers=zeroblob(20) WHERE id=3", "row 3: its atomic numbers"),
        (
            "UPDATE systems SET numbers=(SELECT numbers FROM systems WHERE id=4) WHERE id=3",
            "row 3: its key is not that",
        ),
        ("UPDATE systems SET key_value_pairs=replace(key_value_pairs, '2.0', '3.0') WHERE id=3", "row 3: ASE's tables"),
        (
            "UPDATE systems SET key_value_pairs=replace(key_value_pairs, '2.0', 'NaN') WHERE id=3",
            "row 3: its status is",
        ),
        ("UPDATE systems SET key_value_pairs='{' WHERE id=3", "row 3 cannot be read"),
        ("UPDATE systems SET data=zeroblob(100) WHERE id=3", "row 3 cannot be read"),
        ("UPDATE systems SET cell=zeroblob(17) WHERE id=3", "row 3 cannot be read"),
        ("UPDATE systems SET positions=zeroblob(24) WHERE id=3", r"row 3: numbers, cell and positions must be \[N\]"),
    ],
)
def test_a_wrong_row_is_found(file, statement, problem):
    file.write(many(10))
    with contextlib.closing(sqlite3.connect(file.path, isolation_level=None)) as connection:
        connection.execute(statement)
    findings = verify(file)
    assert findings.good == 9 and len(findings.problems) == 1
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(findings.problems[0])


def test_a_key_that_is_there_twice_is_found(file):
    file.write(many(10))
    with contextlib.closing(sqlite3.connect(file.path, isolation_level=None)) as connection:
        connection.execute("DROP INDEX crystaljax_key")
        columns = [
            name for _, name, *_ in connection.execute("PRAGMA table_info(systems)") if name not in ("id", "unique_id")
        ]
        names = ", ".join(columns)
        connection.execute(f"INSERT INTO systems ({names}) SELECT {names} FROM systems WHERE id=5")
        for table in ("text_key_values", "number_key_values"):
            connection.execute(f"INSERT INTO {table} SELECT key, value, 11 FROM {table} WHERE id=5")
    findings = verify(file)
    assert findings.good == 10
    assert findings.problems == [
        "the index of keys is missing, so a key may be there twice",
        "row 11: row 5 has the same key",
    ]


def damage(path, text):
    """Overwrite the page of an SQLite file on which the text comes first."""
    content = bytearray(path.read_bytes())
    start = content.find(text.encode()) // 4096 * 4096
    content[start : start + 4096] = b"\xff" * 4096
    path.write_bytes(content)


def test_a_damaged_page_gives_one_clear_error_and_is_repaired(file):
    records = many(300)
    file.write(records)
    damage(file.path, f'"key": "{records[150].key}"')
    broken = file.path.read_bytes()
    with pytest.raises(StoreError, match="it is damaged; end its runs; `crystaljax store repair`"):
        file.read([r.key for r in records])
    findings = verify(file)
    assert 285 <= findings.good < 300 and len(findings.problems) > 300 - findings.good
    assert findings.good + findings.only_in_journal == 300

    found, kept = repair(file)
    assert (found, kept.read_bytes()) == (findings, broken)
    assert verify(file) == Findings(2, 300) and file.read([r.key for r in records]) == {
        r.key: r.result for r in records
    }
    assert sorted(path.name for path in file.path.parent.iterdir()) == ["results.db", "results.db.damaged", JOURNAL]


@pytest.mark.parametrize("where", ["header", "everything", "journal", "file and journal"])
def test_repair(file, where):
    """Whatever is left of the file and of its journal, each result that one of them has is saved."""
    records = many(40)
    file.write([*records[:20], *records[25:]])
    file.merge(Row.of(r) for r in [dataclasses.replace(records[20], result=BAD), *records[20:25]])
    journal = file.database.journal.path
    if where in ("header", "everything"):
        content = file.path.read_bytes()
        size = 4096 if where == "header" else len(content)
        file.path.write_bytes(b"\xff" * size + content[size:])
    if where == "file and journal":
        damage(file.path, f'"key": "{records[10].key}"')
    if "journal" in where:
        journal.write_text(journal.read_text().replace('"value":30.0', '"value":31.0'))
        assert f"line 26 of {JOURNAL} is damaged" in verify(file).problems
    repair(file)
    assert verify(file) == Findings(2, 40)
    assert file.read([r.key for r in records]) == {r.key: r.result for r in records}


def test_a_row_that_was_changed_is_found_and_put_right(file):
    """Damage that SQLite does not see: another value, in all its tables."""
    file.write(many(10))
    with contextlib.closing(sqlite3.connect(file.path, isolation_level=None)) as connection:
        connection.execute(
            "UPDATE systems SET key_value_pairs=replace(key_value_pairs, '\"value\": 2.0', '\"value\": 3.0') WHERE id=3"
        )
        connection.execute("UPDATE number_key_values SET value=3.0 WHERE id=3 AND key='value'")
    problem = "row 3: it is not what was written, says the journal"
    assert verify(file) == Findings(2, 9, [problem], 1)
    repair(file)
    assert file.read([many(3)[2].key])[many(3)[2].key].value == 2.0


def test_the_journal_has_what_a_killed_process_had_no_time_to_commit(file, tmp_path):
    records = many(5)
    file.write(records[:4])
    journal = file.database.journal.path
    Store(tmp_path / "other.db").write(records[4:])
    line = (tmp_path / f"other.db{SUFFIX}").read_text()
    journal.write_text(journal.read_text() + line + line[:50])
    assert verify(file) == Findings(2, 4, [], 1)
    file.write(records[3:])  # half a line gives way to the next
    assert verify(file) == Findings(2, 5) and len(journal.read_text().splitlines()) == 6


def test_verify_while_another_process_writes(file, monkeypatch):
    """What comes after the question how many rows there are is no problem, in whichever order the two are read."""
    file.write(many(3))
    original = verify_module._written

    def meanwhile(store, findings):
        found = original(store, findings)
        file.write(many(5)[3:])
        return found

    monkeypatch.setattr(verify_module, "_written", meanwhile)
    assert verify(file) == Findings(2, 3)


def test_a_store_without_a_journal_gets_one_with_the_next_result(tmp_path):
    shutil.copy(VERSION_1, tmp_path / "results.db")
    store = Store(tmp_path / "results.db")
    assert len(store) == 5 and not store.database.journal.exists()
    store.write([real([3, 17])])
    assert len(store.database.journal.path.read_text().splitlines()) == 6 and verify(store) == Findings(2, 6)
    store.database.journal.path.write_text("")  # as if another version had written to the store
    assert verify(store).problems == [f"row {row.id} is not in the journal" for row in store.rows()]
    repair(store)
    assert verify(store) == Findings(2, 6)


def test_a_full_disk_leaves_neither_rows_nor_half_a_line(file, monkeypatch):
    records = many(6)
    file.write(records[:3])
    before = file.database.journal.path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal_module.os, "fsync", full)
        with pytest.raises(StoreError, match="No space left"):
            file.write(records[3:])
    assert len(file) == 3 and file.database.journal.path.read_bytes() == before
    file.write(records[3:])
    assert verify(file) == Findings(2, 6)


def test_a_new_store_beside_the_journal_of_another_says_so(file, caplog):
    file.write(many(3))
    file.path.unlink()
    again = Store(file.path)
    again.write(many(4)[3:])
    assert "`crystaljax store repair` takes them over" in caplog.text and len(again) == 1
    repair(again)
    assert verify(again) == Findings(2, 4)


@pytest.mark.parametrize("moment", ["read", "copied"])
def test_who_writes_while_a_store_is_repaired_writes_to_the_new_file(file, monkeypatch, moment):
    """A row that comes at any moment of a repair is there afterwards; it waits until the repair is over."""
    file.write(many(3))
    writer = threading.Thread(target=lambda: Store(file.path).write(many(4)[3:]))
    module, name = {"read": (Store, "merge"), "copied": (repair_module, "_copied")}[moment]
    original = getattr(module, name)

    def meanwhile(*arguments):
        if not writer.ident:
            writer.start()
            time.sleep(0.3)
            assert writer.is_alive(), "it waits"
        return original(*arguments)

    monkeypatch.setattr(module, name, meanwhile)
    repair(file)
    writer.join()
    assert verify(file) == Findings(2, 4)
    assert sorted(path.name for path in file.path.parent.iterdir()) == ["results.db", "results.db.damaged", JOURNAL]


def test_a_process_that_writes_through_many_repairs_loses_nothing(file):
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_store import Store, many
        store = Store({str(file.path)!r})
        for record in many(20):
            store.write([record])
            print("written", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "written\n"
        repairs = 0
        while process.poll() is None:
            repair(file)
            repairs += 1
        assert process.returncode == 0, process.stderr.read()
    assert repairs > 1 and verify(file) == Findings(2, 20)


def test_two_repairs_at_once(file):
    file.write(many(30))
    damage(file.path, f'"key": "{many(30)[20].key}"')
    with ThreadPoolExecutor(3) as threads:
        kept = {path for _, path in threads.map(repair, [Store(file.path) for _ in range(3)])}
    assert len(kept) == 3 and verify(file) == Findings(2, 30)


def test_rows_that_are_merely_newer_are_no_reason_to_repair(file, monkeypatch):
    """Also one that stands in the journal but is not committed yet: who looks waits for it."""
    file.write(many(3))
    original = verify_module._last_id
    noted, go_on = threading.Event(), threading.Event()

    def slow(self, connection, rows):
        noting(self, connection, rows)
        noted.set()
        go_on.wait(10)

    noting = Store._note
    writer = threading.Thread(target=lambda: Store(file.path).write(many(5)[3:]))

    def meanwhile(store):
        monkeypatch.setattr(Store, "_note", slow)
        found = original(store)

        def ask(connection):
            last = found(connection)
            writer.start()
            assert noted.wait(10)
            threading.Timer(0.3, go_on.set).start()
            return last

        return ask

    monkeypatch.setattr(verify_module, "_last_id", meanwhile)
    assert verify(file) == Findings(2, 3)
    writer.join()
    monkeypatch.undo()
    assert verify(file) == Findings(2, 5)


def test_a_row_that_only_the_journal_has_is_still_found_while_others_write(file):
    file.write(many(4))
    with contextlib.closing(sqlite3.connect(file.path, isolation_level=None)) as connection:
        connection.execute("DELETE FROM systems WHERE id=4")
    assert verify(file).only_in_journal == 1
    read_only = Store(file.path)
    file.path.chmod(0o444)
    assert verify(read_only).only_in_journal == 1


@pytest.mark.parametrize("first", [0, 3])
def test_while_only_the_database_cannot_grow_the_journal_repeats_nothing(file, first):
    """It is full when a row is committed: what stands in the journal by then is taken back."""
    records = many(40)
    file.open()
    file.write(records[:first])
    resource = pytest.importorskip("resource")
    before, journal = resource.getrlimit(resource.RLIMIT_FSIZE), file.database.journal.path
    size = journal.stat().st_size if journal.exists() else None
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.path.stat().st_size, before[1]))
    try:
        for _ in range(3):
            with pytest.raises(StoreError, match="cannot use the store"):
                file.write(records[first:])
            assert (journal.stat().st_size if journal.exists() else None) == size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    file.write(records[first:])
    assert len(journal.read_text().splitlines()) == 40 and verify(file) == Findings(2, 40)


@pytest.mark.postgres
def test_a_server_needs_no_repair(new_schema):
    with pytest.raises(StoreError, match="looks after its own pages"):
        repair(Store(new_schema()))


# Questions


def test_queries_select(store):
    perovskite = library.perovskite()
    store.write(
        [
            real([11, 17], dataclasses.replace(GOOD, value=5.0)),
            real([12, 8], BAD),
            real([20, 22, 8, 8, 8], dataclasses.replace(GOOD, value=1.9), perovskite),
            real([20, 22, 8, 8, 8], dataclasses.replace(GOOD, value=4.1), perovskite, "density"),
        ]
    )

    def formulas(**conditions):
        return [row.formula for row in Query(**conditions).select(store.rows(data=False))]

    assert formulas() == ["NaCl", "MgO", "CaTiO3", "CaTiO3"]
    assert formulas(property_name="band_gap", status="OK") == ["NaCl", "CaTiO3"]
    assert formulas(elements=("O",)) == ["MgO", "CaTiO3", "CaTiO3"] and formulas(elements=("O", "Na")) == []
    assert formulas(minimum=1.9, maximum=4.5) == ["CaTiO3", "CaTiO3"] and formulas(maximum=2) == ["CaTiO3"]
    assert formulas(formula="Ti2Ca2O6") == ["CaTiO3", "CaTiO3"] and formulas(engine="fast", formula="OMg") == ["MgO"]
    assert formulas(engine="gpaw") == []
    counts = {(t.property, t.status): (t.results, t.core_seconds) for t in tally(store.rows(data=False))}
    assert counts == {
        ("band_gap", "NOT_CONVERGED"): (1, 80.0),
        ("band_gap", "OK"): (2, 25.0),
        ("density", "OK"): (1, 12.5),
    }


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        ({"property_name": "gap"}, "choose one of band_gap"),
        ({"status": "good"}, "choose one of OK"),
        ({"elements": ("Xy",)}, "Xy: not an element"),
        ({"formula": "not a formula"}, "not a formula"),
        ({"formula": "Xy2"}, "not a formula"),
    ],
)
def test_senseless_queries_are_refused(condition, reason):
    with pytest.raises(ValueError, match=reason):
        Query(**condition)


def test_rows_know_their_crystal():
    row = Row.of(real([20, 22, 8, 8, 8], GOOD, library.perovskite()))
    assert row.formula == "CaTiO3" and row.result == GOOD
    skeleton = Skeleton("again", row.crystal.lattice, row.crystal.frac_coords, ())
    assert Keys(skeleton, "band_gap", FINGERPRINT).key(row.crystal.numbers) == row.key
