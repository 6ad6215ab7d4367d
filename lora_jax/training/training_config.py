"""Checks of the fields that every task has: each field's check stands here, once.

The fields of the optimizer are checked in ``optimizer.py``, and those of the mesh in ``mesh.py``,
where what they are compared with is known. The defaults are in ``configs/common.py``.
"""

import math
from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from lora_jax.data import holdout
from lora_jax.models.attention import check_attention
from lora_jax.models.layers import check_remat
from lora_jax.training import durations, mesh, optimizer, trackers

ACTIONS = ("stop", "skip")
# Least values of fields.
LEAST = {
    "batch_size": 1,
    "eval_batch_size": 1,
    "init_batches": 1,
    "accumulate": 1,
    "epochs": 1,
    "log_every": 1,
    "checkpoint_keep": 1,
    "data.seed": 0,
    "early_stopping.patience": 0,
    "early_stopping.min_delta": 0,
    "guard.patience": 1,
}


def check(config: ConfigDict, least: Mapping[str, int] | None = None) -> None:
    """Checks the fields that every task has.

    Args:
      config: config of a run.
      least: least values of further fields, such as ``{"data.max_length": 1}``.

    Raises:
      ValueError: names all fields that are wrong.
    """
    raise_problems(list_problems(config, least))


def raise_problems(problems: list[str]) -> None:
    """Raises what is wrong with a config, if anything is.

    Raises:
      ValueError: there are problems.
    """
    if problems:
        raise ValueError(f"The config is wrong: {'; '.join(problems)}.")


def list_problems(config: ConfigDict, least: Mapping[str, int] | None = None) -> list[str]:
    """Says what is wrong with a config; arguments as in :func:`check`."""
    return [
        *_size_problems(config, LEAST | dict(least or {})),
        *_holdout_problems(config),
        *_bucket_problems(config),
        *_batch_problems(config),
        *_model_problems(config.model),
        *_duration_problems(config),
        *_guard_problems(config.guard),
        *optimizer.list_problems(config.optimizer),
        *mesh.list_problems(config),
        *trackers.list_problems(config.log),
    ]


def _size_problems(config: ConfigDict, least: Mapping[str, int]) -> Iterator[str]:
    for field, low in least.items():
        section, _, name = field.rpartition(".")
        value = (config[section] if section else config)[name]
        if not low <= value < math.inf:
            yield f"{field} must be at least {low}, got {value}"


def _holdout_problems(config: ConfigDict) -> Iterator[str]:
    try:
        holdout.parse(config.data.holdout)
    except ValueError as error:
        yield f"data.holdout {error}"


def _bucket_problems(config: ConfigDict) -> Iterator[str]:
    if "buckets" not in config.data:
        return
    buckets = tuple(config.data.buckets)
    if not buckets or any(low >= high for low, high in zip((0, *buckets), buckets, strict=False)):
        yield f"data.buckets must be positive lengths that ascend, got {buckets}"


def _batch_problems(config: ConfigDict) -> Iterator[str]:
    parts, rows = config.accumulate, config.batch_size
    if parts > 0 and rows > 0 and rows % parts:
        divisors = [str(n) for n in range(1, rows + 1) if rows % n == 0]
        yield (
            f"accumulate is {parts}, which does not divide batch_size {rows}; "
            f"{', '.join(divisors)} do"
        )


def _model_problems(model: ConfigDict) -> Iterator[str]:
    for check, value in ((check_remat, model.remat), (check_attention, model.attention)):
        try:
            check(value)
        except ValueError as error:
            yield f"model.{error}"


def _duration_problems(config: ConfigDict) -> Iterator[str]:
    for field in ("steps", "eval_every", "checkpoint_every"):
        try:
            duration = durations.parse_field(field, config[field])
        except ValueError as error:
            yield str(error).rstrip(".")
            continue
        if field == "steps" and duration.unit == "run":
            yield f"steps {config.steps!r} is a part of the run, whose length it is to say"
        if field == "eval_every" and not duration.amount:
            yield "eval_every must not be 0; there is an evaluation at the end in any case"


def _guard_problems(guard: ConfigDict) -> Iterator[str]:
    if guard.action not in ACTIONS:
        yield f"guard.action must be one of {', '.join(ACTIONS)}, got {guard.action!r}"
    if not (guard.spike == 0 or 1 < guard.spike < math.inf):
        yield f"guard.spike must be above 1, or 0 for no limit, got {guard.spike}"


def validation_problems(config: ConfigDict) -> Iterator[str]:
    """Says what is wrong with the choice of evaluation data, for tasks that name files."""
    file, part = config.data.validation, config.data.holdout
    is_wanted = holdout.is_wanted(part)
    if file and is_wanted:
        yield (
            f"data.validation {file!r} and data.holdout {part!r} both say what to evaluate on: the "
            "file, or a part of the training file; set data.holdout=0, or leave data.validation out"
        )
    if not file and not is_wanted:
        yield (
            "there is nothing to evaluate on: set data.validation to a file, or data.holdout to "
            "the part of the training file that is kept for it"
        )
