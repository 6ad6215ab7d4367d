"""Reads labelled sentences, conversations and texts, and makes batches of them."""

from lora_jax.extras import require

require(__name__, "train", "jinja2", "ml_collections", "tensorflow_datasets", "tokenizers")
