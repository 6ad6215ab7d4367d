"""The values of --sweep: fields, each with the values that the runs of a sweep have for it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments import config_flag, lazy

with lazy.imports():
    from lora_jax.training import config_fields, workdirs


def read(texts: Sequence[str], base: ConfigDict) -> dict[str, list[Any]]:
    """Reads the axes of a grid.

    Args:
      texts: values of the flag, each "FIELD=V1,V2,...". A value that is a list stands in brackets.
      base: base config of the program.

    Returns:
      For each field its values, of the field's type.

    Raises:
      ValueError: there is no such field, or some values are wrong, or twice the same.

    >>> base = ConfigDict({"seed": 0, "lora": {"rank": 8, "targets": ("query",)}})
    >>> read(["lora.rank=1,4", "lora.targets=[query],[query,value]"], base)
    {'lora.rank': [1, 4], 'lora.targets': [('query',), ('query', 'value')]}
    """
    axes: dict[str, list[Any]] = {}
    for text in texts:
        try:
            field, values = _read_axis(text, base)
            if field in axes:
                raise ValueError(f"{field} is there twice: give all of its values at once")
        except ValueError as error:
            raise ValueError(f"--sweep={text}: {error}") from error
        axes[field] = values
    return axes


def _read_axis(text: str, base: ConfigDict) -> tuple[str, list[Any]]:
    field, equals, values = text.partition("=")
    known = config_fields.field_names(base)
    if not equals:
        raise ValueError("give a field and its values, such as --sweep=lora.rank=1,4,16")
    if field not in known:
        raise ValueError(config_fields.unknown(field, known))
    if field.partition(".")[0] in workdirs.MAY_CHANGE:
        raise ValueError(f"runs that differ in {field} alone are one run, which may change it")
    section, name = config_fields.get_section(base, field)
    parts = config_flag.split_list(values)
    if section.get_type(name) is tuple:
        parts = [_strip_brackets(part) for part in parts]
    parsed = [_to_plain(config_flag.parse(field, [part], section)) for part in parts]
    if twice := [x for k, x in enumerate(parsed) if x in parsed[:k]]:
        raise ValueError(f"{twice[0]!r} is there twice")
    return field, parsed


def _strip_brackets(text: str) -> str:
    """Takes off the brackets around a list."""
    if text[:1] + text[-1:] not in ("[]", "()"):
        raise ValueError(
            f"{text} is a single entry, and each value is a list: put it in brackets, as in "
            "[query],[query,value]"
        )
    return text[1:-1]


def _to_plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, ConfigDict) else value


def describe(axes: Mapping[str, Sequence[Any]]) -> str:
    """Describes a grid in a line.

    >>> describe({"lora.rank": [1, 4, 16], "seed": [0, 1]})
    'a grid of 6 runs: 3 lora.rank x 2 seed'
    """
    sizes = " x ".join(f"{len(values)} {field}" for field, values in axes.items())
    return f"a grid of {math.prod(map(len, axes.values()))} runs: {sizes}"
