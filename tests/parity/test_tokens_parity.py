"""Trained tokens beside PEFT, live: 20 steps in float64, and files that each side opens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax.methods.tokens import Tokens
from lora_jax.models import added_tokens, checkpoints
from lora_jax.peft import load_peft, save_peft
from tests.helpers import family_parity

torch, transformers = family_parity.torch, family_parity.transformers

pytestmark = pytest.mark.parity
STEPS, IDS = 20, [13, 2, 7]
SIZES = {"vocab_size": 31, "tie_word_embeddings": False}


def gpt2(tied):
    sizes = {"n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 24}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    about = SIZES | sizes | dropout | {"tie_word_embeddings": tied}
    return transformers.GPT2Config(**about, bos_token_id=0, eos_token_id=None)


def llama(tied):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    about = SIZES | sizes | heads | {"tie_word_embeddings": tied}
    return transformers.LlamaConfig(**about, bos_token_id=0, eos_token_id=1, pad_token_id=None)


def inputs(config, seed):
    found = family_parity.padded_ids(config.vocab_size, seed)
    mask = found["attention_mask"]
    return found | {
        "labels": np.where((mask > 0) & (mask.cumsum(-1) > 1), found["input_ids"], -100)
    }


def case(family, tied):
    made = {"gpt2": (gpt2, transformers.GPT2LMHeadModel, ("c_attn",)),
            "llama": (llama, transformers.LlamaForCausalLM, ("q_proj", "v_proj"))}  # fmt: skip
    config, model, targets = made[family]
    return family_parity.Case(
        head="causal-lm", model=model, config=lambda seed: config(tied), inputs=inputs,
        targets=targets, task_type="CAUSAL_LM",
    )  # fmt: skip


def of_tokens(adapter):
    nodes = adapters.nodes(adapter)
    return {name: node for name, node in nodes.items() if isinstance(node, Tokens)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_training_is_that_of_peft(family, tied, tmp_path):
    this = case(family, tied)
    torch.manual_seed(0)
    with jax.enable_x64(True):
        model = family_parity.torch_model(this, 0, torch.float64)
        apply, params, table = family_parity.in_jax(this, model)
        data = [inputs(model.config, k) for k in range(STEPS)]
        wrapped = family_parity.peft_model(this, model, trainable_token_indices=IDS)
        family_parity.quiet(wrapped.save_pretrained, tmp_path / "start")
        adapter, config = load_peft(tmp_path / "start", params, names=table)
        ((name, start),) = of_tokens(adapter).items()
        leaf = adapters.nodes(params)[name]
        np.testing.assert_array_equal(start.rows, leaf[jnp.array(IDS)])
        theirs = family_parity.torch_losses(wrapped, data, "causal-lm")
        ours, adapter = family_parity.our_losses(apply, params, adapter, data, "causal-lm")
        assert theirs.std() > 0.02
        np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=0)
        # After 20 steps both sides have the same rows, and each opens the other's file.
        family_parity.quiet(wrapped.save_pretrained, tmp_path / "end")
        last, _ = load_peft(tmp_path / "end", params, names=table)
        np.testing.assert_allclose(
            of_tokens(adapter)[name].rows, of_tokens(last)[name].rows, rtol=0, atol=1e-7
        )
        save_peft(tmp_path / "ours", params, adapter, config, names=table)
        again = family_parity.torch_model(this, 0, torch.float64)
        opened = family_parity.opened_by_peft(again, tmp_path / "ours").eval()
        given = {k: v for k, v in data[0].items() if k != "labels"}
        want = family_parity.torch_logits(opened, given)
        bound = lora.bind(params, adapter)
        got = lora.lift(apply, strict=True)(bound, **family_parity.our_inputs(given))
        real = given["attention_mask"] > 0
        # PEFT reads a file in float32, whatever the model's dtype.
        np.testing.assert_allclose(np.asarray(got)[real], want[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_made_here_is_opened_by_peft(tied, tmp_path):
    """From ``LoRAConfig(train_tokens=...)``, with outputs of the head where it is not tied."""
    this = case("llama", tied)
    model = family_parity.torch_model(this, 0)
    apply, params, table = family_parity.in_jax(this, model)
    tokens = {"embed_tokens": IDS} | ({} if tied else {"lm_head": [4, 13]})
    config = lora.LoRAConfig(rank=2, targets=("q_proj",), train_tokens=tokens)
    given = {k: v for k, v in inputs(model.config, 0).items() if k != "labels"}
    ours = family_parity.our_inputs(given)
    adapter = lora.init(jax.random.key(0), apply, params, config, **ours)
    adapter = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), adapter
    )
    save_peft(tmp_path, params, adapter, config, names=table, task_type="CAUSAL_LM")
    opened = family_parity.opened_by_peft(model, tmp_path).eval()
    logits = lora.lift(apply, strict=True)(lora.bind(params, adapter), **ours)
    family_parity.assert_same_logits(
        np.asarray(logits), family_parity.torch_logits(opened, given), given
    )


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens_in_transformers(tied, tmp_path):
    """The lines that an export prints: the base is resized, and PEFT puts the rows into it."""
    this = case("llama", tied)
    model = family_parity.torch_model(this, 0)
    size = model.config.vocab_size
    model.save_pretrained(tmp_path / "base")
    loaded = checkpoints.load(tmp_path / "base", head="causal-lm")
    loaded = added_tokens.resize(loaded, size + 2)
    ids = dict.fromkeys(added_tokens.find_leaves(loaded), (size, 5, size + 1))
    config = lora.LoRAConfig(rank=2, targets=("q_proj",), train_tokens=ids)
    given = {"input_ids": np.array([[3, size, 5, size + 1, 7]])}
    adapter = lora.init(
        jax.random.key(0), loaded.model.apply, loaded.params, config, given["input_ids"]
    )
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape)
    adapter = jax.tree.map(noise, adapter)
    names = checkpoints.names(loaded)
    save_peft(tmp_path / "a", loaded.params, adapter, config, names=names, task_type="CAUSAL_LM")
    merged = lora.merge(loaded.params, adapter)
    ours = np.asarray(loaded.model.apply(merged, given["input_ids"]))

    family_parity.quiet(model.resize_token_embeddings, size + 2)
    opened = family_parity.opened_by_peft(model, tmp_path / "a").eval()
    theirs = family_parity.torch_logits(opened, given)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)

    checkpoints.save_hf(
        tmp_path / "merged", loaded.params, loaded.checkpoint, head="causal-lm", adapter=adapter
    )
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    theirs = family_parity.torch_logits(again, given)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
