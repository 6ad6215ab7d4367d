"""Hugging Face's last Flax models (transformers 4.56.2), which this project did not write, unedited.

GPT-2 stores its kernels transposed, and ties its head to its embedding through a nested `apply`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.adapter import nodes

pytestmark = [
    pytest.mark.hf_flax,
    # Warnings of a library that is no longer maintained, on importing and tracing it.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def _promotion_as_the_model_needs_it():
    with jax.numpy_rank_promotion("allow"):
        yield


IDS = jnp.array([[2, 3, 4, 5], [6, 7, 8, 1]])


def _models():
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "FlaxBertModel"):
        pytest.skip("this transformers has no Flax models; 4.56.2 is the last that has")
    return transformers


def _bert():
    t = _models()
    config = t.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return t.FlaxBertForSequenceClassification(config, seed=0)


def _gpt2():
    t = _models()
    config = t.GPT2Config(
        vocab_size=50,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    return t.FlaxGPT2LMHeadModel(config, seed=0)


CASES = {
    "bert": (_bert, ("query", "value"), 4),
    "bert all-linear": (_bert, ("all-linear",), 2 * 6 + 2),
    "gpt2": (_gpt2, ("c_attn",), 2),
    "gpt2 all-linear": (_gpt2, ("all-linear",), 2 * 4 + 1),
    "gpt2 embedding and head": (_gpt2, ("wte",), 1),
}


@pytest.mark.parametrize("case", CASES)
def test_lift_equals_merge_on_an_unedited_model(case):
    make, targets, count = CASES[case]
    model = make()
    fn = lambda params, ids: model(ids, params=params).logits
    config = lora.LoRAConfig(rank=2, targets=targets)
    adapter = lora.init(jax.random.key(0), fn, model.params, config, IDS)
    assert len(nodes(adapter)) == count
    np.testing.assert_array_equal(
        lora.lift(fn)(lora.bind(model.params, adapter), IDS), fn(model.params, IDS)
    )
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda x, t: x + 0.3 * rng.normal(size=x.shape).astype(x.dtype) if t else x,
        adapter,
        lora.mask(adapter),
    )
    lifted = jax.jit(lambda a: lora.lift(fn, strict=True)(lora.bind(model.params, a), IDS))
    merged = jax.jit(lambda a: fn(lora.merge(model.params, a), IDS))
    np.testing.assert_allclose(lifted(moved), merged(moved), rtol=1e-4, atol=1e-4)
    assert np.max(np.abs(lifted(moved) - fn(model.params, IDS))) > 1e-2
    gradient = lambda run: jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(run(a)))))(moved)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-3, atol=2e-3),
        gradient(lifted),
        gradient(merged),
    )


def test_tied_head_of_gpt2_is_factored_at_both_uses():
    model = _gpt2()
    fn = lambda params, ids: model(ids, params=params).logits
    config = lora.LoRAConfig(rank=2, targets=("wte",))
    adapter = lora.init(jax.random.key(0), fn, model.params, config, IDS)
    (use,) = lora.explain(fn, model.params, adapter, IDS).kernels.values()
    assert use.factored == 2 and not use.fallbacks
