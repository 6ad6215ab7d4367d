"""Checkpoints of a run, by Orbax: all that it takes to go on exactly where the run stopped.

The base model is no part of them, since it never changes. The leaves of a state are packed into one
array of bytes. As arrays of their own they would be some fifty files for a small adapter, and one
damaged file of many would show as pages of messages from concurrent reads. Checksums find damage
before it is trained on.

Orbax writes in the background, into a temporary folder that gets its name when all is in it.
"""

import contextlib
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

PyTree = Any
_T = TypeVar("_T")
FORMAT_VERSION = 2
_LOGGER = logging.getLogger("lora_jax.training")
_TEMPORARY = "*.orbax-checkpoint-tmp*"
_TIMEOUT, _NO_TIMEOUT = 20 * 60, 10 * 365 * 24 * 3600  # seconds


class StateMismatch(ValueError):
    """A checkpoint is sound, but of another training state."""


@contextlib.contextmanager
def manager(directory: Path, *, keep: int | None = None) -> Iterator[ocp.CheckpointManager]:
    """Opens the checkpoints of a run.

    Args:
      directory: directory of the checkpoints.
      keep: number of the newest checkpoints to keep after a save; None for all.

    Raises:
      OSError: at the end of the block, if the last save has failed.
    """
    handlers = {
        "state": ocp.StandardCheckpointHandler(),
        "about": ocp.JsonCheckpointHandler(),
    }
    checkpoints = ocp.CheckpointManager(
        directory.absolute(), options=_options(keep), item_handlers=handlers
    )
    try:
        yield checkpoints
        wait(checkpoints)
    except Exception as error:
        try:
            wait(checkpoints)
        except OSError as save_error:  # the message has both
            raise OSError(f"{save_error} Apart from that, the run stopped: {error}") from error
        raise
    finally:
        with contextlib.suppress(Exception):  # a failed save has been raised already
            checkpoints.close()
        # Files of a failed save, which was still being written when it was first cleared away.
        _remove(_on_first_process(directory.glob(_TEMPORARY)))


def _options(keep: int | None) -> ocp.CheckpointManagerOptions:
    return ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=True,
        lightweight_initialize=True,  # nothing in a folder is read before it is checked
        enable_async_checkpointing=True,
        async_options=ocp.AsyncOptions(
            # Orbax measures its timeout by the wall clock, which may jump. Among several processes
            # a save ends when one of them is gone; a single process waits for nobody.
            timeout_secs=_NO_TIMEOUT if jax.process_count() == 1 else _TIMEOUT,
            create_directories_asynchronously=False,  # it would wait for these by the same clock
        ),
    )


def save(checkpoints: ocp.CheckpointManager, step: int, state: PyTree, progress: dict) -> None:
    """Starts to save ``state`` (arrays, no PRNG keys) and ``progress`` (JSON) under ``step``.

    The state is copied before the function returns, and written in the background. The function
    first waits for the save before.

    Raises:
      OSError: this save or the one before has failed, for want of space or permission, say; the
        message names its step. Earlier checkpoints are intact.
    """
    wait(checkpoints)
    packed = _pack(state)
    content = {"progress": progress, "layout": _layout(state), "sha256": _sha256(packed)}
    about = {"version": FORMAT_VERSION, "content": content, "sha256": _json_sha256(content)}
    items = {
        "state": ocp.args.StandardSave({"bytes": packed}),
        "about": ocp.args.JsonSave(about),
    }
    try:  # by force: otherwise Orbax does nothing, and says nothing, if there is a later step
        checkpoints.save(step, args=ocp.args.Composite(**items), force=True)
    except Exception as error:  # Orbax and TensorStore raise many types for a full disk
        raise _clean_up(checkpoints, step, error) from error


def wait(checkpoints: ocp.CheckpointManager) -> None:
    """Waits until the last save is on disk.

    Raises:
      OSError: as :func:`save`.
    """
    step = checkpoints.latest_step()
    try:
        checkpoints.wait_until_finished()
    except Exception as error:
        raise _clean_up(checkpoints, step, error) from error


def _clean_up(checkpoints: ocp.CheckpointManager, step: int | None, error: Exception) -> OSError:
    """Removes the files of a failed save, to make room; returns the error to raise."""
    directory = Path(checkpoints.directory)
    _remove(directory.glob(f"{step}{_TEMPORARY[1:]}"))
    steps = sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal())
    earlier = f"that of step {steps[-1]} is intact" if steps else "there was none before"
    return OSError(
        f"Could not write the checkpoint of step {step} in {directory} ({_reason(error)}); "
        f"{earlier}. Make room or fix the permissions, and run the same command again to go on."
    )


