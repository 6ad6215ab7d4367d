"""The types of tensors in GGUF files: how llama.cpp packs numbers into blocks of bytes.

A row of a tensor is a sequence of blocks, each of ``size`` bytes for ``block`` numbers along the
inputs. Types whose numbers are ``code * scale + offset`` with one scale for each 32 of them can be
had as codes, too; the others ("K-quants", whose scales are packed themselves) as numbers only.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

Array = np.ndarray


class Codes(NamedTuple):
    """A matrix as codes: ``value = code * scale + offset``, computed in float32.

    Attributes:
      codes: int8 or uint8 ``(rows, inputs)``, one a byte.
      scales: float16 ``(rows, inputs / 32)``, one for each 32 inputs.
      offsets: float16 offsets of the shape of scales; None for zero.
      bits: number of bits of a code that are in use: 4, 5 or 8.
    """

    codes: Array
    scales: Array
    offsets: Array | None
    bits: int


class Layout(NamedTuple):
    """One type of tensors.

    Attributes:
      name: llama.cpp's.
      block: number of values in a block.
      size: bytes of a block.
      decode: blocks, uint8 ``(n, size)``, to numbers, float32 ``(n, block)``.
      split: blocks to codes ``(n, block)``, scales ``(n, 1)`` and offsets; None if there is no
        such form.
      bits: number of bits of a code that are in use.
      least: least code.
      has_offsets: whether there are offsets.
    """

    name: str
    block: int
    size: int
    decode: Callable[[Array], Array]
    split: Callable[[Array], tuple[Array, Array, Array | None]] | None = None
    bits: int = 0
    least: int = 0
    has_offsets: bool = False


def _half(blocks: Array, at: int) -> Array:
    """The float16 at a byte of each block, ``(n, 1)``."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")


