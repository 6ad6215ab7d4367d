"""Sweeps: many runs through one compiled step, and reports of their results."""

from lora_jax.extras import require

require(__name__, "train", "matplotlib", "ml_collections", "tqdm")
