"""Passwords in URLs are used, and never shown or saved."""

from __future__ import annotations

import json
import sys

import pytest
from test_cli import run
from test_store import new_schema, real  # noqa: F401

from crystaljax import run_folder
from crystaljax.agents import config as configs
from crystaljax.agents.config import RunConfig
from crystaljax.dft_bridge.store import Store, StoreError
from crystaljax.dft_bridge.store.databases import Postgres
from crystaljax.urls import passwords, without_password

SECRET = "s3cret"


@pytest.mark.parametrize(
    ("url", "saved", "shown"),
    [
        (f"postgresql://me:{SECRET}@host:5432/db", "postgresql://me@host:5432/db", "postgresql://me:***@host:5432/db"),
        (f"postgres://me:a@{SECRET}@host/db", "postgres://me@host/db", "postgres://me:***@host/db"),
        (f"postgresql://me:a/{SECRET}@host/db", "postgresql://me@host/db", "postgresql://me:***@host/db"),
        (
            f"postgresql://me:%2F{SECRET}@/db?host=/tmp",
            "postgresql://me@/db?host=/tmp",
            "postgresql://me:***@/db?host=/tmp",
        ),
        (f"postgresql://:{SECRET}@host", "postgresql://@host", "postgresql://:***@host"),
        (f"postgresql://host/db?password={SECRET}", "postgresql://host/db", "postgresql://host/db?password=***"),
        (
            f"postgresql://host/db?user=me&PASSWORD={SECRET}&sslpassword={SECRET}x&port=1",
            "postgresql://host/db?user=me&port=1",
            "postgresql://host/db?user=me&PASSWORD=***&sslpassword=***&port=1",
        ),
    ],
)
def test_passwords_are_left_out(url, saved, shown):
    assert without_password(url) == saved and without_password(url, "***") == shown
    assert without_password(f"--store={url}") == f"--store={saved}"
    assert all(SECRET in password for password in passwords(url)) and passwords(url)
    assert without_password(saved) == saved and passwords(saved) == []


@pytest.mark.parametrize(
    "text",
    [
        "results.db",
        "C:/my:files@home",
        "postgresql://me@host:5432/d@b",
        "postgresql:///db?host=/a&port=1",
        "tcp://host:8786",
    ],
)
def test_what_holds_no_password_stays_as_it_is(text):
    assert without_password(text) == without_password(text, "***") == text


def test_no_password_is_in_the_settings_that_are_saved_and_shown(tmp_path):
    """The table of a run is what config.json, reports and Weights & Biases get."""
    url = f"postgresql://me:{SECRET}@host/db"
    config = RunConfig(task="BandGap-C1-v0", store=url, scheduler=f"tls://me:{SECRET}@host:1")
    config.save(tmp_path, [])
    saved = (tmp_path / run_folder.CONFIG).read_text()
    assert SECRET not in saved and SECRET not in json.dumps(configs.to_table(config))
    assert SECRET not in repr(config) and config.store == url
    assert configs.load(tmp_path)[0].store == "postgresql://me@host/db"


def test_no_password_is_in_a_message_or_on_the_command_line_that_trackers_save(capsys, monkeypatch):
    url = f"postgresql://me:{SECRET}@localhost:1/db"
    monkeypatch.setattr(sys, "argv", ["crystaljax", "store", "stats", "--store", url, f"--store={url}"])
    code, out, err = run(capsys, "store", "stats", "--store", url)
    assert code == 2 and SECRET not in out + err and "me:***@localhost" in err
    assert SECRET not in " ".join(sys.argv)
    pytest.importorskip("psycopg2")
    for bad in (f"postgresql://me:a/{SECRET}@localhost/db", f"postgresql://localhost:1/db?password={SECRET}&moon=1"):
        with pytest.raises(StoreError) as error:
            Store(bad).open()
        assert SECRET not in str(error.value)


@pytest.mark.postgres
def test_a_password_is_taken_from_the_environment(new_schema, monkeypatch):  # noqa: F811
    url = without_password(new_schema())
    monkeypatch.setenv("PGPASSWORD", SECRET)
    Store(url).write([real()])
    assert len(Store(url)) == 1
    import psycopg2

    database = Postgres(url)
    error = psycopg2.OperationalError("fe_sendauth: no password supplied")
    assert "set PGPASSWORD, or write it into ~/.pgpass" in database.advice(error)
