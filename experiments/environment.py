"""The process of a program: the cache of what it compiles, and the pages of its memory."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from experiments import lazy

with lazy.imports():
    import jax

    from lora_jax.training import kept_programs, workdirs

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Directory that keeps compiled programs, so that the next start need not compile them again; "
    "by default lora_jax/compiled in the user's cache directory. Empty for none.",
)
_MAX_BYTES = 1 << 30  # of what JAX keeps; what was not used for longest is removed
_MIN_SECONDS = 0.02  # of a compilation that is kept
_COLLECTION = (50_000, 20, 20)  # thresholds of Python's garbage collector
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLE = "glibc.malloc.hugetlb"


def collect_seldom() -> None:
    """Has Python look for garbage in cycles less often than by default.

    Imports and tracing make millions of objects that stay; to look through them again and again
    took a sixth of the time to the first step.
    """
    gc.set_threshold(*_COLLECTION)


def start_cache() -> None:
    """Keeps what JAX compiles, unless the command line, or JAX's own setting, says otherwise.

    A directory that does not exist yet is made, and told of on stderr.

    Raises:
      OSError: the directory that the command line names can't be made.
    """
    if _CACHE.value is None and jax.config.values["jax_compilation_cache_dir"]:
        return
    if _CACHE.value == "":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    directory = _find_directory()
    try:
        _make(directory)
    except OSError:
        if _CACHE.value:
            raise
        return  # as in a container without a home that can be written to
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)


def open_store(config: ConfigDict) -> AbstractContextManager[kept_programs.Store | None]:
    """Opens what earlier starts with a config like this have compiled, in the same directory.

    There is None where the user, or JAX's own setting, keeps compiled programs elsewhere or not at
    all, and where :func:`kept_programs.open_store` says so.
    """
    directory = jax.config.values["jax_compilation_cache_dir"]
    is_on = directory and jax.config.values["jax_enable_compilation_cache"]
    if not is_on or Path(directory) != _find_directory():
        return contextlib.nullcontext()
    start = workdirs.to_json_types(config)
    start.pop("seed", None)  # no program depends on it
    text = json.dumps(start, sort_keys=True)
    store = kept_programs.open_store(Path(directory) / "starts", text)
    return store or contextlib.nullcontext()


def place_fonts() -> None:
    """Has matplotlib keep its list of fonts in this project's cache, and tells of it.

    Nothing changes if the user has a place for matplotlib's files already, and where it has been
    imported before.
    """
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    places = (config / "matplotlib", _find_cache() / "matplotlib")
    is_placed = "MPLCONFIGDIR" in os.environ or any(place.is_dir() for place in places)
    if is_placed or "matplotlib" in sys.modules:
        return
    directory = _find_cache() / "lora_jax" / "matplotlib"
    os.environ["MPLCONFIGDIR"] = str(directory)
    if not directory.is_dir():
        print(f"Fonts for figures are listed in {directory}.", file=sys.stderr, flush=True)


def _find_directory() -> Path:
    return Path(_CACHE.value) if _CACHE.value else _find_cache() / "lora_jax" / "compiled"


def _find_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _make(directory: Path) -> None:
    if directory.is_dir():
        return
    directory.mkdir(parents=True)
    most = _MAX_BYTES + kept_programs.MAX_BYTES
    print(
        f"Compiled programs are kept in {directory}, at most {most >> 30} GiB "
        "(--compilation_cache=DIRECTORY, or empty for none).",
        file=sys.stderr,
        flush=True,
    )


def describe_pages() -> str:
    """Says how to get large pages, with which a CPU takes less time for a step; "" if not needed.

    Linux gives large pages to who asks for them, and glibc asks for them if it is told to.
    """
    if jax.default_backend() != "cpu" or _TUNABLE in os.environ.get("GLIBC_TUNABLES", ""):
        return ""
    try:
        is_for_who_asks = "[madvise]" in _PAGES.read_text(encoding="utf-8")
    except OSError:  # no Linux
        return ""
    if not is_for_who_asks:
        return ""
    return (
        f"small pages of memory: with GLIBC_TUNABLES={_TUNABLE}=1 in front of the command a step "
        "takes about a fifth less time"
    )
