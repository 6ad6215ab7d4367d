"""Quantized kernels inside the interpreter: numbers are made at the product, and nowhere else.

A kernel that is stored in fewer bits goes through the jaxpr as it is stored. What rearranges it is
put off, what takes some of its batch axes is done to its parts, and only a use makes numbers of it,
inside ``jax.checkpoint``: the residuals of the product are codes, so that neither pass holds the
numbers of more kernels than one. All else gets the array that it stands for.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.factors import BATCH
from lora_jax.quantized import Quantized, decode
from lora_jax.quantized_sharding import gather

Array = jax.Array


class Step(NamedTuple):
    """A rearrangement that was put off, of one kernel without its leading batch axes."""

    primitive: Any
    params: tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Deferred:
    """A quantized kernel, and the rearrangements that are to be made of its numbers.

    Attributes:
      leaf: kernel as it is stored.
      steps: rearrangements of each of the kernels along the leading batch axes.
    """

    leaf: Quantized
    steps: tuple[Step, ...] = ()

    @property
    def aval(self) -> jax.ShapeDtypeStruct:
        """The shape and dtype of the array that it stands for."""
        return _eval_aval(self.leaf.shape, self.leaf.dtype, self.lead, self.steps)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that it stands for."""
        return self.aval.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the array that it stands for."""
        return self.aval.dtype

    @property
    def ndim(self) -> int:
        """The number of axes of the array that it stands for."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries of the array that it stands for."""
        return self.aval.size

    @property
    def lead(self) -> int:
        """The number of leading batch axes, which no step touches."""
        roles = self.leaf.roles
        return len(roles) - len(roles.lstrip(BATCH))


jax.tree_util.register_dataclass(Deferred, ["leaf"], ["steps"])


@functools.cache
def _eval_aval(
    shape: tuple[int, ...], dtype: Any, lead: int, steps: tuple[Step, ...]
) -> jax.ShapeDtypeStruct:
    whole = jax.ShapeDtypeStruct(shape, dtype)
    return jax.eval_shape(_compose_steps(lead, steps), whole) if steps else whole


def _compose_steps(lead: int, steps: tuple[Step, ...]) -> Callable[[Array], Array]:
    def run(x: Array) -> Array:
        for step in steps:
            x = step.primitive.bind(x, **dict(step.params))
        return x

    for _ in range(lead):
        run = jax.vmap(run)
    return run


def materialize(value: Any) -> Any:
    """Computes the array that a value stands for, if it is deferred; else returns the value."""
    if not isinstance(value, Deferred):
        return value
    array = decode(value.leaf)
    return _compose_steps(value.lead, value.steps)(array) if value.steps else array


def evaluate(
    run: Callable[[Sequence[Any]], list], vals: Sequence[Any], *, prevent_cse: bool
) -> list:
    """Calls ``run`` with numbers in place of what is deferred, and does not keep them.

    Args:
      run: function of a list.
      vals: its items, in a list.
      prevent_cse: flag as in ``jax.checkpoint``.
    """
    if not any(isinstance(v, Deferred) for v in vals):
        return run(vals)
    made = lambda vals: run([materialize(_gather_parts(v)) for v in vals])
    return jax.checkpoint(made, prevent_cse=prevent_cse)(list(vals))


def _gather_parts(value: Any) -> Any:
    if not isinstance(value, Deferred):
        return value
    return dataclasses.replace(value, leaf=gather(value.leaf))


def move(eqn: Any, vals: Sequence[Any]) -> list | None:
    """Moves what is deferred through an equation; None where the equation needs numbers."""
    if not isinstance(vals[0], Deferred) or any(isinstance(v, Deferred) for v in vals[1:]):
        return None
    name, value = eqn.primitive.name, vals[0]
    if name in _OF_BATCH and (moved := _OF_BATCH[name](eqn.params, value, vals[1:])) is not None:
        return moved
    if name in _SAME:
        return [value]
    params = _INSIDE[name](eqn.params, value) if name in _INSIDE else None
    if params is None or len(vals) > 1:
        return None
    step = Step(eqn.primitive, tuple(sorted({**eqn.params, **params}.items())))
    return [dataclasses.replace(value, steps=(*value.steps, step))]


