"""Safetensors files of a model, one or several shards, as transformers writes them."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.files import safetensors_pieces, write_atomically
from lora_jax.models.hub import INDEX, WEIGHTS

DTYPES = {"bfloat16": np.dtype(jnp.bfloat16), "float16": np.dtype("<f2")}
DTYPES |= {"float32": np.dtype("<f4")}
SHARD_SIZE = "5GB"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Plan(NamedTuple):
    """Which tensor goes into which file.

    Attributes:
      files: names of the tensors in each file, in their order.
      dtype: dtype of all tensors.
      shapes: shapes of the tensors by name.
    """

    files: Mapping[str, tuple[str, ...]]
    dtype: np.dtype
    shapes: Mapping[str, tuple[int, ...]]


def parse_size(size: int | str) -> int:
    """Returns a number of bytes, such as ``5GB`` or ``500MB``, in powers of ten.

    Raises:
      ValueError: it is no such number, or less than 1.

    >>> parse_size("1.5GB")
    1500000000
    """
    size = int(size) if str(size).isdecimal() else size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)\s*", str(size), re.IGNORECASE)
    count = int(float(found[1]) * _UNITS[found[2].upper()]) if found else size
    if type(count) is not int or count < 1:
        raise ValueError(
            f"The size of a shard must be a number of bytes, or a number with one of the units "
            f"{', '.join(_UNITS)}, such as '5GB'; got {size!r}."
        )
    return count


def plan_shards(
    shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, shard_size: int | str
) -> Plan:
    """Puts tensors into files of at most a size, in their order; a larger one has its own.

    >>> shapes = {"a": (2,), "b": (9,), "c": (1,), "d": (2,)}
    >>> list(plan_shards(shapes, np.dtype("f4"), 12).files.values())
    [('b',), ('a', 'c'), ('d',)]
    """
    shards: list[tuple[str, ...]] = []
    last: list[str] = []
    most, used = parse_size(shard_size), 0
    for name, shape in shapes.items():
        size = dtype.itemsize * math.prod(shape)
        if size > most:  # before the one that is being filled, as transformers has it
            shards.append((name,))
            continue
        if used + size > most:
            shards.append(tuple(last))
            last, used = [], 0
        last.append(name)
        used += size
    shards += [tuple(last)] if last else []
    if len(shards) == 1:
        return Plan({WEIGHTS: shards[0]}, dtype, shapes)
    file_name = lambda k: f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors"
    return Plan({file_name(k): shard for k, shard in enumerate(shards)}, dtype, shapes)


def write_shards(directory: Path, plan: Plan, read: Callable[[str], np.ndarray]) -> None:
    """Writes the files of a plan, and their index if there are several; removes older ones.

    Args:
      directory: directory that exists.
      plan: which tensor goes into which file.
      read: function that makes the tensor of a name; it is called once for each, one at a time.

    Raises:
      OSError: a file can't be written; each file that existed before is intact.
    """
    for file, names in plan.files.items():
        shapes = {name: plan.shapes[name] for name in names}
        pieces = safetensors_pieces(shapes, map(read, names), {"format": "pt"}, dtype=plan.dtype)
        write_atomically(directory / file, pieces)
    if len(plan.files) > 1:
        text = json.dumps(make_index(plan), indent=2, sort_keys=True) + "\n"
        write_atomically(directory / INDEX, text.encode())
    # What an earlier model has left would be taken for weights of this one.
    ours = {*plan.files, *([INDEX] if len(plan.files) > 1 else [])}
    for path in [directory / INDEX, directory / WEIGHTS, *directory.glob("model-*-of-*")]:
        if path.name not in ours and re.fullmatch(_OURS, path.name):
            path.unlink(missing_ok=True)


_OURS = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"


def make_index(plan: Plan) -> dict[str, Any]:
    """Makes the content of ``model.safetensors.index.json``."""
    count = sum(math.prod(shape) for shape in plan.shapes.values())
    places = {name: file for file, names in plan.files.items() for name in names}
    sizes = {"total_parameters": count, "total_size": count * plan.dtype.itemsize}
    return {"metadata": sizes, "weight_map": places}
