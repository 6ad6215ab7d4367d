"""The state of a run on disk, by Orbax: what is needed to go on exactly where it stopped.

The base model is no part of it: it never changes. The leaves are packed into one array of bytes.
As arrays of their own, a small adapter would be some fifty files, and one damaged file of many
would show as pages of messages from concurrent reads. With a checksum, damage is never trained on.
"""

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

PyTree = Any


def manager(directory: Path, *, keep: int = 2) -> ocp.CheckpointManager:
    """Opens the checkpoints of a run; the newest ``keep`` are kept.

    They are written before ``save`` returns: they are small, and so an error comes from the save
    that it belongs to.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, enable_async_checkpointing=False
    )
    names = ("state", "about")
    return ocp.CheckpointManager(directory.absolute(), options=options, item_names=names)


def save(checkpoints: ocp.CheckpointManager, step: int, state: PyTree, progress: dict) -> None:
    """Saves ``state`` (arrays, no PRNG keys) and ``progress`` (JSON) under ``step``.

    Raises:
      OSError: no space, no permission, ...; earlier checkpoints are intact.
    """
    packed = _pack(state)
    about = {"progress": progress, "layout": _layout(state), "sha256": _sha256(packed)}
    items = {
        "state": ocp.args.StandardSave({"bytes": packed}),
        "about": ocp.args.JsonSave(about),
    }
    try:
        checkpoints.save(step, args=ocp.args.Composite(**items))
    except Exception as error:  # what Orbax and TensorStore raise for a full disk has many types
        raise OSError(
            f"Could not write the checkpoint of step {step} in {checkpoints.directory} "
            f"({_reason(error)}); what was saved before is intact. Make room or fix the "
            "permissions, and run the same command again to go on."
        ) from error


def restore(checkpoints: ocp.CheckpointManager, like: PyTree) -> tuple[PyTree, dict] | None:
    """The newest checkpoint, as a state like the one given, or None if there is none.

    Raises:
      ValueError: it can't be read, or is of another state.
    """
    step = checkpoints.latest_step()
    if step is None:
        return None
    items = {"state": ocp.args.StandardRestore(), "about": ocp.args.JsonRestore()}
    try:
        found = checkpoints.restore(step, args=ocp.args.Composite(**items))
        packed, about = np.asarray(found.state["bytes"]), found.about
        if about["sha256"] != _sha256(packed):
            raise ValueError("its content does not have the SHA-256 that was noted")
        layout, progress = about["layout"], about["progress"]
    except Exception as error:  # damaged files also raise errors of many types
        raise ValueError(
            f"The checkpoint of step {step} in {checkpoints.directory} can't be read "
            f"({_reason(error)}). Remove the folder {step} there to go on from the checkpoint "
            "before it, or use a new workdir."
        ) from error
    if layout != _layout(like):
        raise ValueError(
            f"The checkpoint of step {step} in {checkpoints.directory} is of another training "
            "state (its arrays have other shapes or dtypes); use a new workdir."
        )
    return _unpack(packed, like), progress


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
    return hashlib.sha256(packed.tobytes()).hexdigest()


def _reason(error: Exception) -> str:
    """The head of an error's text: TensorStore appends pages of its settings."""
    text = str(error).split(" [tensorstore_spec")[0].strip() or type(error).__name__
    return text if len(text) < 300 else f"{text[:100]} ... {text[-180:]}"
