"""Config files: in Python, with a function ``get_config``, or the ``config.json`` of a run.

Whatever is wrong in a file is one line: the file, the line in it, and what.
"""

import ast
import difflib
import importlib.util
import inspect
import json
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from lora_jax.training import config_fields

_CONFIG = "config.json"
# What ml_collections says of a value of another type.
_WRONG_TYPE = re.compile(
    r"override field '(\w+)'.*?[.:] (.*) is of original type <class '([\w.]+)'> and cannot be "
    r"casted to type <class '([\w.]+)'>",
    re.DOTALL,
)
_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("purelib", "stdlib"))


def load(path: str) -> ConfigDict:
    """Loads a config.

    Args:
      path: a file of Python, with or without an argument for its ``get_config`` behind a colon; or
        a file of JSON, such as the ``config.json`` of a run.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: something is wrong in the file.
    """
    if split_argument(path)[0].endswith(".json"):
        return _load_json(Path(path))
    file, argument = split_argument(path)
    module = import_file(file)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ValueError(f"{file} defines no get_config(), the function that returns the config")
    _check_argument(get_config, argument, file)
    try:
        config = get_config(*argument)
    except (Exception, SystemExit) as error:
        raise ValueError(describe_error(error, file)) from error
    if isinstance(config, dict):
        config = ConfigDict(config)
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"get_config() of {file} returns {config!r}, and no ConfigDict: does it end with "
            "`return c`?"
        )
    return config


def _check_argument(get_config: Callable[..., Any], argument: Sequence[str], file: str) -> None:
    """Checks that the argument behind the colon is there if, and only if, one is taken."""
    try:
        inspect.signature(get_config).bind(*argument)
    except TypeError as error:
        advice = f"leave out ':{argument[0]}'" if argument else f"give it as in {file}:ARGUMENT"
        takes = "no argument" if argument else "an argument"
        raise ValueError(f"get_config() of {file} takes {takes}: {advice}") from error


def split_argument(path: str) -> tuple[str, list[str]]:
    """Splits ``FILE:ARGUMENT``; the list is empty without an argument.

    >>> split_argument("configs/roberta_base_glue.py:rte")
    ('configs/roberta_base_glue.py', ['rte'])
    """
    file, colon, argument = path.partition(":")
    return file, [argument] if colon else []


def import_file(path: str) -> ModuleType:
    """Loads a file of Python.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: something is wrong in it.
    """
    _check_file(Path(path))
    spec = importlib.util.spec_from_file_location(f"config_file_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(
            f"{path} is no config: that is a file of Python, or the config.json of a run"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the module of a class
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(describe_error(error, path)) from error
    return module


def _check_file(path: Path) -> None:
    if path.is_file():
        return
    if path.is_dir():
        hint = "give a file"
        if (path / _CONFIG).is_file():
            hint = f"did you mean --config={path / _CONFIG}?"
        raise FileNotFoundError(f"{path} is a directory, and no config: {hint}")
    near = _find_similar(path)
    hint = f" (did you mean {near}?)" if near else ""
    raise FileNotFoundError(f"There is no config {path}{hint}")


def _find_similar(path: Path) -> str:
    folder = path.parent
    names = [x.name for x in sorted(folder.glob("*.py"))] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return str(folder / close[0]) if close else ""


def _load_json(path: Path) -> ConfigDict:
    _check_file(path)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds no config: it is {type(stored).__name__}, and no object")
    try:
        return ConfigDict(_to_tuples(stored))
    except (ValueError, TypeError) as error:  # a key with a dot, say
        raise ValueError(f"{path} holds no config: {error}") from error


def _to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _to_tuples(x) for name, x in value.items()}
    return tuple(map(_to_tuples, value)) if isinstance(value, list) else value


def describe_error(error: BaseException, path: str) -> str:
    """Says in a line what an error in a file of Python is, and where.

    The place is the last one in the file itself; else the last outside of libraries.
    """
    if isinstance(error, SyntaxError):
        return f"{error.filename or path}:{error.lineno or 1}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    same = [x for x in frames if Path(x.filename).resolve() == Path(path).resolve()]
    theirs = [x for x in frames if not x.filename.startswith((*_LIBRARIES, "<frozen"))]
    place = (same or theirs or frames)[-1]
    where = path if same else place.filename
    return f"{where}:{place.lineno}: {_describe_cause(error)}"


def _describe_cause(error: BaseException) -> str:
    inner: Any = error
    while isinstance(inner, BaseException) and len(inner.args) == 1:  # ml_collections nests them
        inner = inner.args[0]
    text = " ".join(str(inner).split())
    if match := _WRONG_TYPE.search(text):
        field, value, given, wanted = match.groups()
        value = repr(value) if given == "str" else value
        return f"{field} must be {config_fields.describe_type(wanted)}, got {value}"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def check(
    config: ConfigDict, base: ConfigDict, path: str, *, added: dict[str, Any] | None = None
) -> None:
    """Gives the config of a file the fields and types of a program's base config, in place.

    Args:
      config: config that :func:`load` has returned.
      base: base config of the program.
      path: path of its file, for the message.
      added: as in :func:`config_fields.conform`.

    Raises:
      ValueError: names fields that the program lacks, and values of other types, with the lines of
        the file that set them, if these can be found.
    """
    problems = config_fields.conform(config, base, added=added)
    if problems:
        file = split_argument(path)[0]
        texts = [f"{_locate(file, problem.field)}: {problem.text}" for problem in problems]
        raise ValueError(config_fields.join(texts, limit=4))


def _locate(path: str, field: str) -> str:
    line = find_line(path, field.split("."))
    return f"{path}:{line}" if line else path


def find_line(path: str, names: Sequence[str]) -> int | None:
    """Finds the line of a file of Python that sets a field, by the field's last name.

    Returns:
      The number of the line; None if there is none, or several.
    """
    if not path.endswith(".py"):
        return None
    tree = ast.parse(Path(path).read_bytes())
    lines = [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr == names[-1] and _is_store(node))
        or (isinstance(node, ast.Constant) and node.value == names[-1])
        or (isinstance(node, ast.keyword) and node.arg == names[-1])
    ]
    exact = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and _is_store(node)
        and ast.unparse(node).endswith(".".join(["", *names]))
    ]
    found = exact or lines
    return found[-1] if exact or len(set(found)) == 1 else None


def _is_store(node: ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Store)
