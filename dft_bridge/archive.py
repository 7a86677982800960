"""The store as one engine sees it: keys for what is asked, records for what was calculated."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Mapping
from typing import Any

from crystaljax.dft_bridge.engines.base import (
    CrystalFingerprint,
    Engine,
    RenewedEngine,
    Result,
    tells_of_the_machine,
)
from crystaljax.dft_bridge.engines.caveats import with_caveats
from crystaljax.dft_bridge.keys import Keys, Request, limited_key
from crystaljax.dft_bridge.limits import JobFailed, Limits
from crystaljax.dft_bridge.store import Record, Store, StoreError
from crystaljax.skeleton import Skeleton
from crystaljax.status import Status

logger = logging.getLogger(__name__)

OF_LIMITS = (Status.TIMEOUT, Status.OUT_OF_MEMORY, Status.WORKER_DIED)
"""Failures that speak of the limits as much as of the crystal."""


class Archive:
    """Finds and records the results of an engine under limits. Thread-safe."""

    def __init__(self, store: Store, engine: Engine, preset: str, limits: Limits):
        """``preset``: name of the engine's settings, for labels. Nothing is opened."""
        self.store, self._engine, self._preset = store, engine, preset
        self._limits = dataclasses.asdict(limits)
        self._fingerprints: dict[str, dict[str, Any]] = {}
        self._keys: dict[tuple[bytes, bytes, str], tuple[Keys, dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._unwritten: list[Record] = []
        self._before: dict[str, Archive] = {}
        """By property, for results of an earlier engine that may be taken over."""

    def open(self, property_name: str) -> None:
        """Find out once, at the door, whether engine and store can be used.

        Raises:
            EngineNotReady: the engine cannot run here; says what to install.
            StoreError: the store cannot be written.
            ValueError: the engine does not compute the property.
        """
        if property_name not in self._fingerprints:
            self._engine.preflight()
            self.store.open()
            self._fingerprints[property_name] = self._engine.fingerprint(property_name)
            before = self._engine.before(property_name) if isinstance(self._engine, RenewedEngine) else None
            if before is not None:
                archive = Archive(self.store, before, self._preset, Limits(**self._limits))
                self._before[property_name] = archive
                archive.open(property_name)

    def label(self, property_name: str) -> str:
        """Where values come from, such as ``gpaw 26.7.0, fast``; a fingerprint names the version as its engine."""
        version = self._fingerprints[property_name].get(self._engine.name, "")
        return f"{self._engine.name} {version}".strip() + (f", {self._preset}" if self._preset else "")

    def keys(self, skeleton: Skeleton, property_name: str) -> Keys:
        """What makes the keys of a skeleton, once the property is open."""
        return self._of(skeleton, property_name)[0]

    def _of(self, skeleton: Skeleton, property_name: str) -> tuple[Keys, dict[str, Any]]:
        """What makes the keys of a skeleton, and the fingerprint that is in them."""
        which = (skeleton.lattice.tobytes(), skeleton.frac_coords.tobytes(), property_name)
        if which not in self._keys:
            fingerprint = self._fingerprints[property_name]
            if isinstance(self._engine, CrystalFingerprint):
                fingerprint = self._engine.fingerprint_of(skeleton.lattice, skeleton.frac_coords, property_name)
            self._keys[which] = Keys(skeleton, property_name, fingerprint), fingerprint
        return self._keys[which]

    def find(self, requests: Mapping[str, Request]) -> dict[str, Result]:
        """Those results that are known, by key: of the crystal, or failures under these very limits.

        Failures that speak of the machine, which earlier versions stored, are not known: they are calculated again.
        """
        self.flush()
        limited = {limited_key(key, self._limits): key for key in requests}
        stored = {limited.get(key, key): r for key, r in self.store.read([*requests, *limited]).items()}
        found = {key: self.judged(requests[key], r) for key, r in stored.items() if not tells_of_the_machine(r)}
        for property_name, archive in self._before.items():
            wanted = {k: r for k, r in requests.items() if r.property == property_name and k not in found}
            theirs = {archive.keys(r.skeleton, property_name).key(r.numbers): key for key, r in wanted.items()}
            earlier = archive.find({old: wanted[key] for old, key in theirs.items()}) if theirs else {}
            found |= {theirs[k]: r for k, r in earlier.items() if self._engine.would_find(r, property_name)}
        return found

    def judged(self, request: Request, result: Result) -> Result:
        """The result with its caveats, where nobody has looked for any: of old rows, and of engines that tell none."""
        if result.caveats is not None:
            return result
        _, fingerprint = self._of(request.skeleton, request.property)
        return with_caveats(result, request.crystal, request.property, fingerprint)

    def record(self, results: Mapping[str, tuple[Request, Result]]) -> None:
        """Write results, by key; on return they are durable. What cannot be written is kept until it can.

        Raises:
            StoreError: the store cannot be written; says why and what to do.
        """
        with self._lock:
            self._unwritten += [self._record(key, *what) for key, what in results.items()]
            if self._unwritten:
                self.store.write(self._unwritten)
                self._unwritten = []

    def flush(self) -> None:
        """Write what could not be written before; raises as :meth:`record`."""
        self.record({})

    def close(self) -> None:
        """A last attempt to write what could not be written."""
        try:
            self.flush()
        except StoreError as error:
            logger.error("%d finished results are lost: %s", len(self._unwritten), error)

    def _record(self, key: str, request: Request, result: Result) -> Record:
        if result.status in OF_LIMITS and "limits" in result.details:
            key = limited_key(key, self._limits)
        label, (_, fingerprint) = self.label(request.property), self._of(request.skeleton, request.property)
        return Record(key, request.crystal, request.property, result, label, fingerprint)

    def failure(self, error: JobFailed, size: int = 1) -> Result:
        """The result of a crystal whose worker is gone; it holds the limits."""
        return Result.failure(error.status, str(error), error.seconds / size, limits=self._limits)
