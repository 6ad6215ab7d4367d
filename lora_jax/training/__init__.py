"""Training: one loop for every task and every kind of adapter."""

from lora_jax.extras import require

require(__name__, "train", "matplotlib", "ml_collections", "optax", "orbax", "tensorboardX", "tqdm")
