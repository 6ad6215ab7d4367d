"""The mathematics of one adapted kernel: ``W' = W + s·BA`` (Hu et al. 2021, section 4.1, eq. 3).

The paper multiplies column vectors, so its ``B`` is ``(d_out, r)`` and its ``A`` is ``(r, d_in)``.
Flax kernels are ``(d_in, d_out)`` and act from the right. Hence, here and everywhere in this
library, ``a = Aᵀ``, ``b = Bᵀ`` and ``ΔW = s·a·b``.

A kernel may have any number of axes in any order. Each has a role, one letter of ``axes``:

* ``i``: an input axis, carried by ``a``;
* ``o``: an output axis, carried by ``b``;
* ``b``: a batch axis (layers of a scan, experts), carried by both: every entry is a kernel of its
  own with its own pair of factors.

``a`` has shape ``(*batch, *in, rank)`` and ``b`` has ``(*batch, rank, *out)``, each group in the
order in which its axes stand in the kernel.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

Array = jax.Array
IN, OUT, BATCH = "i", "o", "b"


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """A low-rank term ``s·a·b``, alone or with the kernel that it is added to.

    As a pytree it has the leaves ``a`` and ``b``, and ``w`` in a bound tree. A scale that is a
    number belongs to the structure, so that no optimizer, average or clipping can change it; one
    that is an array is a leaf, so that a sweep can map over it (see
    :func:`lora_jax.adapter.as_data`). Neither ever has a gradient.

    Attributes:
      a: ``(*batch, *in, rank)``, the paper's ``A`` transposed.
      b: ``(*batch, rank, *out)``, the paper's ``B`` transposed.
      scale: ``s``, a finite number, which becomes a Python float, or a scalar array.
      w: the frozen kernel in a bound tree; None in an adapter.
      axes: the role of each kernel axis, for example "io".
      name: the kernel's path in a bound tree, for messages.
      dropout: rate in [0, 1) of the dropout on the input of the branch, for :func:`lora_jax.lift`.

    Raises:
      ValueError: the scale is NaN or infinite, or the rate of dropout is out of its range.

    >>> node = LowRank(jnp.zeros((3, 1)), jnp.zeros((1, 2)), 4)
    >>> len(jax.tree.leaves(node)), node.scale
    (2, 4.0)
    """

    a: Array
    b: Array
    scale: Array | float
    w: Array | None = None
    axes: str = "io"
    name: str = ""
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _tell_observers()
        if _is_number(self.scale):
            object.__setattr__(self, "scale", float(self.scale))  # the dataclass is frozen
            if not math.isfinite(self.scale):
                raise ValueError(f"The scale of a low-rank term must be finite, got {self.scale}.")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(
                f"The dropout of a low-rank term must be a number in [0, 1), got {self.dropout!r}; "
                "a rate that is an array is for lift(fn, dropout=rate)."
            )
        object.__setattr__(self, "dropout", float(self.dropout))


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A leaf of a bound tree that the adapter replaces in full."""

    value: Array


_observers: list[Callable[[], bool]] = []


def observe(observer: Callable[[], bool]) -> None:
    """Has ``observer`` called whenever a low-rank term is made, until it returns True.

    So a library that is imported later can still be told of these classes.
    """
    _observers.append(observer)


def _tell_observers() -> None:
    if _observers:
        _observers[:] = [observer for observer in _observers if not observer()]


def _is_number(x: Any) -> bool:
    # A mask has True and False in place of arrays, and they stay leaves. numpy's scalars are
    # numbers; its arrays without axes are arrays.
    return isinstance(x, int | float | np.floating | np.integer) and not isinstance(x, bool)


_STATIC, _DATA = ("a", "b", "w"), ("a", "b", "scale", "w")  # names of children, in their order
_SCALE_IS_LEAF = "_scale_is_leaf"  # of a node made by a map over leaves, whatever the map gave


def has_static_scale(node: LowRank) -> bool:
    """Whether the scale is a number of the structure, not a leaf."""
    return isinstance(node.scale, float) and _SCALE_IS_LEAF not in node.__dict__


