"""Sweeps: many runs through one compiled step, and reports of what they found."""

from lora_jax.extras import require

require(__name__, "train", "matplotlib", "ml_collections", "tqdm")
