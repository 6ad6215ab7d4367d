"""Adapters on disk: a directory with one safetensors file and one JSON file.

``adapter.json`` holds the config, the id of the base model, versions, the role of each kernel's
axes, and the name and SHA-256 of the weights file. The weights file is named after its content, and
``adapter.json`` is replaced after it, in one rename: whatever happens while saving, the directory
holds the previous adapter or the new one, whole. Nothing in it is ever executed or unpickled.
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
from lora_jax import lowrank, paths
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
      adapter: as made by :func:`lora_jax.init`; saved exactly, in its own dtypes.
      config: saved beside it.
      base: id of the base model, for :func:`load` to compare: any string, such as a content hash.
      metadata: further values of JSON types to keep, for :func:`read_metadata`.

    Raises:
      ValueError: a value is NaN or infinite, or metadata is not JSON.
      OSError: the directory can't be written; an adapter that was there is intact.
    """
    directory = Path(directory)
    nodes = adapters.nodes(adapter)
    tensors = {name: np.asarray(x) for name, x in _tensors(nodes).items()}
    bad = _non_finite(tensors)
    if bad:
        raise ValueError(f"The adapter is not saved: NaN or infinity in {paths.listing(bad)}.")
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
    nodes, problems = _nodes(about, tensors)
    leaves = paths.named_leaves(params)
    problems += adapters.misfits(leaves, nodes) + _wrong_dtypes(leaves, nodes)
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
        return read_safetensors(data)
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}.") from error


def _tensors(nodes: Mapping[str, Any]) -> dict[str, Any]:
    """Names the arrays of an adapter: ``path`` of a leaf, ``path/a`` and so on of a factor."""
    named = {}
    for name, node in nodes.items():
        if isinstance(node, LowRank):
            named |= {f"{name}/{part}": getattr(node, part) for part in _FACTORS}
        else:
            named[name] = node
    return named


def _nodes(about: dict, tensors: dict[str, np.ndarray]) -> tuple[dict[str, Any], list[str]]:
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
            nodes[name] = LowRank(*parts, axes=kernels[name]) if name in kernels else parts[0]
    return nodes, problems


def _are_roles(axes: Any) -> bool:
    return isinstance(axes, str) and set(axes) <= {lowrank.IN, lowrank.OUT, lowrank.BATCH}


def _wrong_dtypes(leaves: Mapping[str, Any], nodes: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, node in nodes.items():
        for part in (node.a, node.b, node.scale) if isinstance(node, LowRank) else ():
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
