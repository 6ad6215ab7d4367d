"""What the inputs of a kernel are like, as a gradient: sums over rows, whatever is around the use.

Automatic differentiation adds up what each use says of its rows, through loops, rematerialization
and maps, as it does for any gradient. So the place of a sum is the gradient of the factor ``a``,
by a term that adds nothing to the result.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from lora_jax.factors import BATCH, IN, positions
from lora_jax.transform.kernel import Kernel
from lora_jax.transform.uses import Factors

Array = jax.Array
N_SUMS = 3  # columns of ``a`` behind those that are multiplied


def measure(eqn: JaxprEqn, vals: Sequence[Any], f: Factors, base: Array) -> Array:
    """Returns zeros, by which the gradient of ``a`` measures the inputs of a product.

    Rows on which the result of the whole function does not depend, as those of padding, do not
    count. With inputs ``X (rows, in)`` and ``a = [Q, …]`` the columns of the gradient are
    ``XᵀX·Q``, and then, for each input, the sum of its numbers, that of their squares, and the
    number of rows. Uses that are no products say nothing.

    Args:
      eqn: equation of the use.
      vals: its operands.
      f: factors with the inputs on the side of ``a``.
      base: result of the use.
    """
    if eqn.primitive.name != "dot_general":
        return jnp.zeros_like(base)
    which = 0 if isinstance(vals[0], Kernel) else 1
    contracting, batch = eqn.params["dimension_numbers"]
    (x_in, k_in), (x_batch, k_batch) = (
        (dims[1 - which], dims[which]) for dims in (contracting, batch)
    )
    x = vals[1 - which]
    free = [d for d in range(x.ndim) if d not in (*x_in, *x_batch)]
    rows = lax.transpose(x, (*x_batch, *free, *x_in))  # as in the result, then the inputs
    a_axes, n, n_rows = positions(f.axes, BATCH + IN), len(x_batch), len(x_batch) + len(free)
    inputs = tuple(range(n_rows, rows.ndim)), tuple(a_axes.index(k) for k in k_in)
    batches = tuple(range(n)), tuple(a_axes.index(k) for k in k_batch)
    n_out = base.ndim - n_rows
    first = n_rows if which == 1 else n
    of_kernel = tuple(range(first, first + n_out))
    about = (inputs, batches), of_kernel, base.shape, base.dtype
    return _add_nothing(about, rows, f.a)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_nothing(about: tuple, rows: Array, a: Array) -> Array:
    _, _, shape, dtype = about
    return jnp.zeros(shape, dtype)


def _forward(about: tuple, rows: Array, a: Array) -> tuple[Array, tuple]:
    return _add_nothing(about, rows, a), (rows, a)


def _backward(about: tuple, kept: tuple, g: Array) -> tuple[Array, Array]:
    dims, of_kernel, _, _ = about
    rows, a = kept
    counts = jnp.any(g != 0, axis=of_kernel)
    counts = lax.expand_dims(counts, range(counts.ndim, rows.ndim)).astype(a.dtype)
    x = rows.astype(a.dtype) * counts
    product = lambda y, a: lax.dot_general(y, a, dims, precision=lax.Precision.HIGHEST)
    sums = lambda y: jax.grad(lambda a: jnp.sum(product(y, a)))(a)
    squares = jax.grad(lambda a: jnp.sum(jnp.square(product(x, a))) / 2)(a)
    ones = jnp.broadcast_to(counts, rows.shape)
    columns = [squares, sums(x), sums(jnp.square(x)), sums(ones)]
    n = a.shape[-1] - N_SUMS
    parts = [squares[..., :n], *(c[..., n : n + 1] for c in columns[1:])]
    return jnp.zeros_like(rows), jnp.concatenate(parts, axis=-1)


_add_nothing.defvjp(_forward, _backward)