def _flatten(node: LowRank) -> tuple[tuple, tuple]:
    if has_static_scale(node):
        return (node.a, node.b, node.w), (node.scale, node.axes, node.name, node.dropout)
    return (node.a, node.b, node.scale, node.w), (None, node.axes, node.name, node.dropout)


def _flatten_with_keys(node: LowRank) -> tuple[tuple, tuple]:
    children, rest = _flatten(node)
    names = _STATIC if len(children) == len(_STATIC) else _DATA
    keys = map(jax.tree_util.GetAttrKey, names)
    return tuple(zip(keys, children, strict=True)), rest


def _unflatten(rest: tuple, children: Sequence[Any]) -> LowRank:
    """Puts any objects into the places of the leaves: no check, no conversion."""
    _tell_observers()
    scale, axes, name, dropout = rest
    node = object.__new__(LowRank)
    fields = node.__dict__  # the dataclass is frozen
    fields.update(scale=scale, axes=axes, name=name, dropout=dropout)
    if scale is None:
        fields[_SCALE_IS_LEAF] = True
    fields.update(zip(_STATIC if scale is not None else _DATA, children, strict=True))
    return node


jax.tree_util.register_pytree_with_keys(LowRank, _flatten_with_keys, _unflatten, _flatten)
jax.tree_util.register_pytree_with_keys(
    Trained,
    lambda node: (((jax.tree_util.GetAttrKey("value"), node.value),), ()),
    lambda _, children: Trained(*children),
    lambda node: ((node.value,), ()),
)


def is_node(x: Any) -> bool:
    """Whether ``x`` is one of the two nodes that this library puts in place of arrays."""
    return isinstance(x, LowRank | Trained)


def positions(axes: Sequence[Any], roles: str) -> list[int]:
    """Axes of the kernel with the given roles, role by role.

    >>> positions("bioi", "bi")
    [0, 1, 3]
    """
    return [k for role in roles for k, axis in enumerate(axes) if axis == role]


def factor_shapes(shape: Sequence[int], axes: str, rank: int) -> tuple[tuple, tuple]:
    """Shapes of ``a`` and ``b`` for a kernel.

    >>> factor_shapes((12, 768, 12, 64), "bioo", rank=8)
    ((12, 768, 8), (12, 8, 12, 64))
    """
    sizes = lambda role: tuple(shape[k] for k in positions(axes, role))
    return (*sizes(BATCH), *sizes(IN), rank), (*sizes(BATCH), rank, *sizes(OUT))


def factor_specs(axes: str, spec: Sequence[Any]) -> tuple[PartitionSpec, PartitionSpec]:
    """The specs of ``a`` and ``b``: their axes lie where the kernel's do, the rank is whole.

    >>> [tuple(spec) for spec in factor_specs("bio", PartitionSpec(None, "fsdp", "tensor"))]
    [(None, 'fsdp', None), (None, None, 'tensor')]
    """
    entries = [*spec, *[None] * (len(axes) - len(spec))]
    of = lambda role: [entries[k] for k in positions(axes, role)]
    batch = of(BATCH)
    return PartitionSpec(*batch, *of(IN), None), PartitionSpec(*batch, None, *of(OUT))


def max_rank(shape: Sequence[int], axes: str) -> int:
    """The largest rank that ``ΔW`` can have: the smaller of the kernel's two sides."""
    side = lambda role: math.prod(shape[k] for k in positions(axes, role))
    return min(side(IN), side(OUT))


def init_a(key: Array, shape: Sequence[int], axes: str, rank: int, dtype: Any) -> Array:
    """Draws ``a ~ U(-1/√fan_in, 1/√fan_in)``; ``b`` starts at zero, so ``ΔW`` does.

    These are the initial values of loralib, PEFT and torchtune (a Kaiming-uniform draw with
    ``a=√5``), where the paper has a Gaussian (section 4.1).
    """
    fan_in = math.prod(shape[k] for k in positions(axes, IN))
    a_shape, _ = factor_shapes(shape, axes, rank)
    return jax.random.uniform(key, a_shape, dtype, -(fan_in**-0.5), fan_in**-0.5)


