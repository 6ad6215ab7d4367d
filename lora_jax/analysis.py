"""What an adapter has learned: subspaces, amplification and effective rank of its change.

For kernels without batch axes, whatever their other axes: ``a`` is ``(*in, rank)`` and ``b`` is
``(rank, *out)``, as in an adapter's ``LowRank`` nodes. The paper's ``A`` is ``aᵀ``. Where a kernel
has batch axes, ``jax.vmap`` over them.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def subspace_similarity(a1: Array | np.ndarray, a2: Array | np.ndarray) -> Array:
    """Measures what the leading directions of two ``a`` have in common (Hu et al. 2021, sec. 7.2).

    ``φ(A₁, A₂, i, j) = ‖U₁ⁱᵀ U₂ʲ‖²_F / min(i, j)`` (equation 4), where the columns of ``Uⁱ`` are
    the right-singular vectors of ``A`` with the ``i`` largest singular values: 1 if one subspace
    holds the other, 0 if they are orthogonal.

    Args:
      a1: ``(*in, r1)``.
      a2: ``(*in, r2)``, of as many inputs.

    Returns:
      ``(r1, r2)``; entry ``[i - 1, j - 1]`` is ``φ(A₁, A₂, i, j)``.

    Raises:
      ValueError: the numbers of inputs differ.

    >>> subspace_similarity(jnp.array([[2.0, 0], [0, 1.0]]), jnp.array([[0], [1.0]])).tolist()
    [[0.0], [1.0]]
    """
    u1, u2 = _directions(jnp.asarray(a1)), _directions(jnp.asarray(a2))
    if u1.shape[0] != u2.shape[0]:
        raise ValueError(
            f"The subspaces are of spaces of {u1.shape[0]} and {u2.shape[0]} dimensions: compare "
            "adapters of the same kernel, or of kernels with as many inputs."
        )
    overlaps = jnp.cumsum(jnp.cumsum((u1.T @ u2) ** 2, axis=0), axis=1)
    r1, r2 = overlaps.shape
    smaller = jnp.minimum(jnp.arange(1, r1 + 1)[:, None], jnp.arange(1, r2 + 1)[None, :])
    return overlaps / smaller


def _directions(a: Array) -> Array:
    """Returns the left-singular vectors of ``a``, those of the largest singular values first."""
    flat = jnp.reshape(a, (-1, jnp.shape(a)[-1]))
    return jnp.linalg.svd(flat, full_matrices=False)[0]


def random_similarity(inputs: int, rank: int) -> float:
    """Returns the expected similarity of two random subspaces, for comparison.

    Each of the ``rank²`` squared cosines is ``1 / inputs`` on average, and ``rank`` divides them.

    >>> random_similarity(384, 8)
    0.020833333333333332
    """
    return rank / inputs


def singular_values(a: Array, b: Array, scale: Array | float = 1.0) -> Array:
    """Returns the ``rank`` largest singular values of ``ΔW = s·a·b`` without forming it.

    With ``a = Q₁R₁`` and ``bᵀ = Q₂R₂``, they are those of the small matrix ``s·R₁R₂ᵀ``.

    Args:
      a: ``(*in, rank)``.
      b: ``(rank, *out)``.
      scale: ``s``.

    Returns:
      ``(rank,)`` at most, in descending order.

    >>> singular_values(jnp.eye(3)[:, :2], jnp.array([[3.0, 0.0], [0.0, 4.0]]), 2.0).tolist()
    [8.0, 6.0]
    """
    return jnp.linalg.svd(_core(a, b, scale)[1], compute_uv=False)


def _core(a: Array, b: Array, scale: Array | float) -> tuple[Array, Array, Array]:
    """Factors ``ΔW = q1 · core · q2ᵀ``, with orthonormal columns in ``q1`` and ``q2``."""
    flat_a = jnp.reshape(a, (-1, jnp.shape(a)[-1]))
    flat_b = jnp.reshape(b, (jnp.shape(b)[0], -1))
    (q1, r1), (q2, r2) = jnp.linalg.qr(flat_a), jnp.linalg.qr(flat_b.T)
    return q1, scale * (r1 @ r2.T), q2


def effective_rank(a: Array, b: Array) -> Array:
    """Measures the number of directions of ``ΔW``, from 1 to the rank (Roy & Vetterli 2007, eq. 2).

    ``exp(-Σ pᵢ log pᵢ)`` with ``pᵢ = σᵢ / Σσ``; 0 where ``ΔW`` is zero, as it is at the start. The
    scale does not matter.

    >>> round(float(effective_rank(jnp.eye(3)[:, :2], jnp.eye(2))), 4)
    2.0
    """
    sigma = singular_values(a, b)
    total = jnp.sum(sigma)
    p = sigma / jnp.where(total > 0, total, 1.0)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0))
    return jnp.where(total > 0, jnp.exp(entropy), 0.0)


def amplification_factor(w: Array, a: Array, b: Array, scale: Array | float = 1.0) -> Array:
    """Measures how much ``ΔW`` amplifies directions that are weak in ``W`` (sec. 7.3, table 7).

    ``‖ΔW‖_F / ‖Uᵀ W V‖_F``, where the columns of ``U`` and ``V`` are the left- and right-singular
    vectors of ``ΔW`` that its rank leaves.

    Args:
      w: the kernel, ``(*in, *out)``.
      a: ``(*in, rank)``.
      b: ``(rank, *out)``.
      scale: ``s``.

    >>> w, a, b = jnp.diag(jnp.array([4.0, 0.5])), jnp.eye(2)[:, 1:], 3.0 * jnp.eye(2)[1:]
    >>> float(amplification_factor(w, a, b))
    6.0
    """
    q1, core, q2 = _core(a, b, scale)
    left, sigma, right = jnp.linalg.svd(core, full_matrices=False)
    # Directions with a singular value of zero are not in ΔW, whose rank is lower then.
    is_used = sigma > sigma[0] * jnp.finfo(sigma.dtype).eps * max(q1.shape[0], q2.shape[0])
    flat = jnp.reshape(w, (q1.shape[0], q2.shape[0]))
    projected = left.T @ (q1.T @ flat @ q2) @ right.T
    w_in_subspace = jnp.where(is_used[:, None] & is_used[None, :], projected, 0.0)
    return jnp.linalg.norm(sigma) / jnp.linalg.norm(w_in_subspace)
