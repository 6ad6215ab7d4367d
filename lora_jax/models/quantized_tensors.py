"""Tensors of a checkpoint that are quantized: which belong together, and the leaf that they make.

Read are the 4-bit and 8-bit files of bitsandbytes, float8 with scales, and what
:mod:`.grouped_tensors` knows. What is stored stays as it is: bytes are put in another order, never
decoded. Every other scheme is refused by its name.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import names
from lora_jax.code_books import DYNAMIC, TABLES
from lora_jax.factors import IN, OUT
from lora_jax.models import grouped_tensors
from lora_jax.models.grouped_tensors import Settings
from lora_jax.models.weight_files import Stored, read_tensor
from lora_jax.names import Weight
from lora_jax.quantized import NESTED_BLOCK, Affine, CodeBook, Quantized, decode

METHODS = ("bitsandbytes", "gptq", "awq", "compressed-tensors", "fp8", "fbgemm_fp8", "modelopt")
ADVICE = "Take the original model, and quantize it on loading."
_KEYS = ("quantization_config", "compression_config", "quantization")  # the last is MLX's
_STATE = ".quant_state.bitsandbytes__"
_BYTES = np.dtype(np.uint8)
_FIELDS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_FIELDS = {"nested_blocksize", "nested_dtype", "nested_offset"}
_FLOAT8 = np.dtype(jnp.float8_e4m3fn)
_LARGEST = 1e30  # scale of any kernel; its products with codes are finite in float32


class QuantizedTensor(NamedTuple):
    """A matrix ``(out, in)`` that is stored in several tensors, not read yet.

    Attributes:
      name: name of the matrix.
      dtype: dtype of what it stands for.
      shape: shape of what it stands for.
      parts: tensors to read for it, by what they are; none if ``make`` reads it itself.
      make: function that makes the class and the fields of a leaf of the parts' values.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    parts: Mapping[str, Stored]
    make: Callable[["QuantizedTensor", Mapping[str, np.ndarray]], tuple[type, dict[str, Any]]]


def read_settings(config: Mapping[str, Any], where: str) -> Settings | None:
    """Reads what a checkpoint's config says of groups of inputs; None where it names none.

    Raises:
      ValueError: the checkpoint is quantized in a way that is not read; the message names it.
    """
    about = _find_about(config)
    if about is None:
        return None
    method = _find_method(about)
    if method not in METHODS or not isinstance(about, Mapping):
        raise ValueError(
            f"The checkpoint {where!r} is quantized with {method!r}, which is not read here; read "
            f"are {', '.join(METHODS)}. {ADVICE}"
        )
    try:
        if method == "modelopt" and (kind := about.get("quant_algo", "FP8")) != "FP8":
            raise ValueError(f"is quantized with 'modelopt' in {kind!r}, which is not read")
        has_groups = method in grouped_tensors.FORMATS
        return grouped_tensors.settings(about, method) if has_groups else None
    except ValueError as error:
        raise ValueError(f"The checkpoint {where!r} {error}. {ADVICE}") from error


def describe(config: Mapping[str, Any]) -> str:
    """Says that a checkpoint's config names a scheme; "" where it names none.

    >>> describe({"quantization_config": {"quant_method": "fp8"}})
    "Its config.json says that it is quantized with 'fp8'."
    """
    about = _find_about(config)
    said = "Its config.json says that it is quantized with"
    return "" if about is None else f"{said} {_find_method(about)!r:.60}."


def _find_about(config: Mapping[str, Any]) -> Any:
    return next((config[key] for key in _KEYS if config.get(key)), None)


def _find_method(about: Any) -> Any:
    """Finds the name of a scheme; some files do not give it, and are known by other words."""
    if not isinstance(about, Mapping):
        return about
    if about.get("quant_method"):
        return about["quant_method"]
    if any("4bit" in word or "8bit" in word for word in about):
        return "bitsandbytes"
    if "config_groups" in about:
        return "compressed-tensors"
    return "mlx" if {"bits", "group_size"} <= set(about) else dict(about)


