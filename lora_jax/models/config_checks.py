"""Reads the families' config dataclasses from ``config.json``, and checks their fields."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def read(
    cls: type[T], config: Mapping[str, Any], *, model_type: Iterable[str], built: Mapping[str, Any]
) -> T:
    """Makes a config dataclass from a parsed ``config.json``, and leaves out other keys.

    Args:
      cls: the dataclass, with field names as in the file.
      config: the file's content.
      model_type: the model types that the dataclass describes.
      built: keys of variants that the model does not have, with the one value that is built. A key
        that is absent or null names no variant.

    Raises:
      ValueError: the config is of another architecture, or it has variants that are not built; all
        are in one message.
    """
    model_types = tuple(model_type)
    if config.get("model_type") not in model_types:
        raise ValueError(
            f"model_type is {config.get('model_type')!r} in this config; "
            f"only {' or '.join(map(repr, model_types))} is built here."
        )
    variants = [
        f"{name} is {config[name]!r} in this config; only {value!r} is built."
        for name, value in built.items()
        if config.get(name, value) not in (value, None)
    ]
    if variants:
        raise ValueError(" ".join(variants))
    fields = dataclasses.fields(cls)
    return cls(**{f.name: config[f.name] for f in fields if f.name in config})


def check_sizes(config: Any, names: Iterable[str]) -> None:
    """Raises ValueError unless each of these fields is a whole number that an axis may have."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if value >= 2**31:
            raise ValueError(f"{name} must be below 2**31, got one of {value.bit_length()} bits.")


def check_at_most(config: Any, name: str, most: int) -> None:
    """Raises ValueError if the field is larger than ``most``, as an array of that size is made."""
    if getattr(config, name) > most:
        raise ValueError(f"{name} must be at most {most}, got {getattr(config, name)}.")


def check_rates(config: Any, names: Iterable[str], *, optional: Iterable[str] = ()) -> None:
    """Raises ValueError unless each field is in [0, 1); optional ones may be None."""
    optional = tuple(optional)
    for name in (*names, *optional):
        value = getattr(config, name)
        if name in optional and value is None:
            continue
        if not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(f"{name} must be a number in [0, 1), got {value!r}.")


def check_positive(config: Any, names: Iterable[str]) -> None:
    """Raises ValueError unless each of these fields is a number above 0 that float32 holds."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int | float) or not 0 < value < 2.0**128:
            raise ValueError(f"{name} must be a positive number below 2**128, got {value!r:.60}.")


def check_one_of(config: Any, name: str, choices: Iterable[str]) -> None:
    """Raises ValueError unless the field is one of the choices."""
    value = getattr(config, name)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} {value!r} is not one of {sorted(choices)}.")


def check_divides(config: Any, whole: str, part: str) -> None:
    """Raises ValueError unless the one field divides into the other."""
    total, count = getattr(config, whole), getattr(config, part)
    if total % count:
        raise ValueError(f"{whole} {total} does not divide into {part} {count}.")
