"""``init_from_activations``: first values from the inputs of kernels (EVA; Paischer et al. 2024).

The principal components of what reaches a kernel are found by subspace iteration, which needs
products with the covariance alone. All kernels share each pass over the data; no covariance is ever
formed, and no activation leaves the pass.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.adapter import base_leaves
from lora_jax.choice import Choice, choose
from lora_jax.config import LoRAConfig
from lora_jax.data_passes import Loss, make_gradient_sum, orthonormalize, to_columns
from lora_jax.factors import IN, factor_shapes, positions, wide_dtype
from lora_jax.initial import check_init, make_adapter
from lora_jax.kernels import Leaf, adapted_shape, max_rank
from lora_jax.lowrank import LowRank
from lora_jax.methods import FROM_FACTORS
from lora_jax.methods.initial_values import FROM_ACTIVATIONS
from lora_jax.methods.start import Start
from lora_jax.nodes import Adapted
from lora_jax.transform.input_moments import N_SUMS
from lora_jax.transform.lift import measure_inputs

PyTree = Any
Array = jax.Array
_N_ITER = 3  # of the subspace iteration
_OVERSAMPLING = 8


class Components(NamedTuple):
    """The principal components of the inputs of a kernel, for each of its ``n`` matrices.

    Attributes:
      vectors: ``(n, in, count)``, orthonormal, the largest variance first.
      ratios: ``(n, count)``, parts of the variance of all inputs together.
    """

    vectors: Array
    ratios: np.ndarray


def init_from_activations(
    key: Array,
    loss_fn: Loss,
    params: PyTree,
    config: LoRAConfig,
    *batches: Any,
    rho: float = 1.0,
) -> dict[str, Any]:
    """Makes the adapter whose ``a`` are the principal components of the inputs of each kernel.

    ``b`` starts as zero (Paischer et al. 2024, "EVA", section 3). Rows on which the loss does not
    depend, such as padding, do not count. With a ``rho`` above one, ranks go where a component
    explains more: the pool of the first ``rho·r`` components of each kernel is cut to as many as
    there were before, by their part of the kernel's variance. A kernel that has none left is not
    adapted; scales stay as they were.

    Args:
      key: PRNG key.
      loss_fn: ``(params, batch) -> loss``. It is run with its gradient, four times for each batch.
      params: its parameters, arrays or quantized, in any containers.
      config: what to adapt and train, with ``init="eva"``.
      *batches: second arguments of ``loss_fn``.
      rho: largest rank of a kernel, as a multiple of that of the config; at least 1.

    Returns:
      An adapter as from :func:`lora_jax.init`.

    Raises:
      ValueError: as :func:`lora_jax.init`; the config has another ``init``, or a method without
        such factors; there is no batch; ``rho`` is below one; or no row of a batch reaches a kernel
        as the input of a product.

    >>> loss_fn = lambda p, batch: jnp.mean((batch @ p["w"]) ** 2)
    >>> x = jnp.array([[3.0, 4.0, 0.0], [-3.0, -4.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
    >>> config, params = LoRAConfig(rank=1, init="eva"), {"w": jnp.ones((3, 2))}
    >>> adapter = init_from_activations(jax.random.key(0), loss_fn, params, config, x)
    >>> [round(abs(number), 3) for number in adapter["w"].a[:, 0].tolist()]
    [0.6, 0.8, 0.0]
    """
    check_init(config, FROM_ACTIVATIONS, "init_from_activations")
    if not batches:
        raise ValueError("init_from_activations needs a batch, after the config, and got none.")
    if not 1 <= rho < math.inf:
        raise ValueError(f"rho must be at least 1, got {rho}.")
    leaves = base_leaves(params)
    choice = choose(loss_fn, params, config, batches[:1], {}, leaves=leaves)
    found = _find_components(key, loss_fn, params, choice, batches, rho)
    scales = {n: config.kernel_scale(n, rank) for n, rank in choice.ranks.items()}
    if rho > 1:
        choice = dataclasses.replace(choice, ranks=share_ranks(choice.ranks, found))

    def make_node(start: Start) -> Adapted:
        a_shape, b_shape = factor_shapes(start.shape, start.axes, start.rank)
        a = found[start.name].vectors[..., : start.rank].reshape(a_shape).astype(start.dtype)
        b = jnp.zeros(b_shape, start.dtype)
        factors = LowRank(a, b, scales[start.name], axes=start.axes, dropout=start.dropout)
        return FROM_FACTORS[config.method](start, factors)

    return make_adapter(key, choice, config, leaves, make_node)


def share_ranks(ranks: Mapping[str, int], found: Mapping[str, Components]) -> dict[str, int]:
    """Shares the ranks of all kernels out anew, to the components that explain most.

    A stack of kernels has one rank, which counts once for each of them.

    >>> ratios = {"one": [0.9, 0.05], "other": [0.5, 0.3], "third": [0.04, 0.03]}
    >>> found = {n: Components(jnp.zeros((1, 4, 2)), np.array([x])) for n, x in ratios.items()}
    >>> share_ranks({"one": 1, "other": 1, "third": 1}, found)
    {'one': 1, 'other': 2}
    """
    costs = {n: len(x.ratios) for n, x in found.items()}
    budget = sum(costs[n] * rank for n, rank in ranks.items())
    pool = [(-ratio, n) for n, x in found.items() for ratio in x.ratios.mean(0).tolist()]
    shares = dict.fromkeys(ranks, 0)
    for _, name in sorted(pool, key=lambda entry: entry[0]):
        if costs[name] <= budget:
            shares[name], budget = shares[name] + 1, budget - costs[name]
    return {n: rank for n, rank in shares.items() if rank}


# ---- Principal components ------------------------------------------------------------------------


def _find_components(
    key: Array,
    loss_fn: Loss,
    params: PyTree,
    choice: Choice,
    batches: Sequence[Any],
    rho: float,
) -> dict[str, Components]:
    leaves = {n: choice.kernels.leaves[n] for n in choice.ranks}
    counts = {n: min(round(rho * r), max_rank(leaves[n])) for n, r in choice.ranks.items()}
    widths = {n: min(counts[n] + _OVERSAMPLING, _count_inputs(leaves[n])) for n in leaves}
    nodes = {n: _make_node(leaves[n], widths[n] + N_SUMS) for n in leaves}
    keys = dict(zip(nodes, jax.random.split(key, len(nodes)), strict=True))
    draw = lambda n, x: jax.random.normal(keys[n], (*x.a.shape[:-1], widths[n]), x.a.dtype)
    basis = {n: orthonormalize(to_columns(draw(n, x), x)) for n, x in nodes.items()}
    measure = make_gradient_sum(measure_inputs, loss_fn, params, batches)
    moments: dict[str, Array] = {}
    for step in range(_N_ITER + 1):
        measured = measure({n: _put(x, basis[n]) for n, x in nodes.items()})
        moments = {n: to_columns(x.a, x) for n, x in measured.items()}
        _check_rows(moments)
        if step < _N_ITER:
            basis = {n: orthonormalize(_center(basis[n], m)[0]) for n, m in moments.items()}
    return {n: _decompose(basis[n], m, counts[n]) for n, m in moments.items()}


def _count_inputs(leaf: Leaf) -> int:
    shape = adapted_shape(leaf)
    return math.prod(shape[k] for k in positions(leaf.axes, IN))


def _make_node(leaf: Leaf, width: int) -> LowRank:
    a, b = factor_shapes(adapted_shape(leaf), leaf.axes, width)
    dtype = wide_dtype(leaf.dtype)
    return LowRank(jnp.zeros(a, dtype), jnp.zeros(b, dtype), 1.0, axes=leaf.axes)


def _put(node: LowRank, basis: Array) -> LowRank:
    """Puts a basis into the first columns of ``a``."""
    shape = (*node.a.shape[:-1], basis.shape[-1])
    return dataclasses.replace(node, a=node.a.at[..., : shape[-1]].set(basis.reshape(shape)))


def _check_rows(moments: Mapping[str, Array]) -> None:
    # The number of rows is the same for all inputs, unless they are scaled on their way.
    has_rows = lambda count: bool(jnp.all((count > 1) & (count == count[:, :1])))
    few = [n for n, x in moments.items() if not has_rows(x[..., -1])]
    if few:
        raise ValueError(
            f"init={FROM_ACTIVATIONS!r} needs rows that reach each kernel as inputs of a product, "
            f"and does not see two or more for {paths.listing(few)}: give more rows; leave tables, "
            "convolutions, and kernels that are scaled or joined before use out of the targets."
        )
    if bad := [n for n, x in moments.items() if not bool(jnp.isfinite(x).all())]:
        raise ValueError(f"Inputs of {paths.listing(bad)} are not finite.")


def _center(basis: Array, moments: Array) -> tuple[Array, Array]:
    """Returns the scatter matrix times the basis, ``(n, in, width)``, and its trace, ``(n,)``."""
    products, sums = moments[..., :-N_SUMS], moments[..., -3:-2]
    squares, count = moments[..., -2], moments[:, :1, -1:]
    mean = sums / count
    of_mean = mean.mT @ basis  # (n, 1, width)
    trace = jnp.sum(squares, axis=1) - jnp.sum(mean * sums, axis=(1, 2))
    return products - sums * of_mean, trace


def _decompose(basis: Array, moments: Array, count: int) -> Components:
    """Returns the components within a basis, of which the measured moments are."""
    products, trace = _center(basis, moments)
    values, vectors = jnp.linalg.eigh(basis.mT @ products, symmetrize_input=True)
    order = slice(None, -count - 1, -1)  # eigenvalues ascend
    ratios = np.maximum(np.asarray(values[:, order]), 0)
    ratios /= np.maximum(np.asarray(trace), np.finfo(np.float32).tiny)[:, None]
    return Components((basis @ vectors)[..., order], ratios)
