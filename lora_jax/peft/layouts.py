"""Converts factors of one kernel between ``a, b`` here and ``lora_A, lora_B`` in the file.

PEFT multiplies column vectors as the paper does, so its A is ``a`` transposed and its B is ``b``
transposed, with the axes of each side joined; a convolution's A has the window last.
"""

import numpy as np

from lora_jax import factors, names
from lora_jax.names import Weight


def to_file(weight: Weight, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Converts ``a (*in, rank)`` and ``b (rank, *out)`` to the file's two tensors."""
    rank = a.shape[-1]
    if names.kind(weight) == names.CONV:
        n = a.ndim
        return a.transpose(n - 1, n - 2, *range(n - 2)), b.T.reshape(-1, rank, *[1] * (n - 2))
    return a.reshape(-1, rank).T, b.reshape(rank, -1).T


def from_file(weight: Weight, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inverts :func:`to_file`."""
    rank = a.shape[0]
    if names.kind(weight) == names.CONV:
        return a.transpose(*range(2, a.ndim), 1, 0), b.reshape(-1, rank).T
    shapes = factors.factor_shapes(weight.shape, names.axes(weight), rank)
    return a.T.reshape(shapes[0]), b.T.reshape(shapes[1])


def node_axes(weight: Weight) -> str:
    """Returns the roles of the leaf's axes, with its axis of layers if it has one."""
    return ("" if weight.layer is None else factors.BATCH) + names.axes(weight)
