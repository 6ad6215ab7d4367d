"""The mathematics of one adapted kernel, arrays in and arrays out: ``W' = gain ⊙ W + a·b``.

The paper (Hu et al. 2021, section 4.1, eq. 3) multiplies column vectors, so its ``B`` is
``(d_out, r)`` and its ``A`` is ``(r, d_in)``. Flax kernels are ``(d_in, d_out)`` and act from the
right. Hence, here and everywhere in this library, ``a = Aᵀ``, ``b = Bᵀ`` and ``ΔW = s·a·b``.

A kernel may have any number of axes in any order. Each has a role, one letter of ``axes``:

* ``i``: an input axis, carried by ``a``;
* ``o``: an output axis, carried by ``b`` and by the gain;
* ``b``: a batch axis (layers of a scan, experts), carried by all three: every entry is a kernel of
  its own with its own pair of factors.

``a`` has shape ``(*batch, *in, rank)``, ``b`` has ``(*batch, rank, *out)``, and the gain, if there
is one, has ``(*batch, *out)``, each group in the order in which its axes stand in the kernel.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

Array = jax.Array
Spec = PartitionSpec | Sequence[Any]
IN, OUT, BATCH = "i", "o", "b"
WHOLE = "w"  # the role of every axis of a leaf that is no kernel: it is replaced as a whole
ROLES = (IN, OUT, BATCH, WHOLE)
RANK = "r"
A_AXES, B_AXES, GAIN_AXES = BATCH + IN + RANK, BATCH + RANK + OUT, BATCH + OUT


def positions(axes: Sequence[Any], roles: str) -> list[int]:
    """Returns the axes of the kernel that have the given roles, role by role.

    >>> positions("bioi", "bi")
    [0, 1, 3]
    """
    return [k for role in roles for k, axis in enumerate(axes) if axis == role]


def places(letters: str, axes: str) -> list[int | str]:
    """Tells where each axis of an array comes from: a kernel axis, or a letter of its own.

    Args:
      letters: one letter for each group of axes, in the array's order. A role stands for all axes
        of the kernel that have it, any other letter for an axis of the array's own (the rank).
      axes: roles of the kernel's axes.

    >>> places("bir", "bioi")
    [0, 1, 3, 'r']
    """
    expand = lambda letter: positions(axes, letter) if letter in ROLES else [letter]
    return [place for letter in letters for place in expand(letter)]


def shape_of(
    letters: str, axes: str, shape: Sequence[int], sizes: Mapping[str, int]
) -> tuple[int, ...]:
    """Returns the shape of an array that carries axes of a kernel; see :func:`places`.

    Args:
      letters: letters of the array, as in :func:`places`.
      axes: roles of the kernel's axes.
      shape: shape of the kernel.
      sizes: sizes of the array's own axes, by letter.

    >>> shape_of("bro", "bioo", (12, 768, 12, 64), {"r": 8})
    (12, 8, 12, 64)
    """
    return tuple(shape[p] if isinstance(p, int) else sizes[p] for p in places(letters, axes))


def spec_of(letters: str, axes: str, spec: Spec) -> PartitionSpec:
    """Returns the spec of such an array: its axes lie where the kernel's do, its own are whole.

    >>> tuple(spec_of("bir", "bio", PartitionSpec(None, "fsdp", "tensor")))
    (None, 'fsdp', None)
    """
    entries = [*spec, *[None] * (len(axes) - len(spec))]
    entry = lambda place: entries[place] if isinstance(place, int) else None
    return PartitionSpec(*map(entry, places(letters, axes)))


def factor_shapes(shape: Sequence[int], axes: str, rank: int) -> tuple[tuple, tuple]:
    """Returns the shapes of ``a`` and ``b`` for a kernel.

    >>> factor_shapes((12, 768, 12, 64), "bioo", rank=8)
    ((12, 768, 8), (12, 8, 12, 64))
    """
    a, b = (shape_of(letters, axes, shape, {RANK: rank}) for letters in (A_AXES, B_AXES))
    return a, b


def spread(x: Array, where: Sequence[int], ndim: int) -> Array:
    """Gives ``x``, whose axes are some of ``ndim``, all of them: those that it lacks have size 1.

    Args:
      x: any array.
      where: position in the result of each axis of ``x``.
      ndim: number of axes of the result.

    >>> spread(jnp.zeros((3, 2)), [2, 0], 4).shape
    (2, 1, 3, 1)
    """
    order = sorted(range(len(where)), key=where.__getitem__)
    x = x if order == list(range(x.ndim)) else lax.transpose(x, order)
    return lax.expand_dims(x, [k for k in range(ndim) if k not in where])


def max_rank(shape: Sequence[int], axes: str) -> int:
    """Returns the largest rank that ``ΔW`` can have: the smaller of the kernel's two sides."""
    size_of = lambda role: math.prod(shape[k] for k in positions(axes, role))
    return min(size_of(IN), size_of(OUT))


