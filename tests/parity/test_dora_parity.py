"""DoRA beside PEFT's, live: the same training in float64, and the same files."""

import numpy as np
import pytest

from tests.helpers import family_parity

transformers = family_parity.transformers

pytestmark = pytest.mark.parity

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 16, "vocab_size": 30,
}  # fmt: skip


def bert(seed):
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertConfig(**SIZES, **none, num_labels=3)


def gpt2(seed):
    return transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=16, vocab_size=30, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip


def llama(seed):
    return transformers.LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=False)


def sentences(config, seed):
    labels = np.random.default_rng(seed).integers(0, 3, 4)
    return family_parity.padded_ids(config.vocab_size, seed) | {"labels": labels}


def texts(config, seed):
    inputs = family_parity.padded_ids(config.vocab_size, seed, left=True)
    mask = inputs["attention_mask"]
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    labels = np.where(mask.cumsum(-1) > 1, inputs["input_ids"], -100)
    return inputs | {"position_ids": positions, "labels": labels}


def language_model(model, config, *targets):
    return family_parity.Case("causal-lm", model, config, texts, targets, "CAUSAL_LM")


CASES = {
    "BERT": family_parity.Case(
        "classifier", transformers.BertForSequenceClassification, bert, sentences
    ),
    "GPT-2": language_model(transformers.GPT2LMHeadModel, gpt2, "c_attn", "mlp.c_proj"),
    "Llama": language_model(transformers.LlamaForCausalLM, llama, "q_proj", "v_proj", "down_proj"),
}


@pytest.mark.parametrize("name", CASES)
def test_20_steps_in_float64(name, tmp_path):
    family_parity.check_training(CASES[name], tmp_path, steps=20, use_dora=True)


@pytest.mark.parametrize("name", CASES)
def test_files_are_read_and_written(name, tmp_path):
    family_parity.check_peft(CASES[name], 0, tmp_path, use_dora=True, use_rslora=True)


def test_layers_in_one_array(tmp_path):
    family_parity.check_training(CASES["Llama"], tmp_path, steps=3, scan_layers=True, use_dora=True)