def restore(
    checkpoints: ocp.CheckpointManager, like: PyTree, say: Callable[[str], None] = _LOGGER.warning
) -> tuple[PyTree, dict] | None:
    """Reads the newest checkpoint that can be read.

    Damaged ones are renamed, and leftovers of a killed save are removed. So only the process that
    writes the checkpoints may call it.

    Args:
      checkpoints: checkpoints of a run.
      like: state with the structure, shapes and dtypes of the one to read.
      say: takes a message about damaged checkpoints.

    Returns:
      State and progress; None if there is no checkpoint.

    Raises:
      ValueError: all are damaged; or the newest sound one is of another state.
    """
    _remove(_on_first_process(Path(checkpoints.directory).glob(_TEMPORARY)))
    damaged: dict[int, str] = {}
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            packed, progress = _read(checkpoints, step, _layout(like))
        except StateMismatch:
            raise
        except Exception as error:  # damaged files raise errors of many types
            damaged[step] = _reason(error)
            continue
        if damaged:
            say(f"{_describe(damaged)} The checkpoint of step {step} is used.")
            _rename(checkpoints, damaged)
        return _unpack(packed, like), progress
    if damaged:
        raise ValueError(
            f"No checkpoint in {checkpoints.directory} can be read. {_describe(damaged)} Restore "
            "one from a backup, or remove that folder to start from the beginning."
        )
    return None


def _remove(folders: Iterable[Path]) -> None:
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)


def _describe(damaged: dict[int, str]) -> str:
    return " ".join(f"The checkpoint of step {k} is damaged: {why}." for k, why in damaged.items())


def _on_first_process(items: Iterable[_T]) -> list[_T]:
    """Returns the items in the first process, which alone changes a directory that all share."""
    return list(items) if jax.process_index() == 0 else []


def _rename(checkpoints: ocp.CheckpointManager, steps: Iterable[int]) -> None:
    """Renames checkpoints, so that the same steps can be saved again, and nothing is destroyed."""
    directory = Path(checkpoints.directory)
    for step in _on_first_process(steps):
        number = 1
        while (new := directory / f"damaged-{step}-{number}").exists():
            number += 1
        (directory / str(step)).rename(new)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("damaged checkpoints are renamed")
    checkpoints.reload()


def _read(checkpoints: ocp.CheckpointManager, step: int, layout: list) -> tuple[np.ndarray, dict]:
    """Reads bytes and progress; each check relies on those before it.

    Raises:
      StateMismatch: the arrays have other shapes or dtypes.
      ValueError: the checkpoint is damaged.
    """
    about = checkpoints.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
    if about.get("version") != FORMAT_VERSION:
        raise ValueError(f"its format is {about.get('version')!r}, not {FORMAT_VERSION}")
    content = about["content"]
    if about["sha256"] != _json_sha256(content):
        raise ValueError("its description does not have the SHA-256 that was stored with it")
    if content["layout"] != layout:
        raise StateMismatch(
            f"The checkpoint of step {step} in {checkpoints.directory} is of another training "
            "state (its arrays have other shapes or dtypes); use a new workdir."
        )
    size = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for dtype, shape in layout)
    stored = checkpoints.item_metadata(step)["state"]["bytes"]
    if (tuple(stored.shape), stored.dtype) != ((size,), np.uint8):  # reading allocates it
        raise ValueError(f"it holds {stored.shape} {stored.dtype} instead of {size} bytes")
    state = ocp.args.Composite(state=ocp.args.StandardRestore())
    packed = np.asarray(checkpoints.restore(step, args=state).state["bytes"])
    if content["sha256"] != _sha256(packed):
        raise ValueError("its content does not have the SHA-256 that was stored with it")
    return packed, content["progress"]


def _pack(state: PyTree) -> np.ndarray:
    # A copy, since the next step will reuse the device's memory.
    return np.frombuffer(
        b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state)), np.uint8
    )


def _layout(state: PyTree) -> list:
    return [[str(x.dtype), list(x.shape)] for x in jax.tree.leaves(state)]


def _unpack(packed: np.ndarray, like: PyTree) -> PyTree:
    """Rebuilds a state; its containers come from the code, never from the file."""
    leaves, treedef = jax.tree.flatten(like)
    ends = np.cumsum([x.size * x.dtype.itemsize for x in leaves])
    parts = np.split(packed, ends[:-1])
    arrays = [
        jnp.array(part.view(x.dtype).reshape(x.shape))
        for part, x in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, arrays)


def _sha256(packed: np.ndarray) -> str:
    return hashlib.sha256(packed.data).hexdigest()


def _json_sha256(content: Any) -> str:
    """Hashes a text that does not depend on the order of keys in a file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    """Returns the head of an error's text, to which TensorStore appends pages of settings."""
    text = str(error).split(" [tensorstore_spec")[0].strip() or type(error).__name__
    return text if len(text) < 300 else f"{text[:100]} ... {text[-180:]}"
