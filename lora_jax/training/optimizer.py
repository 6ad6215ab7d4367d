"""The optimiser that a config describes."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax.training import durations

PyTree = Any
DECAYS = ("linear", "cosine", "none")
_WARMUP = "optimizer.warmup"


def check(config: ConfigDict) -> None:
    """Checks the fields of the section ``optimizer``.

    Raises:
      ValueError: names all fields that are wrong.
    """
    if problems := list(list_problems(config)):
        raise ValueError(f"{'; '.join(problems)}.")


def list_problems(config: ConfigDict) -> Iterator[str]:
    """Says what is wrong with the section ``optimizer``."""
    if not 0 < config.learning_rate < math.inf:
        yield f"optimizer.learning_rate must be positive, got {config.learning_rate}"
    for field in ("weight_decay", "clip_norm"):
        if not 0 <= config[field] < math.inf:
            yield f"optimizer.{field} must not be negative, got {config[field]}"
    try:
        durations.parse_field(_WARMUP, config.warmup, number="fraction")
    except ValueError as error:
        yield str(error).rstrip(".")
    if config.decay not in DECAYS:
        yield f"optimizer.decay must be one of {', '.join(DECAYS)}, got {config.decay!r}"


class Settings(NamedTuple):
    """What the optimiser does with a gradient: numbers, or JAX scalars where a sweep varies them.

    Attributes:
      learning_rate: at its peak.
      warmup_steps: steps of the linear rise to it; 0 for none.
      total_steps: the step at which the decay has come to zero.
      weight_decay: of AdamW; it is multiplied by the learning rate.
      clip_norm: the largest global norm of a gradient; infinite for no limit.
    """

    learning_rate: Any
    warmup_steps: Any
    total_steps: Any
    weight_decay: Any
    clip_norm: Any


def settings(config: ConfigDict, total_steps: int, *, per_epoch: int | None = None) -> Settings:
    """The settings that a config describes, for a run of ``total_steps``.

    Args:
      config: the section ``optimizer``.
      total_steps: of the run.
      per_epoch: steps of an epoch, in which the warm-up may be given; the whole run by default.

    Raises:
      ValueError: as :func:`check`; or the warm-up takes as long as the run.
    """
    check(config)
    warmup = durations.steps(
        config.warmup, per_epoch=per_epoch or total_steps, total=total_steps, number="fraction"
    )
    if warmup and warmup >= total_steps:
        raise ValueError(
            f"{_WARMUP} {config.warmup!r} takes {warmup} steps, and the run has {total_steps}: the "
            "learning rate would never come to its peak."
        )
    return Settings(
        learning_rate=config.learning_rate,
        warmup_steps=warmup,
        total_steps=total_steps,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm or math.inf,
    )


def schedule(settings: Settings, decay: str) -> optax.Schedule:
    """Linear warm-up, then the decay to zero at the last step; or no decay, for "none".

    Cosine: ``(1 + cos πx) / 2`` of the peak (Loshchilov & Hutter 2017, eq. 5), where ``x`` is the
    part of the decay that is over. Optax's own schedules want the number of steps as a Python
    number, where a sweep has an array.

    >>> rate = schedule(Settings(0.5, 2, 6, 0.0, 1.0), "linear")
    >>> [float(rate(step)) for step in range(7)]
    [0.0, 0.25, 0.5, 0.375, 0.25, 0.125, 0.0]
    """
    s = settings

    def rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, float)
        rise = step / jnp.maximum(s.warmup_steps, 1)
        left = (s.total_steps - step) / jnp.maximum(s.total_steps - s.warmup_steps, 1)
        if decay == "cosine":
            left = 0.5 * (1 - jnp.cos(jnp.pi * jnp.clip(left, 0.0, 1.0)))
        if decay == "none":
            left = jnp.ones_like(left)
        fraction = jnp.where(step < s.warmup_steps, rise, left)
        return s.learning_rate * jnp.clip(fraction, 0.0, 1.0)

    return rate


def adamw(settings: Settings, adapter: PyTree, decay: str) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) on the trainable leaves; the scales stay as they are."""
    clip = optax.clip_by_global_norm(settings.clip_norm)
    rule = optax.adamw(schedule(settings, decay), weight_decay=settings.weight_decay)
    parts = {"trainable": optax.chain(clip, rule), "frozen": optax.set_to_zero()}
    return optax.multi_transform(parts, lora.labels(adapter))


def make(
    config: ConfigDict, adapter: PyTree, total_steps: int, *, per_epoch: int | None = None
) -> optax.GradientTransformation:
    """The optimiser of a config.

    Raises:
      ValueError: as :func:`settings`, which also gets the lengths.
    """
    return adamw(settings(config, total_steps, per_epoch=per_epoch), adapter, config.decay)
