"""Makes quantized leaves: the schemes by name, and ``quantize``, which applies one to kernels."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.code_books import DYNAMIC, TABLES
from lora_jax.factors import IN, OUT, ROLES, WHOLE
from lora_jax.quantized import (
    NESTED_BLOCK,
    Affine,
    CodeBook,
    Quantized,
    as_matrix,
    pack,
    side_sizes,
    spread,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How numbers are made codes.

    Attributes:
      make: makes a leaf of the matrix ``(*batch, in, out)`` in float32, the scheme, and the fields
        that say what the leaf stands for.
      block: number of inputs that share a scale; 0 for all of them.
      table: name of a code book.
      is_nested: whether the scales of a code book are quantized, too.
      block_out: number of outputs that share a scale; 0 for all of them.
    """

    make: Callable[[Array, "Scheme", Mapping[str, Any]], Quantized]
    block: int = 0
    table: str = ""
    is_nested: bool = False
    block_out: int = 1


def encode(
    x: Array, scheme: str, axes: str = "io", *, block: int | None = None, dtype: Any = None
) -> Quantized:
    """Stores an array in fewer bits.

    Args:
      x: kernel of floating-point numbers.
      scheme: "nf4" or "fp4" (Dettmers et al. 2023, section 3), in blocks of 64 inputs; "nf4_double"
        or "fp4_double", whose scales are quantized, too; "int8", a scale for each output (Dettmers
        et al. 2022, section 2); "int4", a scale and a zero for each 64 inputs; "float8_e4m3", one
        scale, or "float8_e4m3_blocks", one for each 128 × 128 numbers.
      axes: role of each axis, as in :mod:`lora_jax.factors`.
      block: another number of inputs that share a scale.
      dtype: dtype of the array that the leaf stands for; that of ``x`` if None.

    Returns:
      A leaf that stands for an array of the shape of ``x``; see :mod:`lora_jax.quantized`.

    Raises:
      ValueError: a scheme that does not exist; not floating-point numbers; NaN or infinity, where
        the values are known; a kernel smaller than a block, or whose inputs blocks do not divide.

    >>> leaf = encode(jnp.ones((64, 3), jnp.bfloat16), "nf4")
    >>> leaf.shape, leaf.dtype, leaf.codes.shape, leaf.scales.shape
    ((64, 3), dtype(bfloat16), (32, 3), (1, 3))
    """
    chosen = find_scheme(scheme, block)
    if problem := misfit(x, axes, scheme, chosen):
        raise ValueError(f"The array can't be quantized: it {problem}.")
    fields = {
        "axes": axes,
        "sizes": side_sizes(x.shape, axes),
        "dtype": np.dtype(x.dtype if dtype is None else dtype),
    }
    matrix = as_matrix(jnp.asarray(x), axes).astype(jnp.float32)
    leaf = chosen.make(matrix, chosen, fields)
    if not (_is_finite(matrix) and _is_finite(leaf.scales)):
        raise ValueError(
            "The array can't be quantized: it has NaN or infinity in it, or numbers that are too "
            "large for the scheme."
        )
    return leaf


def find_scheme(name: str, block: int | None = None) -> Scheme:
    """Finds the scheme of a name, with another size of its blocks if one is given.

    Raises:
      ValueError: there is none, or it has no blocks of such a size.
    """
    if name not in SCHEMES:
        raise ValueError(f"There is no scheme {name!r} to quantize with; there are {[*SCHEMES]}.")
    scheme = SCHEMES[name]
    if block is None:
        return scheme
    if not scheme.block or not isinstance(block, int) or block < 2 or block % 2:
        blocks = "blocks of an even number of inputs" if scheme.block else "no blocks of inputs"
        raise ValueError(f"block={block!r} is not possible: the scheme {name!r} has {blocks}.")
    return dataclasses.replace(scheme, block=block)