def delta(a: Array, b: Array, axes: str, *, precision: lax.Precision | None = None) -> Array:
    """Computes ``a·b`` with its axes in the kernel's order; the paper's ``(BA)ᵀ``."""
    n = axes.count(BATCH)
    batch = tuple(range(n))
    product = lax.dot_general(a, b, (((a.ndim - 1,), (n,)), (batch, batch)), precision=precision)
    order = positions(axes, BATCH + IN + OUT)
    return lax.transpose(product, [order.index(k) for k in range(len(axes))])


def wide_dtype(*dtypes: Any) -> Any:
    """Returns the widest of floating-point dtypes, which is float32 at least.

    >>> wide_dtype(jnp.bfloat16), wide_dtype(jnp.float8_e4m3fn, jnp.float16)
    (dtype('float32'), dtype('float32'))
    """
    # Those of less than 16 bits have no implicit promotion in JAX.
    wide = [x for x in map(jnp.dtype, dtypes) if x.itemsize >= 4]
    return functools.reduce(jnp.promote_types, wide, jnp.dtype(jnp.float32))


def materialize(w: Array, a: Array, b: Array, axes: str, gain: Array | None = None) -> Array:
    """Computes ``gain ⊙ w + a·b`` in float32 or wider, rounded once to the kernel's dtype.

    Args:
      w: the frozen kernel.
      a: ``(*batch, *in, rank)``.
      b: ``(*batch, rank, *out)``, with the scale.
      axes: roles of the kernel's axes.
      gain: array that broadcasts to the kernel's shape; see :func:`spread`.
    """
    wide = wide_dtype(a.dtype, b.dtype)
    # Where a gain is 0, the product is the whole kernel, which must come with all of its digits.
    precision = None if gain is None else lax.Precision.HIGHEST
    change = delta(a.astype(wide), b.astype(wide), axes, precision=precision)
    dtype = wide_dtype(w.dtype, wide)
    frozen = w.astype(dtype)
    if gain is not None:
        frozen = frozen * gain.astype(dtype)
    return (frozen + change.astype(dtype)).astype(w.dtype)


