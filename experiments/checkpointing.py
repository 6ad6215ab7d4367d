"""The state of a run on disk, by Orbax: what is needed to go on exactly where it stopped.

The base model is no part of it: it never changes.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

PyTree = Any


def manager(directory: Path, *, keep: int = 2) -> ocp.CheckpointManager:
    """Opens the checkpoints of a run; the newest ``keep`` are kept."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(
        directory.absolute(), options=options, item_names=("state", "progress")
    )


def save(checkpoints: ocp.CheckpointManager, step: int, state: PyTree, progress: dict) -> None:
    """Saves ``state`` (arrays) and ``progress`` (JSON) under ``step``, in the background."""
    arrays = ocp.args.StandardSave(_by_position(state))
    checkpoints.save(
        step, args=ocp.args.Composite(state=arrays, progress=ocp.args.JsonSave(progress))
    )


def restore(checkpoints: ocp.CheckpointManager, like: PyTree) -> tuple[PyTree, dict] | None:
    """The newest checkpoint, as a state like the one given, or None if there is none.

    Raises:
      ValueError: it can't be read, or is of another state.
    """
    step = checkpoints.latest_step()
    if step is None:
        return None
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _by_position(like))
    wanted = ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()
    )
    try:
        found = checkpoints.restore(step, args=wanted)
    except Exception as error:  # Orbax and TensorStore raise errors of many kinds for damaged files
        raise ValueError(
            f"The checkpoint of step {step} in {checkpoints.directory} can't be read: {error}. "
            "Remove that step's folder to go on from the one before, or use a new workdir."
        ) from error
    leaves = [found.state[f"{k:06d}"] for k in range(len(found.state))]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), found.progress


def _by_position(state: PyTree) -> dict[str, Any]:
    """Leaves by position: the tree's own containers come from the code, never from the file."""
    return {f"{k:06d}": leaf for k, leaf in enumerate(jax.tree.leaves(state))}
