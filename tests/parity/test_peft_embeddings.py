"""Embeddings and heads beside factors, as PEFT saves and loads them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

# Of torch's libraries to each other.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import lora_jax as lora  # noqa: E402
from lora_jax.models import checkpoints  # noqa: E402
from lora_jax.peft import load_peft, save_peft  # noqa: E402

IDS = np.random.default_rng(0).integers(0, 40, (2, 6))
SHAPE = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
             num_attention_heads=2, max_position_embeddings=64)  # fmt: skip


def base(directory, *, tied):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SHAPE, tie_word_embeddings=tied)
    )
    model.save_pretrained(directory)
    return model


def adapt(model, targets, **words):
    settings = peft.LoraConfig(
        r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **words
    )
    return peft.get_peft_model(model, settings).eval()


def theirs(root):
    """The logits of the adapter as PEFT loads it, over the base as it is on disk."""
    model = transformers.LlamaForCausalLM.from_pretrained(root / "base")
    model = peft.PeftModel.from_pretrained(model, root / "adapter").eval()
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def load(root):
    loaded = checkpoints.load(root / "base", head="causal-lm")
    adapter, _ = load_peft(root / "adapter", loaded.params, names=checkpoints.names(loaded))
    return loaded, adapter


def ours(root):
    loaded, adapter = load(root)
    merged = lora.merge(loaded.params, adapter)
    return loaded.model.apply(merged, jnp.asarray(IDS), jnp.ones_like(IDS))


@pytest.mark.parametrize("changed", [False, True], ids=["as they were", "changed"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_save_embedding_layers(tied, changed, tmp_path):
    """The words of the adapter say nothing of the embeddings that its file holds."""
    model = adapt(base(tmp_path / "base", tied=tied), ["q_proj", "down_proj"])
    if changed:  # as after training with embeddings that require gradients
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(0.5)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    np.testing.assert_allclose(ours(tmp_path), theirs(tmp_path), rtol=0, atol=1e-4)
    _, adapter = load(tmp_path)
    assert ("embed_tokens" in adapter["params"]["model"]) == changed


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_embeddings_trained_in_full_that_stay_tied(saved, tied, tmp_path):
    words = dict(modules_to_save=saved, ensure_weight_tying=True)
    model = adapt(base(tmp_path / "base", tied=tied), ["q_proj"], **words)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.add_(0.3 * torch.randn_like(value) * ("modules_to_save" in name))
    model.save_pretrained(tmp_path / "adapter")
    expected = theirs(tmp_path)
    np.testing.assert_allclose(ours(tmp_path), expected, rtol=0, atol=1e-4)
    # With words of its own it is written for PEFT as one that is replaced in all its uses.
    loaded = checkpoints.load(tmp_path / "base", head="causal-lm")
    table = checkpoints.names(loaded)
    adapter, config = load_peft(tmp_path / "adapter", loaded.params, names=table)
    config = dataclasses.replace(config, origin={})
    save_peft(tmp_path / "adapter", loaded.params, adapter, config, names=table)
    np.testing.assert_allclose(theirs(tmp_path), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("saved", [False, "auto"])
@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens", "v_proj"]])
def test_factors_with_and_without_a_copy_of_what_is_frozen(targets, saved, tmp_path):
    model = adapt(base(tmp_path / "base", tied=False), targets)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=saved)
    np.testing.assert_allclose(ours(tmp_path), theirs(tmp_path), rtol=0, atol=1e-4)


def test_copies_in_bfloat16_of_a_base_in_float32(tmp_path):
    model = adapt(base(tmp_path / "base", tied=False), ["q_proj", "lm_head"])
    model.to(torch.bfloat16).save_pretrained(tmp_path / "adapter")
    # PEFT rounds the head of its base to that of the file; here the base stays as it is
    np.testing.assert_allclose(ours(tmp_path), theirs(tmp_path), rtol=0, atol=0.02)


@pytest.mark.parametrize("words", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}])
def test_a_resized_vocabulary(words, tmp_path):
    model = base(tmp_path / "base", tied=False)
    model.resize_token_embeddings(43)
    adapted = adapt(model, ["q_proj"], **words)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=not words)
    with pytest.raises(ValueError, match="43 entries and that of the base 40"):
        load(tmp_path)


def test_a_whole_state_dict(tmp_path):
    """As DeepSpeed's scripts make of a checkpoint: names with the adapter's, and all of the base."""
    from safetensors.torch import load_file, save_file

    model = adapt(base(tmp_path / "base", tied=False), ["q_proj", "v_proj"])
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    factors = {name for name in model.state_dict() if "lora_" in name}
    assert {n.replace(".default", "") for n in factors} == set(load_file(path))
    save_file({n: x.contiguous() for n, x in model.state_dict().items() if n in factors}, path)
    np.testing.assert_allclose(ours(tmp_path), theirs(tmp_path), rtol=0, atol=1e-4)
