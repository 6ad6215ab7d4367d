"""Finds the biases that are adapted beside their kernels, and makes their first values."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax import paths
from lora_jax.factors import IN
from lora_jax.kernels import Kernels, is_real
from lora_jax.methods.bias import AdaptedBias
from lora_jax.nodes import Adapted

BIAS = "bias"


def find_biases(
    kernels: Kernels, adapted: Iterable[str], trained: Collection[str]
) -> dict[str, str]:
    """Finds the bias of each adapted kernel: the leaf ``bias`` beside it, of its outputs' shape.

    Args:
      kernels: all leaves, with what each is to the function.
      adapted: names of the kernels that are adapted.
      trained: names of the leaves that are trained in full.

    Returns:
      Names of the biases by those of their kernels.

    Raises:
      ValueError: a kernel has none, or it is trained in full.
    """
    biases = {name: f"{name.rpartition('/')[0]}/{BIAS}".lstrip("/") for name in adapted}
    lacking = [n for n, bias in biases.items() if not _is_bias(bias, n, kernels)]
    if lacking:
        raise ValueError(
            f"adapt_bias is set, and {paths.listing(lacking)} has no leaf {BIAS!r} of its outputs' "
            "shape beside it. A bias that the function does not have can't be added by its "
            "parameters; name kernels with a bias alone (targets), or leave adapt_bias out."
        )
    if both := [bias for bias in biases.values() if bias in trained]:
        raise ValueError(
            f"adapt_bias is for {paths.listing(both)}, which train names as well: a bias is either "
            "adapted or trained in full. Leave one out."
        )
    return biases


def _is_bias(bias: str, kernel: str, kernels: Kernels) -> bool:
    if bias not in kernels.leaves or bias == kernel:
        return False
    leaf, of = kernels.leaves[bias], kernels.leaves[kernel]
    shape = tuple(n for n, role in zip(of.shape or (), of.axes, strict=True) if role != IN)
    return leaf.shape == shape and is_real(leaf)


def init_biases(nodes: Mapping[str, Adapted], biases: Mapping[str, str]) -> dict[str, AdaptedBias]:
    """Makes the nodes of the biases, which start at zero.

    Args:
      nodes: nodes of the kernels by name.
      biases: names of the biases by those of the kernels.
    """
    return {bias: _init_bias(nodes[name]) for name, bias in biases.items()}


def _init_bias(node: Any) -> AdaptedBias:
    """Makes the node of the bias beside an adapted kernel, whose outputs its factor ``b`` has."""
    n = node.axes.count("b")
    shape = (*node.b.shape[:n], *node.b.shape[n + 1 :])
    return AdaptedBias(jnp.zeros(shape, node.b.dtype), node.scale, axes=node.axes.replace(IN, ""))
