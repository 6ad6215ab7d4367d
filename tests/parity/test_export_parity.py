"""Merged exports in half precision and in shards, as transformers opens and writes them."""

import json

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import lora_jax as lora  # noqa: E402
from lora_jax.models import checkpoints, hub  # noqa: E402
from tests.helpers import gguf_checkpoints, gguf_tokens, tiny_llama  # noqa: E402
from tests.helpers.comparisons import perturbed  # noqa: E402
from tests.helpers.quantized_checkpoints import load  # noqa: E402

IDS = np.random.default_rng(0).integers(0, 20, (2, 9))


def base(kind, tmp_path):
    if kind == "plain":
        return tiny_llama.checkpoint(tmp_path / "base", torch_dtype="bfloat16")
    made = gguf_tokens.bpe()
    changes = {"vocab_size": made.get_vocab_size()}
    words = gguf_tokens.words(made)
    return gguf_checkpoints.make(tmp_path, "llama", kind, words=words, changes=changes)[1]


@pytest.mark.parametrize("kind", ["plain", "Q4_1"])
def test_transformers_opens_shards_in_bfloat16(kind, tmp_path):
    loaded = load(base(kind, tmp_path), scan_layers=True)
    settings = lora.LoRAConfig(rank=2, targets=loaded.family.targets)
    adapter = lora.init(jax.random.key(0), loaded.model.apply, loaded.params, settings, IDS)
    adapter = perturbed(adapter, size=0.1)
    out = tmp_path / "out"
    checkpoints.save_hf(
        out, loaded.params, loaded.checkpoint, head="causal-lm", adapter=adapter, dtype="bfloat16",
        shard_size="10KB",
    )  # fmt: skip
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype="auto", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        theirs = model.float().eval()(torch.tensor(IDS)).logits.numpy()
    again = load(out)
    ours = jax.jit(again.model.apply)(again.params, IDS)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)
    merged = lora.merge(loaded.params, adapter)
    exact = jax.jit(loaded.model.apply)(merged, IDS)
    assert np.abs(theirs - exact).max() < 0.03 * np.abs(exact).max()
    # What transformers writes of it has the same index, but for the order of the tensors.
    model.bfloat16().save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    index, wanted = (json.loads((d / hub.INDEX).read_text()) for d in (out, tmp_path / "theirs"))
    assert index["metadata"] == wanted["metadata"]
    assert index["weight_map"].keys() == wanted["weight_map"].keys()
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    assert (out / hub.INDEX).read_text() == text
