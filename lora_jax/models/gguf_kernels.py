"""Kernels of GGUF files in their own codes: which can be kept, and the leaves that they make.

Types with one scale for each 32 inputs can (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0): a leaf's numbers are
then those that ggml decodes, bit for bit. A code of at most 8 bits times a float16 scale is exact
in float32, so that nothing depends on whether a compiler rounds it before an offset is added.
Layers of a stack that are of several of these types get the codes and parts that all of them need.
The scales of K-quants are packed themselves, and there is no such form for them.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.models import gguf
from lora_jax.models.ggml import Layout
from lora_jax.models.gguf import GGUFTensor
from lora_jax.models.quantized_tensors import QuantizedTensor
from lora_jax.models.read_leaves import Part
from lora_jax.quantized import Affine


class Form(NamedTuple):
    """How codes are stored, for all layers of a kernel alike.

    Attributes:
      code: form of a code, "uint4" or "int8".
      zeros: codes that stand for zero, each of one or several layers.
      has_shifts: whether there is a number to add to each block.
    """

    code: str
    zeros: tuple[int, ...]
    has_shifts: bool


def find_form(layouts: Collection[Layout]) -> Form | None:
    """Finds the smallest form that holds all codes of layers of these types; None if there is none.

    >>> from lora_jax.models import ggml
    >>> find_form([ggml.layout(2)])
    Form(code='uint4', zeros=(8,), has_shifts=False)
    >>> find_form([ggml.layout(3), ggml.layout(8)])
    Form(code='int8', zeros=(0,), has_shifts=True)
    """
    if any(layout.split is None for layout in layouts):
        return None
    is_small = all(layout.bits == 4 for layout in layouts)
    zeros = {-layout.least for layout in layouts} if is_small else {0}
    has_shifts = any(layout.has_offsets for layout in layouts)
    return Form("uint4" if is_small else "int8", tuple(sorted(zeros)), has_shifts)


def keep_codes(parts: Sequence[Part]) -> bool:
    """Has the layers of a kernel be read as codes of one form; tells whether there is one.

    Args:
      parts: layers of a linear kernel; what they are stored in is replaced.
    """
    stored = [part.stored[0] for part in parts if len(part.stored) == 1]
    tensors = [x for _, x in stored if isinstance(x, GGUFTensor) and len(x.shape) == 2]
    form = find_form([x.layout for x in tensors])
    if form is None or len(tensors) < len(parts):
        return False
    for part, tensor in zip(parts, tensors, strict=True):
        name = part.stored[0][0]
        part.stored[0] = (name, _as_quantized(name, tensor, form))
    return True


def find_types(parts: Sequence[Part]) -> set[str]:
    """Returns the names of the types of a leaf's layers; none where all hold plain numbers."""
    layouts = [x.layout for part in parts for _, x in part.stored if isinstance(x, GGUFTensor)]
    return {x.name for x in layouts} if any(x.block > 1 for x in layouts) else set()


def _as_quantized(name: str, stored: GGUFTensor, form: Form) -> QuantizedTensor:
    make = lambda tensor, values: (Affine, _make_fields(stored, form))
    return QuantizedTensor(name, stored.dtype, stored.shape, {}, make)


def _make_fields(tensor: GGUFTensor, form: Form) -> dict[str, Any]:
    """Reads codes, and makes the fields of a leaf of them, in numpy arrays."""
    layout, (codes, scales, offsets, _) = tensor.layout, gguf.read_codes(tensor)
    scales = np.ascontiguousarray(scales.T)
    fields: dict[str, Any] = {"code": form.code, "tile": (layout.block, 1), "scales": scales}
    if form.code == "uint4":
        codes = (codes.view(np.int8) - np.int8(layout.least)).view(np.uint8).T
        codes = codes[::2] << 4 | codes[1::2]
    fields["codes"] = np.ascontiguousarray(codes if form.code == "uint4" else codes.T.view(np.int8))
    if len(form.zeros) > 1:
        fields["zeros"] = np.full(scales.shape, -layout.least, np.int8)
    else:
        fields["zero"] = next(iter(form.zeros))
    if form.has_shifts:
        # Adding -0.0 leaves every number as it is, which 0.0 does not do with -0.0.
        nothing = np.full(scales.shape, -0.0, scales.dtype)
        fields["shifts"] = nothing if offsets is None else np.ascontiguousarray(offsets.T)
    return fields
