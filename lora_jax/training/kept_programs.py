"""Compiled functions on disk: a start runs them at once, and tracing confirms them meanwhile.

JAX keeps what it compiles under a name that is known after tracing. Here an index says by what is
known at the start, a config and the machine, which compiled functions were used then, so that they
are loaded while the model is. Such an index promises too much: the code may have changed. So a
loaded function runs while the function of this process is traced, and its results count only if
tracing gives the very program that it was compiled from. If it gives another, the call is made
again, with that one.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jaxlib.version
from jax.experimental import serialize_executable

from lora_jax import files

PyTree = Any
MAX_BYTES = 1 << 30  # of a directory; what was not used for longest is removed
_WRITTEN = "/jax/compilation_cache/cache_misses"  # what JAX tells when it has compiled and kept
_OTHER_SETTINGS = ("cache", "log_", "dump", "explain")  # parts of names of what changes no program
_MOST_COPIED = 256 << 20  # bytes of a state; a larger one is donated when tracing has ended
_PRIVATE = 0o700  # mode of the directory: what is in it is run
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_CPU_FACTS = ("model name", "flags", "Features")  # the lines of /proc/cpuinfo that matter


class Kept(NamedTuple):
    """A function from disk.

    Attributes:
      fingerprint: of the program that it was compiled from.
      inputs: number of arrays that it takes.
      call: the function, from a list of the leaves of its arguments to one of those of its outputs;
        their trees are those of whoever traces the same program.
    """

    fingerprint: str
    inputs: int
    call: Callable[[list], list]


class Store:
    """Compiled functions of one machine, and which of them a kind of start has used before.

    Those are loaded in the background. Each function is a file under the fingerprint of its
    program, each kind of start a file of fingerprints by name.

    Args:
      directory: directory of all functions and starts; it may be new.
      start: describes what is compiled, such as the JSON of a config. Whatever else matters and is
        missing in it costs a start time, and never changes a result.
    """

    def __init__(self, directory: Path, start: str) -> None:
        self._directory, self._machine = directory, "\n".join(_describe_machine())
        self._index = directory / f"{_hash(self._machine, start)}.json"
        self._workers = futures.ThreadPoolExecutor(1, "kept programs")
        self._loads = {
            name: self._workers.submit(_load, self._path(fingerprint))
            for name, fingerprint in _read_index(self._index).items()
            if self._path(fingerprint).is_file()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Gives up what is not loaded yet, so that a program that fails early ends at once."""
        for load in self._loads.values():
            load.cancel()

    def has(self, name: str) -> bool:
        """Returns whether such a start has used something by this name; it may be unreadable."""
        return name in self._loads

    def find(self, name: str) -> Kept | None:
        """Waits until what such a start has used is loaded; None if there is nothing to load."""
        if name not in self._loads:
            return None
        return self._loads[name].result()

    def remove(self, kept: Kept) -> None:
        """Removes a function that does not work."""
        self._path(kept.fingerprint).unlink(missing_ok=True)

    def fingerprint(self, lowered: jax.stages.Lowered) -> str:
        """Tells programs apart; "" for one that calls Python, by an address in this process."""
        text = lowered.as_text()
        return "" if "callback" in text else _hash(self._machine, text)

    def keep(self, name: str, fingerprint: str, compiled: jax.stages.Compiled | None) -> None:
        """Writes what such a start has used, in the background; a program ends after that is done.

        What can't be written, as there is no place or JAX can't serialize it, is not kept.

        Args:
          name: name of the function.
          fingerprint: that of its program.
          compiled: the function; None if it is not to be written, as when it is there.
        """
        self._workers.submit(self._write, name, fingerprint, compiled)

    def _write(self, name: str, fingerprint: str, compiled: jax.stages.Compiled | None) -> None:
        with contextlib.suppress(Exception):
            self._directory.mkdir(_PRIVATE, parents=True, exist_ok=True)
            if compiled is not None:
                payload, inputs, outputs = serialize_executable.serialize(compiled)
                sizes = f"{inputs.num_leaves} {outputs.num_leaves}"
                header = f"{sizes} {hashlib.sha256(payload).hexdigest()}\n".encode()
                files.write_atomically(self._path(fingerprint), header + payload)
            index = _read_index(self._index) | {name: fingerprint}  # the first call remains first
            files.write_atomically(self._index, json.dumps(index, indent=2).encode())
            _prune(self._directory)

    def _path(self, fingerprint: str) -> Path:
        return self._directory / f"{fingerprint}.program"