def _planes(packed: Array, width: int, bits: int) -> Array:
    """Codes of a few bits: each run of ``width`` bytes holds its lowest bits first, then the next.

    >>> _planes(np.array([[0x21, 0x43]], np.uint8), 2, 4).tolist()
    [[1, 3, 2, 4]]
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = packed.reshape(len(packed), -1, 1, width)
    return ((runs >> shifts) & np.uint8(2**bits - 1)).reshape(len(packed), -1)


def _signed(codes: Array, middle: int) -> Array:
    return codes.astype(np.int8) - np.int8(middle)


def _split_q4_0(blocks: Array) -> tuple[Array, Array, None]:
    return _signed(_planes(blocks[:, 2:], 16, 4), 8), _half(blocks, 0), None


def _split_q4_1(blocks: Array) -> tuple[Array, Array, Array]:
    return _planes(blocks[:, 4:], 16, 4), _half(blocks, 0), _half(blocks, 2)


def _split_q5_0(blocks: Array) -> tuple[Array, Array, None]:
    codes = _planes(blocks[:, 6:], 16, 4) | _bits(blocks[:, 2:6]) << 4
    return _signed(codes, 16), _half(blocks, 0), None


def _split_q5_1(blocks: Array) -> tuple[Array, Array, Array]:
    codes = _planes(blocks[:, 8:], 16, 4) | _bits(blocks[:, 4:8]) << 4
    return codes, _half(blocks, 0), _half(blocks, 2)


def _split_q8_0(blocks: Array) -> tuple[Array, Array, None]:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8), _half(blocks, 0), None


def _bits(packed: Array) -> Array:
    return np.unpackbits(packed, axis=1, bitorder="little")


def _affine(
    name: str, size: int, split: Callable[[Array], tuple], *, bits: int, has_offsets: bool
) -> Layout:
    def decode(blocks: Array) -> Array:
        codes, scale, offset = split(blocks)
        values = codes.astype(np.float32) * scale.astype(np.float32)
        return values if offset is None else values + offset.astype(np.float32)

    least = 0 if has_offsets else -(2 ** (bits - 1))
    return Layout(name, 32, size, decode, split, bits, least, has_offsets)


def _scaled(codes: Array, scales: Array, mins: Array | float = 0.0) -> Array:
    """Blocks of 256 numbers: ``code * scale - min``, with a scale for each group of them."""
    groups = codes.reshape(*scales.shape, -1).astype(np.float32)
    least = mins if isinstance(mins, float) else np.asarray(mins)[..., None]
    return (groups * scales[..., None] - least).reshape(len(codes), -1)


def _decode_q2_k(blocks: Array) -> Array:
    scale, least = (_half(blocks, at).astype(np.float32) for at in (80, 82))
    both = blocks[:, :16]
    return _scaled(_planes(blocks[:, 16:80], 32, 2), scale * (both & 15), least * (both >> 4))


def _decode_q3_k(blocks: Array) -> Array:
    low, high = _planes(blocks[:, 32:96], 32, 2), _planes(blocks[:, :32], 32, 1)
    sixths = _planes(blocks[:, 96:104], 8, 4) | _planes(blocks[:, 104:108], 4, 2) << 4
    scales = _half(blocks, 108).astype(np.float32) * _signed(sixths, 32)
    return _scaled(_signed(low | high << 2, 4), scales)


def _k_scales(blocks: Array) -> tuple[Array, Array]:
    """Scales and minima ``(n, 8)`` of Q4_K and Q5_K: six bits each, in the twelve bytes from 4."""
    a, b, c = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scales = np.concatenate([a & 63, c & 15 | a >> 6 << 4], axis=1)
    mins = np.concatenate([b & 63, c >> 4 | b >> 6 << 4], axis=1)
    scale, least = (_half(blocks, at).astype(np.float32) for at in (0, 2))
    return scale * scales, least * mins


def _decode_q4_k(blocks: Array) -> Array:
    return _scaled(_planes(blocks[:, 16:], 32, 4), *_k_scales(blocks))


def _decode_q5_k(blocks: Array) -> Array:
    codes = _planes(blocks[:, 48:], 32, 4) | _planes(blocks[:, 16:48], 32, 1) << 4
    return _scaled(codes, *_k_scales(blocks))


def _decode_q6_k(blocks: Array) -> Array:
    codes = _planes(blocks[:, :128], 64, 4) | _planes(blocks[:, 128:192], 32, 2) << 4
    scales = _half(blocks, 208).astype(np.float32) * blocks[:, 192:208].view(np.int8)
    return _scaled(_signed(codes, 32), scales)


def _plain(name: str, dtype: np.dtype) -> Layout:
    decode = lambda blocks: blocks.view(dtype).astype(np.float32)
    return Layout(name, 1, np.dtype(dtype).itemsize, decode)


# By the numbers that files have.
LAYOUTS: dict[int, Layout] = {
    0: _plain("F32", np.dtype("<f4")),
    1: _plain("F16", np.dtype("<f2")),
    30: _plain("BF16", jnp.bfloat16),
    2: _affine("Q4_0", 18, _split_q4_0, bits=4, has_offsets=False),
    3: _affine("Q4_1", 20, _split_q4_1, bits=4, has_offsets=True),
    6: _affine("Q5_0", 22, _split_q5_0, bits=5, has_offsets=False),
    7: _affine("Q5_1", 24, _split_q5_1, bits=5, has_offsets=True),
    8: _affine("Q8_0", 34, _split_q8_0, bits=8, has_offsets=False),
    10: Layout("Q2_K", 256, 84, _decode_q2_k),
    11: Layout("Q3_K", 256, 110, _decode_q3_k),
    12: Layout("Q4_K", 256, 144, _decode_q4_k),
    13: Layout("Q5_K", 256, 176, _decode_q5_k),
    14: Layout("Q6_K", 256, 210, _decode_q6_k),
}
_OTHERS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip


def layout(number: int) -> Layout:
    """Returns the layout of a type, by its number in files.

    Raises:
      ValueError: the type is not read here; the message names it.

    >>> layout(12).name
    'Q4_K'
    """
    if number not in LAYOUTS:
        name = _OTHERS.get(number, f"of number {number}")
        known = ", ".join(x.name for x in LAYOUTS.values())
        raise ValueError(f"tensors of type {name} are not read here; those of {known} are")
    return LAYOUTS[number]
