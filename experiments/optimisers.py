"""The optimiser that a config describes."""

import math
from typing import Any

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

import lora_jax as lora


def check(config: ConfigDict) -> None:
    """Finds settings that are out of their range.

    Raises:
      ValueError: names the field.
    """
    if not 0 < config.learning_rate < math.inf:
        raise ValueError(f"optimizer.learning_rate must be positive, got {config.learning_rate}.")
    for field in ("weight_decay", "clip_norm"):
        if not 0 <= config[field] < math.inf:
            raise ValueError(f"optimizer.{field} must not be negative, got {config[field]}.")
    if not 0 <= config.warmup < 1:
        raise ValueError(
            f"optimizer.warmup is a fraction in [0, 1) of all steps, got {config.warmup}."
        )


def schedule(config: ConfigDict, total_steps: int) -> optax.Schedule:
    """Linear warm-up over a fraction of the steps, then linear decay to zero at the last one."""
    warmup = round(config.warmup * total_steps)
    whole = optax.linear_schedule(config.learning_rate, 0.0, max(total_steps - warmup, 1))
    if warmup:
        rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
        whole = optax.join_schedules([rise, whole], [warmup])
    # An integer step gives float32 whatever is enabled; this is as exact as JAX is set to be.
    return lambda step: whole(jnp.asarray(step, float))


def make(config: ConfigDict, adapter: Any, total_steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) on the trainable leaves; the scales stay as they are.

    Raises:
      ValueError: as :func:`check`.
    """
    check(config)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    rate = schedule(config, total_steps)
    adamw = optax.adamw(rate, weight_decay=config.weight_decay)
    parts = {"trainable": optax.chain(clip, adamw), "frozen": optax.set_to_zero()}
    return optax.multi_transform(parts, lora.labels(adapter))