def group(
    tensors: Mapping[str, Stored], settings: Settings | None = None
) -> tuple[dict[str, Stored | QuantizedTensor], list[str]]:
    """Puts together the tensors that one quantized matrix is stored in; also returns problems."""
    grouped: dict[str, Stored | QuantizedTensor] = {}
    problems: list[str] = []
    taken: set[str] = set()
    for name in tensors:
        try:
            made, names_of_parts = _find_group(name, tensors, settings)
        except ValueError as error:
            problems.append(f"{name} {error}")
            continue
        if made is not None:
            taken |= names_of_parts
            grouped[made.name] = made
    grouped |= {name: x for name, x in tensors.items() if name not in taken}
    return grouped, problems


def _find_group(
    name: str, tensors: Mapping[str, Stored], settings: Settings | None
) -> tuple[QuantizedTensor | None, set[str]]:
    """Finds the quantized matrix whose codes have this name, and the names of its parts."""
    if settings is not None and (found := grouped_tensors.find(name, tensors, settings)):
        parts = {key: tensors[full] for key, full in found.items()}
        make = lambda tensor, values: grouped_tensors.read(values, tensor.shape, settings)
        shape = grouped_tensors.matrix_shape(parts, settings)
        module = f"{grouped_tensors.module_of(name, settings)}.weight"
        made = QuantizedTensor(module, np.dtype(np.float16), shape, parts, make)
        return made, set(found.values())
    companions = _find_companions(name, tensors)
    if not companions:
        return None, set()
    parts = {key: stored for key, (_, stored) in companions.items()}
    made = _make_tensor(name, {"codes": tensors[name], **parts})
    return made, {name, *(full for full, _ in companions.values())}


def _find_companions(name: str, tensors: Mapping[str, Stored]) -> dict[str, tuple[str, Stored]]:
    """Finds the further tensors of a quantized matrix, by what they are; a plain one has none."""
    if not name.endswith(".weight"):
        return {}
    module = name.removesuffix(".weight")
    states = {f"{name}{_STATE}{kind}": "state" for kind in TABLES}
    rest = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    labels = states | {f"{name}.{part}": part for part in rest}
    labels |= {f"{module}.SCB": "SCB", f"{module}.weight_format": "weight_format"}
    labels |= {f"{name}_scale": "scale", f"{name}_scale_inv": "scale", f"{name}_scale_2": "second"}
    labels |= {f"{module}.input_scale": "input_scale"}  # of activations, which are not rounded
    return {label: (n, tensors[n]) for n, label in labels.items() if n in tensors}


def _make_tensor(name: str, parts: dict[str, Stored]) -> QuantizedTensor:
    """Makes a quantized matrix of its parts, if they belong together.

    Raises:
      ValueError: they do not; the message continues one that begins with the name.
    """
    if "state" in parts:
        return _make_4_bits(name, parts)
    if {"SCB", "codes"} <= set(parts) and parts["codes"].dtype == np.int8:
        return _make_8_bits(name, parts)
    if "scale" in parts and parts["codes"].dtype == _FLOAT8 and "second" not in parts:
        return _of_float8(name, parts)
    kinds = {key: str(stored.dtype) for key, stored in parts.items()}
    raise ValueError(f"is quantized in a way that is not read: its tensors are {kinds}")


def expected_shape(weight: Weight) -> tuple[int, int]:
    """Returns the shape ``(out, in)`` of a kernel's matrix, also where torch has it transposed."""
    roles = names.axes(weight)
    side = lambda role: math.prod(n for n, x in zip(weight.shape, roles, strict=True) if x == role)
    return side(OUT), side(IN)


def read_quantized(tensor: QuantizedTensor, weight: Weight, dtype: Any) -> Quantized | np.ndarray:
    """Reads the leaf for a kernel, in numpy arrays; a plain array for what is no linear kernel.

    Raises:
      ValueError: the values do not belong together; the message continues one that begins with the
        name of the tensor.
    """
    values = {key: read_tensor(stored) for key, stored in tensor.parts.items()}
    cls, fields = tensor.make(tensor, values)
    is_kernel = names.kind(weight) == names.LINEAR and names.axes(weight)
    axes, sizes = (names.axes(weight), weight.shape) if is_kernel else ("oi", tensor.shape)
    leaf = cls(axes=axes, sizes=tuple(sizes), dtype=np.dtype(dtype), **fields)
    for key, x in jax.tree_util.tree_flatten_with_path(leaf)[0]:
        if x.dtype.kind not in "iu":
            _check_size(x, jax.tree_util.keystr(key).strip("."))
    return leaf if is_kernel else names.from_tensor(weight, np.asarray(decode(leaf)))


