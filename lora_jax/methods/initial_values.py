"""The first values of factors, by the names that ``LoRAConfig(init=...)`` takes.

With each of them but "loftq" an adapted kernel starts as the frozen one, bit for bit. Those whose
factors have a product from the start give an :class:`~lora_jax.methods.offset.Offset`, which takes
it off again; the base is never changed.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lora_jax.factors import BATCH, factor_shapes
from lora_jax.lowrank import LowRank, init_a
from lora_jax.methods.offset import Offset
from lora_jax.methods.start import Start
from lora_jax.nodes import Adapted

Array = jax.Array
Pair = tuple[Array, Array]
FROM_GRADIENTS, FROM_ACTIVATIONS = "lora_ga", "eva"  # these need data
FROM_RESIDUALS = "loftq"  # this needs the kernels as they were before they were quantized
# Those that give nodes of plain LoRA; the others give offsets.
PLAIN = ("uniform", "gaussian", "orthogonal", FROM_ACTIVATIONS, FROM_RESIDUALS)
_OVERSAMPLING = 8  # further columns of a randomized SVD (Halko et al. 2011, section 4.2: 5 or 10)


def _draw_uniform(start: Start) -> LowRank:
    """Draws ``a`` uniformly, with ``b = 0``; see :func:`lora_jax.lowrank.init_a`."""
    return _make_plain(start, init_a(start.key, start.shape, start.axes, start.rank, start.dtype))


def _draw_gaussian(start: Start) -> LowRank:
    """Draws ``a ~ N(0, 1/r²)``, with ``b = 0``, as PEFT's "gaussian"."""
    a_shape, _ = factor_shapes(start.shape, start.axes, start.rank)
    return _make_plain(start, jax.random.normal(start.key, a_shape, start.dtype) / start.rank)


