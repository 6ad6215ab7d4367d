"""LoftQ: the first factors against numpy's decomposition of what quantization took away."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.config import LoRAConfig
from lora_jax.lowrank import LowRank
from lora_jax.methods.lora_fa import FrozenA
from tests.helpers.comparisons import assert_close

FN = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"].T
LIKE = {"up": "io", "down": "oi"}
X = jnp.ones((2, 64))


def make_config(**fields):
    return LoRAConfig(**{"rank": 4, "alpha": 6.0, "init": "loftq", **fields})


def make_params(scheme="nf4", targets=("all-linear",)):
    rng = np.random.default_rng(0)
    shapes = {"up": (64, 128), "down": (64, 128)}
    original = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}
    return original, lora.quantize(original, scheme, like=LIKE, targets=targets)


def start(small, original, fn=FN, x=X, **fields):
    key = jax.random.key(0)
    return lora.init_from_residuals(key, fn, small, make_config(**fields), original, x)


@pytest.mark.parametrize("scheme", ["nf4", "fp4_double", "int8", "int4", "float8_e4m3"])
def test_the_term_is_the_best_approximation(scheme):
    original, small = make_params(scheme)
    adapter, base = start(small, original), lora.merge(small, {})
    merged = lora.merge(small, adapter)
    for name, axes in LIKE.items():
        before, q, after = (np.asarray(x[name], np.float64) for x in (original, base, merged))
        u, s, vh = np.linalg.svd(before - q, full_matrices=False)
        assert_close(after - q, (u[:, :4] * s[:4]) @ vh[:4], rtol=0, atol=3e-5 * s[0])
        node = adapter[name]
        assert type(node) is LowRank and node.axes == axes and node.scale == 1.5
        np.testing.assert_allclose(np.diag(node.a.T @ node.a), s[:4] / 1.5, rtol=1e-3)


def test_the_scale_makes_no_difference_to_the_start():
    """PEFT leaves it in, so that its start is right for alpha = rank alone."""
    original, small = make_params()
    one, two = (lora.merge(small, start(small, original, alpha=x)) for x in (4.0, 64.0))
    assert_close(one, two, rtol=0, atol=1e-5)


def test_stacked_kernels_start_as_their_layers_do():
    rng = np.random.default_rng(0)
    original = {"w": jnp.asarray(rng.normal(size=(3, 64, 64)), jnp.float32)}
    fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    small = lora.quantize(original, "nf4", like={"w": "bio"})
    stacked = lora.merge(small, start(small, original, fn))["w"]
    one = lambda k: jax.tree.map(lambda x: x[k], (small, original))
    alone = [
        lora.merge(q, start(q, w, lambda p, x: x @ p["w"]))["w"] for q, w in map(one, range(3))
    ]
    assert_close(stacked, jnp.stack(alone), rtol=0, atol=1e-5)


def test_kernels_that_are_not_quantized_start_as_without():
    original, small = make_params(targets=("up",))
    adapter = start(small, original, train=())
    plain = lora.init(jax.random.key(0), FN, small, make_config(init="uniform"), X)
    np.testing.assert_array_equal(adapter["down"].a, plain["down"].a)
    assert not np.any(adapter["down"].b) and np.any(adapter["up"].b)


def test_a_may_be_frozen():
    original, small = make_params()
    assert type(start(small, original, train_a=False)["up"]) is FrozenA


def test_saved_and_loaded(tmp_path):
    original, small = make_params()
    adapter, config = start(small, original), make_config()
    lora.save(tmp_path, adapter, config)
    loaded, again = lora.load(tmp_path, small)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
    assert again == config


WRONG = [
    ("stand for.*init='pissa'", lambda w, q: start(q, w, init="pissa")),
    ("none of the kernels to adapt is quantized: down, up", lambda w, q: start(w, w)),
    ("original lacks down; it has up", lambda w, q: start(q, {"up": w["up"]})),
    ("'down' quantized, too", lambda w, q: start(q, q)),
    (
        r"'up' of shape \(64, 8\), and the parameters have it of",
        lambda w, q: start(q, w | {"up": w["up"][:, :8]}),
    ),
    ("'down' is what it was before", lambda w, q: start(q, lora.merge(q, {}))),
    (
        "lora.init_from_residuals",
        lambda w, q: lora.init(jax.random.key(0), FN, q, make_config(), X),
    ),
]


@pytest.mark.parametrize(("message", "call"), WRONG)
def test_wrong_inputs(message, call):
    with pytest.raises(ValueError, match=message):
        call(*make_params())
