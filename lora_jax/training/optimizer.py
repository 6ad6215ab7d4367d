"""The optimizer that a config describes."""

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax.training import durations

PyTree = Any
Scalar = float | jax.Array | np.ndarray
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
    """Settings of the optimizer: numbers, or JAX scalars where a sweep varies them.

    Attributes:
      learning_rate: learning rate at its peak.
      warmup_steps: number of steps of the linear rise to the peak; 0 for none.
      total_steps: step at which the decay has come to zero.
      weight_decay: weight decay of AdamW; it is multiplied by the learning rate.
      clip_norm: largest global norm of a gradient; infinite for no limit.
    """

    learning_rate: Scalar
    warmup_steps: Scalar
    total_steps: Scalar
    weight_decay: Scalar
    clip_norm: Scalar


def settings(config: ConfigDict, total_steps: int, *, per_epoch: int | None = None) -> Settings:
    """Returns the settings that a config describes.

    Args:
      config: section ``optimizer`` of a config.
      total_steps: number of steps of the run.
      per_epoch: number of steps of an epoch, which may measure the warm-up; by default that of the
        whole run.

    Raises:
      ValueError: as :func:`check`; or the warm-up takes as long as the run.
    """
    check(config)
    warmup = durations.to_steps(
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
    """Returns a linear warm-up, then the decay to zero at the last step; or none, for "none".

    The cosine is ``(1 + cos πx) / 2`` of the peak (Loshchilov & Hutter 2017, eq. 5), where ``x`` is
    the fraction of the decay that is over. Optax's own schedules take the number of steps as a
    Python number, and a sweep has an array.

    >>> rate = schedule(Settings(0.5, 2, 6, 0.0, 1.0), "linear")
    >>> [float(rate(step)) for step in range(7)]
    [0.0, 0.25, 0.5, 0.375, 0.25, 0.125, 0.0]
    """
    return lambda step: _compute_rate(settings, decay, jnp.asarray(step, float), jnp)


def _compute_rate(s: Settings, decay: str, step: Scalar, xp: ModuleType) -> Scalar:
    """Computes the learning rate with ``xp``, which is numpy or ``jax.numpy``."""
    rise = step / xp.maximum(s.warmup_steps, 1)
    left = (s.total_steps - step) / xp.maximum(s.total_steps - s.warmup_steps, 1)
    if decay == "cosine":
        left = 0.5 * (1 - xp.cos(xp.pi * xp.clip(left, 0.0, 1.0)))
    if decay == "none":
        left = xp.ones_like(left)
    fraction = xp.where(step < s.warmup_steps, rise, left)
    return s.learning_rate * xp.clip(fraction, 0.0, 1.0)


def make_rate(
    config: ConfigDict, total_steps: int, *, per_epoch: int | None = None
) -> Callable[[int], float]:
    """Returns the function from a step, of which the first is 1, to its learning rate.

    It is :func:`schedule` for the host, whose first update has number 0. Arguments are as in
    :func:`settings`.
    """
    numbers = settings(config, total_steps, per_epoch=per_epoch)
    return lambda step: float(_compute_rate(numbers, config.decay, np.float64(step - 1), np))


def adamw(settings: Settings, adapter: PyTree, decay: str) -> optax.GradientTransformation:
    """Returns AdamW (Loshchilov & Hutter 2019) for the leaves of an adapter that are trained."""
    clip = optax.clip_by_global_norm(settings.clip_norm)
    rule = optax.adamw(schedule(settings, decay), weight_decay=settings.weight_decay)
    parts = {"trainable": optax.chain(clip, rule), "frozen": optax.set_to_zero()}
    return optax.multi_transform(parts, lora.labels(adapter))


def make(
    config: ConfigDict, adapter: PyTree, total_steps: int, *, per_epoch: int | None = None
) -> optax.GradientTransformation:
    """Makes the optimizer of a config, for an adapter; arguments as in :func:`settings`.

    Raises:
      ValueError: as :func:`settings`.
    """
    return adamw(settings(config, total_steps, per_epoch=per_epoch), adapter, config.decay)