def delta(a: Array, b: Array, axes: str) -> Array:
    """The product ``a·b`` with its axes in the kernel's order; the paper's ``(BA)ᵀ``."""
    n = axes.count(BATCH)
    batch = tuple(range(n))
    product = lax.dot_general(a, b, (((a.ndim - 1,), (n,)), (batch, batch)))
    order = positions(axes, BATCH + IN + OUT)
    return lax.transpose(product, [order.index(k) for k in range(len(axes))])


def wide_dtype(*dtypes: Any) -> Any:
    """The widest of floating-point dtypes, and float32 at least.

    >>> wide_dtype(jnp.bfloat16), wide_dtype(jnp.float8_e4m3fn, jnp.float16)
    (dtype('float32'), dtype('float32'))
    """
    # Those of less than 16 bits have no implicit promotion in JAX.
    wide = [x for x in map(jnp.dtype, dtypes) if x.itemsize >= 4]
    return functools.reduce(jnp.promote_types, wide, jnp.dtype(jnp.float32))


def dense(w: Array, a: Array, b: Array, axes: str) -> Array:
    """``w + a·b`` in float32 or the factors' precision, rounded once to the kernel's dtype."""
    wide = wide_dtype(a.dtype, b.dtype)
    change = delta(a.astype(wide), b.astype(wide), axes)
    dtype = wide_dtype(w.dtype, wide)
    return (w.astype(dtype) + change.astype(dtype)).astype(w.dtype)


def scale_array(node: LowRank) -> np.ndarray:
    """The scale as it is computed and saved: of the precision of ``b``, and float32 at least."""
    if has_static_scale(node):
        return np.asarray(node.scale, wide_dtype(node.b.dtype))
    return np.asarray(node.scale)


def with_array_scale(node: LowRank) -> LowRank:
    """The same term with the scale as an array, over which a sweep can map."""
    if not has_static_scale(node):
        return node
    return dataclasses.replace(node, scale=jnp.asarray(node.scale, wide_dtype(node.b.dtype)))


def scaled_b(node: LowRank) -> Array:
    """``s·b`` in the wider precision of the two: the cheapest place for the scale, and most exact.

    No gradient reaches the scale, which is a hyperparameter.
    """
    b, scale = node.b, jnp.asarray(with_array_scale(node).scale)
    narrow = min(b.dtype.itemsize, scale.dtype.itemsize) < 2  # JAX promotes these to nothing
    dtype = wide_dtype(b.dtype) if narrow else jnp.promote_types(b.dtype, scale.dtype)
    return b.astype(dtype) * lax.stop_gradient(scale).astype(dtype)


def merged(w: Array, node: LowRank) -> Array:
    """The plain kernel ``W + s·BA``, with the shape and dtype of ``w``."""
    return dense(w, node.a, scaled_b(node), node.axes)


def swap_sides(a: Array, b: Array, axes: str) -> tuple[Array, Array, str]:
    """The same product with inputs and outputs exchanged: ``(a·b)ᵀ = bᵀ·aᵀ``.

    With it a rule for contracting the inputs serves for contracting the outputs (a tied head).
    """
    n = axes.count(BATCH)
    swapped = axes.translate(str.maketrans({IN: OUT, OUT: IN}))
    return jnp.moveaxis(b, n, -1), jnp.moveaxis(a, -1, n), swapped