def misfit(x: Any, axes: str, name: str, scheme: Scheme) -> str:
    """Says why an array, or one of such a shape and dtype, can't be quantized; empty if it can."""
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        return f"holds {getattr(x, 'dtype', type(x).__name__)}, not floating-point numbers"
    if len(axes) != len(x.shape) or set(axes) - {*ROLES} or WHOLE in axes or IN not in axes:
        return f"has shape {tuple(x.shape)}, for which {axes!r} are no roles of a kernel's axes"
    side = lambda role: math.prod(n for n, r in zip(x.shape, axes, strict=True) if r == role)
    n_in, n_out = side(IN), side(OUT)
    if n_in * n_out < max(scheme.block, 1):
        return f"has {n_in * n_out} numbers, fewer than a block of {name!r}, {scheme.block}"
    if name == "int4" and n_in % scheme.block:
        return (
            f"has {n_in} inputs, which blocks of {scheme.block} do not divide, as {name!r} needs "
            "it: give another block"
        )
    return ""


def _is_finite(x: Array) -> bool:
    """Tells whether there is no NaN or infinity, as far as the values are known."""
    return isinstance(x, jax.core.Tracer) or bool(_all_finite(x))


@jax.jit
def _all_finite(x: Array) -> Array:
    return jnp.isfinite(x).all()


# ---- Code books ----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _encode_blocks(matrix: Array, table: str, block: int, is_flat: bool) -> tuple[Array, Array]:
    """Returns packed codes, and the largest absolute value of each block."""
    *batch, n_in, n_out = matrix.shape
    if is_flat:
        row = jnp.swapaxes(matrix, -1, -2).reshape(*batch, n_in * n_out, 1)
        matrix = _fill(row, block)
    tiles = matrix.reshape(*batch, -1, block, matrix.shape[-1])
    scales = jnp.max(jnp.abs(tiles), axis=-2)
    inverse = jnp.where(scales > 0, 1 / jnp.where(scales > 0, scales, 1), 0)
    scaled = jnp.clip(tiles * inverse[..., None, :], -1, 1)
    codes = _find_nearest(scaled, TABLES[table]).reshape(matrix.shape)
    if is_flat:
        n = n_in * n_out
        codes = codes[..., : n + n % 2, :]
    return pack(codes), scales


def _fill(x: Array, block: int) -> Array:
    """Adds zeros along the last axis but one, up to a whole number of blocks."""
    widths = [(0, 0)] * x.ndim
    widths[-2] = (0, -x.shape[-2] % block)
    return jnp.pad(x, widths)


def _find_nearest(x: Array, table: np.ndarray) -> Array:
    """Finds the codes of the nearest entries; of two that are as near, the smaller entry's."""
    order = np.argsort(table, kind="stable").astype(np.uint8)
    values = table[order]
    middles = (values[:-1] + values[1:]) / np.float32(2)
    # A sum of comparisons is one loop over the array; a binary search would be one for each step.
    above = jnp.zeros(x.shape, jnp.uint8)
    for middle in middles:
        above = above + (x > middle).astype(jnp.uint8)
    if np.array_equal(order, np.arange(len(order))):
        return above
    return jnp.asarray(order).at[above].get(mode="promise_in_bounds")


def _code_book(matrix: Array, scheme: Scheme, fields: Mapping[str, Any]) -> CodeBook:
    is_flat = bool(matrix.shape[-2] % scheme.block)
    codes, scales = _encode_blocks(matrix, scheme.table, scheme.block, is_flat)
    rest: dict[str, Any] = {"table": scheme.table, "block": scheme.block, **fields}
    if scheme.is_nested:
        # PyTorch adds up in another order: its mean may differ in the last digit.
        rest["offset"] = jnp.mean(scales, axis=(-2, -1))
        scales, rest["nested"] = nest(scales, rest["offset"])
    return CodeBook(codes=codes, scales=scales, **rest)


@jax.jit
def nest(scales: Array, offset: Array) -> tuple[Array, Array]:
    """Makes bytes of scales less an offset, in blocks of 256 with their largest absolute value.

    Args:
      scales: ``(*batch, blocks of inputs, out)``, counted along inputs, then outputs.
      offset: ``(*batch,)``.
    """
    *batch, rows, columns = scales.shape
    row = jnp.swapaxes(scales - offset[..., None, None], -1, -2).reshape(*batch, -1, 1)
    tiles = _fill(row, NESTED_BLOCK).reshape(*batch, -1, NESTED_BLOCK)
    nested = jnp.max(jnp.abs(tiles), axis=-1)
    inverse = jnp.where(nested > 0, 1 / jnp.where(nested > 0, nested, 1), 0)
    middles = jnp.asarray((DYNAMIC[:-1] + DYNAMIC[1:]) / np.float32(2))
    scaled = jnp.clip(tiles * inverse[..., None], -1, 1)
    codes = jnp.searchsorted(middles, scaled, side="left").astype(jnp.uint8)
    codes = codes.reshape(*batch, -1)[..., : rows * columns].reshape(*batch, columns, rows)
    return jnp.swapaxes(codes, -1, -2), nested


