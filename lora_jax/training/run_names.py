"""Names of runs that say what they are, and their configs as flat hyperparameters."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from lora_jax.training import config_fields, workdirs

_WORDS = {"optimizer.learning_rate": "lr", "optimizer.weight_decay": "wd"}
_CHOICES = ("lora.method", "lora.init")  # of which the value says enough
_SINGLE = ("lora.rank", "optimizer.learning_rate", "seed")  # in the name of a run by itself
_MAX_LENGTH = 120


def name_run(config: ConfigDict) -> str:
    """Names a run by itself: by its model, method, rank, learning rate and seed.

    >>> c = ConfigDict({"seed": 0, "model": {"name": "org/mini"}, "lora": {"rank": 8}})
    >>> c.optimizer = ConfigDict({"learning_rate": 5e-4})
    >>> name_run(c)
    'mini-rank8-lr5e-4-seed0'
    """
    model = str(config.model.get("name", "")).rstrip("/").rpartition("/")[2] or "model"
    method = config.lora.get("method", "lora")
    words = [model] if method == "lora" else [model, method]
    return "-".join([_clean(word) for word in words] + [name_values(config, _SINGLE)])


def name_values(config: ConfigDict, fields: Sequence[str]) -> str:
    """Names a run by the values of some fields, which set it apart from others.

    >>> c = ConfigDict({"seed": 0, "lora": {"rank": 4}, "optimizer": {"learning_rate": 1e-3}})
    >>> name_values(c, ["lora.rank", "optimizer.learning_rate", "seed"])
    'rank4-lr1e-3-seed0'
    """
    known = config_fields.field_names(config)
    parts = []
    for field in fields:
        section, name = config_fields.get_section(config, field)
        value = format_value(section[name])
        word = "" if field in _CHOICES else _shorten(field, known)
        is_number = value[:1].isdigit() or value[:1] in "+-."
        parts.append(f"{word}{value}" if is_number or not word else f"{word}-{value}")
    return "-".join(parts)[:_MAX_LENGTH] or "run"


def _shorten(field: str, known: Iterable[str]) -> str:
    """Returns the last part of a field's name, with its section if others have the same one."""
    last = field.rpartition(".")[2]
    is_unique = sum(name.rpartition(".")[2] == last for name in known) == 1
    return _WORDS.get(field) or (last if is_unique or field == last else field.replace(".", "-"))


def format_value(value: Any) -> str:
    """Formats a value for a name.

    >>> [format_value(x) for x in (0.0005, 16.0, 1e-10, 0.1, True, ("query", "value"), {"q": 4})]
    ['5e-4', '16', '1e-10', '0.1', 'true', 'query+value', 'q4']
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return _format_float(value)
    if isinstance(value, tuple | list):
        return "+".join(map(format_value, value)) or "none"
    if isinstance(value, ConfigDict | dict):
        return "+".join(f"{_clean(k)}{format_value(v)}" for k, v in value.items()) or "none"
    return _clean(str(value)) or "none"


def _format_float(value: float) -> str:
    text = f"{value:g}"
    if value and abs(value) < 0.01 and "e" not in text:
        text = f"{value:.5e}"
    head, e, exponent = text.partition("e")
    if not e:
        return text
    head = head.rstrip("0").rstrip(".") if "." in head else head
    return f"{head}e{int(exponent)}"


def _clean(text: str) -> str:
    """Replaces what is no letter, digit, dot, plus or minus sign of a text."""
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")


def flatten(config: ConfigDict) -> dict[str, bool | int | float | str]:
    """Returns a config's fields by their dotted names, but those of which log a run.

    >>> flatten(ConfigDict({"seed": 0, "lora": {"targets": ("query", "value")}}))
    {'lora.targets': 'query,value', 'seed': 0}
    """
    names = [x for x in config_fields.field_names(config) if not x.startswith(f"{workdirs.LOG}.")]
    values = {}
    for field in names:
        section, name = config_fields.get_section(config, field)
        values[field] = _flatten_value(section[name])
    return values


def _flatten_value(value: Any) -> bool | int | float | str:
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    content: Mapping[str, Any] = value.to_dict() if isinstance(value, ConfigDict) else value
    return json.dumps(content, sort_keys=True) if content else ""
