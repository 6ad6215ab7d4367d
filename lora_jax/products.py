"""Products of bfloat16 numbers that are summed in float32, in both passes.

A product of two bfloat16 arrays, with a bfloat16 result, is summed in float32 by every accelerator.
XLA for CPU takes the fast instructions of a processor for bfloat16 only if the result is float32,
and JAX's own gradient of such a product multiplies a float32 array by a bfloat16 one, for which
there is no fast instruction anywhere. Here the gradient of the result is rounded to bfloat16 first.
That loses nothing where the result itself is rounded to bfloat16, as in a layer of a model. Where
it is float32, as the scores of attention are, an accelerator gains by it, and rounds as its fused
kernels do; XLA for CPU has no fast product of many small matrices, and nothing is rounded there.

There is no forward-mode derivative, as of every ``jax.custom_vjp``.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

Array = jax.Array
Dims = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]

# The name of the ``jit`` by which :mod:`lora_jax.transform.forms` knows such a product.
NAME = "bfloat16_dot_general"


def dot_general(
    x: Array,
    y: Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    **options: Any,
) -> Array:
    """Computes ``lax.dot_general``, of which it has the arguments; ``flax.linen.Dense`` takes it.

    Two bfloat16 arrays are multiplied as the module says: on a CPU to a bfloat16 result, elsewhere
    to one of float32. All other products are handed to ``lax.dot_general``.

    >>> x = jnp.ones((2, 3), jnp.bfloat16)
    >>> dot_general(x, x, (((1,), (1,)), ((), ()))).dtype
    dtype(bfloat16)
    """
    result = jnp.dtype(preferred_element_type or jnp.result_type(x, y))
    gains_by_it = result == (jnp.bfloat16 if jax.default_backend() == "cpu" else jnp.float32)
    if x.dtype == y.dtype == jnp.bfloat16 and gains_by_it and not any(options.values()):
        return bfloat16_dot_general(x, y, _freeze(dimension_numbers), precision, result)
    return lax.dot_general(
        x,
        y,
        dimension_numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
        **options,
    )


def _freeze(dims: Any) -> Dims:
    (x_in, y_in), (x_batch, y_batch) = dims
    return (tuple(x_in), tuple(y_in)), (tuple(x_batch), tuple(y_batch))


def _multiply(x: Array, y: Array, dims: Dims, precision: Any, result: Any) -> Array:
    wide = lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)
    return wide.astype(result)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _dot_general_bfloat16(x: Array, y: Array, dims: Dims, precision: Any, result: Any) -> Array:
    return _multiply(x, y, dims, precision, result)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def bfloat16_dot_general(x: Array, y: Array, dims: Dims, precision: Any, result: Any) -> Array:
    """Multiplies two bfloat16 arrays.

    Args:
      x: left operand.
      y: right operand.
      dims: dimension numbers, as of ``lax.dot_general``, in tuples.
      precision: precision as of ``lax.dot_general``.
      result: dtype of the result, bfloat16 or float32.
    """
    return _dot_general_bfloat16(x, y, dims, precision, result)


def _save(
    x: Any, y: Any, dims: Dims, precision: Any, result: Any
) -> tuple[Array, tuple[Array, Array]]:
    """Keeps of each operand what the gradient by the other needs: nothing if nobody asks for it."""
    # Not None: the trees of what is kept must be alike, since JAX has one for all calls of a jaxpr.
    nothing = jnp.zeros((), bool)
    kept = x.value if y.perturbed else nothing, y.value if x.perturbed else nothing
    return _multiply(x.value, y.value, dims, precision, result), kept


def _backward(
    dims: Dims, precision: Any, result: Any, kept: tuple[Array, Array], g: Any
) -> tuple[Array | None, Array | None]:
    x, y = kept
    if isinstance(g, SymbolicZero):
        return None, None
    g = g.astype(jnp.bfloat16)
    (x_in, y_in), (x_batch, y_batch) = dims
    swapped = (y_in, x_in), (y_batch, x_batch)
    differentiate = functools.partial(_differentiate, g, precision=precision)
    by_x = None if y.dtype == bool else differentiate(y, dims, is_left=True)
    by_y = None if x.dtype == bool else differentiate(x, swapped, is_left=False)
    return by_x, by_y


def _differentiate(g: Array, other: Array, dims: Dims, *, precision: Any, is_left: bool) -> Array:
    """Computes the gradient by an operand, of whose axes ``dims`` speaks first.

    Args:
      g: gradient of the result ``(*batch, *free axes of left, *free axes of right)``.
      other: other operand.
      dims: dimension numbers, those of the operand first.
      precision: precision of the product.
      is_left: whether the operand is the left one.
    """
    (own_in, other_in), (own_batch, other_batch) = dims
    n_batch = len(own_batch)
    other_free = [k for k in range(other.ndim) if k not in (*other_in, *other_batch)]
    n_own = g.ndim - n_batch - len(other_free)
    first = n_batch + n_own if is_left else n_batch  # of the axes in g that are the other's
    summed = tuple(range(first, first + len(other_free)))
    batch = tuple(range(n_batch)), tuple(other_batch)
    y = _multiply(g, other, ((summed, tuple(other_free)), batch), precision, jnp.bfloat16)
    # y: (*batch, *own free axes, *summed axes in the order in which they stand in `other`)
    ordered = [own for _, own in sorted(zip(other_in, own_in, strict=True))]
    free = [k for k in range(y.ndim) if k not in (*own_in, *own_batch)]
    axes_of_y: Sequence[int] = [*own_batch, *free, *ordered]
    return lax.transpose(y, [axes_of_y.index(k) for k in range(y.ndim)])


_dot_general_bfloat16.defvjp(_save, _backward, symbolic_zeros=True)
