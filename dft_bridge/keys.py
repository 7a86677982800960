"""What is asked of an engine, and the key under which its answer is kept.

Two labelings of a skeleton that its symmetry turns into each other are one crystal, so a request holds the smallest
of them. Its key is a SHA-256 over geometry, elements, property and everything of the engine that can change the
number; whoever computes it, on whatever machine, gets the same key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crystaljax.skeleton import Skeleton
from crystaljax.symmetry import canonical_numbers
from dft_bridge.engines.base import Crystal

KEY_PREFIX = "cj"
"""How keys begin; ASE refuses to store text that reads as a number, which a bare digest may."""


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

    @property
    def crystal(self) -> Crystal:
        """The crystal that the engine gets."""
        return Crystal(self.skeleton.lattice, self.skeleton.frac_coords, np.array(self.numbers, dtype=np.int64))


class Keys:
    """Makes the keys of one property of one skeleton under one engine fingerprint."""

    def __init__(self, skeleton: Skeleton, property_name: str, fingerprint: Mapping[str, Any]):
        """``fingerprint``: JSON-able, see :class:`dft_bridge.engines.base.Engine`."""
        settings = json.dumps(fingerprint, sort_keys=True, separators=(",", ":"))
        self._common = hashlib.sha256(f"{settings}\n{skeleton.digest}\n{property_name}\n".encode())

    def key(self, numbers: Sequence[int] | np.ndarray) -> str:
        """The key of a canonical labeling, integer [N]."""
        digest = self._common.copy()
        digest.update(np.asarray(numbers, dtype="<i4").tobytes())
        return KEY_PREFIX + digest.hexdigest()


def limited_key(key: str, limits: Mapping[str, Any]) -> str:
    """The key of a failure that speaks of limits (JSON-able) as much as of the crystal: other limits try again."""
    return KEY_PREFIX + hashlib.sha256(f"{key} {json.dumps(limits, sort_keys=True)}".encode()).hexdigest()
