"""Adapters on disk: a directory with one safetensors file and one JSON file.

``adapter.json`` holds the config, the id of the base model, versions, the role of each kernel's
axes, and the name and SHA-256 of the weights file; also the leading axes of a stack of adapters,
and the dtypes of tensors that are stored as bytes since safetensors has no name for their dtype.
The weights file is named after its content, and ``adapter.json`` is replaced after it, in one
rename: whatever happens while saving, the directory holds the previous adapter or the new one,
whole. Nothing in it is ever executed or unpickled.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from lora_jax import adapter as adapters
from lora_jax import encoding, lowrank, paths
from lora_jax.config import LoRAConfig
from lora_jax.files import read_safetensors, write_atomically
from lora_jax.lowrank import LowRank
from lora_jax.version import __version__

PyTree = Any
JSON_NAME = "adapter.json"
FORMAT = "lora_jax.adapter"
FORMAT_VERSION = 1
_FACTORS = ("a", "b", "scale")


def save(
    directory: str | Path,
    adapter: PyTree,
    config: LoRAConfig,
    *,
    base: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes an adapter to ``directory``, replacing the adapter there, if any, in one step.

    Args:
      directory: made if need be.
      adapter: as made by :func:`lora_jax.init`, or a stack of them, as ``jax.vmap`` of it makes,
        whose arrays have the same leading axes; saved exactly, in its own dtypes.
      config: saved beside it.
      base: id of the base model, for :func:`load` to compare: any string, such as a content hash.
      metadata: further values of JSON types to keep, for :func:`read_metadata`.

    Raises:
      ValueError: a value is NaN or infinite, or no array of numbers; factors have shapes that do
        not belong together; this is a bound tree; or metadata is not JSON.
      OSError: the directory can't be written; an adapter that was there is intact.
    """
    directory = Path(directory)
    if not isinstance(config, LoRAConfig):
        raise ValueError(f"config must be a LoRAConfig, got {type(config).__name__}.")
    nodes = adapters.nodes(adapter)
    stacked = adapters.leading_axes(nodes)
    problems = _malformed(nodes, stacked) or _unsaveable(nodes)
    tensors = {} if problems else {name: np.asarray(x) for name, x in _tensors(nodes).items()}
    bad = _non_finite(tensors)
    problems += [f"NaN or infinity in {paths.listing(bad)}"] if bad else []
    if problems:
        raise ValueError(f"The adapter is not saved: {'; '.join(problems)}.")
    tensors, dtypes = encoding.encode(tensors)
    data = safetensors.numpy.save(tensors)
    digest = hashlib.sha256(data).hexdigest()
    weights = f"adapter-{digest[:16]}.safetensors"
    about = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "base": base,
        "config": config.to_dict(),
        "weights": {"file": weights, "sha256": digest},
        "kernels": {n: x.axes for n, x in nodes.items() if isinstance(x, LowRank)},
        "trained": [n for n, x in nodes.items() if not isinstance(x, LowRank)],
        "metadata": dict(metadata or {}),
    }
    about |= {"stacked": list(stacked)} if stacked else {}
    about |= {"dtypes": dtypes} if dtypes else {}
    try:
        text = json.dumps(about, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must hold JSON types only: {error}") from error
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / weights, data)
    write_atomically(directory / JSON_NAME, text.encode())
    for old in directory.glob("adapter-*.safetensors"):
        if old.name != weights:
            old.unlink(missing_ok=True)


def load(
    directory: str | Path, params: PyTree, *, base: str | None = None
) -> tuple[dict[str, Any], LoRAConfig]:
    """Reads an adapter and its config, for the parameters that it is meant for.

    A stack of adapters has the leading axes that it was saved with. A scale is a Python float. The
    adapter is for inference, without dropout; to train on with that of the config, call
    ``lift(fn, dropout=config.dropout, dropout_key=key)``.

    Args:
      directory: as written by :func:`save`.
      params: the base parameters (arrays or ``jax.ShapeDtypeStruct``), to check against.
      base: id of the base model at hand; None leaves it unchecked.

    Raises:
      FileNotFoundError: there is no adapter in ``directory``.
      ValueError: damaged files, or an adapter that does not fit. All problems are in one message:
        missing, unexpected and misshapen tensors, wrong dtypes, NaN, another base.
    """
    directory = Path(directory)
    about = read_json(directory)
    tensors = _read_tensors(directory, about["weights"])
    config = _config(directory, about["config"])
    tensors, problems = encoding.decode(tensors, about.get("dtypes", {}))
    nodes, more = _nodes(about, tensors, config)
    leaves = adapters.base_leaves(params)
    stacked, wrong = _stacked(about, nodes, leaves)
    problems += more + wrong
    problems += adapters.misfits(leaves, nodes, stacked) + _wrong_dtypes(leaves, nodes)
    bad = _non_finite(tensors)
    problems += [f"NaN or infinity in {paths.listing(bad)}"] if bad else []
    if base is not None and about.get("base") is not None and base != about["base"]:
        problems.append(f"it was made for base {about['base']!r}, and this base is {base!r}")
    if problems:
        raise ValueError(f"The adapter in {directory} can't be used: " + "; ".join(problems) + ".")
    return paths.nest(jax.tree.map(jnp.asarray, nodes)), config


