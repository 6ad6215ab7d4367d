"""Flags of XLA with which tests compile fast; nothing here imports JAX, which reads them."""

import importlib.metadata

_OLDER_EMITTERS = "--xla_cpu_use_fusion_emitters=false"


def make_flags() -> str:
    """Returns flags without LLVM's optimizer, and with older emitters of loops where XLA has them.

    The tests compile thousands of tiny programs and run each once. The emitters alone are a fifth
    of the processor time of the default tests. jaxlib 0.11 has the newer ones alone.
    """
    flags = "--xla_backend_optimization_level=0"
    major, minor = map(int, importlib.metadata.version("jaxlib").split(".")[:2])
    return f"{flags} {_OLDER_EMITTERS}" if (major, minor) < (0, 11) else flags


def has_older_emitters(flags: str) -> bool:
    """Returns whether flags ask for the older emitters."""
    return _OLDER_EMITTERS in flags
