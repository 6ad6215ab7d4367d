"""Dropout: what is dropped, how often, and by how much the rest grows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.dropout import dropout

KEY = jax.random.key(0)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(400, 301), (1, 120_000), (120_001,), (3, 5, 7, 1200)])
def test_rate_and_scale(rate, shape):
    y = np.asarray(dropout(jnp.ones(shape), rate, KEY))
    kept = y != 0
    n, rounded = y.size, round(rate * 2**16) / 2**16
    # Six standard deviations of a binomial share.
    assert abs(kept.mean() - (1 - rounded)) < 6 * (rate * (1 - rate) / n) ** 0.5
    np.testing.assert_allclose(y[kept], 1 / (1 - rounded), rtol=1e-6)


def test_neighbours_are_independent():
    # Two entries share a word of random bits.
    kept = np.asarray(dropout(jnp.ones((1000, 128)), 0.5, KEY)).reshape(-1, 2) != 0
    for pattern in ([0, 0], [0, 1], [1, 0], [1, 1]):
        share = (kept == pattern).all(1).mean()
        assert abs(share - 0.25) < 6 * (0.25 * 0.75 / len(kept)) ** 0.5


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_dtype_stays(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        y = dropout(jnp.ones((8, 8), dtype), 0.25, KEY)
        assert y.dtype == dtype
        np.testing.assert_allclose(np.unique(np.asarray(y, float))[-1], 4 / 3, rtol=1e-2)


def test_a_mask_is_broadcast():
    y = np.asarray(dropout(jnp.ones((50, 6, 9)), 0.5, KEY, (50, 1, 9)))
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1], y.shape))
    assert len({tuple(row) for row in y[:, 0]}) > 10


def test_scalars_and_rates_at_the_ends():
    assert dropout(jnp.float32(2.0), 0.0, KEY) == 2.0
    x = jnp.arange(1.0, 100.0)
    np.testing.assert_array_equal(dropout(x, 0.0, KEY), x)
    assert np.isfinite(dropout(x, 0.9999999, KEY)).all()


def test_a_traced_rate_gives_the_same_mask():
    x = jnp.ones((30, 7))
    np.testing.assert_array_equal(
        jax.jit(dropout)(x, 0.1, KEY), jax.jit(lambda x, k: dropout(x, 0.1, k))(x, KEY)
    )
