"""The pre-trained weights of CHGNet 0.3.0, as they ship with the package."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

FILE = Path(__file__).parent / "data" / "chgnet-0.3.0.npz"


@functools.cache
def _arrays() -> dict[str, np.ndarray]:
    with np.load(FILE) as archive:
        return {name: archive[name] for name in archive.files}


def pretrained() -> dict[str, Any]:
    """Parameters of :class:`crystaljax.agents.chgnet.model.CHGNet` (without the collection ``params``), float32."""
    return jax.tree.map(jnp.asarray, unflatten_dict(_arrays(), sep="/"))
