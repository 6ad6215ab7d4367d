"""Tasks as values: classification, language modelling, instructions, generation."""

from lora_jax.extras import require

require(__name__, "train", "ml_collections", "sacrebleu", "tokenizers")
