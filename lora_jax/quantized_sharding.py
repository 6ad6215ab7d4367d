"""Where the parts of a quantized kernel lie on a mesh, given where the kernel is to lie."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax.factors import BATCH, IN, OUT, Spec, positions
from lora_jax.quantized import Quantized, is_quantized, parts

Entry = tuple[str, ...]  # the mesh axes that one axis of an array is split over


def part_specs(leaf: Quantized, spec: Spec, sizes: Mapping[str, int]) -> Quantized:
    """Returns the specs of the parts, in their places.

    Inputs are split where the first of their axes is, if every part can be split so, each block
    whole; likewise outputs. Scales of scales are on every device.

    Args:
      leaf: leaf of arrays, or shapes.
      spec: spec of the kernel.
      sizes: sizes of the mesh axes.
    """
    entries = [*map(_entry, spec), *[()] * (leaf.ndim - len(spec))]
    batch = [entries[k] for k in positions(leaf.roles, BATCH)]
    sides = [_split_side(leaf, role, entries, sizes) for role in (IN, OUT)]
    return _make_specs(leaf, batch, sides)


def _entry(x: Any) -> Entry:
    return () if x is None else (x,) if isinstance(x, str) else tuple(x)


def _split_side(
    leaf: Quantized, role: str, entries: Sequence[Entry], sizes: Mapping[str, int]
) -> Entry:
    first, *rest = positions(leaf.roles, role) or [-1]
    if first < 0 or any(entries[k] for k in rest) or _is_one_column(leaf):
        return ()
    pieces = math.prod(sizes[axis] for axis in entries[first])
    counts = [x.shape[-2 if role == IN else -1] for x in _find_matrices(leaf).values()]
    fits = entries[first] and all(n == 1 or n % pieces == 0 for n in counts)
    return entries[first] if fits and leaf.shape[first] % pieces == 0 else ()


def _is_one_column(leaf: Quantized) -> bool:
    """Tells whether blocks run over the whole kernel, so that no part has blocks of its own."""
    return leaf.codes.shape[-1] != leaf.sides[1]


def _find_matrices(leaf: Quantized) -> dict[str, Any]:
    """Returns the parts that have an axis of inputs and one of outputs."""
    return {n: x for n, x in parts(leaf).items() if n not in ("nested", "offset")}


def _make_specs(leaf: Quantized, batch: Sequence[Entry], sides: Sequence[Entry]) -> Quantized:
    made = lambda entries: PartitionSpec(*(x[0] if len(x) == 1 else x or None for x in entries))
    n = leaf.codes.ndim - 2

    def spec(name: str, x: Any) -> PartitionSpec:
        if name not in _find_matrices(leaf):
            return made([*batch, *[()] * (len(x.shape) - n)])
        split = [side if size > 1 else () for side, size in zip(sides, x.shape[-2:], strict=True)]
        return made([*batch, *split])

    specs: dict[str, Any] = {name: spec(name, x) for name, x in parts(leaf).items()}
    return dataclasses.replace(leaf, **specs)


def kernel_spec(leaf: Quantized) -> PartitionSpec:
    """Returns the spec of a kernel by where its parts lie: the inverse of :func:`part_specs`."""
    spec: Any = getattr(leaf.codes.sharding, "spec", None)
    batch = iter(spec[: leaf.codes.ndim - 2])
    sides: dict[str, Any] = dict(zip((IN, OUT), spec[-2:], strict=True))
    # Only the first axis of a side is split.
    return PartitionSpec(
        *(next(batch) if role == BATCH else sides.pop(role, None) for role in leaf.roles)
    )


def with_gathering(leaf: Quantized, specs: Quantized, gathered: str) -> Quantized:
    """Notes in a leaf that a mesh axis does not split it where numbers are made of it."""
    keeps = lambda entry: tuple(axis for axis in _entry(entry) if axis != gathered)
    return dataclasses.replace(leaf, split=tuple(map(keeps, specs.codes[-2:])))


def gather(leaf: Quantized) -> Quantized:
    """Gathers codes and scales, so that it is not the numbers that go from device to device.

    It counts for leaves that have been put onto a mesh, in functions that are compiled under
    ``jax.set_mesh``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    is_auto = not mesh.empty and all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
    if leaf.split is None or not is_auto or not {x for s in leaf.split for x in s} <= {*mesh.shape}:
        return leaf
    specs = _make_specs(leaf, [()] * (leaf.codes.ndim - 2), leaf.split)
    return jax.tree.map(lax.with_sharding_constraint, leaf, specs)


def spec_of(x: Any) -> PartitionSpec:
    """Returns the spec of an array, or of the kernel that a quantized leaf stands for."""
    return kernel_spec(x) if is_quantized(x) else x.sharding.spec