def _map_parts(change: Callable[[Array], Array], value: Deferred) -> Deferred:
    return dataclasses.replace(value, leaf=jax.tree.map(change, value.leaf))


# ---- Rearrangements that leave the leading batch axes alone --------------------------------------
#
# Each gives the changed parameters of the same rearrangement of one kernel without these axes, or
# None where it is none.


def _transpose(params: dict, value: Deferred) -> dict | None:
    n, order = value.lead, params["permutation"]
    if tuple(order[:n]) != tuple(range(n)):
        return None
    return {"permutation": tuple(k - n for k in order[n:])}


def _reshape(params: dict, value: Deferred) -> dict | None:
    n, sizes = value.lead, params["new_sizes"]
    is_plain = params.get("dimensions") is None and params.get("sharding") is None
    if not is_plain or tuple(sizes[:n]) != value.shape[:n]:
        return None
    return {"new_sizes": tuple(sizes[n:])}


def _squeeze(params: dict, value: Deferred) -> dict | None:
    axes = [k - value.lead for k in params["dimensions"]]
    return None if min(axes, default=0) < 0 else {"dimensions": tuple(axes)}


def _broadcast(params: dict, value: Deferred) -> dict | None:
    n, dims, sizes = value.lead, params["broadcast_dimensions"], params["shape"]
    kept = tuple(dims[:n]) == tuple(range(n)) and tuple(sizes[:n]) == value.shape[:n]
    if not kept or params.get("sharding") is not None:
        return None
    return {"broadcast_dimensions": tuple(k - n for k in dims[n:]), "shape": tuple(sizes[n:])}


def _slice(params: dict, value: Deferred) -> dict | None:
    n, strides = value.lead, params["strides"] or (1,) * value.ndim
    start, limit = params["start_indices"], params["limit_indices"]
    whole = tuple(start[:n]) == (0,) * n and tuple(limit[:n]) == value.shape[:n]
    if not whole or any(k != 1 for k in strides[:n]):
        return None
    names = ("start_indices", "limit_indices", "strides")
    return {k: tuple(x[n:]) for k, x in zip(names, (start, limit, strides), strict=True)}


def _convert(params: dict, value: Deferred) -> dict | None:
    is_float = jnp.issubdtype(params["new_dtype"], jnp.floating)
    return {} if is_float and params.get("sharding") is None else None


_INSIDE: dict[str, Callable[[dict, Deferred], dict | None]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "convert_element_type": _convert,
}

# What changes neither values nor axes. Names and copies are of arrays that a program keeps.
_SAME = {"copy", "copy_p", "name", "stop_gradient"}


# ---- Rearrangements of the leading batch axes: those of each part --------------------------------


def _bring_batch_first(params: dict, value: Deferred, _: Sequence) -> list[Deferred] | None:
    """Transposes where that only says anew where the axes of the stored matrix are."""
    leaf, order = value.leaf, params["permutation"]
    roles = leaf.roles
    same = all([k for k in order if roles[k] == x] == _find_axes(roles, x) for x in {*roles})
    if value.steps or not same or len(order) != len(roles):
        return None
    axes = "".join(roles[k] for k in order)
    sizes = tuple(leaf.shape[k] for k in order if roles[k] != BATCH)
    return [Deferred(dataclasses.replace(leaf, axes=axes, sizes=sizes))]


def _find_axes(roles: str, role: str) -> list[int]:
    return [k for k, x in enumerate(roles) if x == role]


