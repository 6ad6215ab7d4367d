"""``init_from_gradients``: first values from the gradient of a loss (LoRA-GA; Wang et al. 2024).

The singular vectors of a kernel's gradient ``G`` are found by subspace iteration (Halko et al.
2011, algorithm 4.4), which needs products with ``G`` alone. These are gradients of factors: where
the low-rank term is zero, that of ``a`` is ``G·bᵀ`` and that of ``b`` is ``aᵀ·G``. So no gradient
of the size of a kernel is ever there, all kernels share each pass over the data, and the base may
be quantized.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.adapter import base_leaves
from lora_jax.choice import Choice, choose
from lora_jax.config import LoRAConfig
from lora_jax.data_passes import Loss, make_gradient_sum, orthonormalize, to_columns
from lora_jax.factors import BATCH, factor_shapes, wide_dtype
from lora_jax.initial import check_init, make_adapter
from lora_jax.kernels import Leaf, adapted_shape, max_rank
from lora_jax.lowrank import LowRank
from lora_jax.methods import FROM_FACTORS
from lora_jax.methods.initial_values import FROM_GRADIENTS, make_offset
from lora_jax.methods.offset import Offset
from lora_jax.methods.start import Start
from lora_jax.nodes import Adapted
from lora_jax.transform.lift import lift

PyTree = Any
Array = jax.Array
_GAMMA = 16.0  # γ of the paper, section 4.1: a larger one makes both factors smaller
_N_ITER = 2  # of the subspace iteration; there are twice as many columns as are used


def init_from_gradients(
    key: Array, loss_fn: Loss, params: PyTree, config: LoRAConfig, *batches: Any
) -> dict[str, Any]:
    """Makes the adapter whose first step is as near as can be to one of full fine-tuning.

    With the singular vectors ``G = UΣVᵀ`` of the gradient by a kernel, ``a`` starts with the first
    ``r`` columns of ``U`` and ``b`` with the next ``r`` rows of ``Vᵀ``, both times ``out^¼ / √γ``
    with ``γ = 16`` (Wang et al. 2024, "LoRA-GA", section 3.3; ``U`` and ``V`` change places in
    their layout). Their product is taken off again by the adapter, which starts as the base. As in
    the paper, the size of the gradient makes no difference; PEFT multiplies ``b`` by ``Σ``, too.

    Args:
      key: PRNG key, for the iteration to start from, and for factors.
      loss_fn: ``(params, batch) -> loss``, a mean over the rows, say. It is run, six times for each
        batch, with its gradient by low-rank factors of up to four times the rank.
      params: its parameters, arrays or quantized, in any containers.
      config: what to adapt and train, with ``init="lora_ga"``.
      *batches: second arguments of ``loss_fn``; the gradient is the mean over them.

    Returns:
      An adapter as from :func:`lora_jax.init`.

    Raises:
      ValueError: as :func:`lora_jax.init`; the config has another ``init``, or a method without
        such factors; there is no batch; a kernel has fewer than ``2r`` inputs or outputs; or a
        gradient is not finite.

    >>> loss_fn = lambda p, batch: jnp.mean((jnp.tanh(batch[0] @ p["w"]) - batch[1]) ** 2)
    >>> params, batch = {"w": jnp.ones((4, 3))}, (jnp.ones((2, 4)), jnp.zeros((2, 3)))
    >>> config = LoRAConfig(rank=1, init="lora_ga")
    >>> adapter = init_from_gradients(jax.random.key(0), loss_fn, params, config, batch)
    >>> adapter["w"].a.shape, adapter["w"].b0.shape
    ((4, 1), (1, 3))
    """
    check_init(config, FROM_GRADIENTS, "init_from_gradients")
    if not batches:
        raise ValueError("init_from_gradients needs a batch, after the config, and got none.")
    leaves = base_leaves(params)
    choice = choose(loss_fn, params, config, batches[:1], {}, leaves=leaves)
    _check_sizes(choice)
    directions = _find_directions(key, loss_fn, params, choice, batches)

    def make_node(start: Start) -> Adapted:
        return FROM_FACTORS[config.method](start, _make_factors(start, *directions[start.name]))

    return make_adapter(key, choice, config, leaves, make_node)


def _check_sizes(choice: Choice) -> None:
    leaves = choice.kernels.leaves
    small = {n: max_rank(leaves[n]) for n, r in choice.ranks.items() if 2 * r > max_rank(leaves[n])}
    if small:
        raise ValueError(
            f"init={FROM_GRADIENTS!r} takes twice as many singular vectors as the rank, and of "
            f"{paths.listing(small)} there are {[*small.values()][:8]}: lower the rank "
            "(rank_pattern sets it per kernel)."
        )


def _make_factors(start: Start, u: Array, vh: Array) -> Offset:
    rank, size = start.rank, vh.shape[-1] ** 0.25 / _GAMMA**0.5
    a, b = u[..., :rank] * size, vh[:, rank : 2 * rank] * size
    return make_offset(start, list(zip(a, b, strict=True)))


# ---- Singular vectors ----------------------------------------------------------------------------


def _find_directions(
    key: Array, loss_fn: Loss, params: PyTree, choice: Choice, batches: Sequence[Any]
) -> dict[str, tuple[Array, Array]]:
    """Finds the first singular vectors of the gradient by each kernel.

    Returns:
      For each kernel ``u (n, in, 2r at least)`` and ``vh (n, 2r at least, out)``, for each of its
      ``n`` matrices.
    """
    leaves = {n: choice.kernels.leaves[n] for n in choice.ranks}
    widths = {n: min(4 * r, max_rank(leaves[n])) for n, r in choice.ranks.items()}
    zeros = {n: _make_zeros(leaves[n], widths[n]) for n in leaves}
    by_factors = _make_gradient(loss_fn, params, batches)
    keys = dict(zip(zeros, jax.random.split(key, len(zeros)), strict=True))
    start = lambda n, x: jax.random.normal(keys[n], x.b.shape, x.b.dtype)
    b = {n: start(n, x) for n, x in zeros.items()}
    a: dict[str, Array] = {}
    gradient: dict[str, LowRank] = {}
    for step in range(_N_ITER + 1):
        gradient = by_factors({n: _replace(x, b=b[n]) for n, x in zeros.items()})
        a = {n: orthonormalize(to_columns(x.a, x)) for n, x in gradient.items()}
        nodes = {n: _replace(x, a=a[n].reshape(x.a.shape)) for n, x in zeros.items()}
        gradient = by_factors(nodes)
        if step < _N_ITER:
            rows = {n: _to_rows(x.b, x) for n, x in gradient.items()}
            new = {n: orthonormalize(rows[n].mT).mT for n in rows}
            b = {n: new[n].reshape(x.b.shape) for n, x in zeros.items()}
    return {n: _decompose(a[n], _to_rows(x.b, x)) for n, x in gradient.items()}


def _make_zeros(leaf: Leaf, width: int) -> LowRank:
    a, b = factor_shapes(adapted_shape(leaf), leaf.axes, width)
    dtype = wide_dtype(leaf.dtype)
    return LowRank(jnp.zeros(a, dtype), jnp.zeros(b, dtype), 1.0, axes=leaf.axes)


def _replace(node: LowRank, a: Array | None = None, b: Array | None = None) -> LowRank:
    return LowRank(
        node.a if a is None else a, node.b if b is None else b, node.scale, axes=node.axes
    )


def _to_rows(x: Array, node: LowRank) -> Array:
    """Returns ``b`` as ``(n, rank, out)``."""
    k = node.axes.count(BATCH)
    return x.reshape(math.prod(x.shape[:k]), x.shape[k], -1)


def _make_gradient(
    loss_fn: Loss, params: PyTree, batches: Sequence[Any]
) -> Callable[[Mapping[str, LowRank]], dict[str, LowRank]]:
    """Returns the function from factors to the gradient by them, the mean over batches."""
    compute_sum = make_gradient_sum(lift, loss_fn, params, batches)

    def compute_mean(nodes: Mapping[str, LowRank]) -> dict[str, LowRank]:
        sums = compute_sum(nodes)
        _check_finite(sums)
        return jax.tree.map(lambda x: x / len(batches), sums)

    return compute_mean


def _check_finite(gradient: Mapping[str, LowRank]) -> None:
    is_finite = lambda x: bool(jnp.isfinite(x.a).all() & jnp.isfinite(x.b).all())
    if bad := [n for n, x in gradient.items() if not is_finite(x)]:
        raise ValueError(
            f"The gradient of the loss is not finite at the base, by {paths.listing(bad)}: there "
            f"is nothing for init={FROM_GRADIENTS!r} to start from."
        )


@jax.jit
def _decompose(q: Array, rows: Array) -> tuple[Array, Array]:
    """Returns the singular vectors of ``G``, given ``qᵀG`` for an orthonormal ``q``."""
    u, _, vh = jnp.linalg.svd(rows, full_matrices=False)
    return q @ u, vh
