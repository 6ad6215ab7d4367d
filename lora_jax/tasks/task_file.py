"""``lora_jax.json``, which keeps in PEFT's directories what PEFT's words have no place for.

PEFT reads over it. It names the labels of a classifier in the order of its outputs, and says what
texts it takes and how long they may be.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.files import read_object, write_atomically

NAME = "lora_jax.json"
_FORMAT, _VERSION = "lora_jax.task", 1
_COMMON = ("format", "format_version")
_is_size = lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 1
# The keys that describe a classifier, each with what it must be.
KEYS = {
    "labels": (
        "a list of different names",
        lambda x: _is_list(x, lambda s: isinstance(s, str)) and len(set(x)) == len(x),
    ),
    "max_length": ("a whole number of at least 1", _is_size),
    "buckets": ("a list of increasing lengths", lambda x: _is_list(x, _is_size) and x == sorted(x)),
    "pairs": ("true, false, or null for either", lambda x: x is None or isinstance(x, bool)),
    "glue": ("the name of a task", lambda x: isinstance(x, str)),
    "columns": (
        "a list of names of columns",
        lambda x: isinstance(x, list) and all(isinstance(name, str) for name in x),
    ),
}


def _is_list(x: Any, fits: Any) -> bool:
    return isinstance(x, list) and bool(x) and all(map(fits, x))


def write(directory: str | Path, values: Mapping[str, Any]) -> None:
    """Writes the file.

    Args:
      directory: directory of an adapter in PEFT's format.
      values: a value for each of ``KEYS``.

    Raises:
      OSError: the file can't be written.
    """
    content = {"format": _FORMAT, "format_version": _VERSION, **values}
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomically(Path(directory) / NAME, text.encode())


def read(directory: str | Path) -> dict[str, Any]:
    """Reads the file; an empty dict if there is none.

    Raises:
      ValueError: it is damaged, or of a version that is not known here.
    """
    path = Path(directory) / NAME
    if not path.is_file():
        return {}
    about = read_object(path)
    if [about.get(name) for name in _COMMON] != [_FORMAT, _VERSION]:
        raise ValueError(f"{path} is not a file of format {_FORMAT!r}, version {_VERSION}.")
    values = {name: x for name, x in about.items() if name not in _COMMON}
    problems = [f"{name} is not known here" for name in values if name not in KEYS]
    problems += [f"{name} is missing" for name in KEYS if name not in values]
    for name, (wanted, fits) in KEYS.items():
        if name in values and not fits(values[name]):
            problems.append(f"{name} must be {wanted}, got {values[name]!r:.80}")
    if problems:
        raise ValueError(f"{path} can't be used: {'; '.join(problems)}.")
    return values