def swap_sides(a: Array, b: Array, axes: str) -> tuple[Array, Array, str]:
    """Exchanges inputs and outputs of the same product: ``(a·b)ᵀ = bᵀ·aᵀ``.

    With it a rule for contracting the inputs serves for contracting the outputs (a tied head).
    """
    n = axes.count(BATCH)
    swapped = axes.translate(str.maketrans(IN + OUT, OUT + IN))
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
    """Computes ``(x·a)·b`` in the layout that ``lax.dot_general`` gives to ``x`` times the kernel.

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

    Returns:
      The product, in the preferred dtype; of bfloat16 operands on a CPU in float32.
    """
    (x_in, k_in), (x_batch, k_batch) = dims
    n_lead = next((d for d in range(x.ndim) if d in x_in), x.ndim)
    by_rows = n_lead > 1 and not x_batch and _is_on_cpu()
    if by_rows and out_sharding is None and not _is_sharded(x, range(n_lead)):
        return _contract_rows(x, a, b, axes, dims=dims, x_first=x_first, n_lead=n_lead, **options)
    a_axes, b_axes = positions(axes, BATCH + IN), positions(axes, BATCH)
    free_batch = [k for k in b_axes if k not in k_batch]
    x_free = [d for d in range(x.ndim) if d not in (*x_in, *x_batch)]

    # t: (shared batch, free axes of x, batch axes of the kernel that x lacks, rank)
    # y: (shared batch, free batch axes of the kernel, free axes of x, out)
    # result: shared batch, then the free axes of the left operand and of the right one, those of
    # the kernel in its own order.
    batch = [("s", k) for k in range(len(k_batch))]
    rows, stacked = [("x", k) for k in x_free], [("k", k) for k in free_batch]
    axes_of_y = batch + stacked + rows + [("k", k) for k in positions(axes, OUT)]
    kernel = sorted(axis for axis in axes_of_y if axis[0] == "k")
    axes_of_result = batch + (rows + kernel if x_first else kernel + rows)
    sharding = _sharding_by_axis(out_sharding, axes_of_result)

    a_dims = ([a_axes.index(k) for k in k_in], [a_axes.index(k) for k in k_batch])
    sums = _sums_in_float32(x, a, b)
    t = lax.dot_general(
        x,
        a,
        ((x_in, a_dims[0]), (x_batch, a_dims[1])),
        precision=options.get("precision"),
        **sums,
        **sharding([*batch, *rows, *stacked, "rank"]),
    ).astype(x.dtype)
    shared, first_free = len(k_batch), len(k_batch) + len(x_free)
    t_batch = [*range(shared), *range(first_free, t.ndim - 1)]
    b_batch = [b_axes.index(k) for k in (*k_batch, *free_batch)]
    dims = (((t.ndim - 1,), (len(b_axes),)), (t_batch, b_batch))
    wanted = jnp.dtype(options.get("preferred_element_type") or t.dtype)
    options |= sums if wanted.itemsize < 4 else {}
    y = lax.dot_general(t, b, dims, **options, **sharding(axes_of_y))
    if axes_of_y == axes_of_result:
        return y
    return lax.transpose(y, [axes_of_y.index(axis) for axis in axes_of_result])


def _sums_in_float32(*arrays: Array) -> dict[str, Any]:
    """Returns the option that makes XLA for CPU fast at bfloat16; see :mod:`lora_jax.products`.

    Elsewhere sums are in float32 anyway. The gradients are those of JAX, so that there is one in
    forward mode too: the factors are narrow, and cost little in any form.
    """
    is_narrow = all(x.dtype == jnp.bfloat16 for x in arrays)
    return {"preferred_element_type": jnp.float32} if is_narrow and _is_on_cpu() else {}


def _is_on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _sharding_by_axis(out_sharding: Any, result_axes: list) -> Callable[[list], dict[str, Any]]:
    """Derives the sharding of arrays with some of the axes ``want`` from that of the result."""
    if out_sharding is None:
        return lambda axes: {}
    spec = [*out_sharding.spec, *[None] * (len(result_axes) - len(out_sharding.spec))]
    entries = dict(zip(result_axes, spec, strict=True))
    spec_of_axes = lambda axes: PartitionSpec(*(entries.get(axis) for axis in axes))
    return lambda axes: {"out_sharding": NamedSharding(out_sharding.mesh, spec_of_axes(axes))}


def _is_sharded(x: Array, axes: Iterable[int]) -> bool:
    """Tells whether the type of ``x`` says that one of the axes is split over devices."""
    spec = getattr(getattr(jax.typeof(x), "sharding", None), "spec", ())
    return any(spec[k] is not None for k in axes if k < len(spec))


def _contract_rows(
    x: Array,
    a: Array,
    b: Array,
    axes: str,
    *,
    dims: tuple,
    x_first: bool,
    n_lead: int,
    **options: Any,
) -> Array:
    """Contracts with the first ``n_lead`` axes of ``x``, which are free, joined to rows.

    The gradients of the factors are sums over these axes. XLA for CPU prepares a sum over two axes
    by writing the wide operand once more, transposed, with all that computes it: a quarter of a
    training step with every kernel of MiniLM adapted. Over one axis it needs no such copy.
    Elsewhere the axes stay apart, since each of them may be sharded.
    """
    (x_in, k_in), batch = dims
    sizes, rest = x.shape[:n_lead], x.shape[n_lead:]
    dims = (tuple(d - n_lead + 1 for d in x_in), k_in), batch
    rows = x.reshape(math.prod(sizes), *rest)
    y = contract(rows, a, b, axes, dims=dims, x_first=x_first, **options)
    return y.reshape((*sizes, *y.shape[1:]) if x_first else (*y.shape[:-1], *sizes))