def read_metadata(directory: str | Path) -> dict[str, Any]:
    """The ``metadata`` given to :func:`save`, with ``"base"`` added if that was given.

    Raises:
      FileNotFoundError, ValueError: as :func:`load`.
    """
    about = read_json(Path(directory))
    base = {} if about.get("base") is None else {"base": about["base"]}
    return about["metadata"] | base


def read_json(directory: Path) -> dict[str, Any]:
    """Reads and checks the form of ``adapter.json``."""
    path = directory / JSON_NAME
    if not path.is_file():
        there = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else None
        what = "does not exist" if there is None else f"holds {there[:20] or 'nothing'}"
        raise FileNotFoundError(f"No adapter in {directory}: no {JSON_NAME}; the directory {what}.")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{path} is not an adapter of this library: no format {FORMAT!r} in it.")
    if about.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {about.get('format_version')!r}; this is lora_jax "
            f"{__version__}, which reads version {FORMAT_VERSION}. Use the version that wrote it "
            f"({about.get('library_version')!r})."
        )
    kinds = {"config": dict, "weights": dict, "kernels": dict, "trained": list, "metadata": dict}
    wrong = [k for k, kind in kinds.items() if not isinstance(about.get(k), kind)]
    if wrong:
        raise ValueError(f"{path} is damaged: {', '.join(wrong)} missing or of the wrong type.")
    return about


def _config(directory: Path, fields: dict[str, Any]) -> LoRAConfig:
    try:
        return LoRAConfig.from_dict(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"The config in {directory / JSON_NAME} is damaged: {error}") from error


def _read_tensors(directory: Path, weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
    name, digest = weights.get("file"), weights.get("sha256")
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise ValueError(f"{directory / JSON_NAME} is damaged: no weights file is called {name!r}.")
    path = directory / name
    if not path.is_file():
        raise ValueError(f"The weights file {path} of the adapter is missing.")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise ValueError(
            f"{path} is damaged (truncated or changed): its SHA-256 is {found}, and "
            f"{JSON_NAME} says {digest}. Copy or train the adapter again."
        )
    try:
        return read_safetensors(data, float8=True)
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}.") from error


def _tensors(nodes: Mapping[str, Any]) -> dict[str, Any]:
    """Names the arrays of an adapter: ``path`` of a leaf, ``path/a`` and so on of a factor."""
    return {tensor: x for node in nodes.items() for tensor, x in _parts(*node)}


def _parts(name: str, node: Any) -> list[tuple[str, Any]]:
    if not isinstance(node, LowRank):
        return [(name, node)]
    values = (node.a, node.b, lowrank.scale_array(node))
    return [(f"{name}/{part}", x) for part, x in zip(_FACTORS, values, strict=True)]


def _malformed(nodes: Mapping[str, Any], stacked: tuple[int, ...]) -> list[str]:
    """Says which shapes do not belong together; those of the parameters are not known here."""
    problems = []
    for name, node in nodes.items():
        if not isinstance(node, LowRank):
            if np.shape(node)[: len(stacked)] != stacked:
                problems.append(
                    f"{name} has shape {np.shape(node)}, without the leading axes {stacked} that "
                    "the factors have"
                )
            continue
        a, b, scale = np.shape(node.a), np.shape(node.b), np.shape(node.scale)
        sizes = lambda role, axes=node.axes: len(lowrank.positions(axes, role))
        lead, batch = len(stacked), sizes(lowrank.BATCH)
        ends = len(a) == lead + batch + sizes(lowrank.IN) + 1
        ends = ends and len(b) == lead + batch + sizes(lowrank.OUT) + 1
        alike = ends and a[: lead + batch] == b[: lead + batch] and a[-1] == b[lead + batch]
        if not alike or a[:lead] != stacked or scale not in ((), stacked):
            problems.append(
                f"{name} has a, b and scale of shapes {(a, b, scale)}, which do not belong to "
                f"axes {node.axes!r}" + (f" with leading axes {stacked}" if stacked else "")
            )
    return problems


