"""LoRA-FA, VeRA and AdaLoRA on a base whose kernels are stored as codes."""

import jax
import pytest

import lora_jax as lora
from tests.helpers import zoo
from tests.helpers.comparisons import assert_close, perturbed

METHODS = {
    "lora_fa": {"train_a": False},
    "vera": {"method": "vera"},
    "adalora": {"method": "adalora"},
}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x != "vera")) for x in METHODS]
)
def test_lift_is_merge(name):
    model = zoo.ZOO["mlp"]()
    config = lora.LoRAConfig(rank=2, targets=("up", "down"), **METHODS[name])
    plain = lora.init(jax.random.key(0), model.fn, model.params, config, model.x)
    base = lora.quantize(model.params, "int8", like=plain)
    adapter = lora.init(jax.random.key(0), lora.lift(model.fn), base, config, model.x)
    assert_close(adapter, plain)
    adapter = perturbed(adapter)
    lifted = lambda a, p: lora.lift(model.fn, strict=True)(lora.bind(p, a), model.x)
    merged = lambda a, p: model.fn(lora.merge(p, a), model.x)
    assert_close(jax.jit(lifted)(adapter, base), jax.jit(merged)(adapter, base))
