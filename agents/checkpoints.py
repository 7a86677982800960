"""Checkpoints of a run: the whole train state, by orbax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

FOLDER = "checkpoints"
KEPT = 2


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(tree: Any) -> Any:
    """Random keys as the integers they are made of."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


class Checkpoints:
    """The checkpoints in a run folder, numbered by the updates done."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, create=True, enable_async_checkpointing=False)
        # Named here, so that a checkpoint's metadata can be read before anything is saved or restored.
        handler = ocp.StandardCheckpointHandler()
        self._manager = ocp.CheckpointManager((folder / FOLDER).absolute(), options=options, item_handlers=handler)

    @property
    def latest(self) -> int | None:
        """Updates done at the last complete checkpoint; ``None`` if there is none."""
        return self._manager.latest_step()

    def save(self, update: int, state: Any) -> None:
        """Save a train state, unless this update has been saved; complete, or not there at all."""
        if update not in self._manager.all_steps():
            self._manager.save(update, args=ocp.args.StandardSave(_without_keys(state)))
            self._manager.wait_until_finished()

    def restore(self, update: int, like: Any) -> Any:
        """The train state after an update; ``like`` has the structure, shapes and dtypes (``jax.eval_shape``)."""
        restored = self._restore(update, jax.eval_shape(_without_keys, like))
        return jax.tree.map(lambda leaf, old: jax.random.wrap_key_data(old) if _is_key(leaf) else old, like, restored)

    def restore_network(self) -> Any:
        """The network's parameters of the last train state."""
        return self._restore(self.latest, self._manager.item_metadata(self.latest))["network"]

    def _restore(self, update: int, like: Any) -> Any:
        # Onto a device of this machine, whatever the run was trained on.
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like)
        return self._manager.restore(update, args=ocp.args.StandardRestore(placed))

    def close(self) -> None:
        self._manager.close()
