"""Reads JSON without losing anything: what Python's reader passes over in silence is an error."""

import json
import math
from typing import Any


def loads(text: str) -> Any:
    """Reads one value.

    Raises:
      ValueError: the text is no JSON; or an object has a key twice, a number is infinite or NaN,
        or objects are nested too deeply.

    >>> loads('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: the key 'a' occurs twice in an object
    """
    try:
        return json.loads(text, **_HOOKS)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_value(text: str, begin: int) -> tuple[Any, int]:
    """Reads the value that begins at a place; also returns the place after it.

    Raises:
      ValueError: as :func:`loads`.
    """
    try:
        return _DECODER.raw_decode(text, begin)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.60} occurs twice in an object")
    return made


def _make_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text:.20} is too large")
    return value


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


_HOOKS: dict[str, Any] = {
    "object_pairs_hook": _make_object,
    "parse_float": _make_float,
    "parse_constant": _refuse_constant,
}
_DECODER = json.JSONDecoder(**_HOOKS)
