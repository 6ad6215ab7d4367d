"""Accuracy of runs of SST-2 on training sentences that are really new to them.

    python -m scripts.score_new_sentences DIRECTORY_OF_SST2 runs/best_0 runs/best_1 ...

SST-2's training set has the phrases of a sentence as examples of their own, so that an example left
out at random has often been seen in part. Scored here are 2,500 examples of at least ten words that
share no five words in a row with the run's training examples, nor with each other, by the adapter
of the run's last step (not the best one on the validation set). For choosing recipes.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

import lora_jax as lora
from configs import sst2_minilm
from lora_jax.data import batches, examples, sources, tokenization
from lora_jax.models.checkpoints import load_tokenizer, resolve
from lora_jax.tasks import classification, from_config, glue
from lora_jax.training import checkpointing, durations, workdirs
from lora_jax.training.state import initial_state, unwrap_key

WORDS, SHARED, COUNT = 10, 5, 2500


def grams(sentence):
    words = sentence.split()
    return {tuple(words[k : k + SHARED]) for k in range(len(words) - SHARED + 1)}


def new_sentences(training, others):
    """The first of the other examples that qualify."""
    seen, chosen = set().union(*map(grams, training.sentences)), []
    for k, sentence in enumerate(others.sentences):
        found = grams(sentence)
        if len(sentence.split()) >= WORDS and not found & seen:
            seen |= found
            chosen.append(k)
    return examples.take(others, chosen[:COUNT])


def last_adapter(run, task, config):
    state, _ = initial_state(task, config, from_config.lora_config(config))
    with checkpointing.manager(run / workdirs.CHECKPOINTS) as checkpoints:
        stored, _ = checkpointing.restore(checkpoints, unwrap_key(state))
    done, total = int(stored.step), durations.make_plan(config, task.steps_per_epoch).total
    if done < total:
        raise SystemExit(f"{run} stands at step {done} of {total}: finish it first.")
    return stored.adapter


def accuracy(run, source):
    config = sst2_minilm.get_config().unlock()
    config.update(json.loads((run / "config.json").read_text()))
    config.data.source = source
    everything = sources.load(source, "train", num_labels=2)
    config.data.holdout = len(everything.labels) - config.data.train_examples
    training, (others,) = classification.load_examples(config, glue.find(config.task))
    chosen = new_sentences(training, others)
    config.data.holdout = 1  # the task is there for its model and its training examples
    task, _ = classification.make_task(config)
    tokenizer = load_tokenizer(resolve(config.model.name))
    tokens = tokenization.tokenize(chosen, tokenizer, max_length=config.data.max_length)
    merged = lora.merge(task.base, last_adapter(run, task, config))
    step, right = jax.jit(lambda params, batch: task.apply(params, batch, None)), 0
    for batch in batches.eval_batches(tokens, batch_size=64, buckets=tuple(config.data.buckets)):
        guesses = np.argmax(step(merged, batch), axis=-1)
        right += int(((guesses == batch["labels"]) & (batch["weights"] > 0)).sum())
    return right / len(chosen.labels)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        print(name, round(accuracy(Path(name), sys.argv[1]), 4), flush=True)
