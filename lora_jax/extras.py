"""Packages that parts of the library need and ``pip install lora_jax`` does not bring."""

import importlib.util


def require(part: str, extra: str, *modules: str) -> None:
    """Checks that modules are installed, without importing them.

    Args:
      part: name of the package that needs them.
      extra: name of the extra of lora_jax that brings them.
      modules: names of top-level modules.

    Raises:
      ModuleNotFoundError: some are not installed; the message says what to install.

    >>> require("lora_jax.models", "models", "no_such_module")
    Traceback (most recent call last):
    ModuleNotFoundError: lora_jax.models needs no_such_module: pip install 'lora_jax[models]'
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{part} needs {', '.join(missing)}: pip install 'lora_jax[{extra}]'", name=missing[0]
        )
