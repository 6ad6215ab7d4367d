"""Tiny encoder checkpoints and a data set on disk, for tests of the programs."""

import ast
import json

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers

from configs import common
from lora_jax import paths
from lora_jax.models import registry

WORDS = "good great fine lovely bad awful poor dull film book meal the a was very".split()


BERT = {
    "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 20,
}  # fmt: skip
CONFIGS = {
    "bert": BERT,
    "roberta": BERT
    | {"model_type": "roberta", "max_position_embeddings": 22, "type_vocab_size": 1, "pad_token_id": 1},
    "distilbert": {
        "model_type": "distilbert", "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24,
        "max_position_embeddings": 20,
    },
}  # fmt: skip


def checkpoint(directory, seed=0, kind="bert"):
    """A random two-layer model without a head, with a vocabulary of a few words."""
    directory.mkdir(parents=True, exist_ok=True)
    about = CONFIGS[kind] | {"vocab_size": vocabulary(directory, roberta=kind == "roberta")}
    family = registry.find(about)
    config = family.config.from_hf(about)
    model = family.models["encoder"](config)
    ids = jnp.ones((1, 3), jnp.int32)
    shapes = paths.named_leaves(jax.eval_shape(model.init, jax.random.key(0), ids, ids)["params"])
    rng = np.random.default_rng(seed)
    tensors = {}
    for row in family.names(config, head="encoder"):
        shape = shapes[row.flax].shape
        center = 1.0 if row.flax.endswith("scale") else 0.0
        value = (center + 0.3 * rng.normal(size=shape)).astype(np.float32)
        tensors[row.hf] = np.ascontiguousarray(value.T if row.transpose else value)
    (directory / "config.json").write_text(json.dumps(about))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


def vocabulary(directory, *, roberta):
    """Writes a tokenizer of whole words, in the family's way; returns the size."""
    if not roberta:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
        (directory / "vocab.txt").write_text("\n".join(words) + "\n")
        return len(words)
    words = ["<s>", "<pad>", "</s>", "<unk>", *WORDS]
    numbers = {word: k for k, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    made.save(str(directory / "tokenizer.json"))
    return len(words)


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
        "eval_at_start": False,
        "lora.rank": 2,
        "lora.train": "('classifier','pooler','word_embeddings')",
        "optimizer.learning_rate": 0.01,
    }


def config(root, **changes):
    """The config of such a run."""
    made = common.base_config()
    for field, value in (overrides(root) | changes).items():
        tupled = isinstance(value, str) and value.startswith("(")
        made.update_from_flattened_dict({field: ast.literal_eval(value) if tupled else value})
    return made.lock()
