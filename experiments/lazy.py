"""Imports that wait until something of a module is used, as ``lazy import`` of Python 3.15 does.

    with lazy.imports():
        import jax
        from lora_jax.tasks import chat

``--help`` and mistakes on the command line are then answered before JAX is there. The names stand
for modules; a class or a function that is imported so would be an error when it is used.
"""

import builtins
import contextlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any


class _Module(ModuleType):
    """A module that is imported when one of its attributes is asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


class _Package:
    """What ``from NAME import ...`` takes its modules from."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> _Module:
        return _Module(f"{self._name}.{name}")


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Puts off the imports of modules that stand in the block, but for what they import.

    Raises:
      ModuleNotFoundError: when a module is used that there is not.

    >>> with imports():
    ...     import this_is_none
    >>> this_is_none.value
    Traceback (most recent call last):
    ModuleNotFoundError: No module named 'this_is_none'
    """
    usual = builtins.__import__
    late: Any = _import  # whose packages are no modules
    builtins.__import__ = late
    try:
        yield
    finally:
        builtins.__import__ = usual


def _import(
    name: str,
    _globals: Mapping[str, object] | None = None,
    _locals: Mapping[str, object] | None = None,
    names: Sequence[str] | None = (),
    level: int = 0,
) -> Any:
    if level or (not names and "." in name):
        raise ImportError(f"{name}: imported late, a module is `import x` or `from x.y import z`")
    return _Package(name) if names else _Module(name)