# ---- bitsandbytes -------------------------------------------------------------------------------


def _make_4_bits(name: str, parts: dict[str, Stored]) -> QuantizedTensor:
    about = _read_state(read_tensor(parts["state"]))
    needed = {"absmax", "quant_map"} | ({"nested_absmax"} if "nested_offset" in about else set())
    if missing := needed - set(parts):
        raise ValueError(f"lacks {', '.join(sorted(missing))}")
    count, block = math.prod(about["shape"]), about["blocksize"]
    blocks = -(-count // block)
    have = math.prod(parts["codes"].shape) * parts["codes"].dtype.itemsize
    if have != (count + 1) // 2:
        raise ValueError(f"has {have} bytes, and {count} numbers of 4 bits need {(count + 1) // 2}")
    wanted = {"absmax": blocks}
    wanted |= {"nested_absmax": -(-blocks // NESTED_BLOCK)} if "nested_offset" in about else {}
    for key, size in wanted.items():
        if parts[key].shape != (size,):
            raise ValueError(f"has {key} of shape {parts[key].shape}, and {size} are needed")
    if (parts["absmax"].dtype == _BYTES) != ("nested_offset" in about):
        raise ValueError(f"has absmax of dtype {parts['absmax'].dtype}, unlike its quant_state")
    make = lambda tensor, values: _make_code_book(tensor, values, about)
    return QuantizedTensor(name, jnp.dtype(about["dtype"]), tuple(about["shape"]), parts, make)


def _read_state(data: np.ndarray) -> dict[str, Any]:
    """Reads what a file says of a matrix, and checks it."""
    try:
        about = json.loads(data.tobytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has a quant_state that is no JSON ({error})") from error
    fields = set(about) if isinstance(about, dict) else set()
    if fields not in (_FIELDS, _FIELDS | _NESTED_FIELDS):
        raise ValueError(f"has a quant_state with the fields {sorted(fields)}, which are not known")
    shape, block = about["shape"], about["blocksize"]
    is_size = lambda n: type(n) is int and 0 < n < 2**31
    known = {
        "quant_type": about["quant_type"] in [*TABLES],
        "blocksize": is_size(block) and block >= 32 and block & (block - 1) == 0,
        "dtype": about["dtype"] in ("float16", "bfloat16", "float32"),
        "shape": isinstance(shape, list) and len(shape) == 2 and all(map(is_size, shape)),
        "nested_blocksize": about.get("nested_blocksize", NESTED_BLOCK) == NESTED_BLOCK,
        "nested_dtype": about.get("nested_dtype", "float32") == "float32",
        "nested_offset": _is_number(about.get("nested_offset", 0)),
    }
    if bad := {field: about[field] for field, fits in known.items() if not fits}:
        raise ValueError(f"has a quant_state that is not understood: {bad}")
    return about


def _check_size(x: np.ndarray, part: str) -> None:
    largest = np.abs(np.asarray(x, np.float32)).max(initial=0)
    if not np.isfinite(largest):
        raise ValueError(f"has NaN or infinity in its {part}")
    if largest > _LARGEST:
        raise ValueError(f"has numbers as large as {largest:.1e} in its {part}: it is damaged")


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and abs(x) <= _LARGEST  # false for NaN


def _make_code_book(
    tensor: QuantizedTensor, values: Mapping[str, np.ndarray], about: Mapping[str, Any]
) -> tuple[type, dict[str, Any]]:
    table, block, n_in = about["quant_type"], about["blocksize"], tensor.shape[1]
    if not np.array_equal(values["quant_map"], TABLES[table]):
        raise ValueError(f"has a quant_map that is not that of {table!r}")
    # Where blocks cross rows, all is one column; see `CodeBook`.
    columns = 1 if n_in % block else tensor.shape[0]
    turn = lambda x: np.ascontiguousarray(x.reshape(columns, -1).T)
    # The bytes may be kept as those of floats, so that a trainer can split them.
    fields = {"codes": turn(values["codes"].reshape(-1).view(np.uint8)), "table": table}
    fields |= {"block": block, "scales": turn(values["absmax"])}
    if "nested_offset" in about:
        fields |= _make_nested(fields["scales"], values, float(about["nested_offset"]))
    return CodeBook, fields


def _make_nested(
    scales: np.ndarray, values: Mapping[str, np.ndarray], offset: float
) -> dict[str, Any]:
    """Makes the fields of quantized scales; plain scales where their table is not the usual."""
    nested, table = values["nested_absmax"], values.get("nested_quant_map", DYNAMIC)
    if table.shape != DYNAMIC.shape or np.abs(table - DYNAMIC).max() > 1e-6:
        raise ValueError("has a nested_quant_map that is not known")
    if np.array_equal(table, DYNAMIC):
        return {"nested": nested, "offset": np.asarray(offset, np.float32)}
    # Older versions computed it with other roundings.
    order = scales.T.reshape(-1)
    products = table[order] * np.repeat(nested, NESTED_BLOCK)[: order.size]
    plain = (products + np.float32(offset)).astype(np.float32)
    return {"scales": np.ascontiguousarray(plain.reshape(scales.T.shape).T)}


def _make_8_bits(name: str, parts: dict[str, Stored]) -> QuantizedTensor:
    shape = parts["codes"].shape
    if len(shape) != 2 or parts["SCB"].shape != (shape[0],):
        raise ValueError(f"has shape {shape}, and SCB has {parts['SCB'].shape}")
    if "weight_format" in parts and np.any(read_tensor(parts["weight_format"])):
        raise ValueError("has a weight_format other than 0 (row by row), which is not read")
    return QuantizedTensor(name, np.dtype(np.float16), shape, parts, _int8)


def _int8(tensor: QuantizedTensor, values: Mapping[str, np.ndarray]) -> tuple[type, dict[str, Any]]:
    codes, scales = np.ascontiguousarray(values["codes"].T), values["SCB"].reshape(1, -1)
    fields = {"codes": codes, "scales": scales, "code": "int8", "tile": (tensor.shape[1], 1)}
    return Affine, {**fields, "factor": 0.007874015718698502}


# ---- Float8 -------------------------------------------------------------------------------------


def _of_float8(name: str, parts: dict[str, Stored]) -> QuantizedTensor:
    shape, scale = parts["codes"].shape, parts["scale"]
    if len(shape) != 2 or not jnp.issubdtype(scale.dtype, jnp.floating):
        raise ValueError(f"has shape {shape}, and scales of {scale.dtype}")
    _find_tile(shape, scale.shape)
    return QuantizedTensor(name, np.dtype(jnp.bfloat16), shape, parts, _float8)


def _find_tile(shape: tuple[int, int], scales: tuple[int, ...]) -> tuple[int, int]:
    """Finds how many outputs and inputs share a scale."""
    if math.prod(scales) == 1:
        return shape
    if scales in ((shape[0],), (shape[0], 1)):
        return 1, shape[1]
    if len(scales) == 2 and scales == tuple(-(-n // 128) for n in shape):
        return 128, 128
    raise ValueError(f"of shape {shape} has scales of shape {scales}, which are not understood")


def _float8(
    tensor: QuantizedTensor, values: Mapping[str, np.ndarray]
) -> tuple[type, dict[str, Any]]:
    rows, columns = tensor.shape
    n_out, n_in = _find_tile((rows, columns), values["scale"].shape)
    counts = [-(-n // size) for n, size in zip(tensor.shape, (n_out, n_in), strict=True)]
    scales = np.asarray(values["scale"], np.float32).reshape(counts).T
    codes = np.ascontiguousarray(values["codes"].T)
    if not np.isfinite(codes.astype(np.float32)).all():
        raise ValueError("has NaN in its codes")
    fields = {"codes": codes.view(np.uint8), "scales": np.ascontiguousarray(scales)}
    return Affine, {**fields, "code": "float8_e4m3fn", "tile": (n_in, n_out)}