def _draw_orthogonal(start: Start) -> LowRank:
    """Draws ``a`` and ``b`` of half the rank each, in orthogonal halves of the rank's space.

    Neither is zero, and their product is. PEFT turns the two halves by a random rotation, after
    which the product is zero up to rounding; here they are coordinates, and it is zero exactly.
    The entries are normal with variance 1/100, as there.

    Raises:
      ValueError: the rank is odd.
    """
    if start.rank % 2:
        raise ValueError(
            f"init='orthogonal' halves the rank, and that of {start.name!r} is {start.rank}: give "
            "it an even one (rank_pattern sets it per kernel)."
        )
    shapes = factor_shapes(start.shape, start.axes, start.rank // 2)
    keys = jax.random.split(start.key)
    a, b = (
        jax.random.normal(k, shape, start.dtype) / 10 for k, shape in zip(keys, shapes, strict=True)
    )
    n = start.axes.count(BATCH)
    a = jnp.concatenate([a, jnp.zeros_like(a)], axis=-1)
    return _make_plain(start, a, jnp.concatenate([jnp.zeros_like(b), b], axis=n))


def _make_plain(start: Start, a: Array, b: Array | None = None) -> LowRank:
    _, b_shape = factor_shapes(start.shape, start.axes, start.rank)
    return LowRank(
        a=a,
        b=jnp.zeros(b_shape, start.dtype) if b is None else b,
        scale=start.scale,
        axes=start.axes,
        dropout=start.dropout,
    )


# ---- Values taken from the kernel ----------------------------------------------------------------


def make_offset(start: Start, pairs: list[Pair]) -> Offset:
    """Makes the node that starts from given factors, as no change.

    Args:
      start: the kernel.
      pairs: ``(in, rank)`` and ``(rank, out)`` of each of its matrices; see
        :meth:`Start.matrices <lora_jax.methods.start.Start.matrices>`.
    """
    a, b = _join(start, pairs)
    # The frozen arrays are others than the trained ones, so that a step may donate them all.
    a0, b0 = jnp.array(a, copy=True), jnp.array(b, copy=True)
    return Offset(a, b, a0, b0, start.scale, axes=start.axes, dropout=start.dropout)


def _join(start: Start, pairs: list[Pair]) -> Pair:
    """Joins the factors of each matrix to those of the kernel."""
    shapes = factor_shapes(start.shape, start.axes, start.rank)
    sides = zip(*pairs, strict=True)
    join = lambda side, shape: jnp.stack(side).reshape(shape).astype(start.dtype)
    a, b = (join(side, shape) for side, shape in zip(sides, shapes, strict=True))
    return a, b


def _factorize_each(
    start: Start, factorize: Callable[..., Pair], *, scale: float = 1.0, has_key: bool = False
) -> Offset:
    pairs = []
    for k, matrix in enumerate(start.matrices(f"init={start.init!r}")):
        keys = [jax.random.fold_in(start.key, k)] if has_key else []
        pairs.append(factorize(matrix, *keys, start.rank, scale))
    return make_offset(start, pairs)


@functools.partial(jax.jit, static_argnums=1)
def _take_principal(w: Array, rank: int, scale: float) -> Pair:
    return _share(*_decompose(w), slice(rank), scale)


@functools.partial(jax.jit, static_argnums=1)
def _take_minor(w: Array, rank: int, scale: float) -> Pair:
    return _share(*_decompose(w), slice(-rank, None), scale)


def _decompose(w: Array) -> tuple[Array, Array, Array]:
    # Of the paper's W, the transposed one, as in PEFT: its files are read by computing this again,
    # and the rounding of a decomposition depends on which side comes first.
    u, s, vh = jnp.linalg.svd(w.T, full_matrices=False)
    return vh.T, s, u.T


def _share(u: Array, s: Array, vh: Array, part: slice, scale: float) -> Pair:
    """Makes factors of a part of an SVD, with the roots of its singular values in each."""
    root = jnp.sqrt(s[part] / scale)
    return u[:, part] * root[None], root[:, None] * vh[part]


@functools.partial(jax.jit, static_argnums=(2, 4))
def _find_principal(w: Array, key: Array, rank: int, scale: float, n_iter: int) -> Pair:
    """Approximates :func:`_take_principal` by subspace iteration (Halko et al. 2011, alg. 4.4)."""
    width = min(rank + _OVERSAMPLING, *w.shape)
    orthonormalize = lambda x: jnp.linalg.qr(x)[0]
    q = orthonormalize(w @ jax.random.normal(key, (w.shape[1], width), w.dtype))
    for _ in range(n_iter):
        q = orthonormalize(w @ orthonormalize(w.T @ q))
    u, s, vh = jnp.linalg.svd(q.T @ w, full_matrices=False)
    return _share(q @ u, s, vh, slice(rank), scale)


@functools.partial(jax.jit, static_argnums=1)
def _take_columns(w: Array, rank: int, scale: float) -> Pair:
    q, r = jnp.linalg.qr(w.T)  # of the paper's W, whose rows are outputs
    return r[:rank].T, q[:, :rank].T


def _start_pissa(start: Start) -> Offset:
    """Takes the ``r`` largest singular triplets: ``s·a·b`` is the best rank-``r`` part of ``W``.

    Meng et al. 2024, eq. 2 and 3: ``a = U√(S/s)``, ``b = √(S/s)Vᵀ``, so that alpha makes no
    difference to what is trained at first.
    """
    return _factorize_each(start, _take_principal, scale=start.scale)


def _start_randomized_pissa(start: Start, n_iter: int) -> Offset:
    """Takes nearly the same by a randomized SVD, for kernels whose exact one takes too long."""
    find = lambda w, key, rank, scale: _find_principal(w, key, rank, scale, n_iter)
    return _factorize_each(start, find, scale=start.scale, has_key=True)


def _start_milora(start: Start) -> Offset:
    """Takes the ``r`` smallest singular triplets (Wang et al. 2024, MiLoRA, eq. 5)."""
    return _factorize_each(start, _take_minor, scale=start.scale)


def _start_olora(start: Start) -> Offset:
    """Takes the first ``r`` columns of ``Q`` and rows of ``R`` of ``Wᵀ = QR`` in our layout.

    Büyükakyüz 2024, section 3: ``b = Q[:, :r]ᵀ``, which is orthonormal, and ``a = R[:r]ᵀ``. The
    scale is not divided out, there or in PEFT: the term starts as ``s`` times that part of ``W``.
    """
    return _factorize_each(start, _take_columns)


def make_best_approximation(start: Start, original: Array) -> LowRank:
    """Makes plain factors whose term is the best approximation to what quantization took away.

    Args:
      start: the kernel, quantized.
      original: the kernel as it was before.

    Raises:
      ValueError: the two are the same.
    """
    before = dataclasses.replace(start, kernel=original)
    matrices = zip(before.matrices(_RESIDUALS), start.matrices(_RESIDUALS), strict=True)
    pairs = [_take_principal(w - q, start.rank, start.scale) for w, q in matrices]
    if not any(jnp.any(a) for a, _ in pairs):  # no gradient would ever reach such factors
        raise ValueError(
            f"{_RESIDUALS} makes up for what quantization took away, and {start.name!r} is what it "
            "was before: choose another init."
        )
    return _make_plain(start, *_join(start, pairs))


_RESIDUALS = f"init={FROM_RESIDUALS!r}"
_FUNCTIONS = {
    FROM_GRADIENTS: "gradients: make the adapter with "
    "lora.init_from_gradients(key, loss_fn, params, config, *batches)",
    FROM_ACTIVATIONS: "activations: make the adapter with "
    "lora.init_from_activations(key, loss_fn, params, config, *batches)",
    FROM_RESIDUALS: "what quantization took away: make the adapter with "
    "lora.init_from_residuals(key, fn, params, config, original, *args)",
}


def _refuse_alone(start: Start) -> Adapted:
    raise ValueError(
        f"init={start.init!r} takes its values from {_FUNCTIONS[start.init]} in place of lora.init."
    )


INITS: dict[str, Callable[[Start], Adapted]] = {
    "uniform": _draw_uniform,
    "gaussian": _draw_gaussian,
    "orthogonal": _draw_orthogonal,
    "pissa": _start_pissa,
    # PEFT's names for this, with the number of iterations; 16 is for spectra that fall slowly.
    "pissa_niter_4": functools.partial(_start_randomized_pissa, n_iter=4),
    "pissa_niter_16": functools.partial(_start_randomized_pissa, n_iter=16),
    "olora": _start_olora,
    "milora": _start_milora,
    FROM_GRADIENTS: _refuse_alone,
    FROM_ACTIVATIONS: _refuse_alone,
    FROM_RESIDUALS: _refuse_alone,
}