def contract(
    x: Array,
    a: Array,
    b: Array,
    axes: str,
    *,
    dims: tuple,
    x_first: bool,
    out_sharding: Any = None,
    **options: Any,
) -> Array:
    """``(x·a)·b`` in the layout that ``lax.dot_general`` gives to ``x`` times the kernel.

    Args:
      x: the other operand.
      a: ``(*batch, *in, rank)``.
      b: ``(*batch, rank, *out)``, with the scale.
      axes: roles of the kernel's axes.
      dims: ``((x contracting, kernel contracting), (x batch, kernel batch))``; all input axes of
        the kernel are contracted, and its batch axes may be batch axes here or stay free.
      x_first: whether ``x`` is the left operand, which decides the order of the result's axes.
      out_sharding: explicit sharding of the result, a ``NamedSharding``; both products get theirs
        from it.
      **options: ``precision`` and ``preferred_element_type`` of the second product.
    """
    (x_in, k_in), (x_batch, k_batch) = dims
    lead = next((d for d in range(x.ndim) if d in x_in), x.ndim)
    by_rows = lead > 1 and not x_batch and jax.default_backend() == "cpu"
    if by_rows and out_sharding is None and not _is_sharded(x, range(lead)):
        return _by_rows(x, a, b, axes, dims=dims, x_first=x_first, lead=lead, **options)
    a_axes, b_axes = positions(axes, BATCH + IN), positions(axes, BATCH)
    free_batch = [k for k in b_axes if k not in k_batch]
    x_free = [d for d in range(x.ndim) if d not in (*x_in, *x_batch)]

    # t: (shared batch, free axes of x, batch axes of the kernel that x lacks, rank)
    # y: (shared batch, free batch of the kernel, free axes of x, out); wanted: shared batch, then
    # the free axes of the left operand and of the right one, the kernel's in its own order.
    batch = [("s", k) for k in range(len(k_batch))]
    rows, stacked = [("x", k) for k in x_free], [("k", k) for k in free_batch]
    have = batch + stacked + rows + [("k", k) for k in positions(axes, OUT)]
    kernel = sorted(axis for axis in have if axis[0] == "k")
    want = batch + (rows + kernel if x_first else kernel + rows)
    sharding = _sharding_by_axis(out_sharding, want)

    a_dims = ([a_axes.index(k) for k in k_in], [a_axes.index(k) for k in k_batch])
    t = lax.dot_general(
        x,
        a,
        ((x_in, a_dims[0]), (x_batch, a_dims[1])),
        precision=options.get("precision"),
        **sharding([*batch, *rows, *stacked, "rank"]),
    )
    shared, first_free = len(k_batch), len(k_batch) + len(x_free)
    t_batch = [*range(shared), *range(first_free, t.ndim - 1)]
    b_batch = [b_axes.index(k) for k in (*k_batch, *free_batch)]
    dims = (((t.ndim - 1,), (len(b_axes),)), (t_batch, b_batch))
    y = lax.dot_general(t, b, dims, **options, **sharding(have))
    return y if have == want else lax.transpose(y, [have.index(axis) for axis in want])


def _sharding_by_axis(out_sharding: Any, want: list) -> Callable[[list], dict[str, Any]]:
    """From the explicit sharding of a result with axes ``want``, that of arrays with its axes."""
    if out_sharding is None:
        return lambda axes: {}
    spec = [*out_sharding.spec, *[None] * (len(want) - len(out_sharding.spec))]
    entries = dict(zip(want, spec, strict=True))
    of = lambda axes: PartitionSpec(*(entries.get(axis) for axis in axes))
    return lambda axes: {"out_sharding": NamedSharding(out_sharding.mesh, of(axes))}


def _is_sharded(x: Array, axes: Iterable[int]) -> bool:
    """Whether the type of ``x`` says that one of the axes is split over devices."""
    spec = getattr(getattr(jax.typeof(x), "sharding", None), "spec", ())
    return any(spec[k] is not None for k in axes if k < len(spec))


def _by_rows(
    x: Array,
    a: Array,
    b: Array,
    axes: str,
    *,
    dims: tuple,
    x_first: bool,
    lead: int,
    **options: Any,
) -> Array:
    """:func:`contract` with the first ``lead`` axes of ``x``, which are free, joined to rows.

    The gradients of the factors are sums over these axes. XLA for CPU prepares a sum over two axes
    by writing the wide operand once more, transposed, with all that computes it: a quarter of a
    training step with every kernel of MiniLM adapted. Over one axis it needs no such copy.
    Elsewhere the axes stay apart, since each of them may be sharded.
    """
    (x_in, k_in), batch = dims
    sizes, rest = x.shape[:lead], x.shape[lead:]
    dims = (tuple(d - lead + 1 for d in x_in), k_in), batch
    rows = x.reshape(math.prod(sizes), *rest)
    y = contract(rows, a, b, axes, dims=dims, x_first=x_first, **options)
    return y.reshape((*sizes, *y.shape[1:]) if x_first else (*y.shape[:-1], *sizes))
