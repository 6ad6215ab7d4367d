"""Batches on a mesh: each process makes the rows of its own devices, and puts them there."""

import jax
import numpy as np
from jax.sharding import NamedSharding

from lora_jax import sharding
from lora_jax.data.batches import Batch
from lora_jax.training.mesh import Devices, PyTree, require_mesh


def local_rows(devices: Devices, batch_size: int) -> np.ndarray:
    """Returns the numbers of a batch's rows that devices of this process hold, ascending."""
    split = NamedSharding(require_mesh(devices), sharding.BATCH)
    slices = split.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def put_batch(devices: Devices, batch: Batch) -> PyTree:
    """Puts the rows that this process has of a batch onto its devices."""
    mesh = require_mesh(devices)
    split = NamedSharding(mesh, sharding.BATCH)
    parts = mesh.shape[sharding.DATA] * mesh.shape[sharding.FSDP]
    local_parts = local_rows(devices, parts)

    def put(x: np.ndarray) -> jax.Array:
        size = len(x) // len(local_parts)  # rows of each part

        def rows_at(index: tuple[slice, ...] | None) -> np.ndarray:
            first = index[0].start if index else 0
            start = np.searchsorted(local_parts, (first or 0) // size) * size
            return x[start : start + size]

        return jax.make_array_from_callback((size * parts, *x.shape[1:]), split, rows_at)

    # The devices do not need the number of each row's example, which is given for all rows.
    return {name: put(x) for name, x in batch.items() if name != "index"}