def _slice_batch(params: dict, value: Deferred, _: Sequence) -> list[Deferred] | None:
    n, strides = value.lead, params["strides"] or (1,) * value.ndim
    start, limit = params["start_indices"], params["limit_indices"]
    whole = zip(start[n:], limit[n:], strides[n:], value.shape[n:], strict=True)
    if not n or any((a, b, step) != (0, size, 1) for a, b, step, size in whole):
        return None
    index = tuple(slice(*k) for k in zip(start[:n], limit[:n], strides[:n], strict=True))
    return [_map_parts(lambda x: x[index], value)]


def _dynamic_slice_batch(params: dict, value: Deferred, start: Sequence) -> list[Deferred] | None:
    n, sizes = value.lead, params["slice_sizes"]
    if not n or tuple(sizes[n:]) != value.shape[n:]:
        return None

    def change(x: Array) -> Array:
        rest = [jnp.zeros_like(start[0])] * (x.ndim - n)
        return lax.dynamic_slice(x, [*start[:n], *rest], [*sizes[:n], *x.shape[n:]])

    return [_map_parts(change, value)]


def _squeeze_batch(params: dict, value: Deferred, _: Sequence) -> list[Deferred] | None:
    axes = [k % value.ndim for k in params["dimensions"]]
    if not axes or max(axes) >= value.lead:
        return None
    return [_map_parts(lambda x: lax.squeeze(x, axes), value)]


def _reshape_batch(params: dict, value: Deferred, _: Sequence) -> list[Deferred] | None:
    """Splits and joins leading batch axes, if all the axes of the kernel are such."""
    n, sizes = value.lead, tuple(params["new_sizes"])
    rest = value.shape[n:]
    new = sizes[: len(sizes) - len(rest)]
    is_plain = params.get("dimensions") is None and params.get("sharding") is None
    if not is_plain or not n or sizes[len(new) :] != rest or new == value.shape[:n]:
        return None
    return [_map_parts(lambda x: x.reshape(*new, *x.shape[n:]), value)]


def _unstack_batch(params: dict, value: Deferred, _: Sequence) -> list[Deferred] | None:
    axis = params["axis"]
    if axis >= value.lead:
        return None
    pick = lambda k: lambda x: lax.index_in_dim(x, k, axis, keepdims=False)
    return [_map_parts(pick(k), value) for k in range(value.shape[axis])]


def _pick_batch(params: dict, value: Deferred, indices: Sequence) -> list[Deferred] | None:
    """Gathers whole kernels along the leading batch axes, by numbers that are data."""
    n, dims, sizes = value.lead, params["dimension_numbers"], params["slice_sizes"]
    n_ids = indices[0].ndim - 1
    rest = value.ndim - n
    fits = (
        n > 0
        and tuple(dims.collapsed_slice_dims) == tuple(range(n))
        and tuple(dims.offset_dims) == tuple(range(n_ids, n_ids + rest))
        and {*dims.start_index_map} <= {*range(n)}
        and not getattr(dims, "operand_batching_dims", ())
        and tuple(sizes[n:]) == value.shape[n:]
    )
    # Out of bounds an entry is filled with NaN, which no code stands for.
    if not fits or params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        return None

    def change(x: Array) -> Array:
        offsets = tuple(range(n_ids, n_ids + x.ndim - n))
        options = {k: params[k] for k in ("indices_are_sorted", "unique_indices", "mode")}
        return lax.gather(
            x,
            indices[0],
            lax.GatherDimensionNumbers(offsets, tuple(range(n)), tuple(dims.start_index_map)),
            slice_sizes=(*[1] * n, *x.shape[n:]),
            **options,
        )

    return [_map_parts(change, value)]


_OF_BATCH: dict[str, Callable[[dict, Deferred, Sequence], list[Deferred] | None]] = {
    "transpose": _bring_batch_first,
    "slice": _slice_batch,
    "dynamic_slice": _dynamic_slice_batch,
    "squeeze": _squeeze_batch,
    "reshape": _reshape_batch,
    "unstack": _unstack_batch,
    "gather": _pick_batch,
}
