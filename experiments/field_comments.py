"""What the fields of a config mean: the comments of the function that makes it, by field.

A comment stands behind the assignment of a field, or in the lines above it.
"""

import ast
import inspect
import io
import tokenize
from collections.abc import Callable, Iterator
from typing import Any

_CONFIG = "c"  # the name that a config has in the function that makes it


def read(get_config: Callable[[], Any]) -> dict[str, str]:
    """Reads the comments on fields and sections, by their dotted names.

    The function begins with ``c = OTHER_FUNCTION()``, whose comments hold where it has none of its
    own, or with a new config.

    Raises:
      OSError: its source can't be read.
    """
    source = inspect.getsource(get_config)
    behind, alone = _find_comments(source)
    comments: dict[str, str] = {}
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    for statement in function.body:
        if isinstance(statement, ast.Delete):
            for gone in map(_name_field, statement.targets):
                comments = {f: x for f, x in comments.items() if not _is_in(f, gone)}
        elif isinstance(statement, ast.Assign):
            if base := _find_base(statement, get_config):
                comments |= read(base)
            text = behind.get(statement.end_lineno or 0) or _join_above(alone, statement.lineno)
            comments |= {field: text for field in _list_fields(statement) if text}
    return comments


def _is_in(field: str, section: str) -> bool:
    return field == section or field.startswith(f"{section}.")


def _find_comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Finds comments by line: those behind something, and those that have the line alone."""
    behind: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            is_alone = not token.line[: token.start[1]].strip()
            (alone if is_alone else behind)[token.start[0]] = token.string.lstrip("# ")
    return behind, alone


def _join_above(alone: dict[int, str], line: int) -> str:
    parts: list[str] = []
    while (line := line - 1) in alone:
        parts.insert(0, alone[line])
    return " ".join(parts)


def _find_base(statement: ast.Assign, get_config: Callable[[], Any]) -> Callable | None:
    """Returns the function whose result the config starts from, in ``c = module.function()``."""
    target, value = statement.targets[0], statement.value
    if not (isinstance(target, ast.Name) and isinstance(value, ast.Call)):
        return None
    found: Any = get_config.__globals__
    for name in ast.unparse(value.func).split("."):
        found = found.get(name) if isinstance(found, dict) else getattr(found, name, None)
    return found if inspect.isfunction(found) else None


def _list_fields(statement: ast.Assign) -> Iterator[str]:
    for target in statement.targets:
        parts = target.elts if isinstance(target, ast.Tuple) else [target]
        yield from filter(None, map(_name_field, parts))


def _name_field(target: ast.expr) -> str:
    first, _, field = ast.unparse(target).partition(".")
    return field if first == _CONFIG else ""
