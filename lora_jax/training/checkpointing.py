"""The state of a run on disk, by Orbax: what is needed to go on exactly where it stopped.

The base model is no part of it: it never changes. The leaves are packed into one array of bytes.
As arrays of their own, a small adapter would be some fifty files, and one damaged file of many
would show as pages of messages from concurrent reads. With checksums, damage is never trained on.

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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

PyTree = Any
FORMAT_VERSION = 2
_LOGGER = logging.getLogger("lora_jax.training")
_TEMPORARY = "*.orbax-checkpoint-tmp*"
_PATIENCE, _LONG = 20 * 60, 10 * 365 * 24 * 3600  # seconds


class OtherState(ValueError):
    """A checkpoint is sound, and of another training state."""


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
        except OSError as failed:  # both are told
            raise OSError(f"{failed} Apart from that, the run stopped: {error}") from error
        raise
    finally:
        with contextlib.suppress(Exception):  # what a save had to tell has been told
            checkpoints.close()
        # Of a save that failed, which was still being written when it was first cleared away.
        _remove(_primary(directory.glob(_TEMPORARY)))


def _options(keep: int | None) -> ocp.CheckpointManagerOptions:
    return ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=True,
        lightweight_initialize=True,  # nothing in a folder is read before it is checked
        enable_async_checkpointing=True,
        async_options=ocp.AsyncOptions(
            # Orbax measures its patience by the wall clock, which may jump. Among several processes
            # a save ends when one of them is gone; alone there is nobody to wait for.
            timeout_secs=_LONG if jax.process_count() == 1 else _PATIENCE,
            create_directories_asynchronously=False,  # it would wait for these by the same clock
        ),
    )


def save(checkpoints: ocp.CheckpointManager, step: int, state: PyTree, progress: dict) -> None:
    """Starts to save ``state`` (arrays, no PRNG keys) and ``progress`` (JSON) under ``step``.

    It is copied before this returns, and written after; the save before is waited for.

    Raises:
      OSError: this save or the one before has failed (the message names its step): no space, no
        permission, ...; earlier checkpoints are intact.
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
    except Exception as error:  # what Orbax and TensorStore raise for a full disk has many types
        raise _failed(checkpoints, step, error) from error


def wait(checkpoints: ocp.CheckpointManager) -> None:
    """Waits until what was saved is on disk.

    Raises:
      OSError: as :func:`save`.
    """
    step = checkpoints.latest_step()
    try:
        checkpoints.wait_until_finished()
    except Exception as error:
        raise _failed(checkpoints, step, error) from error


def _failed(checkpoints: ocp.CheckpointManager, step: int | None, error: Exception) -> OSError:
    """The error to raise; what the save has left behind is removed, to make room."""
    directory = Path(checkpoints.directory)
    _remove(directory.glob(f"{step}{_TEMPORARY[1:]}"))
    steps = sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal())
    there = f"that of step {steps[-1]} is intact" if steps else "there was none before"
    return OSError(
        f"Could not write the checkpoint of step {step} in {directory} ({_reason(error)}); {there}."
        " Make room or fix the permissions, and run the same command again to go on."
    )


def restore(
    checkpoints: ocp.CheckpointManager, like: PyTree, say: Callable[[str], None] = _LOGGER.warning
) -> tuple[PyTree, dict] | None:
    """The newest checkpoint that can be read, as a state like the one given; None for none at all.

    Damaged ones are put aside, under another name, and leftovers of a killed save are removed: only
    the process that writes here may call it.

    Args:
      checkpoints: of one run.
      like: a state, for its structure, shapes and dtypes.
      say: is told of damage.

    Raises:
      ValueError: all are damaged; or the newest sound one is of another state.
    """
    _remove(_primary(Path(checkpoints.directory).glob(_TEMPORARY)))
    damaged: dict[int, str] = {}
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            packed, progress = _read(checkpoints, step, _layout(like))
        except OtherState:
            raise
        except Exception as error:  # damaged files raise errors of many types
            damaged[step] = _reason(error)
            continue
        if damaged:
            say(f"{_told(damaged)} The checkpoint of step {step} is used.")
            _put_aside(checkpoints, damaged)
        return _unpack(packed, like), progress
    if damaged:
        raise ValueError(
            f"No checkpoint in {checkpoints.directory} can be read. {_told(damaged)} Restore one "
            "from a backup, or remove that folder to start from the beginning."
        )
    return None


