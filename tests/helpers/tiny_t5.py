"""A tiny T5 checkpoint on disk, for tests of the programs; its data are those of ``tiny``."""

import json

import jax
import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from lora_jax import names, paths
from lora_jax.models import t5
from tests.helpers.tiny_encoder import WORDS

# "negative" is two tokens.
PIECES = ["▁" + w for w in (*WORDS, "sst2", "sentence:", "positive", "negat")] + ["ive", "▁"]


def tokenizer():
    """Of pieces, as T5's; it ends every text with ``</s>``."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((p, -1.0) for p in PIECES)]
    made = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return made


def checkpoint(directory, seed=0):
    """A random model of version 1.1."""
    about = {
        "model_type": "t5", "vocab_size": len(PIECES) + 3, "d_model": 16, "d_kv": 4, "d_ff": 24,
        "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False, "decoder_start_token_id": 0, "dropout_rate": 0.0,
    }  # fmt: skip
    config = t5.T5Config.from_hf(about)
    inputs = t5.FAMILY.inputs("seq2seq-lm")
    shapes = jax.eval_shape(t5.T5ForConditionalGeneration(config).init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(seed)
    tensors = {}
    for weight in names.weights(t5.names(config), paths.named_leaves(shapes["params"])):
        if weight.hf not in weight.row.tied:
            center = 1.0 if weight.leaf.endswith("scale") else 0.0
            value = center + 0.3 * rng.normal(size=names.tensor_shape(weight))
            tensors[weight.hf] = value.astype(np.float32)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(about))
    tokenizer().save(str(directory / "tokenizer.json"))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory
