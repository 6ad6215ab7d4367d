"""VeRA: against its formula, its start, its files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax.methods.vera import draw_projections
from tests.helpers.comparisons import assert_close, perturbed

KERNELS = {
    "wide": {"kernel": jnp.ones((4, 2, 3))},  # one input axis, two of outputs
    "stack": {"kernel": jnp.ones((3, 5, 4))},  # three layers
}


def fn(params, x):
    y = jnp.einsum("i,ihd->hd", x, params["wide"]["kernel"]).sum()
    return y + jax.lax.scan(lambda c, w: (c, jnp.ones(5) @ w), 0.0, params["stack"]["kernel"])[1]


def make(**fields):
    config = lora.LoRAConfig(rank=9, method="vera", **fields)
    return lora.init(jax.random.key(0), fn, KERNELS, config, jnp.ones(4)), config


def test_is_its_formula():
    adapter, _ = make(projection_seed=5)
    adapter = perturbed(adapter)
    a, b = draw_projections(5, 9, 5, 6)  # the largest sides of both kernels
    nodes = adapters.nodes(adapter)
    merged = lora.merge(KERNELS, adapter)
    wide, stack = nodes["wide/kernel"], nodes["stack/kernel"]
    change = np.einsum("ri,r,or->io", a[:, :4], wide.lambda_d, b[:6]).reshape(4, 2, 3)
    assert_close(merged["wide"]["kernel"], 1 + change * wide.lambda_b[None], rtol=1e-5)
    layers = np.einsum("ri,lr,or,lo->lio", a[:, :5], stack.lambda_d, b[:4], stack.lambda_b)
    assert_close(merged["stack"]["kernel"], 1 + layers, rtol=1e-5)


def test_the_rank_is_not_that_of_the_kernel():
    adapter, _ = make()
    assert {x.a.shape[-1] for x in adapters.nodes(adapter).values()} == {9}
    assert "trainable params: 54 ||" in lora.summary(KERNELS, adapter)  # 9 + 6 and 3 * (9 + 4)


def test_another_key_of_the_init_is_the_same_start():
    """What is drawn is the projections, by a seed of their own."""
    config = lora.LoRAConfig(rank=9, method="vera")
    one, two = (lora.init(jax.random.key(k), fn, KERNELS, config, jnp.ones(4)) for k in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_file_has_equal_parts_once(tmp_path):
    kernels = {f"layer_{k}": jnp.ones((40, 30)) for k in range(6)}
    run = lambda params, x: sum((x @ w).sum() for w in params.values())
    config = lora.LoRAConfig(rank=16, method="vera")
    adapter = perturbed(lora.init(jax.random.key(0), run, kernels, config, jnp.ones(40)))
    lora.save(tmp_path, adapter, config)
    (file,) = tmp_path.glob("*.safetensors")
    held = safetensors.numpy.load_file(file)
    assert sum(name.endswith("/a") for name in held) == 1
    assert file.stat().st_size < 4 * (16 * 70 + 6 * (16 + 30)) + 4000
    again, _ = lora.load(tmp_path, kernels)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)
    path = tmp_path / "adapter.json"
    content = json.loads(path.read_text())
    for copies, says in (
        ({"layer_1/a": "nowhere"}, "is a copy of a tensor that is missing"),
        (3, "no object"),
    ):
        path.write_text(json.dumps(content | {"copies": copies}))
        with pytest.raises(ValueError, match=says):
            lora.load(tmp_path, kernels)


@pytest.mark.parametrize(
    "fields",
    [{"alpha": 8.0}, {"rank_pattern": {"wide": 2}}, {"rank_stabilized": True}, {"train_a": False}],
)
def test_fields_without_a_meaning_are_refused(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"{name} is .*, and method 'vera' has no use for it"):
        lora.LoRAConfig(method="vera", **fields)


@pytest.mark.parametrize("seed", [-1, 1.5, True, 2**63])
def test_wrong_seeds(seed):
    with pytest.raises(ValueError, match="projection_seed must be a whole number from 0"):
        lora.LoRAConfig(method="vera", projection_seed=seed)
