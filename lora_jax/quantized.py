"""Leaves of a parameter tree in fewer bits: codes and scales that stand for an array.

Two forms carry every scheme. In a :class:`CodeBook` a code is the number of an entry of a table
(NF4, FP4: Dettmers et al. 2023, section 3), in an :class:`Affine` leaf it is a number itself (int8,
int4, float8, GGUF's Q4_0, Q4_1 and Q8_0, GPTQ, AWQ). In both, numbers are code times scale in
float32, cast once to the dtype that the leaf stands for.

The kernel is seen as a matrix ``(*batch, in, out)``, whatever the order of its axes: all its inputs
are one axis there, and all its outputs. Every part of a leaf begins with the batch axes, so that a
scan over layers slices all parts alike, ``vmap`` maps over them, and ``jnp.stack`` stacks them.
Codes of 4 bits lie two in a byte of ``uint8``, since ``jnp.uint4`` takes a byte in numpy, and
safetensors does not have it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.code_books import DYNAMIC, TABLES
from lora_jax.display import describe_array, describe_fields
from lora_jax.factors import BATCH, IN, OUT, positions

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Array = jax.Array
NESTED_BLOCK = 256  # scales that share one scale of their own, where these are quantized again


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Quantized:
    """A kernel that is stored as codes and scales: the base of both forms.

    Attributes:
      codes: ``(*batch, in, out)``, or with two inputs in each byte, the first in the high bits.
      scales: ``(*batch, blocks of inputs, blocks of outputs)``.
      axes: role of each axis of the kernel, as in :mod:`lora_jax.factors`.
      sizes: sizes of the axes that are inputs or outputs, in the kernel's order.
      dtype: dtype of the array that it stands for.
      split: mesh axes over which inputs, and outputs, stay split where numbers are made; None where
        the leaf has not been put onto a mesh. See :mod:`lora_jax.quantized_sharding`.
    """

    codes: Array
    scales: Array
    axes: str
    sizes: tuple[int, ...]
    dtype: np.dtype
    split: tuple[tuple[str, ...], ...] | None = None

    @property
    def roles(self) -> str:
        """The role of each axis, after slices and stacks along batch axes, which come first."""
        extra = self.codes.ndim - 2 - self.axes.count(BATCH)
        return BATCH * extra + self.axes if extra >= 0 else self.axes.replace(BATCH, "", -extra)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that it stands for."""
        batch, rest = iter(self.codes.shape), iter(self.sizes)
        return tuple(next(batch) if role == BATCH else next(rest) for role in self.roles)

    @property
    def ndim(self) -> int:
        """The number of axes of the array that it stands for."""
        return len(self.roles)

    @property
    def size(self) -> int:
        """The number of entries of the array that it stands for."""
        return math.prod(self.shape)

    @property
    def sides(self) -> tuple[int, int]:
        """The numbers of inputs and of outputs."""
        roles = self.axes.replace(BATCH, "")
        side = lambda role: math.prod(self.sizes[k] for k in positions(roles, role))
        return side(IN), side(OUT)

    def __repr__(self) -> str:
        """Describes arrays by dtype and shape; leaves out what is not used."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        describe = lambda name, x: repr(str(x)) if name == "dtype" else describe_array(x)
        is_default = lambda name, x: not hasattr(x, "shape") and x == defaults[name]
        return describe_fields(
            type(self).__name__,
            {name: describe(name, x) for name, x in fields.items() if not is_default(name, x)},
        )

    def matrix(self) -> Array:
        """Computes the numbers ``(*batch, in, out)`` in float32."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class CodeBook(Quantized):
    """A kernel of 4-bit codes that number the entries of a table, in blocks with a scale each.

    As bitsandbytes has it, whose bytes are these, transposed. Where blocks do not divide the
    inputs, they run over the whole kernel as a row of ``(out, in)``, and the parts have one column.

    Attributes:
      codes: ``(*batch, in / 2, out)`` of ``uint8``, or ``(*batch, (in * out + 1) // 2, 1)``.
      scales: ``(*batch, in / block, out)``, or ``(*batch, blocks, 1)``: floats, or bytes that
        number the entries of a second table, which holds floats of 8 bits.
      nested: ``(*batch, blocks of 256 scales)``, what the scales are to be multiplied with, if they
        are bytes; they are counted along inputs, then outputs.
      offset: ``(*batch,)``, what is to be added to them then.
      table: name of the table, "nf4" or "fp4".
      block: number of entries that share a scale.
    """

    nested: Array | None = None
    offset: Array | None = None
    table: str
    block: int

    def matrix(self) -> Array:
        """Multiplies entries of the table by the scale of their block."""
        n_in, n_out = self.sides
        values = _entries(TABLES[self.table], unpack(self.codes))
        scales = spread(self.block_scales(), values.shape[-2], self.block, axis=-2)
        numbers = values * scales
        if self.codes.shape[-2:] == (n_in // 2, n_out) and n_in % 2 == 0:
            return numbers
        rows = numbers[..., : n_in * n_out, 0].reshape(*numbers.shape[:-2], n_out, n_in)
        return jnp.swapaxes(rows, -1, -2)

    def block_scales(self) -> Array:
        """Computes the scale of each block in float32: what is the largest of its entries."""
        if self.nested is None or self.offset is None:
            return self.scales.astype(jnp.float32)
        *batch, rows, columns = self.scales.shape
        factors = jnp.repeat(self.nested, NESTED_BLOCK, axis=-1)[..., : rows * columns]
        factors = jnp.swapaxes(factors.reshape(*batch, columns, rows), -1, -2)
        # A product and a sum are two roundings, of which a compiler may make one.
        product = lax.optimization_barrier(_entries(DYNAMIC, self.scales) * factors)
        return product + self.offset[..., None, None]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Affine(Quantized):
    """A kernel of numbers of few bits, in blocks: ``(code - zero) * scale + shift``.

    Floats of 8 bits are kept as bytes too: XLA's CPU backend would widen the kernels of all layers
    to 16 bits before a loop over them.

    Attributes:
      codes: ``(*batch, in, out)`` of ``int8`` or ``uint8``, or ``(*batch, in / 2, out)`` with two
        codes in each byte.
      scales: ``(*batch, blocks of inputs, blocks of outputs)`` of any float; one block is the whole
        axis, and the last one may be smaller.
      zeros: codes that stand for zero, of the same shape; None for ``zero``.
      shifts: numbers to add, of the same shape; None for nothing.
      tile: numbers of inputs and outputs of a block.
      code: form of a code: "int8", "uint8", "uint4" or "float8_e4m3fn".
      zero: code that stands for zero in every block.
      factor: number that all scales are multiplied with.
    """

    zeros: Array | None = None
    shifts: Array | None = None
    tile: tuple[int, int]
    code: str
    zero: int = 0
    factor: float = 1.0

    def matrix(self) -> Array:
        """Multiplies codes by the scale of their block."""
        codes = unpack(self.codes) if self.code == "uint4" else self.codes
        if self.code.startswith("float8"):
            codes = lax.bitcast_convert_type(codes, jnp.dtype(self.code))
        numbers = codes.astype(jnp.float32)
        if self.zeros is not None:
            numbers = numbers - self._of_entries(self.zeros)
        elif self.zero:
            numbers = numbers - self.zero
        numbers = numbers * self._of_entries(self.scales)
        if self.factor != 1:
            numbers = numbers * self.factor
        return numbers if self.shifts is None else numbers + self._of_entries(self.shifts)

    def _of_entries(self, x: Array) -> Array:
        (n_in, n_out), x = self.sides, x.astype(jnp.float32)
        return spread(spread(x, n_in, self.tile[0], axis=-2), n_out, self.tile[1], axis=-1)


_PARTS: dict[type[Quantized], list[str]] = {
    CodeBook: ["codes", "scales", "nested", "offset"],
    Affine: ["codes", "scales", "zeros", "shifts"],
}
for _cls, _parts in _PARTS.items():
    _structure = [f.name for f in dataclasses.fields(_cls) if f.name not in _parts]
    jax.tree_util.register_dataclass(_cls, _parts, _structure)


def is_quantized(x: Any) -> "TypeIs[Quantized]":
    """Tells whether ``x`` is a leaf that is stored as codes and scales."""
    return isinstance(x, Quantized)


def parts(leaf: Quantized) -> Mapping[str, Array]:
    """Returns the arrays of a leaf by name, each with the batch axes first."""
    named = {name: getattr(leaf, name) for name in _PARTS[type(leaf)]}
    return {name: x for name, x in named.items() if x is not None}


def numbers(leaf: Quantized) -> Array:
    """Computes the numbers of a leaf in float32, before they are rounded to its dtype.

    No gradient reaches its parts, which are frozen.
    """
    matrix = lax.stop_gradient(leaf).matrix()
    roles, shape = leaf.roles, leaf.shape
    order = positions(roles, BATCH + IN + OUT)
    split = matrix.reshape([shape[k] for k in order])
    return lax.transpose(split, [order.index(k) for k in range(len(order))])


def decode(leaf: Quantized) -> Array:
    """Computes the array that a leaf stands for: its numbers, rounded once to its dtype."""
    return numbers(leaf).astype(leaf.dtype)


def as_array(x: Any) -> Any:
    """Returns ``x`` itself, or the array that it stands for if it is quantized."""
    return decode(x) if is_quantized(x) else x


def abstract(x: Any) -> Any:
    """Returns ``x`` itself, or shape and dtype of what it stands for if it is quantized."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_quantized(x) else x


# ---- Layout --------------------------------------------------------------------------------------


def as_matrix(x: Array, axes: str) -> Array:
    """Rearranges a kernel as ``(*batch, in, out)``."""
    order = positions(axes, BATCH + IN + OUT)
    batch = [x.shape[k] for k in positions(axes, BATCH)]
    n_in = math.prod(x.shape[k] for k in positions(axes, IN))
    n_out = math.prod(x.shape[k] for k in positions(axes, OUT))
    return lax.transpose(x, order).reshape(*batch, n_in, n_out)


def side_sizes(shape: Sequence[int], axes: str) -> tuple[int, ...]:
    """Returns the sizes of the axes that are inputs or outputs, in the kernel's order."""
    return tuple(n for n, role in zip(shape, axes, strict=True) if role != BATCH)


def pack(codes: Array) -> Array:
    """Puts codes of 4 bits in pairs along the last axis but one, the first in the high bits.

    >>> pack(jnp.array([[1], [2], [3], [4]], jnp.uint8))
    Array([[18],
           [52]], dtype=uint8)
    """
    pairs = codes.reshape(*codes.shape[:-2], codes.shape[-2] // 2, 2, codes.shape[-1])
    return (pairs[..., 0, :] << 4 | pairs[..., 1, :]).astype(jnp.uint8)


def unpack(codes: Array) -> Array:
    """Inverts :func:`pack`."""
    pairs = jnp.stack([codes >> 4, codes & 15], axis=-2)
    return pairs.reshape(*codes.shape[:-2], 2 * codes.shape[-2], codes.shape[-1])


def spread(x: Array, size: int, block: int, axis: int) -> Array:
    """Repeats what blocks of an axis have for each of their entries; one block stays as it is."""
    if x.shape[axis] == 1 or block == 1:
        return x
    wide = jnp.repeat(x, block, axis=axis)
    return wide if wide.shape[axis] == size else lax.slice_in_dim(wide, 0, size, axis=axis)


def _entries(table: np.ndarray, codes: Array) -> Array:
    return jnp.asarray(table).at[codes].get(mode="promise_in_bounds")
