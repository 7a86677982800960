"""Checkpoints of a run: the whole train state, by orbax."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from crystaljax import files
from crystaljax.run_folder import CHECKPOINTS, RunFolderError

KEPT = 2


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(tree: Any) -> Any:
    """Random keys as the integers they are made of."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _sizes(tree: Any) -> Counter[tuple[tuple[int, ...], str]]:
    """How often each shape and dtype is among the leaves; orbax keeps other containers than ours."""
    return Counter((tuple(leaf.shape), jnp.dtype(leaf.dtype).name) for leaf in jax.tree.leaves(tree))


class Checkpoints:
    """The checkpoints in a run folder, numbered by the updates done."""

    def __init__(self, folder: Path, read_only: bool = False):
        """Makes the folder of the checkpoints, unless they are only read.

        Raises:
            FileRefused: the folder, or something in it, is a link.
        """
        self._folder = folder / CHECKPOINTS
        files.refuse_link(self._folder)
        for path in self._folder.rglob("*"):
            files.refuse_link(path)
        if not read_only:
            files.make_folder(self._folder)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else KEPT, create=False, read_only=read_only, enable_async_checkpointing=False
        )
        # Named here, so that a checkpoint's metadata can be read before anything is saved or restored.
        handler = ocp.StandardCheckpointHandler()
        self._manager = ocp.CheckpointManager(self._folder.absolute(), options=options, item_handlers=handler)

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
        """The train state after an update; ``like`` has the structure, shapes and dtypes (``jax.eval_shape``).

        Raises:
            RunFolderError: the checkpoint is damaged or missing, or that of another run.
        """
        plain = jax.eval_shape(_without_keys, like)
        with self._reading(update):
            if _sizes(self._manager.item_metadata(update)) != _sizes(plain):  # or it may be larger than the memory
                raise ValueError("it is that of another run")
            restored = self._restore(update, plain)
        return jax.tree.map(lambda leaf, old: jax.random.wrap_key_data(old) if _is_key(leaf) else old, like, restored)

    def network_shapes(self) -> Any:
        """Shapes and dtypes of the network's parameters of the last train state; errors as of :meth:`restore`."""
        with self._reading(self.latest):
            return self._manager.item_metadata(self.latest)["network"]

    def restore_network(self) -> Any:
        """The network's parameters of the last train state; errors as of :meth:`restore`."""
        with self._reading(self.latest):
            return self._restore(self.latest, self._manager.item_metadata(self.latest))["network"]

    def _restore(self, update: int, like: Any) -> Any:
        # Onto a device of this machine, whatever the run was trained on.
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like)
        return self._manager.restore(update, args=ocp.args.StandardRestore(placed))

    @contextlib.contextmanager
    def _reading(self, update: int | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the outermost edge: of damaged files, orbax and what it uses raise anything
            earlier = [step for step in self._manager.all_steps() if update is not None and step < update]
            advice = "start the run anew in another folder, where the store has its calculations"
            if earlier:
                advice = f"remove that folder to go on from update {max(earlier)}, or {advice}"
            why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            raise RunFolderError(
                f"the checkpoint {self._folder / str(update)} cannot be read ({why}); {advice}"
            ) from error

    def close(self) -> None:
        self._manager.close()