def _remove(folders: Iterable[Path]) -> None:
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)


def _told(damaged: dict[int, str]) -> str:
    return " ".join(f"The checkpoint of step {k} is damaged: {why}." for k, why in damaged.items())


def _primary(items: Any) -> Any:
    """What is in a directory that processes share is changed by the first of them."""
    return list(items) if jax.process_index() == 0 else []


def _put_aside(checkpoints: ocp.CheckpointManager, steps: Any) -> None:
    """Renames checkpoints, so that the same steps can be saved again, and nothing is destroyed."""
    directory = Path(checkpoints.directory)
    for step in _primary(steps):
        number = 1
        while (new := directory / f"damaged-{step}-{number}").exists():
            number += 1
        (directory / str(step)).rename(new)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("damaged checkpoints are put aside")
    checkpoints.reload()


def _read(checkpoints: ocp.CheckpointManager, step: int, layout: list) -> tuple[np.ndarray, dict]:
    """Bytes and progress, after each check that the next one needs.

    Raises:
      OtherState: the arrays have other shapes or dtypes.
    """
    about = checkpoints.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
    if about.get("version") != FORMAT_VERSION:
        raise ValueError(f"its format is {about.get('version')!r}, not {FORMAT_VERSION}")
    content = about["content"]
    if about["sha256"] != _json_sha256(content):
        raise ValueError("its description does not have the SHA-256 that was noted")
    if content["layout"] != layout:
        raise OtherState(
            f"The checkpoint of step {step} in {checkpoints.directory} is of another training "
            "state (its arrays have other shapes or dtypes); use a new workdir."
        )
    size = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for dtype, shape in layout)
    stored = checkpoints.item_metadata(step)["state"]["bytes"]
    if (tuple(stored.shape), stored.dtype) != ((size,), np.uint8):  # which it would make room for
        raise ValueError(f"it holds {stored.shape} {stored.dtype} instead of {size} bytes")
    state = ocp.args.Composite(state=ocp.args.StandardRestore())
    packed = np.asarray(checkpoints.restore(step, args=state).state["bytes"])
    if content["sha256"] != _sha256(packed):
        raise ValueError("its content does not have the SHA-256 that was noted")
    return packed, content["progress"]


def _pack(state: PyTree) -> np.ndarray:
    # Copied out of the device, where the next step will reuse the memory.
    return np.frombuffer(
        b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state)), np.uint8
    )


def _layout(state: PyTree) -> list:
    return [[str(x.dtype), list(x.shape)] for x in jax.tree.leaves(state)]


def _unpack(packed: np.ndarray, like: PyTree) -> PyTree:
    """The containers come from the code, never from the file."""
    leaves, treedef = jax.tree.flatten(like)
    ends = np.cumsum([x.size * x.dtype.itemsize for x in leaves])
    parts = np.split(packed, ends[:-1])
    arrays = [
        jnp.array(part.view(x.dtype).reshape(x.shape))
        for part, x in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, arrays)


def _sha256(packed: np.ndarray) -> str:
    return hashlib.sha256(packed).hexdigest()


def _json_sha256(content: Any) -> str:
    """Of the text that JSON types always have, whatever the order of keys in a file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    """The head of an error's text: TensorStore appends pages of its settings."""
    text = str(error).split(" [tensorstore_spec")[0].strip() or type(error).__name__
    return text if len(text) < 300 else f"{text[:100]} ... {text[-180:]}"