class Program:
    """A jitted function, whose compiled forms come from a store if they are there.

    What is compiled for a call serves all calls whose last arguments, the batches, have the same
    shapes.

    Args:
      name: name of the function in the store.
      function: what ``jax.jit`` has returned, for a single device.
      store: the store.
      donates: whether the first argument is donated.
    """

    def __init__(self, name: str, function: Any, store: Store, *, donates: bool = False) -> None:
        self._name, self._function, self._store, self._donates = name, function, store, donates
        self._ready: dict[str, Callable] = {}  # by the shapes of the last argument

    def __call__(self, *args: PyTree) -> Any:
        """Calls the function."""
        batch = _describe_shapes(args[-1])
        if batch not in self._ready:
            return self._call_first(*args)
        return self._ready[batch](*args)

    def prepare(self, *args: PyTree) -> None:
        """Compiles what a call with arguments of these shapes needs, unless it is kept."""
        if not self._store.has(self._name_for(args)):
            self._compile(args, self._function.lower(*args))

    def _call_first(self, *args: PyTree) -> Any:
        """Calls the function for the first time with a batch of these shapes."""
        shapes = jax.tree.map(describe, args)
        kept = self._store.find(self._name_for(args))
        if kept is None or kept.inputs != len(jax.tree.leaves(args)):
            return self._compile(shapes, self._function.lower(*shapes))(*args)
        return self._call_kept(kept, shapes, args)

    def _call_kept(self, kept: Kept, shapes: tuple, args: tuple) -> Any:
        """Calls what is kept, or what this process compiles if tracing gives another program."""
        is_early = not self._donates or _count_bytes(args[0]) <= _MOST_COPIED
        state = jax.device_put(args[0], may_alias=False) if self._donates and is_early else args[0]
        outputs = kept.call(jax.tree.leaves(args)) if is_early else []
        lowered = self._function.lower(*shapes)  # while JAX's threads compute the outputs
        if self._store.fingerprint(lowered) != kept.fingerprint:
            return self._compile(shapes, lowered)(state, *args[1:])
        tree = lowered.out_tree
        run = lambda *args: tree.unflatten(kept.call(jax.tree.leaves(args)))
        try:
            result = jax.block_until_ready(tree.unflatten(outputs) if is_early else run(*args))
        except jax.errors.JaxRuntimeError:
            self._store.remove(kept)
            if not is_early:
                raise
            return self._compile(shapes, lowered)(state, *args[1:])  # which may raise it, too
        self._ready[_describe_shapes(args[-1])] = run
        return result

    def _compile(self, args: tuple, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        with _watch() as written:
            compiled = lowered.compile()
        self._ready[_describe_shapes(args[-1])] = compiled
        if fingerprint := self._store.fingerprint(lowered):
            self._store.keep(self._name_for(args), fingerprint, compiled if written else None)
        return compiled

    def _name_for(self, args: tuple) -> str:
        return f"{self._name} {_hash(_describe_shapes(args))}"


def open_store(directory: Path, start: str) -> Store | None:
    """Opens a :class:`Store`.

    Returns:
      The store; None where it can't be used: among several processes, if settings of JAX ask for
      something else than one compiled function on the first device, and if others than the user
      may write in the directory, since what is kept there is run.
    """
    unusual = ("jax_default_device", "jax_disable_jit", "jax_debug_nans", "jax_debug_infs")
    if jax.process_count() > 1 or any(map(jax.config.values.get, unusual)):
        return None
    return Store(directory, start) if _is_private(directory) else None


def describe(x: jax.typing.ArrayLike) -> jax.ShapeDtypeStruct:
    """Returns what a program is compiled for, of an argument on the default device.

    Without its sharding: JAX compiles for an array that is on its device by default as for one that
    says nothing of devices.
    """
    array = jax.typeof(x)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, weak_type=array.weak_type)


