"""The optimiser that a config describes."""

import math
from typing import Any, NamedTuple

import jax
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


class Settings(NamedTuple):
    """What the optimiser does with a gradient: numbers, or JAX scalars where a sweep varies them.

    Attributes:
      learning_rate: at its peak.
      warmup_steps: steps of the linear rise to it; 0 for none.
      total_steps: the step at which the linear decay has come to zero.
      weight_decay: of AdamW; it is multiplied by the learning rate.
      clip_norm: the largest global norm of a gradient; infinite for no limit.
    """

    learning_rate: Any
    warmup_steps: Any
    total_steps: Any
    weight_decay: Any
    clip_norm: Any


def settings(config: ConfigDict, total_steps: int) -> Settings:
    """The settings that a config describes, for a run of ``total_steps``.

    Raises:
      ValueError: as :func:`check`.
    """
    check(config)
    return Settings(
        learning_rate=config.learning_rate,
        warmup_steps=round(config.warmup * total_steps),
        total_steps=total_steps,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm or math.inf,
    )


def schedule(settings: Settings) -> optax.Schedule:
    """Linear warm-up, then linear decay to zero at the last step.

    Optax's own schedules want the number of steps as a Python number, where a sweep has an array.

    >>> rate = schedule(Settings(0.5, 2, 6, 0.0, 1.0))
    >>> [float(rate(step)) for step in range(7)]
    [0.0, 0.25, 0.5, 0.375, 0.25, 0.125, 0.0]
    """
    s = settings

    def rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, float)
        rise = step / jnp.maximum(s.warmup_steps, 1)
        left = (s.total_steps - step) / jnp.maximum(s.total_steps - s.warmup_steps, 1)
        fraction = jnp.where(step < s.warmup_steps, rise, left)
        return s.learning_rate * jnp.clip(fraction, 0.0, 1.0)

    return rate


def adamw(settings: Settings, adapter: Any) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) on the trainable leaves; the scales stay as they are."""
    clip = optax.clip_by_global_norm(settings.clip_norm)
    rule = optax.adamw(schedule(settings), weight_decay=settings.weight_decay)
    parts = {"trainable": optax.chain(clip, rule), "frozen": optax.set_to_zero()}
    return optax.multi_transform(parts, lora.labels(adapter))


def make(config: ConfigDict, adapter: Any, total_steps: int) -> optax.GradientTransformation:
    """The optimiser of a config.

    Raises:
      ValueError: as :func:`check`.
    """
    return adamw(settings(config, total_steps), adapter)
