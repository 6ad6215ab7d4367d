"""Converts arrays of a node between their layout here and that of a tensor in the file.

PEFT multiplies column vectors as the paper does, so its A is ``a`` transposed and its B is ``b``
transposed, with the axes of each side joined; a convolution's A has the window last. Which axes a
tensor has is one letter for each: "i" or "o" for all inputs or outputs of the kernel, "1" for an
axis of size 1, another letter for an axis of the array's own, such as "r" for the rank. "b" is the
experts of one kernel, which are joined with the rank beside them: "br" has the factor of one expert
after that of the other.
"""

import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from lora_jax import factors, names
from lora_jax.factors import BATCH, IN, OUT
from lora_jax.names import Weight

ONE = "1"
_SIDES = (BATCH, IN, OUT)


def tensor_shape(weight: Weight, letters: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Returns the shape of a tensor in the file.

    A convolution's tensors have the axes of the window behind, of size 1 but for the input's, and
    at least two others before them.

    Args:
      weight: weight that the tensor belongs to.
      letters: letters of the tensor's axes.
      sizes: sizes, by letter, of the axes that the kernel does not have.
    """
    window = weight.shape[:-2] if names.kind(weight) == names.CONV else ()
    if window:
        letters = letters.rjust(2, ONE)
    of_sides = {side: _count_entries(weight, side) for side in _SIDES}
    of_sides[IN] //= math.prod(window)
    of_letters = {**sizes, **of_sides, ONE: 1}
    shape = [math.prod(of_letters[x] for x in group) for group in _find_groups(letters)]
    return (*shape, *(window if IN in letters else [1] * len(window)))


def _find_groups(letters: str) -> list[str]:
    """Splits letters into those of each axis of the tensor."""
    return re.findall("br|rb|.", letters)


def _count_entries(weight: Weight, side: str) -> int:
    sizes = zip(weight.shape, names.axes(weight), strict=True)
    return math.prod(n for n, role in sizes if role == side)


def to_file(weight: Weight, value: np.ndarray, axes: str, letters: str) -> np.ndarray:
    """Converts an array of a node, of one layer, to the file's tensor.

    Args:
      weight: weight that the node is for.
      value: the array.
      axes: letters of the array's axes, as in :class:`lora_jax.nodes.Field`, with that of the batch
        only if the kernel of one layer has such axes.
      letters: letters of the tensor's axes.
    """
    places = factors.places(axes, names.axes(weight))
    own = {x: n for x, n in zip(places, value.shape, strict=True) if isinstance(x, str)}
    joined = _move_channels(weight, value, axes, first=True).reshape(_matrix(weight, axes, own))
    ordered = joined.transpose([axes.index(x) for x in letters if x != ONE])
    return ordered.reshape(tensor_shape(weight, letters, own))


def from_file(weight: Weight, tensor: np.ndarray, axes: str, letters: str) -> np.ndarray:
    """Inverts :func:`to_file`."""
    own = {
        x: n // math.prod(_count_entries(weight, y) for y in group if y != x)
        for group, n in zip(_find_groups(letters), tensor.shape, strict=False)
        for x in group
        if x not in (*_SIDES, ONE)
    }
    ordered = [x for x in letters if x != ONE]
    joined = tensor.reshape(_matrix(weight, ordered, own))
    value = joined.transpose([ordered.index(x) for x in axes])
    shape = factors.shape_of(axes, names.axes(weight), weight.shape, own)
    if names.kind(weight) == names.CONV and IN in axes:
        k, n = axes.index(IN), len(weight.shape) - 1
        shape = (*shape[:k], shape[k + n - 1], *shape[k : k + n - 1], *shape[k + n :])
    return _move_channels(weight, value.reshape(shape), axes, first=False)


def _matrix(weight: Weight, letters: Iterable[str], own: Mapping[str, int]) -> list[int]:
    """Returns the sizes of axes of which those of each side are joined."""
    return [_count_entries(weight, x) if x in _SIDES else own[x] for x in letters]


def _move_channels(weight: Weight, value: np.ndarray, axes: str, *, first: bool) -> np.ndarray:
    """Moves the channels of a convolution's inputs before the window, or behind it again."""
    if names.kind(weight) != names.CONV or IN not in axes:
        return value
    k = axes.index(IN)
    ends = (k + len(weight.shape) - 2, k)
    return np.moveaxis(value, *(ends if first else ends[::-1]))


def node_axes(weight: Weight) -> str:
    """Returns the roles of the leaf's axes, with its axis of layers if it has one."""
    return ("" if weight.layer is None else BATCH) + names.axes(weight)
