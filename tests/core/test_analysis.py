"""The analysis against numpy's decompositions of the full matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import analysis


def draw(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("shapes", [((20, 4), (20, 7)), ((5, 4, 3), (20, 3)), ((6, 1), (6, 6))])
def test_subspace_similarity(shapes):
    a1, a2 = draw(0, *shapes)
    found = np.asarray(analysis.subspace_similarity(a1, a2))
    # The paper's: right-singular vectors of A, which is (rank, in).
    v1, v2 = (np.linalg.svd(a.reshape(-1, a.shape[-1]).T.astype(np.float64))[2] for a in (a1, a2))
    for i in range(1, a1.shape[-1] + 1):
        for j in range(1, a2.shape[-1] + 1):
            want = np.linalg.norm(v1[:i] @ v2[:j].T, "fro") ** 2 / min(i, j)
            np.testing.assert_allclose(found[i - 1, j - 1], want, atol=1e-5)
    assert found.shape == (a1.shape[-1], a2.shape[-1])


def test_subspace_similarity_at_its_ends():
    (a,) = draw(1, (30, 5))
    mixed = a @ draw(2, (5, 5))[0]  # the same space, other directions
    assert np.asarray(analysis.subspace_similarity(a, mixed))[-1, -1] == pytest.approx(1, abs=1e-5)
    q = np.linalg.qr(draw(3, (30, 10))[0])[0]
    np.testing.assert_allclose(analysis.subspace_similarity(q[:, :5], q[:, 5:]), 0, atol=1e-6)
    with pytest.raises(ValueError, match="30 and 29 dimensions"):
        analysis.subspace_similarity(a, a[1:])


def test_random_subspaces():
    rows = [analysis.subspace_similarity(*draw(s, (64, 4), (64, 4)))[-1, -1] for s in range(200)]
    # 200 means of 16 squared cosines: their mean has a standard error of about 0.001.
    assert np.mean(rows) == pytest.approx(analysis.random_similarity(64, 4), abs=0.005)


def test_singular_values_and_effective_rank():
    a, b = draw(4, (4, 3, 5), (5, 9))
    delta = 0.5 * a.reshape(12, 5).astype(np.float64) @ b
    sigma = np.linalg.svd(delta, compute_uv=False)[:5]
    np.testing.assert_allclose(analysis.singular_values(a, b, 0.5), sigma, rtol=1e-5)
    p = sigma / sigma.sum()
    want = np.exp(-(p * np.log(p)).sum())
    np.testing.assert_allclose(analysis.effective_rank(a, b), want, rtol=1e-5)
    assert analysis.effective_rank(a, np.zeros_like(b)) == 0
    one = analysis.effective_rank(a[..., :1] * np.ones(5, np.float32), b)  # five times one column
    assert float(one) == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_amplification_factor(rank):
    """Rank 12 is more than the 8 outputs allow: then all of W's directions are kept."""
    w, a, b = draw(5, (12, 8), (12, rank), (rank, 8))
    delta = (2.0 * a.astype(np.float64)) @ b
    u, sigma, vt = np.linalg.svd(delta)
    n = min(rank, 8)
    want = np.linalg.norm(sigma) / np.linalg.norm(u[:, :n].T @ w @ vt[:n].T, "fro")
    np.testing.assert_allclose(analysis.amplification_factor(w, a, b, 2.0), want, rtol=1e-4)


def test_unused_rank_is_not_counted():
    """A direction that b never uses is none of ΔW's, though a has it."""
    w, a, b = draw(6, (10, 8), (10, 3), (3, 8))
    b[2] = 0
    want = analysis.amplification_factor(w, a[:, :2], b[:2])
    np.testing.assert_allclose(analysis.amplification_factor(w, a, b), want, rtol=1e-4)


def test_batch_axes_by_vmap():
    a1, a2 = draw(7, (3, 10, 2), (3, 10, 2))
    stacked = jax.vmap(analysis.subspace_similarity)(jnp.asarray(a1), jnp.asarray(a2))
    for k in range(3):
        np.testing.assert_allclose(
            stacked[k], analysis.subspace_similarity(a1[k], a2[k]), atol=1e-6
        )
