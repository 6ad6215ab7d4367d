"""Adapters on disk: a directory with one safetensors file and one JSON file.

``adapter.json`` holds the config, the id of the base model, versions, the kind of each node with
the roles of its kernel's axes, and the name and SHA-256 of the weights file. It also holds the
leading axes of a stack of adapters, and the dtypes of tensors that are stored as bytes since
safetensors has no name for their dtype (see :mod:`lora_jax.manifest`). Arrays that are not trained
and equal, such as the projections that nodes of VeRA share, are stored once.
The weights file is named after its content, and ``adapter.json`` is replaced after it, in one
rename: whatever happens while saving, the directory holds the previous adapter or the new one,
whole. Nothing in it is ever executed or unpickled.
"""

import dataclasses
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
from lora_jax import encoding, fields, manifest, paths
from lora_jax.config import LoRAConfig
from lora_jax.factors import BATCH, IN, OUT, RANK, WHOLE
from lora_jax.files import read_safetensors, write_atomically
from lora_jax.manifest import JSON_NAME
from lora_jax.nodes import (
    Field,
    Node,
    Trained,
    as_node,
    is_adapted,
    is_adapted_kernel,
    scale_array,
)
from lora_jax.version import __version__

PyTree = Any


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
      directory: directory to write to; it is made if it does not exist.
      adapter: adapter from :func:`lora_jax.init`, or a stack of them from ``jax.vmap`` of it, whose
        arrays have the same leading axes; it is saved exactly, in its own dtypes.
      config: config to save with the adapter.
      base: id of the base model, for ``load`` to compare: any string, such as a content hash.
      metadata: further values of JSON types to keep, for :func:`lora_jax.serialize.read_metadata`.

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
    problems = _find_malformed(nodes, stacked) or _find_unsaveable(nodes)
    tensors = {} if problems else {name: np.asarray(x) for name, x in _tensors(nodes).items()}
    not_finite = _find_non_finite(tensors)
    problems += [f"NaN or infinity in {paths.listing(not_finite)}"] if not_finite else []
    if problems:
        raise ValueError(f"The adapter is not saved: {'; '.join(problems)}.")
    tensors, copies = encoding.drop_copies(tensors, _find_frozen(nodes))
    tensors, dtypes = encoding.encode(tensors)
    data = safetensors.numpy.save(tensors)
    digest = hashlib.sha256(data).hexdigest()
    weights = f"adapter-{digest[:16]}.safetensors"
    content = {
        "format": manifest.FORMAT,
        "format_version": manifest.FORMAT_VERSION,
        "library_version": __version__,
        "base": base,
        "config": config.to_dict(),
        "weights": {"file": weights, "sha256": digest},
        "nodes": {name: manifest.describe(x) for name, x in nodes.items()},
        "metadata": dict(metadata or {}),
    }
    content |= {"stacked": list(stacked)} if stacked else {}
    content |= {"dtypes": dtypes} if dtypes else {}
    content |= {"copies": copies} if copies else {}
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
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
      directory: directory that :func:`lora_jax.save` has written.
      params: base parameters (arrays or ``jax.ShapeDtypeStruct``) that the adapter must fit.
      base: id of the base model at hand; None leaves it unchecked.

    Raises:
      FileNotFoundError: there is no adapter in ``directory``.
      ValueError: damaged files, or an adapter that does not fit. All problems are in one message:
        missing, unexpected and misshapen tensors, wrong dtypes, NaN, another base.
    """
    directory = Path(directory)
    content = manifest.read(directory)
    tensors = _read_tensors(directory, content["weights"])
    config = _read_config(directory, content["config"])
    tensors, problems = encoding.decode(tensors, content.get("dtypes", {}))
    tensors, absent = encoding.restore_copies(tensors, content.get("copies", {}))
    problems += absent
    nodes, node_problems = _make_nodes(manifest.node_classes(directory, content), tensors, config)
    leaves = adapters.base_leaves(params)
    stacked, wrong = _find_leading_axes(content, nodes, leaves)
    problems += node_problems + wrong
    problems += adapters.misfits(leaves, nodes, stacked) + _find_wrong_dtypes(leaves, nodes)
    not_finite = _find_non_finite(tensors)
    problems += [f"NaN or infinity in {paths.listing(not_finite)}"] if not_finite else []
    if base is not None and content.get("base") is not None and base != content["base"]:
        problems.append(f"it was made for base {content['base']!r}, and this base is {base!r}")
    if problems:
        raise ValueError(f"The adapter in {directory} can't be used: " + "; ".join(problems) + ".")
    return paths.nest(jax.tree.map(jnp.asarray, nodes)), config


def read_metadata(directory: str | Path) -> dict[str, Any]:
    """Reads the ``metadata`` given to ``save``, with ``"base"`` added if that was given.

    Raises:
      FileNotFoundError, ValueError: as :func:`lora_jax.load`.
    """
    content = manifest.read(Path(directory))
    base = {} if content.get("base") is None else {"base": content["base"]}
    return content["metadata"] | base


def _read_config(directory: Path, values: dict[str, Any]) -> LoRAConfig:
    try:
        return LoRAConfig.from_dict(values)
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
    actual = hashlib.sha256(data).hexdigest()
    if actual != digest:
        raise ValueError(
            f"{path} is damaged (truncated or changed): its SHA-256 is {actual}, and "
            f"{JSON_NAME} says {digest}. Copy or train the adapter again."
        )
    try:
        return read_safetensors(data, float8=True)
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}.") from error


def _tensors(nodes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arrays of an adapter by name: ``path`` of a leaf, ``path/a`` of a factor."""
    return {n: x for path, node in nodes.items() for n, x in fields.tensors(path, node).items()}


