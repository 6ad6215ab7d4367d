"""Moves that change only where a kernel lies: on devices, in memory, over a mesh.

By these rules of :mod:`.moves` each factor goes where the axes that it carries go.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import JaxprEqn
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.factors import BATCH, IN, OUT
from lora_jax.transform import forms
from lora_jax.transform.kernel import (
    SAME,
    Kernel,
    Unfactored,
    factor_specs,
    is_free,
    map_factors,
    require_kernel,
)

Array = jax.Array


def replace_frozen(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list:
    """Replaces the frozen parts alone; there is one result for each operand."""
    pairs = zip(vals, w, strict=True)
    return [dataclasses.replace(v, w=x) if isinstance(v, Kernel) else x for v, x in pairs]


def reshard(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """Reshards as ``jax.reshard``: an axis of a factor lies where the kernel's does."""
    kernel, target = require_kernel(vals), eqn.params["dst_sharding"]
    place = lambda x, spec: forms.rebind(eqn, x, dst_sharding=NamedSharding(target.mesh, spec))
    specs = factor_specs(kernel, target.spec).items()
    placed: dict[str, Any] = {name: place(getattr(kernel, name), spec) for name, spec in specs}
    return [dataclasses.replace(kernel, w=w[0], **placed)]


def device_put(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list:
    """Moves kernels as ``jax.device_put``, also from one kind of memory to another."""
    triples = zip(vals, w, eqn.params["devices"], strict=True)
    return [_put(v, x, target) if isinstance(v, Kernel) else x for v, x, target in triples]


def _put(kernel: Kernel, w: Array, target: Any) -> Kernel:
    if target is None:
        return dataclasses.replace(kernel, w=w)

    def place(spec: PartitionSpec) -> Any:
        if not isinstance(target, NamedSharding):
            return target
        return NamedSharding(target.mesh, spec, memory_kind=target.memory_kind)

    spec = target.spec if isinstance(target, NamedSharding) else PartitionSpec()
    specs = factor_specs(kernel, spec).items()
    put: dict[str, Any] = {n: jax.device_put(getattr(kernel, n), place(s)) for n, s in specs}
    return dataclasses.replace(kernel, w=w, **put)


def all_gather(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """Gathers as ``lax.all_gather`` in a ``shard_map``, along an axis split over devices."""
    kernel, axis = require_kernel(vals), eqn.params["all_gather_dimension"]
    if not eqn.params["tiled"]:
        axes = kernel.axes[:axis] + _role_over_devices(eqn, kernel) + kernel.axes[axis:]
    elif is_free(kernel, axis) and kernel.axes[axis] == SAME:
        return [dataclasses.replace(kernel, w=w[0])]
    else:
        axes = kernel.axes

    def change(x: Array, old: list[int], new: list[int]) -> Array:
        if axis not in new:
            return x
        return forms.rebind(eqn, x, all_gather_dimension=new.index(axis))

    return [map_factors(kernel, w[0], axes, change)]


def _role_over_devices(eqn: JaxprEqn, kernel: Kernel) -> str:
    """Returns the role of an axis of devices: varying factors have a part on each.

    Raises:
      Unfactored: the gain varies over devices, and the factor of its side does not, or vice versa.
    """
    names = eqn.params["axis_name"]
    names = frozenset(names if isinstance(names, tuple | list) else (names,))
    varies = lambda x: x is not None and bool(names & forms.varying_axes(x))
    w, a, b = map(varies, (kernel.w, kernel.a, kernel.b))
    if a == b:  # with check_vma=False nothing is known to vary
        role = SAME if w and not a else BATCH
    else:
        role = IN if a else OUT
    is_split = (a or b) and role in (BATCH, kernel.gain_side)
    if kernel.gain is not None and varies(kernel.gain) != is_split:
        raise Unfactored("gathers a kernel from devices of which each has another gain")
    return role
