"""Checkpoints of a run: a thin layer over Orbax, so that a change of its API costs this file only.

A checkpoint holds the training state (sharded arrays) and a small host part (the schedule's arrays, say). It is written in the background
while training goes on. Orbax writes to a temporary folder and renames it, and removes an older checkpoint only after that, so a kill
leaves either the whole checkpoint or none. What cannot be read, or is not what was saved (neither Orbax nor the file formats below it check
the values themselves), is passed over for the one before.
"""

import base64
import contextlib
import dataclasses
import errno
import io
import logging as std_logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from jaxrl_llm.errors import UserError, from_os_error

# What the parts of Orbax that do not raise OSError say when the disk refuses.
_DISK_FULL = ("no space left", "disk quota", "file too large", "resource_exhausted")
_TEMPORARY = "orbax-checkpoint-tmp"
_PATIENCE = 2 * 3600  # seconds that a write may take; Orbax would give up after 20 minutes, which a large state on slow storage can need


def _not_of_a_write(record: std_logging.LogRecord) -> bool:
    """Whether a log record is none of Orbax's on a write that failed: it is told of once a thread with a traceback, and raised to us too."""
    return record.levelno < std_logging.ERROR or "/orbax/checkpoint/" not in Path(record.pathname).as_posix()


@dataclasses.dataclass
class _Kept:
    """Which checkpoints stay (Orbax's PreservationPolicy): the newest `newest`, and that of step `best`."""

    newest: int
    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """One answer a checkpoint, oldest first."""
        return [i >= len(checkpoints) - self.newest or found.step == self.best for i, found in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints of one folder, newest kept, and the one that is named best. As a context manager it closes itself at the end.

    path: the folder (made if need be). keep: how many of the newest to keep. Raises UserError where it cannot be written.

    One write at a time goes on in the background: the next `save`, `restore`, `finish` or `close` waits for it and raises what it ran into
    (UserError when the disk is full or not writable; earlier checkpoints are then as they were), once.
    """

    def __init__(self, path: str | Path, keep: int = 2):
        import orbax.checkpoint as ocp

        self.path = Path(path).absolute()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                for left_over in self.path.glob(f"*{_TEMPORARY}*"):
                    shutil.rmtree(left_over, ignore_errors=True)
        except OSError as error:
            raise from_os_error(error, self.path, "write checkpoints to") from error
        self._kept = _Kept(keep)
        options = ocp.CheckpointManagerOptions(preservation_policy=self._kept, async_options=ocp.AsyncOptions(timeout_secs=_PATIENCE))
        self._manager = ocp.CheckpointManager(self.path, options=options, item_names=("state", "host"))
        self._ocp = ocp
        self._failure: Exception | None = None  # of the last write, to be raised
        logging.get_absl_logger().addFilter(_not_of_a_write)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: Any) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as failure:  # the error that ends the block is the one to raise
            logging.error("%s", failure)

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, oldest first; waits for the write that goes on."""
        self._settle()
        return sorted(self._manager.all_steps())

    def name_best(self, step: int | None) -> None:
        """From now on the checkpoint of `step` stays, however many are newer, and the one named before stays no longer."""
        self._kept.best = step

    def save(self, step: int, state: Any, host: dict[str, np.ndarray]) -> None:
        """Saves `state` and `host` under `step`, if there is none yet. Returns once they are copied: what is written is what they are now,
        though the next step may take the state's memory. Raises UserError as said above, here of the write before or of this one's start.
        """
        self.finish()
        if step in self._manager.all_steps():
            return
        self._check_space(state, host)
        args = self._ocp.args
        host_part = {"arrays": _pack(host), "checksums": checksums(state)}
        # Orbax copies from the devices and copies host arrays. On the CPU it only refers to the buffers; XLA does not give those away then.
        items = args.Composite(state=args.StandardSave(state), host=args.JsonSave(host_part))
        try:
            saved = self._manager.save(step, args=items)
        except Exception as error:
            raise self._told(error) from error
        if not saved:
            raise UserError(f"{self.path}: no checkpoint of step {step} was written, since there is one of a later step; use another folder")

    def finish(self) -> None:
        """Waits until the last save is on disk. Raises UserError when the disk refused it."""
        self._settle()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def restore(self, abstract_state: Any, at: int | None = None) -> tuple[int, Any, dict[str, np.ndarray]] | None:
        """(step, state, host) of the newest checkpoint that can be read, or None where there is none. at: of that step and no other.

        abstract_state: ShapeDtypeStructs, with the shardings wanted now; they need not be those it was saved with. Newer ones that cannot be
        read, or whose values are not those that were saved, are renamed ("unreadable-STEP"): they neither count among those that are kept
        nor stand in the way of their step's next save.
        Raises UserError when there are checkpoints and none can be read (their model or optimizer differs, say).
        """
        self.finish()
        args, last = self._ocp.args, None
        unreadable: list[int] = []
        for step in [at] if at is not None else reversed(self.steps()):
            try:
                items = args.Composite(state=args.StandardRestore(abstract_state), host=args.JsonRestore())
                restored = self._manager.restore(step, args=items)
                _check_values(restored.state, restored.host.get("checksums", {}))
                if at is None and unreadable:
                    self._put_aside(unreadable)
                return step, restored.state, _unpack(restored.host["arrays"])
            except Exception as error:  # damage shows in many shapes: OSError, ValueError, KeyError, a JSON error
                first_line = (str(error).splitlines() or [type(error).__name__])[0]
                if at is None:
                    logging.warning("checkpoint %s/%d cannot be read (%s); trying the one before", self.path, step, first_line)
                last = f"{step}: {first_line}"
                unreadable.append(step)
        if last is not None and at is not None:
            way_on = "to end with the newest instead add --config.train.keep_best= --config.allow_changes=train.keep_best"
            raise UserError(f"the best checkpoint in {self.path} cannot be read ({last}); {way_on}")
        if last is not None:
            raise UserError(f"none of the checkpoints in {self.path} can be read ({last}); move them away to start over")
        return None

    def _put_aside(self, steps: list[int]) -> None:
        """Takes what cannot be read out of the row of checkpoints, on all processes."""
        from jax.experimental.multihost_utils import sync_global_devices

        if jax.process_index() == 0:
            for step in steps:
                aside = self.path / f"unreadable-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                (self.path / str(step)).rename(aside)
                logging.warning("%s/%d is now %s; remove it when you have seen what it was", self.path, step, aside.name)
        if jax.process_count() > 1:
            sync_global_devices("checkpoints put aside")
        self._manager.reload()

    def close(self) -> None:
        """Waits until the last save is on disk and frees Orbax's threads. Raises UserError when the disk refused it."""
        self._settle()
        self._manager.close()
        logging.get_absl_logger().removeFilter(_not_of_a_write)
        self.finish()

    def remove(self) -> None:
        """Removes the folder of what is closed: the run is over and what it made is kept elsewhere."""
        if jax.process_index() == 0:
            shutil.rmtree(self.path, ignore_errors=True)

    def _check_space(self, state, host) -> None:
        need = sum(x.nbytes for x in jax.tree.leaves((state, host)))
        try:
            free = shutil.disk_usage(self.path).free
        except OSError as error:
            raise from_os_error(error, self.path, "write a checkpoint to") from error
        if free < need and jax.process_count() == 1:
            raise self._save_error(OSError(errno.ENOSPC, "disk full"))

    def _settle(self) -> None:
        """Waits for the write that goes on; what it ran into is kept to be raised."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            # Orbax has already struck off those that were to give way to the new one: they are still there.
            self._manager.reload()
            self._failure = self._told(error)
            self._failure.__cause__ = error

    def _told(self, error: Exception) -> Exception:
        """What to raise of a save that failed: a user's error where the disk refused."""
        if isinstance(error, OSError):
            return self._save_error(error)
        # Tensorstore reports a refused write as a ValueError or a runtime error with the system's words in it.
        if any(words in str(error).lower() for words in _DISK_FULL):
            return self._save_error(OSError(errno.ENOSPC, "disk full"))
        return error

    def _save_error(self, error: OSError) -> UserError:
        steps = sorted(self._manager.all_steps())
        kept = f"the last good checkpoint is step {steps[-1]}" if steps else "no checkpoint was saved before"
        return UserError(f"{from_os_error(error, self.path, 'write a checkpoint to')} ({kept})")


@contextlib.contextmanager
def until_done(path: str | Path, keep: int = 2) -> Iterator[Checkpoints]:
    """The Checkpoints of `path` for a block, removed when the block ends well and left for the next start when it does not."""
    with Checkpoints(path, keep) as checkpoints:
        yield checkpoints
    checkpoints.remove()


def checksums(state: Any) -> dict[str, list[Any]]:
    """{path of an array: [its dtype, a checksum of its bits]}, on any mesh the same: sums modulo 2**32 are exact in any order.

    Each 32-bit word counts times an odd number of its own, so that one changed word always shows, and words that change places do.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    sums = [_checksum(leaf) for _, leaf in leaves]  # all are under way before the first is waited for
    return {jax.tree_util.keystr(path): [str(leaf.dtype), int(total)] for (path, leaf), total in zip(leaves, sums, strict=True)}


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}")).astype(jnp.uint32)
    number, below = jnp.uint32(0), 1  # the place of each word in the whole array: by dimensions, so that nothing has to be moved
    for axis in reversed(range(bits.ndim)):
        number += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(below % 2**32)
        below *= bits.shape[axis]
    return jnp.sum(bits * (2 * number + 1), dtype=jnp.uint32)


def _check_values(state: Any, saved: dict[str, list[Any]]) -> None:
    """Raises ValueError for arrays that are not those that were saved. A checkpoint from before there were checksums is taken as it is."""
    for name, (dtype, total) in checksums(state).items():
        if name in saved and saved[name][0] == dtype and saved[name][1] != total:
            raise ValueError(f"{name} does not hold the values that were saved: the files have changed since")


def _pack(arrays: dict[str, np.ndarray]) -> str:
    """Named arrays as base64 of an npz: exact, any dtype, no shapes needed to read them."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.asarray(value) for name, value in arrays.items()})
    return base64.b64encode(buffer.getvalue()).decode()


def _unpack(text: str) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as data:
        return {name: data[name] for name in data.files}