def _find_frozen(nodes: Mapping[str, Any]) -> list[str]:
    """Finds the names of arrays that are not trained, without scales."""
    adapted = {path: node for path, node in nodes.items() if is_adapted(node)}
    return [
        fields.tensor_name(path, type(node), name)
        for path, node in adapted.items()
        for name, field in node.table.items()
        if not field.is_trained and not field.scales
    ]


def _find_malformed(nodes: Mapping[str, Any], stacked: tuple[int, ...]) -> list[str]:
    """Says which shapes do not belong together; those of the parameters are not known here."""
    problems = []
    for name, node in nodes.items():
        if not is_adapted(node):
            if np.shape(node)[: len(stacked)] != stacked:
                problems.append(
                    f"{name} has shape {np.shape(node)}, without the leading axes {stacked} that "
                    "the factors have"
                )
        elif not fields.is_consistent(node, stacked):
            *names, last = node.table
            shapes = tuple(np.shape(getattr(node, field)) for field in node.table)
            problems.append(
                f"{name} has {', '.join(names)} and {last} of shapes {shapes}, which do not belong "
                f"to axes {node.axes!r}" + (f" with leading axes {stacked}" if stacked else "")
            )
    return problems


def _find_unsaveable(nodes: Mapping[str, Any]) -> list[str]:
    problems, seen = [], set()
    parts = (part for path, x in nodes.items() for part in fields.tensors(path, x).items())
    for name, x in parts:
        if problem := encoding.describe_problem(x):
            problems.append(f"{name} {problem}")
        if name in seen:
            problems.append(f"two tensors would be called {name!r}; rename a key of the parameters")
        seen.add(name)
    return problems


def _find_leading_axes(
    content: Mapping[str, Any], nodes: Mapping[str, Any], leaves: Mapping[str, Any]
) -> tuple[tuple[int, ...], list[str]]:
    """Finds the leading axes of a stack of adapters: of its factors, or else of what is trained."""
    axes = adapters.leading_axes(nodes)
    if not any(map(is_adapted, nodes.values())):
        candidates = {
            np.shape(x)[: max(np.ndim(x) - np.ndim(leaves[n]), 0)]
            for n, x in nodes.items()
            if n in leaves
        }
        axes = candidates.pop() if len(candidates) == 1 else ()
    recorded = content.get("stacked", list(axes))
    if recorded != list(axes):
        problem = f"{JSON_NAME} says a stack of {recorded}, and the leading axes are {list(axes)}"
        return axes, [problem]
    return axes, []


