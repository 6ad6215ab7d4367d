"""Says which entries of an adapter have no place in PEFT's files, and why."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax import fields, names
from lora_jax.methods.bias import AdaptedBias
from lora_jax.methods.tokens import Tokens
from lora_jax.names import Weight
from lora_jax.nodes import Adapted, is_adapted, scale_array, scales
from lora_jax.peft import layouts, methods, parameters, tokens


def find_obstacle(leaf: str, node: Any, rows: Sequence[Weight]) -> str:
    """Says why PEFT's format has no place for an entry; "" if it has.

    Args:
      leaf: path of the entry.
      node: the entry.
      rows: weights of the torch model that the leaf is.
    """
    if not rows:
        return f"the table of names has no row for {leaf}"
    if isinstance(node, AdaptedBias):
        return ""  # said when the kernels are known
    if isinstance(node, Tokens):
        return tokens.find_obstacle(leaf, node, rows[0])
    if rows[0].row.tied and is_adapted(node):
        return (
            f"{leaf} is one weight with several uses here ({', '.join(w.hf for w in rows)}), and "
            "PEFT would adapt one of them by itself"
        )
    if is_adapted(node) and methods.find_method_of(node) is None:
        return (
            f"{leaf} is adapted by the method {node.kind!r}, which is not written in PEFT's "
            "format; merge it into the base, or save it with lora_jax.save"
        )
    if not all(np.all(np.isfinite(np.asarray(x))) for x in fields.tensors(leaf, node).values()):
        return f"NaN or infinity in {leaf}"
    if not is_adapted(node):
        return ""
    if not names.kind(rows[0]):
        return f"{leaf} is {rows[0].hf} there, which PEFT does not adapt"
    return _find_obstacle_of_factors(leaf, node, rows[0])


def _find_obstacle_of_factors(leaf: str, node: Adapted, weight: Weight) -> str:
    method = methods.require_method_of(node)
    if names.is_bare(weight) and (problem := parameters.describe_unfit(weight)):
        return f"{leaf} is {weight.hf} there, {problem}"
    if names.is_bare(weight) and method is not methods.METHODS[0]:
        return (
            f"{leaf} is adapted by the method {node.kind!r} and is a bare parameter there, "
            f"{weight.hf}, for which PEFT has plain LoRA alone; merge it into the base, or save it "
            "with lora_jax.save"
        )
    if names.kind(weight) not in method.kinds:
        return (
            f"{leaf} is of the kind {names.kind(weight)}, which PEFT does not adapt with "
            f"{methods.describe_words(method)}"
        )
    if scales(type(node)) and not (scale := float(scale_array(node))) > 0:
        return f"{leaf} has scale {scale}, and alpha must be positive"
    axes = layouts.node_axes(weight)
    if node.axes != axes or not names.axes(weight):
        return (
            f"{leaf} has axes {node.axes!r} in the adapter and {axes or 'no'!r} axes in the table "
            "of names"
        )
    problem = method.find_problem(node)
    return f"{leaf} {problem}" if problem else ""
