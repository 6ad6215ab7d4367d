"""Adapted biases: ``bias + s·β`` beside adapted kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax.methods.bias import AdaptedBias
from tests.helpers.comparisons import assert_close, perturbed

RNG = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)
PARAMS = {
    "up": {"kernel": draw(4, 2, 3), "bias": draw(2, 3)},
    "layers": {"kernel": draw(3, 6, 6), "bias": draw(3, 6)},
    "head": {"kernel": draw(6, 5)},
}
X = draw(7, 4)
CONFIG = lora.LoRAConfig(rank=3, alpha=8, targets=("up", "layers"), adapt_bias=True)


def fn(p, x):
    x = (jnp.einsum("ni,iho->nho", x, p["up"]["kernel"]) + p["up"]["bias"][None]).reshape(-1, 6)
    step = lambda x, layer: (jnp.tanh(x @ layer["kernel"] + layer["bias"][None]), None)
    return jax.lax.scan(step, x, p["layers"])[0] @ p["head"]["kernel"]


def make(config=CONFIG, params=PARAMS):
    return lora.init(jax.random.key(0), fn, params, config, X)


def lifted(adapter, params=PARAMS):
    return lora.lift(fn, strict=True)(lora.bind(params, adapter), X)


def test_values():
    adapter = make()
    assert_close(lifted(adapter), fn(PARAMS, X), rtol=0, atol=0)
    adapter = perturbed(adapter)
    merged = lora.merge(PARAMS, adapter)
    for name in ("up", "layers"):
        node = adapter[name]["bias"]
        assert node.scale == adapter[name]["kernel"].scale == 8 / 3
        assert node.beta.shape == PARAMS[name]["bias"].shape
        assert_close(merged[name]["bias"], PARAMS[name]["bias"] + 8 / 3 * node.beta, rtol=1e-6)
    assert_close(lifted(adapter), fn(merged, X), rtol=1e-5, atol=1e-5)
    got = jax.grad(lambda a: jnp.sum(lifted(a) ** 2))(adapter)
    want = jax.grad(lambda a: jnp.sum(fn(lora.merge(PARAMS, a), X) ** 2))(adapter)
    assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_tree(tmp_path):
    adapter = perturbed(make())
    lora.save(tmp_path, adapter, CONFIG)
    loaded, config = lora.load(tmp_path, PARAMS)
    assert config == CONFIG and jax.tree.structure(loaded) == jax.tree.structure(adapter)
    assert_close(loaded, adapter, rtol=0, atol=0)
    assert all(jax.tree.leaves(lora.mask(adapter)))
    assert "adapt_bias" not in lora.LoRAConfig().to_dict()
    names = lora.explain(fn, PARAMS, adapter, X).kernels
    assert set(names) == {"up/kernel", "layers/kernel"}
    text = str(lora.tabulate(fn, PARAMS, CONFIG, X))
    assert "layers/bias   3×6   other       adapted      as the kernel beside it" in text
    data = adapters.as_data(adapter)
    assert_close(lifted(data), lifted(adapter))
    several = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), data)
    assert_close(jax.vmap(lifted)(several)[0], lifted(adapter), rtol=1e-5, atol=1e-5)


def test_a_bias_whose_layers_come_last():
    node = AdaptedBias(draw(3, 2), 2.0, axes="ob")
    assert_close(node.merge(jnp.zeros((2, 3))), 2 * node.beta.T)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ("up", "head")}, "head/kernel has no leaf 'bias' of its outputs' shape"),
        (
            {"targets": ("up/kernel",), "train": ("up/bias",)},
            "adapt_bias is for up/bias, which train names as well",
        ),
    ],
)
def test_what_can_not_be(fields, message):
    config = lora.LoRAConfig(**({"targets": ("up",), "adapt_bias": True, "rank": 2} | fields))
    with pytest.raises(ValueError, match=message):
        make(config)


def test_a_config_refuses():
    with pytest.raises(ValueError, match="adapt_bias must be True or False, got 1"):
        lora.LoRAConfig(adapt_bias=1)
    with pytest.raises(ValueError, match="adapt_bias is for kernels with method 'lora'"):
        lora.LoRAConfig(adapt_bias=True, targets=(), train=("head",))
    with pytest.raises(TypeError, match="adapt_bias is this library's name for lora_bias"):
        lora.LoRAConfig(lora_bias=True)