def _make_nodes(
    known: Mapping[str, tuple[type[Node], Any]],
    tensors: dict[str, np.ndarray],
    config: LoRAConfig,
) -> tuple[dict[str, Any], list[str]]:
    """Makes nodes of the tensors, and says which tensors are missing or left over."""
    wrong = [n for n, (cls, axes) in known.items() if cls is not Trained and not _is_axes(axes)]
    problems = [f"axes {known[n][1]!r} of {n} are no roles" for n in wrong]
    wanted = {
        n: {field: fields.tensor_name(n, cls, field) for field in cls.table}
        for n, (cls, _) in known.items()
        if n not in wrong
    }
    expected = {key for keys in wanted.values() for key in keys.values()}
    problems += [f"tensor {key} is missing" for key in sorted(expected - set(tensors))]
    problems += [f"tensor {key} is unexpected" for key in sorted(set(tensors) - expected)]
    nodes = {}
    for name, keys in wanted.items():
        if expected.intersection(keys.values()) <= set(tensors):
            values = {field: tensors[key] for field, key in keys.items()}
            nodes[name] = _make_node(name, *known[name], values, config)
    return _restore_shared_scales(nodes), problems


def _make_node(
    name: str, cls: Any, axes: Any, values: dict[str, np.ndarray], config: LoRAConfig
) -> Any:
    if cls is Trained:
        return values["value"]
    node: Node = cls(**values, axes=axes)
    rank = max(fields.sizes(node).get(RANK, 1), 1)  # it is 0 in a damaged file, which is reported
    wanted = config.kernel_scale(name, rank)
    numbers = {
        n: _restore_scale(values[n], wanted) for n, field in cls.table.items() if field.scales
    }
    return dataclasses.replace(node, **numbers)


def _restore_shared_scales(nodes: dict[str, Any]) -> dict[str, Any]:
    """Restores the scales of nodes without a rank, which are those of kernels beside them."""
    known = [getattr(node, "scale", None) for node in nodes.values() if is_adapted_kernel(node)]
    numbers = {s for s in known if isinstance(s, float)}

    def restore(node: Any) -> Any:
        scale = getattr(node, "scale", None)
        if is_adapted_kernel(node) or not is_adapted(node) or not isinstance(scale, float):
            return node
        stored = scale_array(node)
        numbers_of_node: dict[str, Any] = {
            "scale": next((s for s in numbers if stored.dtype.type(s) == stored), scale)
        }
        return dataclasses.replace(node, **numbers_of_node)

    return {name: restore(node) for name, node in nodes.items()}


def _restore_scale(stored: np.ndarray, wanted: float) -> Any:
    """Restores the number that was saved: the config's scale, if its rounded value was saved."""
    if stored.ndim or not np.isfinite(stored):  # a stack; or damaged, which is reported
        return stored
    with np.errstate(over="ignore"):
        return wanted if stored.dtype.type(wanted) == stored else float(stored)


def _is_axes(axes: Any) -> bool:
    return isinstance(axes, str) and set(axes) <= {IN, OUT, BATCH}


def _find_wrong_dtypes(leaves: Mapping[str, Any], nodes: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, x in nodes.items():
        node = as_node(x)
        for field, row in node.table.items():
            problem = _describe_wrong_dtype(name, row, getattr(node, field), leaves)
            problems += [problem] if problem else []
    wide_tensors = {
        n for n, x in _tensors(nodes).items() if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype
    }
    if wide_tensors:
        problems.append(
            f"{paths.listing(wide_tensors)} is 64 bits wide; set jax_enable_x64 to load it exactly"
        )
    return problems


def _describe_wrong_dtype(name: str, field: Field, x: Any, leaves: Mapping[str, Any]) -> str:
    if field.axes == WHOLE:
        wrong = name in leaves and x.dtype != leaves[name].dtype
        return f"{name} has dtype {leaves[name].dtype}, not {x.dtype}" if wrong else ""
    # Fields that are not trained may be integers, such as numbers of rows.
    real = jnp.issubdtype(getattr(x, "dtype", float), jnp.floating)
    if real or not (field.is_trained or field.scales):
        return ""
    return f"{name} has factors of dtype {x.dtype}, which are not real numbers"


def _find_non_finite(tensors: Mapping[str, np.ndarray]) -> list[str]:
    # ml_dtypes' bfloat16 is not a numpy floating type, but isfinite takes it.
    return [name for name, x in tensors.items() if not np.all(np.isfinite(x))]
