"""Kernels of 4 and 8 bits with a scale for each group of inputs, as GPTQ, AWQ and others have them.

Words of 32 bits hold several codes each; every format has another order of them. What is stored
becomes a leaf with the same codes: ``(code - zero) * scale``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.models.weight_files import Stored, read_tensor
from lora_jax.quantized import Affine

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each part of a word holds
# Layouts of each format, the usual one first; float-quantized are floats of 8 bits.
_USUAL = {
    "gptq": ("gptq", "gptq_v2"), "awq": ("gemm",),
    "compressed-tensors": ("pack-quantized", "float-quantized", "naive-quantized"),
}  # fmt: skip
_WORD = np.dtype(np.int32)


class Format(NamedTuple):
    """How a format names the tensors of a module, and how it is read.

    Attributes:
      parts: endings of the names, by what they are; of "codes" the format is known.
      optional: those that may be missing.
      shape: gives ``(out, in)`` of the parts.
      read: gives codes ``(in, out)``, scales and zeros ``(groups, out)``, or one zero for all.
    """

    parts: Mapping[str, str]
    optional: frozenset[str]
    shape: Callable[[Mapping[str, Stored], int], tuple[int, int]]
    read: Callable[[Mapping[str, np.ndarray], int, "Settings"], tuple[np.ndarray, Any, Any]]


class Settings(NamedTuple):
    """What the config of a checkpoint says.

    Attributes:
      method: "gptq", "awq" or "compressed-tensors".
      bits: bits of a code.
      plus: number to add to the zeros of the file.
    """

    method: str
    bits: int
    plus: int = 0


def settings(about: Mapping[str, Any], method: str) -> Settings:
    """Reads the ``quantization_config`` of a checkpoint of one of the formats.

    Raises:
      ValueError: it is of a kind that is not read; the message continues one on the checkpoint.
    """
    usual = _USUAL[method][0]
    words = ("version", "format") if method == "awq" else ("checkpoint_format", "format")
    form = next((str(about[word]).lower() for word in words if about.get(word)), usual)
    if form not in _USUAL[method]:
        raise ValueError(f"is quantized with {method!r} in the layout {form!r}, which is not read")
    if method == "compressed-tensors":
        groups = about.get("config_groups")
        weights = [g.get("weights") for g in groups.values()] if isinstance(groups, dict) else []
        numbers: list[Any] = [w.get("num_bits") for w in weights if isinstance(w, dict)]
        return _check(Settings(method, numbers[0] if len({*numbers}) == 1 else 0))
    bits = about.get("bits", about.get("w_bit", 0))
    others = about.get("dynamic")
    others = others if isinstance(others, dict) else {}
    if any(isinstance(x, dict) and x.get("bits", bits) != bits for x in others.values()):
        raise ValueError(f"is quantized with {method!r} in several numbers of bits, not in one")
    # Version 1 stores zeros less one.
    plus = 1 if form == "gptq" else 0
    return _check(Settings(method, bits, plus))


def _check(made: Settings) -> Settings:
    if made.bits not in (4, 8) or (made.method == "awq" and made.bits != 4):
        raise ValueError(f"is quantized with {made.method!r} in {made.bits} bits, not in 4 or 8")
    return made


def find(name: str, tensors: Mapping[str, Stored], about: Settings) -> dict[str, str]:
    """Finds the names of the tensors of a module whose codes have this name, by what they are.

    None if these are no codes.

    Raises:
      ValueError: some are missing, or have a dtype or shape that does not belong to the codes.
    """
    form = FORMATS[about.method]
    ending = form.parts["codes"]
    if not name.endswith(ending) or tensors[name].dtype != _WORD:
        return {}
    module = name.removesuffix(ending)
    known = {key: f"{module}{end}" for key, end in form.parts.items()}
    found = {key: full for key, full in known.items() if full in tensors}
    if missing := sorted(set(known) - set(found) - form.optional):
        raise ValueError(f"lacks {', '.join(known[key] for key in missing)}")
    matrices = [tensors[full] for key, full in found.items() if key in ("codes", "scales", "zeros")]
    if any(len(x.shape) != 2 for x in matrices):
        raise ValueError("has parts that are no matrices")
    return found


def read(
    values: Mapping[str, np.ndarray], shape: tuple[int, int], about: Settings
) -> tuple[type, dict[str, Any]]:
    """Returns the class and the fields of the leaf.

    Raises:
      ValueError: the parts do not belong together.
    """
    n_out, n_in = shape
    codes, scales, zeros = FORMATS[about.method].read(values, n_in, about)
    groups = len(scales)
    size = n_in // groups if groups else 0
    fits = codes.shape == (n_in, n_out) and scales.shape == (groups, n_out)
    if not fits or size * groups != n_in or np.shape(zeros) not in ((), scales.shape):
        shapes = (codes.shape, scales.shape, np.shape(zeros))
        raise ValueError(f"has codes, scales and zeros of shapes {shapes}, which do not fit")
    order = values.get("order")
    if order is not None and not np.array_equal(order.reshape(-1), np.arange(n_in) // size):
        raise ValueError(
            "has groups of inputs that are no neighbours (desc_act), which is not read"
        )
    if about.bits == 4 and n_in % 2:
        raise ValueError(f"has an odd number of inputs, {n_in}")
    packed = (codes[::2] << 4 | codes[1::2]).astype(np.uint8) if about.bits == 4 else codes
    fields = {"codes": packed, "scales": np.ascontiguousarray(scales), "tile": (size, 1)}
    fields |= {"zeros": zeros} if isinstance(zeros, np.ndarray) else {"zero": zeros}
    return Affine, fields | {"code": "uint4" if about.bits == 4 else "uint8"}


# ---- Words ---------------------------------------------------------------------------------------


def _unpack(words: np.ndarray, bits: int, order: Sequence[int] | None = None) -> np.ndarray:
    """Unpacks words ``(rows, words)``, the low bits first: ``(rows, codes)``."""
    per_word = 32 // bits
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    parts = (words.view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    if order is not None:
        parts = parts[..., np.argsort(order)]
    return parts.astype(np.uint8).reshape(words.shape[0], -1)


def _read_gptq(values: Mapping[str, np.ndarray], n_in: int, about: Settings) -> tuple:
    codes = np.ascontiguousarray(_unpack(np.ascontiguousarray(values["codes"].T), about.bits).T)
    zeros = _unpack(values["zeros"], about.bits).astype(np.int16) + about.plus
    return codes, values["scales"], zeros.astype(np.uint8 if about.bits == 4 else np.int16)


def _read_awq(values: Mapping[str, np.ndarray], n_in: int, about: Settings) -> tuple:
    codes, zeros = (_unpack(values[key], 4, _AWQ_ORDER) for key in ("codes", "zeros"))
    return codes, values["scales"], zeros


def _read_compressed(values: Mapping[str, np.ndarray], n_in: int, about: Settings) -> tuple:
    codes = np.ascontiguousarray(_unpack(values["codes"], about.bits)[:, :n_in].T)
    scales = np.ascontiguousarray(values["scales"].T)
    if "zeros" not in values:
        return codes, scales, 2 ** (about.bits - 1)
    by_group = _unpack(np.ascontiguousarray(values["zeros"].T), about.bits)
    return codes, scales, np.ascontiguousarray(by_group[:, : scales.shape[1]])


def _shape_gptq(parts: Mapping[str, Stored], bits: int) -> tuple[int, int]:
    rows, n_out = parts["codes"].shape
    return n_out, rows * 32 // bits


def _shape_awq(parts: Mapping[str, Stored], bits: int) -> tuple[int, int]:
    n_in, words = parts["codes"].shape
    return words * 32 // bits, n_in


def _shape_compressed(parts: Mapping[str, Stored], bits: int) -> tuple[int, int]:
    (n_out, words), said = parts["codes"].shape, read_tensor(parts["shape"]).reshape(-1)
    if said.size != 2 or said[0] != n_out or not 0 < said[1] <= words * 32 // bits:
        raise ValueError(f"has a weight_shape {said.tolist()} that its codes do not have")
    if -(-int(said[1]) * bits // 32) != words:
        raise ValueError(f"has {words} words a row, not those of {said[1]} inputs in {bits} bits")
    return n_out, int(said[1])


_QUANT = {"codes": ".qweight", "scales": ".scales", "zeros": ".qzeros", "order": ".g_idx"}
_COMPRESSED = {
    "codes": ".weight_packed", "scales": ".weight_scale", "zeros": ".weight_zero_point",
    "shape": ".weight_shape", "order": ".weight_g_idx",
}  # fmt: skip
FORMATS: dict[str, Format] = {
    "gptq": Format(_QUANT, frozenset({"order"}), _shape_gptq, _read_gptq),
    "awq": Format(_QUANT, frozenset({"order"}), _shape_awq, _read_awq),
    "compressed-tensors": Format(
        _COMPRESSED, frozenset({"zeros", "order"}), _shape_compressed, _read_compressed
    ),
}


def module_of(name: str, about: Settings) -> str:
    """Returns the name of the module whose codes have this name."""
    return name.removesuffix(FORMATS[about.method].parts["codes"])


def matrix_shape(parts: Mapping[str, Stored], about: Settings) -> tuple[int, int]:
    """Returns the shape ``(out, in)`` of the kernel."""
    shape = FORMATS[about.method].shape(parts, about.bits)
    if math.prod(shape) == 0:
        raise ValueError(f"has the shape {shape}")
    return shape
