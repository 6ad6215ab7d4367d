"""Durations in a config: in steps, in epochs, or as a fraction of the run."""

import math
import re
from typing import NamedTuple

from ml_collections import ConfigDict

_TEXT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%|steps?|epochs?)\s*")
_EXAMPLES = {
    "steps": 'a whole number of steps, or a text such as "100 steps", "1.5 epochs" or "6%"',
    "fraction": (
        "a number in [0, 1), the fraction of all steps, or a text such as "
        '"100 steps", "0.5 epochs" or "6%"'
    ),
}


class Duration(NamedTuple):
    """An amount of a unit.

    Attributes:
      amount: number of units.
      unit: "steps", "epochs", or "run" for the run's whole length.
    """

    amount: float
    unit: str


class Plan(NamedTuple):
    """Length of a run and of its regular intervals, in steps.

    Attributes:
      total: number of steps of the run.
      eval_every: number of steps between evaluations; the last evaluation is at the end.
      checkpoint_every: number of steps between checkpoints, besides one with each evaluation; 0 for
        none.
      eval_at_start: whether there is an evaluation before the first step, too.
    """

    total: int
    eval_every: int
    checkpoint_every: int
    eval_at_start: bool = False


def parse(value: float | str, *, number: str = "steps") -> Duration:
    """Parses a number or a text of a config.

    Args:
      value: a value such as 100, 0.06, "100 steps", "1.5 epochs" or "6%".
      number: meaning of a plain number: "steps", or "fraction" of the run.

    Raises:
      ValueError: the value is no duration; the message has examples.

    >>> parse("1.5 epochs"), parse(0.06, number="fraction")
    (Duration(amount=1.5, unit='epochs'), Duration(amount=0.06, unit='run'))
    """
    duration = _read(value, number)
    if duration is None or not _is_valid(duration, number):
        raise _error(value, number)
    return duration


def _read(value: float | str, number: str) -> Duration | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Duration(value, "steps" if number == "steps" else "run")
    match = _TEXT.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    amount, unit = float(match[1]), match[2]
    if unit == "%":
        return Duration(amount / 100, "run")
    return Duration(amount, "epochs" if unit.startswith("epoch") else "steps")


def _is_valid(duration: Duration, number: str) -> bool:
    amount, unit = duration
    if not (math.isfinite(amount) and amount >= 0):
        return False
    if unit == "steps":
        return float(amount).is_integer()
    return number != "fraction" or unit != "run" or amount < 1


def _error(value: float | str, number: str) -> ValueError:
    return ValueError(f"must be {_EXAMPLES[number]}; got {value!r}")


def to_steps(
    value: float | str, *, per_epoch: int, total: int | None = None, number: str = "steps"
) -> int:
    """Converts a duration to steps, rounded to the nearest number.

    Args:
      value: the duration, as :func:`parse` takes it.
      per_epoch: number of steps of an epoch.
      total: number of steps of the run; None if it is not known yet.
      number: meaning of a plain number, as in :func:`parse`.

    Raises:
      ValueError: as :func:`parse`; or the value is a fraction of a run of unknown length.

    >>> [to_steps(x, per_epoch=30, total=200) for x in (100, "100 steps", "1.5 epochs", "6%")]
    [100, 100, 45, 12]
    """
    amount, unit = parse(value, number=number)
    steps_of_unit = {"steps": 1, "epochs": per_epoch, "run": total}[unit]
    if steps_of_unit is None:
        raise ValueError(
            f"{value!r} is a part of the run, whose length this is to say: give steps or epochs"
        )
    return round(amount * steps_of_unit)


def make_plan(config: ConfigDict, per_epoch: int) -> Plan:
    """Makes the plan that a config describes.

    Args:
      config: config of the run.
      per_epoch: number of steps of an epoch.

    Raises:
      ValueError: a field is no duration; the message names it.
    """
    length = _field_to_steps(config, "steps", per_epoch=per_epoch)
    total = length or config.epochs * per_epoch
    eval_every, checkpoint_every = (
        _field_to_steps(config, field, per_epoch=per_epoch, total=total)
        for field in ("eval_every", "checkpoint_every")
    )
    return Plan(total, eval_every, checkpoint_every, config.eval_at_start)


def _field_to_steps(
    config: ConfigDict, field: str, *, per_epoch: int, total: int | None = None
) -> int:
    """Converts a field to steps; a duration that is not zero is one step at least."""
    value = config[field]
    try:
        count = to_steps(value, per_epoch=per_epoch, total=total)
    except ValueError as error:
        raise ValueError(f"{field} {error}.") from error
    return max(1, count) if parse(value).amount else 0


def parse_field(field: str, value: float | str, *, number: str = "steps") -> Duration:
    """Parses the value of a field, as :func:`parse` does, with an error that names the field."""
    try:
        return parse(value, number=number)
    except ValueError as error:
        raise ValueError(f"{field} {error}.") from error


def is_evaluation_due(plan: Plan, step: int) -> bool:
    """Returns whether there is an evaluation after a step, of which the first is 1.

    Step 0 stands for the start of the run.

    >>> [step for step in range(11) if is_evaluation_due(Plan(10, 4, 0), step)]
    [4, 8, 10]
    >>> is_evaluation_due(Plan(10, 4, 0, eval_at_start=True), 0)
    True
    """
    if step == 0:
        return plan.eval_at_start
    return step % plan.eval_every == 0 or step == plan.total


def is_checkpoint_due(plan: Plan, step: int) -> bool:
    """Returns whether there is a checkpoint after a step, of which the first is 1."""
    every = plan.checkpoint_every
    return is_evaluation_due(plan, step) or bool(every and step % every == 0)
