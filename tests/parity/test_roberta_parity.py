"""RoBERTa and XLM-R against transformers and PEFT, live."""

import json

import numpy as np
import pytest

from lora_jax.models import tokenizer
from tests.helpers import family_parity, places

transformers = family_parity.transformers

pytestmark = pytest.mark.parity


def random_config(seed, cls=transformers.RobertaConfig):
    rng = np.random.default_rng(seed)
    heads = int(rng.integers(1, 5))
    return cls(
        vocab_size=int(rng.integers(20, 60)),
        hidden_size=heads * int(rng.integers(3, 9)),
        num_hidden_layers=int(rng.integers(1, 4)),
        num_attention_heads=heads,
        intermediate_size=int(rng.integers(5, 50)),
        hidden_act=str(rng.choice(["gelu", "gelu_new", "relu"])),
        max_position_embeddings=int(rng.integers(14, 20)),
        type_vocab_size=int(rng.integers(1, 3)),
        pad_token_id=int(rng.integers(0, 4)),
        layer_norm_eps=float(rng.choice([1e-5, 1e-2])),
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def random_inputs(config, seed):
    """Padding left or right, and padding tokens that the mask does not hide."""
    rng = np.random.default_rng(seed)
    pad = config.pad_token_id if seed % 3 else None
    inputs = family_parity.padded_ids(config.vocab_size, seed, left=seed % 2 == 1, pad=pad)
    types = rng.integers(0, config.type_vocab_size, inputs["input_ids"].shape)
    return inputs | {"token_type_ids": types, "labels": rng.integers(0, 3, len(types))}


CASE = family_parity.Case(
    head="classifier",
    model=transformers.RobertaForSequenceClassification,
    config=random_config,
    inputs=random_inputs,
)
XLM = CASE._replace(
    model=transformers.XLMRobertaForSequenceClassification,
    config=lambda seed: random_config(seed, transformers.XLMRobertaConfig),
)


@pytest.mark.supports("RoBERTa", "logits")
@pytest.mark.parametrize("seed", range(8))
def test_logits_of_random_models(seed, tmp_path):
    family_parity.check_logits(CASE, seed, tmp_path, scan_layers=seed % 4 == 3)


@pytest.mark.supports("XLM-R", "logits")
@pytest.mark.parametrize("seed", range(2))
def test_logits_of_random_xlm(seed, tmp_path):
    family_parity.check_logits(XLM, seed, tmp_path)


@pytest.mark.supports("RoBERTa", "training")
def test_50_steps(tmp_path):
    family_parity.check_training(CASE, tmp_path)


@pytest.mark.supports("XLM-R", "training")
def test_50_steps_of_xlm(tmp_path):
    family_parity.check_training(XLM._replace(targets="all-linear"), tmp_path, scan_layers=True)


@pytest.mark.supports("RoBERTa", "PEFT round trip")
@pytest.mark.parametrize("targets", [("query", "value"), "all-linear"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_peft_round_trip(targets, scan_layers, tmp_path):
    family_parity.check_peft(CASE._replace(targets=targets), 1, tmp_path, scan_layers=scan_layers)


@pytest.mark.supports("XLM-R", "PEFT round trip")
def test_peft_round_trip_of_xlm(tmp_path):
    family_parity.check_peft(XLM, 1, tmp_path)


@pytest.mark.supports("RoBERTa", "merged export")
@pytest.mark.parametrize("scan_layers", [False, True])
def test_transformers_opens_merged_weights(scan_layers, tmp_path):
    auto = transformers.AutoModelForSequenceClassification
    family_parity.check_merged_export(CASE, 2, tmp_path, auto=auto, scan_layers=scan_layers)


@pytest.mark.supports("XLM-R", "merged export")
def test_transformers_opens_merged_weights_of_xlm(tmp_path):
    auto = transformers.AutoModelForSequenceClassification
    family_parity.check_merged_export(XLM, 2, tmp_path, auto=auto)


GPT2 = places.SHARED / "gpt2_tokenizer"
TEXTS = ["Hello world", " two  spaces", "naïve 電影 — it's 100%\tbad…\n", "a b</s>c", ""]


@pytest.mark.skipif(not GPT2.is_dir(), reason=f"needs GPT-2's tokenizer in {GPT2}")
@pytest.mark.parametrize("prefix", [False, True])
def test_tokens_of_a_vocabulary_and_merges(prefix, tmp_path):
    """RoBERTa's files: GPT-2's words, with its own special tokens before and behind them."""
    words = json.loads((GPT2 / "vocab.json").read_text())
    special = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        *(w for w in words if w != "<|endoftext|>"),
        "<mask>",
    ]
    numbers = {word: k for k, word in enumerate(special)}
    (tmp_path / "vocab.json").write_text(json.dumps(numbers))
    (tmp_path / "merges.txt").write_bytes((GPT2 / "merges.txt").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": prefix}))
    theirs = transformers.RobertaTokenizerFast.from_pretrained(tmp_path)
    ours = tokenizer.read_tokenizer(tmp_path)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text
        assert ours.encode(text, "and").ids == theirs(text, "and")["input_ids"], text
