"""How long things take, in a config: in steps, in epochs, or as a part of the run."""

import math
import re
from typing import Any, NamedTuple

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
    """An amount of a unit: "steps", "epochs", or "run", the run's whole length."""

    amount: float
    unit: str


class Plan(NamedTuple):
    """A run's length and its regular pauses, in steps.

    Attributes:
      total: at which it ends.
      eval_every: steps from one evaluation to the next; the last is at the end.
      checkpoint_every: from one checkpoint to the next, besides one with each evaluation; 0 for
        none.
    """

    total: int
    eval_every: int
    checkpoint_every: int


def parse(value: Any, *, number: str = "steps") -> Duration:
    """A duration from a config's number or text.

    Args:
      value: such as 100, 0.06, "100 steps", "1.5 epochs" or "6%".
      number: what a plain number stands for: "steps", or "fraction" of the run.

    Raises:
      ValueError: it is no duration; the message has examples.

    >>> parse("1.5 epochs"), parse(0.06, number="fraction")
    (Duration(amount=1.5, unit='epochs'), Duration(amount=0.06, unit='run'))
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        found = Duration(value, "steps" if number == "steps" else "run")
    else:
        match = _TEXT.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise _wrong(value, number)
        amount, unit = float(match[1]), match[2]
        found = Duration(amount, "epochs" if unit.startswith("epoch") else "steps")
        if unit == "%":
            found = Duration(amount / 100, "run")
    whole = found.unit != "steps" or float(found.amount).is_integer()
    fraction = number != "fraction" or found.unit != "run" or found.amount < 1
    if not (math.isfinite(found.amount) and found.amount >= 0 and whole and fraction):
        raise _wrong(value, number)
    return found


def _wrong(value: Any, number: str) -> ValueError:
    return ValueError(f"must be {_EXAMPLES[number]}; got {value!r}")


def steps(value: Any, *, per_epoch: int, total: int | None = None, number: str = "steps") -> int:
    """A duration in steps, rounded to the nearest.

    Args:
      value: as :func:`parse`, which also gets ``number``.
      per_epoch: steps of an epoch.
      total: steps of the run; None where it is not known, and so can't be the measure.

    Raises:
      ValueError: as :func:`parse`; or a part of the run where its length is not known.

    >>> [steps(x, per_epoch=30, total=200) for x in (100, "100 steps", "1.5 epochs", "6%")]
    [100, 100, 45, 12]
    """
    found = parse(value, number=number)
    if found.unit == "run" and total is None:
        raise ValueError(
            f"{value!r} is a part of the run, whose length this is to say: give steps or epochs"
        )
    return round(found.amount * {"steps": 1, "epochs": per_epoch, "run": total}[found.unit])


def plan(config: ConfigDict, per_epoch: int) -> Plan:
    """The length and the pauses that a config describes.

    Raises:
      ValueError: a field is no duration; the message names it.
    """
    total = config.epochs * per_epoch
    if length := _steps("steps", config.steps, per_epoch=per_epoch):
        total = length
    every = lambda field: _steps(field, config[field], per_epoch=per_epoch, total=total)
    return Plan(total, every("eval_every"), every("checkpoint_every"))


def _steps(field: str, value: Any, *, per_epoch: int, total: int | None = None) -> int:
    """At least one step for what is not nothing."""
    try:
        found = steps(value, per_epoch=per_epoch, total=total)
    except ValueError as error:
        raise ValueError(f"{field} {error}.") from error
    return max(1, found) if parse(value).amount else 0


def parse_field(field: str, value: Any, *, number: str = "steps") -> Duration:
    """:func:`parse`, with an error that names the field."""
    try:
        return parse(value, number=number)
    except ValueError as error:
        raise ValueError(f"{field} {error}.") from error


def evaluates(plan: Plan, done: int) -> bool:
    """Whether there is an evaluation after ``done`` steps.

    >>> [done for done in range(1, 11) if evaluates(Plan(10, 4, 0), done)]
    [4, 8, 10]
    """
    return done % plan.eval_every == 0 or done == plan.total


def saves(plan: Plan, done: int) -> bool:
    """Whether there is a checkpoint after ``done`` steps."""
    every = plan.checkpoint_every
    return evaluates(plan, done) or bool(every and done % every == 0)
