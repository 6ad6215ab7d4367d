"""Holds out examples of a training set for evaluation: a number of them, or a percentage."""

import math
import re

import numpy as np

from lora_jax.data.order import SUBSET, permutation

DEFAULT = "5%"
_TEXT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", re.ASCII)


def parse(value: int | float | str) -> tuple[float, bool]:
    """Parses a value of ``data.holdout``.

    Args:
      value: a number of examples, such as 100 or "100", or a part, such as "5%" or 0.05.

    Returns:
      The number, or the fraction, and whether it is a fraction.

    Raises:
      ValueError: the value is neither.

    >>> parse(100), parse("5%")
    ((100, False), (0.05, True))
    """
    match = None if isinstance(value, bool) else _TEXT.fullmatch(str(value))
    number, is_percentage = (float(match[1]), bool(match[2])) if match else (math.nan, False)
    if is_percentage and number < 100:
        return number / 100, True
    if not is_percentage and 0 < number < 1:
        return number, True
    if not is_percentage and number.is_integer():
        return int(number), False
    raise ValueError(f'must be a number of examples, or a part such as "5%", got {value!r}')


def is_wanted(value: int | float | str) -> bool:
    """Returns whether a value asks for a part: 0, in any form, does not.

    >>> is_wanted("5%"), is_wanted("0%"), is_wanted(0)
    (True, False, False)
    """
    try:
        return parse(value)[0] > 0
    except ValueError:  # which the check of the config tells
        return True


def count(value: int | float | str, total: int, *, examples: str = "examples") -> int:
    """Returns the number of examples to keep of ``total``: of a percentage, one at least.

    Args:
      value: the value, as :func:`parse` takes it.
      total: number of all examples.
      examples: what they are, for the error.

    Raises:
      ValueError: the value is wrong, or no example is left to train on.

    >>> count("5%", 120), count("5%", 8), count(7, 120)
    (6, 1, 7)
    """
    amount, is_fraction = parse(value)
    number = max(1, math.floor(amount * total + 0.5)) if is_fraction and amount else int(amount)
    if number >= total:
        raise ValueError(
            f"data.holdout {value} leaves nothing of the {total} {examples} to train on."
        )
    return number


def split(total: int, number: int, seed: int) -> tuple[list[int], list[int]]:
    """Chooses the examples to keep, by a seed.

    Returns:
      The numbers of those to train on, and of those to keep, each ascending.
    """
    kept, rest = np.split(permutation(total, seed, stream=SUBSET), [number])
    return sorted(rest.tolist()), sorted(kept.tolist())