# ---- Numbers of few bits -------------------------------------------------------------------------


@jax.jit
def _int8_codes(matrix: Array) -> tuple[Array, Array]:
    # As bitsandbytes has it, which rounds to float16 first.
    half = matrix.astype(jnp.float16).astype(jnp.float32)
    scales = jnp.max(jnp.abs(half), axis=-2, keepdims=True)
    codes = jnp.round(half * (127 / jnp.where(scales > 0, scales, 1)))
    return codes.astype(jnp.int8), scales


def _int8(matrix: Array, scheme: Scheme, fields: Mapping[str, Any]) -> Affine:
    codes, scales = _int8_codes(matrix)
    tile = (matrix.shape[-2], 1)
    rest = {"tile": tile, "code": "int8", "factor": 0.007874015718698502, **fields}
    return Affine(codes=codes, scales=scales, **rest)


@functools.partial(jax.jit, static_argnums=1)
def _int4_codes(matrix: Array, block: int) -> tuple[Array, Array, Array]:
    *batch, _, n_out = matrix.shape
    tiles = matrix.reshape(*batch, -1, block, n_out)
    low, high = jnp.minimum(tiles.min(-2), 0), jnp.maximum(tiles.max(-2), 0)
    scales = (high - low) / 15
    step = jnp.where(scales > 0, scales, 1)
    zeros = jnp.clip(jnp.round(-low / step), 0, 15)
    codes = jnp.clip(jnp.round(tiles / step[..., None, :]) + zeros[..., None, :], 0, 15)
    return pack(codes.reshape(matrix.shape).astype(jnp.uint8)), scales, zeros.astype(jnp.uint8)


def _int4(matrix: Array, scheme: Scheme, fields: Mapping[str, Any]) -> Affine:
    codes, scales, zeros = _int4_codes(matrix, scheme.block)
    tile = (scheme.block, 1)
    return Affine(codes=codes, scales=scales, zeros=zeros, tile=tile, code="uint4", **fields)


@functools.partial(jax.jit, static_argnums=1)
def _float8_codes(matrix: Array, tile: tuple[int, int]) -> tuple[Array, Array]:
    *batch, n_in, n_out = matrix.shape
    wide = jnp.swapaxes(_fill(jnp.swapaxes(_fill(matrix, tile[0]), -1, -2), tile[1]), -1, -2)
    split = wide.reshape(*batch, -1, tile[0], wide.shape[-1] // tile[1], tile[1])
    most = float(jnp.finfo(jnp.float8_e4m3fn).max)
    scales = jnp.max(jnp.abs(split), axis=(-3, -1)) / most
    step = jnp.where(scales > 0, scales, 1)
    entries = spread(spread(step, n_in, tile[0], axis=-2), n_out, tile[1], axis=-1)
    codes = jnp.clip(matrix / entries, -most, most).astype(jnp.float8_e4m3fn)
    return lax.bitcast_convert_type(codes, jnp.uint8), scales


def _float8(matrix: Array, scheme: Scheme, fields: Mapping[str, Any]) -> Affine:
    tile = (scheme.block or matrix.shape[-2], scheme.block_out or matrix.shape[-1])
    codes, scales = _float8_codes(matrix, tile)
    return Affine(codes=codes, scales=scales, tile=tile, code="float8_e4m3fn", **fields)


SCHEMES: dict[str, Scheme] = {
    "nf4": Scheme(make=_code_book, block=64, table="nf4"),
    "nf4_double": Scheme(make=_code_book, block=64, table="nf4", is_nested=True),
    "fp4": Scheme(make=_code_book, block=64, table="fp4"),
    "fp4_double": Scheme(make=_code_book, block=64, table="fp4", is_nested=True),
    "int8": Scheme(make=_int8),
    "int4": Scheme(make=_int4, block=64),
    "float8_e4m3": Scheme(make=_float8, block_out=0),
    "float8_e4m3_blocks": Scheme(make=_float8, block=128, block_out=128),
}
