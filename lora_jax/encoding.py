"""Arrays of every dtype in a safetensors file: as they are, or as bytes with a dtype beside."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_NATIVE = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "float16", "bfloat16", "float32", "float64",
    "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip
# Dtypes that safetensors, or some of its versions, has no name for.
_AS_BYTES = (
    "int2", "int4", "uint2", "uint4", "uint16", "uint32", "uint64", "complex64", "complex128",
    "float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fnuz",
    "float8_e5m2fnuz", "float8_e8m0fnu",
)  # fmt: skip


def describe_problem(x: Any) -> str:
    """Says why a file can't hold ``x``; returns an empty text if it can.

    >>> describe_problem(np.zeros(3)), describe_problem(np.array(["text"]))
    ('', 'is no array of numbers that a file can hold, but <U4')
    """
    dtype = str(getattr(x, "dtype", type(x).__name__))
    is_supported = dtype in (*_NATIVE, *_AS_BYTES) and not isinstance(x, jax.ShapeDtypeStruct)
    return "" if is_supported else f"is no array of numbers that a file can hold, but {dtype}"


def encode(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Replaces arrays whose dtype safetensors lacks by their bytes, along one more axis.

    Returns:
      The tensors, and the dtypes of the replaced ones by name.

    >>> tensors, dtypes = encode({"x": np.zeros(3, np.uint16), "y": np.zeros(3)})
    >>> tensors["x"].shape, dtypes
    ((3, 2), {'x': 'uint16'})
    """
    dtypes = {name: x.dtype.name for name, x in tensors.items() if x.dtype.name in _AS_BYTES}
    to_bytes = lambda x: np.ascontiguousarray(x[..., None]).view(np.uint8)
    return {n: to_bytes(x) if n in dtypes else x for n, x in tensors.items()}, dtypes


def decode(
    tensors: Mapping[str, np.ndarray], dtypes: Any
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Inverts :func:`encode`, and says what is wrong with the dtypes that a file records."""
    if not isinstance(dtypes, dict):
        return dict(tensors), [f"its dtypes are {dtypes!r}, and must be given by name"]
    typed, problems = dict(tensors), []
    for name, dtype in dtypes.items():
        x = tensors.get(name)
        if x is None:
            problems.append(f"a dtype is given for {name}, which is no tensor")
            continue
        size = jnp.dtype(dtype).itemsize if dtype in _AS_BYTES else 0
        if x.dtype != np.uint8 or x.shape[-1:] != (size,):
            problems.append(f"tensor {name} holds no {dtype!r}")
        else:
            typed[name] = x.view(jnp.dtype(dtype))[..., 0]
    return typed, problems


def drop_copies(
    tensors: Mapping[str, np.ndarray], names: Iterable[str]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Leaves out arrays that are the same as an earlier one, bit for bit.

    Args:
      tensors: arrays by name.
      names: names of those that are compared with each other.

    Returns:
      The other arrays, and for each that is left out the name of its like.

    >>> kept, copies = drop_copies({"x": np.ones(2), "y": np.ones(2)}, ["x", "y"])
    >>> list(kept), copies
    (['x'], {'y': 'x'})
    """
    first: dict[tuple, str] = {}
    copies = {}
    for name in names:
        x = tensors[name]
        key = x.shape, str(x.dtype), hashlib.sha256(x.tobytes()).digest()
        if first.setdefault(key, name) != name:
            copies[name] = first[key]
    return {n: x for n, x in tensors.items() if n not in copies}, copies


def restore_copies(
    tensors: Mapping[str, np.ndarray], copies: Any
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Inverts :func:`drop_copies`; also says what is wrong with the names."""
    if not isinstance(copies, dict):
        return dict(tensors), ["the list of copies is no object"]
    wrong = [n for n, like in copies.items() if not isinstance(like, str) or like not in tensors]
    restored = {n: tensors[like] for n, like in copies.items() if n not in wrong}
    return dict(tensors) | restored, [f"{n} is a copy of a tensor that is missing" for n in wrong]