def _describe_shapes(tree: PyTree) -> str:
    return "; ".join(str(jax.typeof(x)) for x in jax.tree.leaves(tree))


def _count_bytes(tree: PyTree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


_written = threading.local()


@contextlib.contextmanager
def _watch() -> Iterator[list[str]]:
    """Lists the programs that JAX compiles in the block and writes to its own cache.

    What JAX reads from there, instead, is of no use here: XLA's CPU backend serializes a function
    that was loaded without a part of its machine code, and it fails when it runs (jaxlib 0.10). So
    a file of the store that is lost is written again when JAX has lost its own, too; until then
    such a start waits for tracing, and takes the function from JAX.
    """
    _listen()
    _written.events = []
    try:
        yield _written.events
    finally:
        del _written.events


@functools.cache
def _listen() -> None:
    def add(event: str, **_: object) -> None:
        if event == _WRITTEN and hasattr(_written, "events"):
            _written.events.append(event)

    jax.monitoring.register_event_listener(add)


def _describe_machine() -> list[str]:
    """Describes what compiled functions depend on beside their programs."""
    device = jax.devices()[0]
    settings = {
        name: value
        for name, value in jax.config.values.items()
        if isinstance(value, str | int | float | None)
        and not any(part in name for part in _OTHER_SETTINGS)
    }
    return [
        jax.__version__, jaxlib.version.__version__, device.client.platform_version,
        device.device_kind, os.environ.get("XLA_FLAGS", ""), json.dumps(settings, sort_keys=True),
        *_describe_cpu(),
    ]  # fmt: skip


def _describe_cpu() -> list[str]:
    """Names the processor, with its instructions and the cores of this process, where it can."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [platform.machine(), platform.processor(), str(cores)]
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
        lines += [line for line in first.splitlines() if line.startswith(_CPU_FACTS)]
    return lines


def _read_index(path: Path) -> dict[str, str]:
    """Reads fingerprints by name; empty if there is no such file, or no such thing in it."""
    try:
        index = json.loads(path.read_bytes())
        path.touch()  # it was used
    except (OSError, ValueError):
        return {}
    is_right = isinstance(index, dict) and all(isinstance(x, str) for x in index.values())
    return index if is_right else {}


def _is_private(directory: Path) -> bool:
    """Returns whether the user alone may write in a directory, or it is none yet."""
    try:
        found = directory.stat()
    except OSError:
        return True
    is_own = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
    return is_own and not found.st_mode & _OTHERS_WRITE


def _load(path: Path) -> Kept | None:
    """Reads a function; None if it can't be read, and then its file is removed.

    Like JAX's own cache, such a file is code that runs: it is as trusted as its directory.
    """
    try:
        header, _, payload = path.read_bytes().partition(b"\n")
        *sizes, digest = header.decode().split()
        inputs, outputs = map(int, sizes)
        if hashlib.sha256(payload).hexdigest() != digest:  # damaged machine code ends the process
            raise ValueError(f"{path} is damaged")
        compiled = serialize_executable.deserialize_and_load(
            payload, jax.tree.structure((([0] * inputs,), {})), jax.tree.structure([0] * outputs),
            execution_devices=jax.devices()[:1],
        )  # fmt: skip
        path.touch()  # it was used
    except Exception:  # whatever is wrong with it, the function can be compiled again
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    return Kept(path.stem, inputs, compiled)


def _prune(directory: Path) -> None:
    """Removes what was not used for longest, until the rest is small enough."""
    found = sorted(
        (path.stat().st_mtime, path.stat().st_size, path) for path in directory.iterdir()
    )
    total = sum(size for _, size, _ in found)
    for _, size, path in found:
        if total <= MAX_BYTES:
            break
        path.unlink(missing_ok=True)
        total -= size


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]
