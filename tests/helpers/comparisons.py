"""Trees that are to be close, and adapters of which nothing is zero."""

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora

# Float32 sums in another order: a few ulps of values of order one, more for gradients, which add
# up over the batch.
CLOSE = dict(rtol=2e-5, atol=2e-5)


def perturbed(adapter, seed=5, size=0.2):
    """Random values in every trainable leaf, so that nothing is zero by accident."""
    rng = np.random.default_rng(seed)
    noise = lambda x: jnp.asarray(x + size * rng.normal(size=x.shape), x.dtype)
    return jax.tree.map(lambda x, t: noise(x) if t else x, adapter, lora.mask(adapter))


def assert_close(got, want, **tolerance):
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(
            np.asarray(g, np.float64), np.asarray(w, np.float64), **(tolerance or CLOSE)
        ),
        got,
        want,
    )
