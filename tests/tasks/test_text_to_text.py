"""T5 as a classifier: its words' tokens, their likelihoods, and the programs on the one loop."""

import dataclasses
import doctest
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.data import batches, tokenization
from lora_jax.data.examples import Examples
from lora_jax.models import checkpoints
from lora_jax.tasks import classification, classifier, text_to_text
from lora_jax.tasks.glue import TASKS
from tests.helpers import programs, tiny_encoder, tiny_t5

LABELS = ("negative", "positive")
SENTENCES = ("the film was good", "the book was very dull", "a fine meal")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    directory = tiny_t5.checkpoint(tmp_path_factory.mktemp("t5") / "model")
    return checkpoints.load(directory, head="seq2seq-lm")


def tokenizer(loaded):
    return checkpoints.load_tokenizer(loaded.checkpoint)


def batch(loaded):
    examples = text_to_text.to_prompts(
        Examples(SENTENCES, np.array([1, 0, 1], np.int32)), task=TASKS["sst2"]
    )
    tokens = tokenization.tokenize(examples, tokenizer(loaded), max_length=16)
    return next(batches.eval_batches(tokens, batch_size=4, buckets=(16,)))


def test_doctests():
    assert doctest.testmod(text_to_text).failed == 0


def test_words_are_the_tokens_of_the_labels_with_their_end(loaded):
    words = text_to_text.encode_labels(LABELS, tokenizer(loaded), loaded.model.config)
    token = tokenizer(loaded).token_to_id
    negative = [token("▁negat"), token("ive"), 1]
    assert words.tokens.tolist() == [negative, [token("▁positive"), 1, 0]]
    assert words.inputs.tolist() == [[0, *negative[:2]], [0, token("▁positive"), 1]]
    assert words.mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    with pytest.raises(ValueError, match="model.labels.*'yes', 'no'.*tells apart"):
        text_to_text.encode_labels(("yes", "no"), tokenizer(loaded), loaded.model.config)


def test_scores_are_log_likelihoods_of_the_words(loaded):
    """Token by token, each word alone, in numpy."""
    words = text_to_text.encode_labels(LABELS, tokenizer(loaded), loaded.model.config)
    inputs = batch(loaded)
    run = jax.jit(lambda params, b: text_to_text.apply(loaded.model, words, params, b, None))
    scores = run(loaded.params, inputs)
    for k, label in enumerate(LABELS):
        tokens = tokenizer(loaded).encode(label).ids
        given = np.tile([0, *tokens[:-1]], (4, 1))
        args = loaded.params, inputs["input_ids"], inputs["attention_mask"], given
        logits = np.float64(jax.jit(loaded.model.apply)(*args))
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = sum(log_probs[:, i, t] for i, t in enumerate(tokens))
        np.testing.assert_allclose(scores[:, k], expected, rtol=0, atol=1e-5)


def test_likelihood_counts_real_rows():
    scores = jnp.array([[-1.0, -2.0], [-3.0, -0.5], [-9.0, -9.5]])
    sums = text_to_text.likelihood(scores, jnp.array([0, 0, 1]), jnp.array([1.0, 1.0, 0.0]))
    assert [float(x) for x in sums] == [4.0, 1.0, 2.0]


def test_a_regression_is_refused_and_a_pair_is_asked_about(loaded):
    with pytest.raises(
        ValueError, match="'stsb' is a regression.*choose a model with a classifier"
    ):
        classification.make_scorer(loaded, ("similarity",), tokenizer(loaded), task=TASKS["stsb"])
    scorer = classification.make_scorer(loaded, LABELS, tokenizer(loaded), task=TASKS["qnli"])
    asked = scorer.to_prompts(Examples(("Who?",), None, ("A man.",)))
    assert asked.sentences == ("qnli question: Who? sentence: A man.",) and asked.pairs is None


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    tiny_t5.checkpoint(root / "model")
    tiny_encoder.data(root / "data")
    return root


run = programs.run


@pytest.mark.xdist_group("t5 cli")
@pytest.mark.slow
def test_training_predicting_and_exporting(inputs, tmp_path):
    """The same loop and the same commands as for a model with a classifier."""
    kernels = ("q", "k", "v", "o", "wi_0", "wi_1", "wo", "lm_head")
    fields = tiny_encoder.overrides(inputs) | {
        "lora.train": "()", "lora.rank": 8, "lora.dropout": 0.0, "lora.targets": str(kernels),
        "data.buckets": "(16,)",
    }  # fmt: skip
    flags = [f"--config.{k}={v}" for k, v in fields.items()]
    adapter = tmp_path / "run" / "adapter"
    done = run("sst2", "--config=configs/sst2_t5.py", f"--workdir={adapter.parent}", *flags)
    assert done.returncode == 0, done.stderr
    lines = (adapter.parent / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line).get("eval_accuracy", 0) for line in lines) >= 0.9

    sentences = ["the film was great", "the film was awful"]
    done = run("predict", f"--adapter={adapter}", *sentences)
    assert [x.split()[0] for x in done.stdout.splitlines()] == ["positive", "negative"], done.stderr
    expected = classifier.predict(classifier.load(adapter), sentences)
    np.testing.assert_allclose(expected.sum(-1), 1, rtol=1e-6)

    done = run("export", f"--adapter={adapter}", f"--out={tmp_path / 'peft'}", "--peft")
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert about["task_type"] == "SEQ_2_SEQ_LM" and about["target_modules"] == sorted(kernels)
    again = classifier.load(tmp_path / "peft")
    assert (
        again.labels == LABELS
        and "labels negative, positive (those of lora_jax.json)" in again.notes
    )
    np.testing.assert_allclose(classifier.predict(again, sentences), expected, atol=1e-6)

    done = run("export", f"--adapter={adapter}", f"--out={tmp_path / 'merged'}", "--merged")
    assert done.returncode == 0 and "AutoModelForSeq2SeqLM" in done.stdout, done.stderr
    merged = classification.load_model(tmp_path / "merged")
    plain = dataclasses.replace(again, loaded=merged, adapter={})
    np.testing.assert_allclose(classifier.predict(plain, sentences), expected, atol=1e-6)
