"""What is trained on: classification, language modelling, instructions; a task is a value."""

from lora_jax.extras import require

require(__name__, "train", "ml_collections", "sacrebleu", "tokenizers")
