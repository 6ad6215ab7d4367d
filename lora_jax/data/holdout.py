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
      value: a number of examples, such as 100 or "100", or a percentage, such as "5%".

    Returns:
      The number, or the fraction, and whether it is a fraction.

    Raises:
      ValueError: the value is neither.

    >>> parse(100), parse("5%")
    ((100, False), (0.05, True))
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value, False
    match = _TEXT.fullmatch(value) if isinstance(value, str) else None
    if match and match[2] and float(match[1]) < 100:
        return float(match[1]) / 100, True
    if match and not match[2] and float(match[1]).is_integer():
        return int(float(match[1])), False
    raise ValueError(f'must be a number of examples, or a percentage such as "5%", got {value!r}')


def count(value: int | float | str, total: int) -> int:
    """Returns the number of examples to keep of ``total``: of a percentage, one at least.

    Raises:
      ValueError: the value is wrong, or no example is left to train on.

    >>> count("5%", 120), count("5%", 8), count(7, 120)
    (6, 1, 7)
    """
    amount, is_fraction = parse(value)
    number = max(1, math.floor(amount * total + 0.5)) if is_fraction and amount else int(amount)
    if number >= total:
        raise ValueError(f"data.holdout {value} leaves nothing of {total} to train on")
    return number


def split(total: int, number: int, seed: int) -> tuple[list[int], list[int]]:
    """Chooses the examples to keep, by a seed.

    Returns:
      The numbers of those to train on, and of those to keep, each ascending.
    """
    kept, rest = np.split(permutation(total, seed, stream=SUBSET), [number])
    return sorted(rest.tolist()), sorted(kept.tolist())
