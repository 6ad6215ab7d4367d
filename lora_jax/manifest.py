"""``adapter.json``: the description of the adapter in a directory, in each format so far.

Format 2 gives the kind of each node, and the roles of its kernel's axes:
``"nodes": {"up/kernel": {"kind": "lora", "axes": "io"}, "up/bias": {"kind": "full"}}``. Format 1
knew plain LoRA alone: it had the axes of the kernels, and a list of the leaves that are trained in
full.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax import paths
from lora_jax.lowrank import LowRank
from lora_jax.nodes import KINDS, Node, Trained, as_node, is_adapted
from lora_jax.version import __version__

JSON_NAME = "adapter.json"
FORMAT = "lora_jax.adapter"
FORMAT_VERSION = 2

# The entries that `adapter.json` must have in each format, with their types.
_COMMON = {"config": dict, "weights": dict, "metadata": dict}
_SCHEMAS: dict[Any, dict[str, type]] = {
    1: {**_COMMON, "kernels": dict, "trained": list},
    2: {**_COMMON, "nodes": dict},
}


def read(directory: Path) -> dict[str, Any]:
    """Reads ``adapter.json`` and checks its form.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or has a format that is not known here.
    """
    path = directory / JSON_NAME
    if not path.is_file():
        files = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else None
        state = "does not exist" if files is None else f"holds {files[:20] or 'nothing'}"
        raise FileNotFoundError(
            f"No adapter in {directory}: no {JSON_NAME}; the directory {state}."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not an adapter of this library: no format {FORMAT!r} in it.")
    version = content.get("format_version")
    if version not in [*_SCHEMAS]:
        raise ValueError(
            f"{path} has format version {version!r}, and was written by lora_jax "
            f"{content.get('library_version')!r}; this is lora_jax {__version__}, which reads "
            f"versions {[*_SCHEMAS]}. Use the version that wrote it, or a newer one."
        )
    wrong = [k for k, kind in _SCHEMAS[version].items() if not isinstance(content.get(k), kind)]
    if wrong:
        raise ValueError(f"{path} is damaged: {', '.join(wrong)} missing or of the wrong type.")
    return content


def describe(x: Any) -> dict[str, str]:
    """Makes the entry of ``adapter.json`` for a node: its kind, and the roles of its axes."""
    return {"kind": as_node(x).kind} | ({"axes": x.axes} if is_adapted(x) else {})


def node_classes(directory: Path, content: Mapping[str, Any]) -> dict[str, tuple[type[Node], Any]]:
    """Returns the class and the axes of each node that ``adapter.json`` names.

    Raises:
      ValueError: a kind is not known here.
    """
    if content["format_version"] == 1:
        described = _upgrade_first_format(content)
    else:
        described = content["nodes"]
    described = {n: x if isinstance(x, dict) else {} for n, x in described.items()}
    if unknown := {n: x.get("kind") for n, x in described.items() if x.get("kind") not in [*KINDS]}:
        kinds = sorted(set(map(str, unknown.values())))
        raise ValueError(
            f"The adapter in {directory} was written by lora_jax "
            f"{content.get('library_version')!r} and has nodes of the kinds {kinds}, at "
            f"{paths.listing(unknown)}; this is lora_jax {__version__}, which knows the kinds "
            f"{sorted(KINDS)}. Use the version that wrote it, or import the module that defines "
            "the kind."
        )
    return {n: (KINDS[x["kind"]], x.get("axes")) for n, x in described.items()}


def _upgrade_first_format(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Describes the nodes of a file of format 1 as format 2 does."""
    kernels = {n: {"kind": LowRank.kind, "axes": axes} for n, axes in content["kernels"].items()}
    return kernels | {str(n): {"kind": Trained.kind} for n in content["trained"]}
