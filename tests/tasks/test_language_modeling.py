"""Language modelling: which tokens count, what they cost, and texts written in batches."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from ml_collections import ConfigDict

from lora_jax.data import texts
from lora_jax.models import checkpoints, generate, gpt2, hub
from lora_jax.models.decoding import Decoding
from lora_jax.models.tokenizer import read_tokenizer
from lora_jax.tasks import generation, language_modeling

ROWS = [([7, 8], [9]), ([5], [6, 6, 4]), ([1, 2, 3], [4, 5])]
OPTIONS = {"batch_size": 4, "buckets": (4, 6)}


def test_a_batch_says_what_counts():
    batch = texts.train_batch(texts.make_texts(ROWS, pad_id=3), 0, seed=0, **OPTIONS)
    assert set(batch) == {"input_ids", "attention_mask", "counts", "weights"}
    assert batch["input_ids"].shape == (4, 6) and batch["weights"].tolist() == [1, 1, 1, 0]
    found = {}
    for ids, mask, counts in zip(
        *(batch[k] for k in ("input_ids", "attention_mask", "counts")), strict=True
    ):
        n = mask.sum()
        assert (ids[n:] == 3).all() and (counts[n:] == 0).all()
        found[tuple(ids[:n])] = counts[:n].tolist()
    assert found == {tuple(a + b): [0] * len(a) + [1] * len(b) for a, b in ROWS}
    (whole,) = texts.eval_batches(texts.make_texts(ROWS), **OPTIONS)
    assert whole["index"].tolist() == [0, 1, 2, 0]  # shortest first


@pytest.mark.parametrize("row", [([], [1]), ([1], [])])
def test_a_text_needs_both_parts(row):
    with pytest.raises(ValueError, match="text 1 has .* both must be there"):
        texts.make_texts([ROWS[0], row])


class Said(nn.Module):
    """A model that has its logits as a parameter."""

    def compute_hidden(self, input_ids, attention_mask, deterministic):
        return self.get_variable("params", "logits"), None

    def compute_logits(self, hidden):
        return hidden


def loss_by_hand(logits, batch, smoothing):
    """Token by token, in float64."""
    loss = right = count = 0.0
    for row, ids, counts, weight in zip(
        np.asarray(logits, np.float64),
        batch["input_ids"],
        batch["counts"],
        batch["weights"],
        strict=True,
    ):
        for k in range(1, len(ids)):
            if not (counts[k] and weight):
                continue
            log_probs = row[k - 1] - np.log(np.exp(row[k - 1]).sum())
            target = np.full(len(log_probs), smoothing / len(log_probs))
            target[ids[k]] += 1 - smoothing
            loss -= target @ log_probs
            right += row[k - 1].argmax() == ids[k]
            count += 1
    return loss, right, count


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_of_the_tokens_that_count(smoothing):
    batch = texts.train_batch(texts.make_texts(ROWS), 0, seed=0, **OPTIONS)
    logits = np.random.default_rng(0).normal(size=(4, 6, 11)).astype(np.float32)
    logits[0, 0, batch["input_ids"][0, 1]] = 9.0  # one that is right, if it counts

    def loss(logits, batch):
        params = {"params": {"logits": logits}}
        losses = language_modeling.apply(Said(), params, batch, None, smoothing=smoothing)
        return language_modeling.token_loss(losses, batch)

    sums = loss(jnp.asarray(logits), batch)
    np.testing.assert_allclose(sums, loss_by_hand(logits, batch, smoothing), rtol=1e-6)
    # What is said of anything else matters neither to the loss nor to its gradient.
    counts = np.zeros((4, 6), bool)
    counts[:, :-1] = batch["counts"][:, 1:] * batch["weights"][:, None] > 0
    other = jnp.where(counts[..., None], logits, jnp.nan)
    np.testing.assert_array_equal(loss(other, batch), sums)
    grads = jax.grad(lambda x: loss(x, batch).loss)(other)
    assert (np.abs(grads).sum(-1) > 0).tolist() == counts.tolist()
    assert np.isfinite(grads).all()


# --- Writing


VOCAB = 20


def loaded_model(tmp_path, **about):
    config = gpt2.GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=8, n_layer=1, n_head=2, initializer_range=1.0
    )
    model = gpt2.GPT2LMHeadModel(config)
    params = jax.jit(model.init)(jax.random.key(1), jnp.ones((1, 2), jnp.int32))
    said = config.to_hf() | {"eos_token_id": [2, 3]} | about
    here = hub.Checkpoint("tiny", tmp_path, said, (tmp_path / hub.WEIGHTS,), "made")
    checkpoints.save_hf(tmp_path, params, here, head="causal-lm")
    return checkpoints.load(tmp_path, head="causal-lm")


@pytest.mark.slow
def test_texts_in_batches_are_those_of_each_prompt_alone(tmp_path):
    loaded = loaded_model(tmp_path)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, VOCAB, n).tolist() for n in (5, 1, 9, 3, 2)]
    free = Decoding(max_new_tokens=7)
    whole = generation.write(loaded, loaded.params, prompts, decoding=free, batch_size=5)
    stop = (whole[0][2], whole[1][4])  # so that some end before the others
    settings = Decoding(max_new_tokens=7, stop=stop, pad_id=stop[0])
    options = {"decoding": settings, "batch_size": 2}
    written = generation.write(loaded, loaded.params, prompts, buckets=(4,), **options)
    for long, text in zip(whole, written, strict=True):
        assert text == long[: next((k for k, t in enumerate(long) if t in stop), 7)]
    run = generate.generator(*generate.causal_lm(loaded.model, gpt2.init_cache), free)
    for prompt, text in zip(prompts, whole, strict=True):
        made = run(loaded.params, generate.pad_left([prompt], pad_id=0, length=9))
        assert text == made.tokens[0].tolist()
    assert len({tuple(text) for text in whole}) > 1 and min(map(len, written)) <= 2
    with pytest.raises(ValueError, match="prompts must have"):
        generation.write(loaded, loaded.params, [], **options)


def test_which_tokens_end_a_text(tmp_path):
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    assert generation.stop_tokens(loaded_model(tmp_path), tokenizer) == (2, 3)
    assert generation.stop_tokens(loaded_model(tmp_path, eos_token_id=4), tokenizer) == (4,)
    silent = loaded_model(tmp_path, eos_token_id=None)
    with pytest.raises(ValueError, match="put eos_token_id into its config.json"):
        generation.stop_tokens(silent, tokenizer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    assert generation.stop_tokens(silent, tokenizer) == (0,)


def test_sampling_follows_the_seed(tmp_path):
    loaded = loaded_model(tmp_path)
    decode = {"max_new_tokens": 5, "sample": True, "batch_size": 2, "buckets": (), "seed": 0}
    settings = generation.make_decoding(ConfigDict({"decode": decode}), (2,))
    assert settings == Decoding(max_new_tokens=5, sample=True, stop=(2,), pad_id=2)
    run = lambda seed: generation.write(
        loaded, loaded.params, [[5], [6], [5]], decoding=settings, batch_size=2, seed=seed
    )
    assert run(0) == run(0) != run(1)


def test_tokenisers_of_vocabulary_and_merges(tmp_path):
    made = tokenizers.ByteLevelBPETokenizer()
    lines = ["the cat sat", "the mat é"]
    made.train_from_iterator(
        lines, vocab_size=280, special_tokens=["<|endoftext|>"], show_progress=False
    )
    made.save_model(str(tmp_path))
    read = read_tokenizer(tmp_path)
    for text in ("the cat", " the mat é 電", ""):
        assert read.encode(text).ids == made.encode(text).ids
        assert read.decode(read.encode(text).ids) == text
    assert read.encode("cat<|endoftext|>").ids[-1] == 0
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"No tokenizer in .*vocab\.json with merges\.txt"):
        read_tokenizer(tmp_path)
