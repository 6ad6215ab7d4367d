"""Checks of the fields that steer training, the same for every task."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from lora_jax.models.layers import check_remat
from lora_jax.training import durations

ACTIONS = ("stop", "skip")
# The least value of fields that every task has, for :func:`check_sizes`.
LEAST = {
    "batch_size": 1,
    "eval_batch_size": 1,
    "epochs": 1,
    "log_every": 1,
    "checkpoint_keep": 1,
    "data.holdout": 0,
    "data.seed": 0,
}


def check(config: ConfigDict) -> None:
    """Finds mistakes in ``accumulate``, ``model.remat``, durations, early stopping and guard.

    Raises:
      ValueError: names all fields that are wrong.
    """
    if problems := list(_problems(config)):
        raise ValueError(f"The config is wrong: {'; '.join(problems)}.")


def _problems(config: ConfigDict) -> Iterator[str]:
    yield from _batch_problems(config)
    yield from _duration_problems(config)
    stopping, guard = config.early_stopping, config.guard
    for field, value, low in (
        ("early_stopping.patience", stopping.patience, 0),
        ("early_stopping.min_delta", stopping.min_delta, 0),
        ("guard.patience", guard.patience, 1),
    ):
        if not low <= value < math.inf:
            yield f"{field} must be at least {low}, got {value}"
    if guard.action not in ACTIONS:
        yield f"guard.action must be one of {', '.join(ACTIONS)}, got {guard.action!r}"
    if not (guard.spike == 0 or 1 < guard.spike < math.inf):
        yield f"guard.spike must be above 1, or 0 for no limit, got {guard.spike}"


def _batch_problems(config: ConfigDict) -> Iterator[str]:
    parts, rows = config.accumulate, config.batch_size
    if parts < 1:
        yield f"accumulate must be at least 1, got {parts}"
    elif rows % parts:
        fits = [n for n in range(1, rows + 1) if rows % n == 0]
        yield (
            f"accumulate is {parts}, which does not divide batch_size {rows}; "
            f"{', '.join(map(str, fits))} do"
        )
    try:
        check_remat(config.model.remat)
    except ValueError as error:
        yield f"model.{error}"


def _duration_problems(config: ConfigDict) -> Iterator[str]:
    for field in ("steps", "eval_every", "checkpoint_every"):
        try:
            found: Any = durations.parse_field(field, config[field])
        except ValueError as error:
            yield str(error).rstrip(".")
            continue
        if field == "steps" and found.unit == "run":
            yield f"steps {config.steps!r} is a part of the run, whose length it is to say"
        if field == "eval_every" and not found.amount:
            yield "eval_every must not be 0; there is an evaluation at the end in any case"


def size_problems(config: ConfigDict, least: Mapping[str, int]) -> list[str]:
    """What is wrong with fields ("data.seed") that are below the least value that they may have."""
    problems = []
    for field, low in (LEAST | least).items():
        part, _, name = field.rpartition(".")
        value = (config[part] if part else config)[name]
        if value < low:
            problems.append(f"{field} must be at least {low}, got {value}")
    return problems


def check_sizes(config: ConfigDict, least: Mapping[str, int]) -> None:
    """Finds sizes that are too small, and buckets that do not ascend.

    Raises:
      ValueError: names them.
    """
    if problems := size_problems(config, least):
        raise ValueError(f"{'; '.join(problems)}.")
    buckets = tuple(config.data.buckets)
    if not buckets or any(low >= high for low, high in zip((0, *buckets), buckets, strict=False)):
        raise ValueError(f"data.buckets must be positive lengths that ascend, got {buckets}.")
