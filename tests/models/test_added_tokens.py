"""Rows for added tokens: the mean of a model's own, in its embedding and its head."""

import doctest
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models

from lora_jax import paths
from lora_jax.models import added_tokens, checkpoints
from tests.helpers import places

GOLDENS = places.GOLDENS / "tokens"
TABLES = {
    "llama": {"params/model/embed_tokens/embedding": 0, "params/lm_head/kernel": 1},
    "llama_tied": {"params/model/embed_tokens/embedding": 0},
    "gpt2": {"params/transformer/wte/embedding": 0},
}


def load(case):
    return checkpoints.load(GOLDENS / case / "base", head="causal-lm")


def test_doctests():
    assert doctest.testmod(added_tokens).failed == 0


@pytest.mark.parametrize("case", TABLES)
def test_new_rows_are_the_mean(case):
    loaded = load(case)
    assert added_tokens.find_leaves(loaded) == TABLES[case]
    resized = added_tokens.resize(loaded, 102)
    old, new = (paths.named_leaves(x.params) for x in (loaded, resized))
    for name, x in new.items():
        axis = TABLES[case].get(name)
        if axis is None:
            assert x is old[name]
            continue
        was, x = np.asarray(old[name]), np.asarray(x)
        np.testing.assert_array_equal(np.take(x, range(99), axis), was)
        for k in (99, 100, 101):
            np.testing.assert_allclose(np.take(x, k, axis), was.mean(axis), rtol=0, atol=1e-6)
    assert resized.model.config.vocab_size == 102 and resized.is_resized
    assert resized.checkpoint.config["vocab_size"] == 102
    assert loaded.checkpoint.config["vocab_size"] == 99 and not loaded.is_resized
    assert added_tokens.resize(loaded, 99) is loaded
    with pytest.raises(ValueError, match="has 99 tokens, and can't be cut to 98"):
        added_tokens.resize(loaded, 98)


def test_old_tokens_have_the_old_logits(tmp_path):
    loaded, ids = load("llama"), np.array([[5, 17, 33, 2]])
    resized = added_tokens.resize(loaded, 101)
    old = jax.jit(loaded.model.apply)(loaded.params, ids)
    new = jax.jit(resized.model.apply)(resized.params, ids)
    np.testing.assert_allclose(new[..., :99], old, rtol=0, atol=1e-6)
    np.testing.assert_allclose(new[..., 99:], jnp.tile(old.mean(-1, keepdims=True), 2), atol=1e-5)
    checkpoints.save_hf(tmp_path, resized.params, resized.checkpoint, head="causal-lm")
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 101
    again = checkpoints.load(tmp_path, head="causal-lm")
    for name, x in paths.named_leaves(again.params).items():
        np.testing.assert_array_equal(x, paths.named_leaves(resized.params)[name])


def test_special_tokens_and_others():
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="a"))
    tokenizer.add_special_tokens(["<s>"])
    tokens = {"<tool>": False, "<|end|>": True, "<s>": True, "[werkzeug ü]": False}
    ids = added_tokens.add(tokenizer, tokens)
    assert sorted(ids) == [1, 2, 3, 4] and ids[2] == 1
    assert added_tokens.add(tokenizer, tokens) == ids  # once is enough
    encoded = tokenizer.encode("<tool>a[werkzeug ü]<|end|>").ids
    assert encoded == [ids[0], 0, ids[3], ids[1]]
    assert tokenizer.decode(encoded) == "<tool> a [werkzeug ü]"
