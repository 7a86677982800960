"""The store: every calculation that was ever finished, failures included, in one ASE database.

A store is an SQLite file or, by a URL ``postgresql://...``, a PostgreSQL database, both in ASE's own layout: ``ase db
results.db`` lists it, ``ase db results.db -w`` shows it in a browser and ``ase.db.connect`` reads it. A row holds the
crystal, key-value pairs (:data:`COLUMNS`) and, as ``data``, the fingerprint of the engine, the details of the
calculation, its message and, of a failure, the end of the engine's log. What :meth:`Store.write` has written is on disk
when it returns; of an SQLite file also in its journal (:mod:`crystaljax.dft_bridge.store.journal`), from which a
damaged file is repaired (:mod:`crystaljax.dft_bridge.store.repair`).

Any number of processes may use one store. On one machine an SQLite file needs nothing else. On a folder that several
hosts share, SQLite is as safe as the locks of its file system; so it keeps a rollback journal here, never the write-
ahead log, which needs memory that all processes share. NFS 4, CephFS and Lustre mounted with ``flock`` lock files;
where locks are switched off or local to a host (``nolock``, ``local_lock=all``), two hosts can damage the file. Then,
and for dozens of hosts, use PostgreSQL.

Rows are told apart by key and ordered by ASE's ``id``; times are for people, so a clock that jumps does no harm.
"""

from crystaljax.dft_bridge.store.records import COLUMNS, Record, Row
from crystaljax.dft_bridge.store.store import PATH_VARIABLE, Store, StoreError, default_path

__all__ = ["COLUMNS", "PATH_VARIABLE", "Record", "Row", "Store", "StoreError", "default_path"]
