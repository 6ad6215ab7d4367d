"""A tiny BERT checkpoint and data set on disk, for tests of the programs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from lora_jax import paths
from lora_jax.models import bert

WORDS = "good great fine lovely bad awful poor dull film book meal the a was very".split()


def checkpoint(directory, seed=0):
    """A random two-layer model with a vocabulary of a few words."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    about = {
        "model_type": "bert", "vocab_size": len(vocabulary), "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 20,
    }  # fmt: skip
    config = bert.BertConfig.from_hf(about)
    model = bert.BertModel(config)
    ids = jnp.ones((1, 3), jnp.int32)
    shapes = paths.named_leaves(jax.eval_shape(model.init, jax.random.key(0), ids, ids)["params"])
    rng = np.random.default_rng(seed)
    tensors = {}
    for row in bert.names(config, head="encoder"):
        shape = shapes[row.flax].shape
        center = 1.0 if row.flax.endswith("scale") else 0.0
        value = (center + 0.3 * rng.normal(size=shape)).astype(np.float32)
        tensors[row.hf] = np.ascontiguousarray(value.T if row.transpose else value)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(about))
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


def data(directory, n=200):
    """Sentences whose label is that of their only adjective."""
    rng = np.random.default_rng(1)
    directory.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", n), ("dev", 20)):
        lines = ["sentence\tlabel"]
        for _ in range(count):
            label = int(rng.integers(2))
            adjective = WORDS[int(rng.integers(4)) + 4 * (1 - label)]
            noun = WORDS[8 + int(rng.integers(3))]
            lines.append(f"the {noun} was {adjective}\t{label}")
        (directory / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return directory


def overrides(root):
    """Config fields that make a run of the tiny model on the tiny data, of a few seconds."""
    return {
        "model.name": str(root / "model"),
        "data.source": str(root / "data"),
        "data.train_examples": 0,
        "data.max_length": 16,
        "data.buckets": "(8,16)",
        "batch_size": 8,
        "eval_batch_size": 8,
        "epochs": 3,
        "log_every": 2,
        "lora.rank": 2,
        "lora.train": "('classifier','pooler','word_embeddings')",
        "optimizer.learning_rate": 0.01,
    }