def _unsaveable(nodes: Mapping[str, Any]) -> list[str]:
    problems, seen = [], set()
    for name, x in (part for node in nodes.items() for part in _parts(*node)):
        if problem := encoding.problem(x):
            problems.append(f"{name} {problem}")
        if name in seen:
            problems.append(f"two tensors would be called {name!r}; rename a key of the parameters")
        seen.add(name)
    return problems


def _stacked(
    about: Mapping[str, Any], nodes: Mapping[str, Any], leaves: Mapping[str, Any]
) -> tuple[tuple[int, ...], list[str]]:
    """The leading axes of a stack of adapters: of its factors, or else of what is trained."""
    found = adapters.leading_axes(nodes)
    if not any(isinstance(x, LowRank) for x in nodes.values()):
        extra = {
            np.shape(x)[: max(np.ndim(x) - np.ndim(leaves[n]), 0)]
            for n, x in nodes.items()
            if n in leaves
        }
        found = extra.pop() if len(extra) == 1 else ()
    noted = about.get("stacked", list(found))
    if noted != list(found):
        return found, [f"it is noted as a stack of {noted}, and has leading axes {list(found)}"]
    return found, []


def _nodes(
    about: dict, tensors: dict[str, np.ndarray], config: LoRAConfig
) -> tuple[dict[str, Any], list[str]]:
    """Puts the tensors back into nodes, and says which are missing or left over."""
    kernels = {n: x for n, x in about["kernels"].items() if _are_roles(x)}
    problems = [
        f"axes {about['kernels'][n]!r} of {n} are no roles"
        for n in about["kernels"]
        if n not in kernels
    ]
    wanted = {n: [f"{n}/{part}" for part in _FACTORS] for n in kernels}
    wanted |= {str(n): [str(n)] for n in about["trained"]}
    expected = {key for keys in wanted.values() for key in keys}
    problems += [f"tensor {key} is missing" for key in sorted(expected - set(tensors))]
    problems += [f"tensor {key} is unexpected" for key in sorted(set(tensors) - expected)]
    nodes = {}
    for name, keys in wanted.items():
        parts = [tensors[key] for key in keys if key in tensors]
        if len(parts) == len(keys):
            nodes[name] = parts[0]
        if len(parts) == len(keys) and name in kernels:
            scale = _scale(parts[2], config.kernel_scale(name, _rank(parts[0])))
            nodes[name] = LowRank(*parts[:2], scale, axes=kernels[name])
    return nodes, problems


def _rank(a: np.ndarray) -> int:
    """The rank of a factor: lower than the config's where the kernel allows no more."""
    return max(a.shape[-1] if a.ndim else 1, 1)  # of a damaged file, which is told


def _scale(stored: np.ndarray, wanted: float) -> Any:
    """The number that was saved: that of the config, if it is the one that was rounded for it."""
    if stored.ndim or not np.isfinite(stored):  # of a stack; or damaged, which is told
        return stored
    with np.errstate(over="ignore"):
        return wanted if stored.dtype.type(wanted) == stored else float(stored)


def _are_roles(axes: Any) -> bool:
    return isinstance(axes, str) and set(axes) <= {lowrank.IN, lowrank.OUT, lowrank.BATCH}


def _wrong_dtypes(leaves: Mapping[str, Any], nodes: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, node in nodes.items():
        factors = [x for _, x in _parts(name, node)] if isinstance(node, LowRank) else ()
        for part in factors:
            if not jnp.issubdtype(part.dtype, jnp.floating):
                problems.append(
                    f"{name} has factors of dtype {part.dtype}, which are not real numbers"
                )
        full = not isinstance(node, LowRank) and name in leaves
        if full and node.dtype != leaves[name].dtype:
            problems.append(f"{name} has dtype {leaves[name].dtype}, not {node.dtype}")
    wide = {
        n for n, x in _tensors(nodes).items() if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype
    }
    if wide:
        problems.append(
            f"{paths.listing(wide)} is 64 bits wide; set jax_enable_x64 to load it exactly"
        )
    return problems


def _non_finite(tensors: Mapping[str, np.ndarray]) -> list[str]:
    # ml_dtypes' bfloat16 is not a numpy floating type, but isfinite takes it.
    return [name for name, x in tensors.items() if not np.all(np.isfinite(x))]
