"""Tables of names: which leaf of a model here is which tensor of a Hugging Face checkpoint.

A model family has one table, a list of :class:`Name`, by which checkpoints and adapters are read
and written. The layouts of the two sides differ, and this file converts them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.factors import BATCH

LINEAR, EMBEDDING, CONV = "linear", "embedding", "conv"
STACK = "{}"  # placeholder in a tensor's name for the number of the layer
EXPERT = "{e}"  # the same for that of the expert


class Name(NamedTuple):
    """One row of a table of names.

    Attributes:
      flax: path of the leaf, its components joined by "/".
      hf: name of the tensor in a Hugging Face checkpoint. If it has ``{}`` in place of a number,
        the leaf has a leading axis of layers (a scan), and there is one tensor for each layer.
      transpose: whether the tensor is the leaf transposed (a torch Linear is ``(d_out, d_in)``).
        GPT-2's Conv1D is stored ``(d_in, d_out)`` on both sides.
      axes: role of each axis of a kernel after the axis of layers, "i" for input and "o" for
        output, if it is not "io": "ioo" for ``(d, heads, head_dim)``. The tensor is a matrix; with
        a "b" before them, for experts, one for each: ``(experts, out, in)`` with ``transpose``, and
        otherwise ``(experts, in, out)``, as of a torch module that says ``is_transposed``.
      kind: "linear", "embedding" or "conv" (the tensor is ``(out, in, *window)``, the leaf
        ``(*window, in, out)``); by default a leaf called "embedding" is one, and others are linear.
      older: name of the tensor in transformers 4, if it has changed since.
      tied: names of further tensors that are the same weight (an output head tied to the embedding)
        and so have no leaf of their own.
      otherwise: name of the tensor to read if a checkpoint lacks this one, to which it is equal.
      is_bare: whether the torch module computes with the tensor by itself, as a router does with
        its ``weight``, so that PEFT adapts it as a parameter and not as the weight of a layer.
        Tensors of other names than "weight" are so anyway. The rows of a module's parameters stand
        in the order in which the module has them.
      stored: names of the tensors that checkpoints hold in place of this one, which is what a model
        has in memory: ``{e}`` stands for the number of an expert, and of several names each has the
        next of the rows.
    """

    flax: str
    hf: str
    transpose: bool = False
    axes: str = ""
    kind: str = ""
    older: str = ""
    tied: tuple[str, ...] = ()
    otherwise: str = ""
    is_bare: bool = False
    stored: tuple[str, ...] = ()


class Weight(NamedTuple):
    """One tensor of the checkpoint, and where it is here.

    Attributes:
      hf: name of the tensor.
      leaf: path of the leaf.
      layer: place along the leaf's leading axis; None if the leaf is not stacked.
      shape: shape of the leaf, without the axis of layers.
      row: row of the tensor in the table.
    """

    hf: str
    leaf: str
    layer: int | None
    shape: tuple[int, ...]
    row: Name


def weights(
    table: Sequence[Name], leaves: Mapping[str, Any], *, older: bool = False
) -> list[Weight]:
    """Returns the tensors that the leaves of a model are made of, in the table's order.

    Args:
      table: rows of names; those without a leaf are left out (in a headless model, say).
      leaves: arrays or shapes by path; Linen's collection ``params/`` may precede the paths.
      older: whether to take the names of transformers 4 where a row has one.
    """
    result = []
    for row in table:
        leaf = next((n for n in (row.flax, f"params/{row.flax}") if n in leaves), None)
        if leaf is None:
            continue
        shape = tuple(np.shape(leaves[leaf]))
        for hf in ((row.older if older and row.older else row.hf), *row.tied):
            if STACK in hf:
                result += [
                    Weight(hf.replace(STACK, str(k)), leaf, k, shape[1:], row)
                    for k in range(shape[0])
                ]
            else:
                result.append(Weight(hf, leaf, None, shape, row))
    return result


def module(tensor: str) -> str:
    """Returns the name of the torch module that holds a tensor."""
    return tensor.rpartition(".")[0]


def kind(weight: Weight) -> str:
    """Tells what the leaf is: a linear or convolution kernel, an embedding, or "" for the rest."""
    if weight.hf.rpartition(".")[2] == "bias" or len(weight.shape) < 2:
        return ""
    by_name = EMBEDDING if weight.leaf.rpartition("/")[2] == "embedding" else LINEAR
    return weight.row.kind or by_name


def axes(weight: Weight) -> str:
    """Returns the roles of a kernel's axes without that of layers; "" where the table is silent."""
    if weight.row.axes:
        return weight.row.axes
    if kind(weight) == CONV:
        return "i" * (len(weight.shape) - 1) + "o"
    return "io" if len(weight.shape) == 2 else ""


def is_conv1d(weight: Weight) -> bool:
    """Tells whether torch stores the linear layer as ``(d_in, d_out)``, as GPT-2's Conv1D does."""
    return kind(weight) == LINEAR and axes(weight).startswith("i") and not weight.row.transpose


def is_bare(weight: Weight) -> bool:
    """Tells whether a kernel is a parameter that is no layer's weight; see :class:`Name`."""
    row = weight.row
    older = row.older.replace(STACK, str(weight.layer))
    return bool(kind(weight)) and (
        not weight.hf.endswith(".weight") or (row.is_bare and weight.hf != older)
    )


def batch_shape(weight: Weight) -> tuple[int, ...]:
    """Returns the sizes of a kernel's leading batch axes (experts), without that of layers."""
    roles = axes(weight)
    return weight.shape[: len(roles) - len(roles.lstrip(BATCH))]


def tensor_shape(weight: Weight) -> tuple[int, ...]:
    """Returns the shape of the tensor in a checkpoint."""
    return to_tensor(weight, np.broadcast_to(np.int8(0), weight.shape)).shape


def to_tensor(weight: Weight, value: np.ndarray) -> np.ndarray:
    """Converts a leaf (one layer of it) to the checkpoint's tensor."""
    if kind(weight) == CONV:
        n = value.ndim
        return value.transpose(n - 1, n - 2, *range(n - 2))
    if weight.hf.rpartition(".")[2] == "bias":
        return value.reshape(-1)
    matrix = value.reshape(_matrix(weight)) if value.ndim > 2 and axes(weight) else value
    return _transpose(matrix) if weight.row.transpose else matrix


def from_tensor(weight: Weight, value: np.ndarray) -> np.ndarray:
    """Inverts :func:`to_tensor`."""
    if kind(weight) == CONV:
        return value.transpose(*range(2, value.ndim), 1, 0)
    return (_transpose(value) if weight.row.transpose else value).reshape(weight.shape)


def _transpose(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, -1, -2) if x.ndim > 1 else x


def _matrix(weight: Weight) -> tuple[int, ...]:
    """Returns the leaf's shape with the axes of each side joined; the sides must not be mixed."""
    batch = batch_shape(weight)
    roles, shape = axes(weight)[len(batch) :], weight.shape[len(batch) :]
    first = len(roles) - len(roles.lstrip(roles[:1]))
    if len(roles) != len(shape) or len(set(roles[first:])) != 1 or BATCH in roles:
        raise ValueError(
            f"{weight.leaf} has shape {weight.shape}, and axes {roles!r} in the table of names do "
            "not say which of them are inputs and which outputs, one side after the other."
        )
    return (*batch, math.prod(shape[:first]), math.prod(shape[first:]))
