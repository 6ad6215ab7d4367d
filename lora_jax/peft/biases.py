"""Adapted biases in PEFT's files: ``lora_bias`` and the tensors that belong to it."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lora_jax.factors import BATCH, OUT
from lora_jax.methods.bias import AdaptedBias
from lora_jax.names import Weight
from lora_jax.nodes import Adapted, scale_array
from lora_jax.peft.target_modules import Model

WORD = "lora_bias"
BETA = ".lora_B.bias"


def find(kernels: Iterable[str], model: Model) -> tuple[dict[str, Weight], list[str]]:
    """Finds the bias of each adapted module, and says which modules have none."""
    kernels = list(kernels)
    found = {m: model.weights[f"{m}.bias"] for m in kernels if f"{m}.bias" in model.weights}
    lacking = [m for m in kernels if m not in found]
    problem = (
        f"{WORD} is true, and {', '.join(lacking[:3])}{', ...' if lacking[3:] else ''} has no bias "
        "in this model; PEFT adds one that is no parameter of the base (and can't merge it either)"
    )
    return found, [problem] if lacking else []


def make_node(beta: Any, weight: Weight, scale: float) -> AdaptedBias:
    """Makes the node of a bias; ``beta`` has the shape of the leaf, with its axis of layers."""
    axes = ("" if weight.layer is None else BATCH) + OUT * len(weight.shape)
    return AdaptedBias(beta, scale, axes=axes)


def select(nodes: Mapping[str, Any]) -> dict[str, AdaptedBias]:
    """Returns the entries of an adapter that are adapted biases."""
    return {n: node for n, node in nodes.items() if isinstance(node, AdaptedBias)}


def find_obstacles(
    nodes: Mapping[str, Adapted], kernels: Mapping[str, Weight], model: Model
) -> list[str]:
    """Says why biases can't be written: PEFT has one for each kernel, of the kernel's scale.

    Args:
      nodes: entries of the adapter by path.
      kernels: adapted weights by module.
      model: model that the adapter is for.
    """
    if not (biases := select(nodes)):
        return []
    beside, problems = find(kernels, model)
    leaves = {w.leaf: kernels[m].leaf for m, w in beside.items()}
    for name in [*leaves, *(n for n in biases if n not in leaves)]:
        if name not in biases:
            problems.append(f"{name} is not adapted, and other biases are: PEFT adapts all or none")
        elif name not in leaves:
            problems.append(f"{name} is adapted, and the kernel beside it is not")
        elif not np.array_equal(scale_array(biases[name]), scale_array(nodes[leaves[name]])):
            problems.append(f"{name} has another scale than the kernel beside it")
        elif not np.all(np.isfinite(np.asarray(biases[name].beta))):
            problems.append(f"NaN or infinity in {name}")
    return problems
