"""What is asked of an engine, and the key under which its answer is kept.

Two labelings of a skeleton that its symmetry turns into each other are one crystal, so a request holds the smallest
of them. Its key is a SHA-256 over the skeleton's standard form (:mod:`crystaljax.dft_bridge.standard_form`), the
elements in the order of that form, the property and everything of the engine that can change the number. So it does not
depend on the axes, the origin or the site order that describe a crystal, nor on its hand, and whoever computes it, on
whatever machine, gets the same key.
"""

from __future__ import annotations

import builtins
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crystaljax.dft_bridge.engines.base import Crystal
from crystaljax.dft_bridge.standard_form import standard_form
from crystaljax.skeleton import Skeleton
from crystaljax.symmetry import canonical_numbers

KEY_PREFIX = "cj"
"""How keys begin; ASE refuses to store text that reads as a number, which a bare digest may."""
MOST_KEPT = 1 << 26
"""Bytes of what a :class:`KeyRing` keeps; a symmetric crystal of 500 sites takes most of it."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One property of one crystal. :meth:`of` makes it from any labeling.

    Attributes:
        skeleton: lattice and sites.
        numbers: atomic number of each site, canonical.
        property: ``band_gap``, ``bulk_modulus`` or ``density``.
    """

    skeleton: Skeleton
    numbers: tuple[int, ...]
    property: str

    @classmethod
    def of(cls, skeleton: Skeleton, numbers: Sequence[int] | np.ndarray, property_name: str) -> Request:
        """The request for a labeling (integer [N]) of the skeleton; equivalent labelings give equal requests."""
        given = np.asarray(numbers, dtype=np.int32)
        if given.shape != (skeleton.n_sites,) or (given < 1).any():
            raise ValueError(
                f"skeleton {skeleton.name} needs {skeleton.n_sites} atomic numbers, one per site; got {numbers}"
            )
        return cls(skeleton, tuple(canonical_numbers(given, skeleton.permutations).tolist()), property_name)

    @builtins.property  # "property" is a field here
    def crystal(self) -> Crystal:
        """The crystal that the engine gets."""
        return Crystal(self.skeleton.lattice, self.skeleton.frac_coords, np.array(self.numbers, dtype=np.int64))


class Keys:
    """Makes the keys of one property of one skeleton under one engine fingerprint."""

    def __init__(self, skeleton: Skeleton, property_name: str, fingerprint: Mapping[str, Any]):
        """``fingerprint``: JSON-able, see :class:`crystaljax.dft_bridge.engines.base.Engine`."""
        form = standard_form(skeleton.lattice, skeleton.frac_coords)
        # Every equivalent of a labeling, in the site order of the standard form.
        self._images = skeleton.permutations[:, form.order]
        settings = json.dumps(fingerprint, sort_keys=True, separators=(",", ":"))
        self._common = hashlib.sha256(f"{settings}\n{property_name}\n".encode() + form.geometry.astype("<i8").tobytes())

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return self._images.nbytes

    def key(self, numbers: Sequence[int] | np.ndarray) -> str:
        """The key of a labeling, integer [N], in the site order of the skeleton."""
        digest = self._common.copy()
        digest.update(canonical_numbers(np.asarray(numbers, dtype="<i4"), self._images).tobytes())
        return KEY_PREFIX + digest.hexdigest()


def limited_key(key: str, limits: Mapping[str, Any]) -> str:
    """The key of a failure that speaks of limits (JSON-able) as much as of the crystal: other limits try again."""
    return KEY_PREFIX + hashlib.sha256(f"{key} {json.dumps(limits, sort_keys=True)}".encode()).hexdigest()


class KeyRing:
    """Makes keys from finished crystals. Keeps what it worked out for their last skeletons (:data:`MOST_KEPT`)."""

    def __init__(self) -> None:
        self._keys: dict[tuple[bytes, bytes, str, str], Keys] = {}
        self._size = 0

    def key(
        self,
        crystal: Crystal,
        property_name: str,
        fingerprint: Mapping[str, Any],
        limits: Mapping[str, Any] | None = None,
    ) -> str:
        """The key of a crystal, as :meth:`Keys.key` gives it for its labeling of its skeleton, under ``limits``."""
        lattice, sites = crystal.lattice, crystal.frac_coords
        which = lattice.tobytes(), sites.tobytes(), property_name, json.dumps(fingerprint, sort_keys=True)
        if which not in self._keys:
            keys = Keys(Skeleton("crystal", lattice, sites, ()), property_name, fingerprint)
            if self._size + keys.size > MOST_KEPT:
                self._keys, self._size = {}, 0
            self._keys[which], self._size = keys, self._size + keys.size
        key = self._keys[which].key(crystal.numbers)
        return limited_key(key, limits) if limits else key
