"""Factors of single experts, as PEFT wrote them before transformers 5, where each was a layer.

Now the experts of a layer are one parameter, often with the rows of two layers (gate and up) one
after the other. Their factors become those of that parameter: of two layers with the sum of the
ranks, the second factor a block for each.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax import names
from lora_jax.names import EXPERT, STACK, Weight
from lora_jax.peft import parameters, target_modules
from lora_jax.peft.parts import PREFIX
from lora_jax.peft.target_modules import Model

Tensors = dict[str, np.ndarray]
_SIDES = "AB"


class _Joined(NamedTuple):
    """A parameter of which there are factors of single experts.

    Attributes:
      weight: the parameter.
      layers: names of the layers of each expert that its rows are of.
    """

    weight: Weight
    layers: list[list[str]]

    def list_names(self, side: str) -> list[str]:
        """Lists the tensors of one side."""
        return [f"{PREFIX}{x}.lora_{side}.weight" for own in self.layers for x in own]

    def list_layers(self) -> list[str]:
        """Lists the names of all layers."""
        return [x for own in self.layers for x in own]


def join(
    words: Mapping[str, Any], tensors: Mapping[str, np.ndarray], model: Model
) -> tuple[dict[str, Any], Tensors]:
    """Returns words and tensors of the same adapter with one parameter for all experts of a layer.

    Args:
      words: words of the adapter, all of them.
      tensors: tensors of its file.
      model: model that they are for.

    Raises:
      ValueError: factors of some experts are missing, their ranks or alphas differ, or the words
        ask for what bare parameters do not have.
    """
    every = [_find_layers(w) for w in model.weights.values() if EXPERT in "".join(w.row.stored)]
    found = [x for x in every if not tensors.keys().isdisjoint(x.list_names("A"))]
    if not found:
        return dict(words), dict(tensors)
    chosen = [*(words[parameters.WORD] or ()), *(x.weight.hf for x in found)]
    if problems := parameters.find_contradictions(
        {**words, parameters.WORD: chosen, **_NO_DROPOUT}
    ):
        raise ValueError("; ".join(problems))
    new = dict(words) | {parameters.WORD: chosen}
    for what, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        new[what] = _join_values(words, what, default, found, model)
    single = [name for x in every for name in x.list_layers()]
    if isinstance(words["target_modules"], list):
        endings = {s for name in single for s in target_modules.suffixes(name)}
        new["target_modules"] = [x for x in words["target_modules"] if x not in endings]
    return new, _join_tensors(new, tensors, found, model)


# There is none in inference, and here there may be some on any kernel.
_NO_DROPOUT = {"lora_dropout": 0.0}


def _find_layers(weight: Weight) -> _Joined:
    (count,) = names.batch_shape(weight)
    stored = [names.module(n.replace(STACK, str(weight.layer))) for n in weight.row.stored]
    return _Joined(weight, [[n.replace(EXPERT, str(e)) for n in stored] for e in range(count)])


def _join_values(
    words: Mapping[str, Any], what: str, default: str, found: list[_Joined], model: Model
) -> dict[str, Any]:
    """Makes a pattern for each parameter whose scale is that of its single experts."""
    patterns = target_modules.compile_patterns(words[what], what)
    values: dict[str, Any] = {}
    for x in found:
        own = {target_modules.find_value(n, patterns, words[default])[0] for n in x.list_layers()}
        if len(own) > 1:
            raise ValueError(f"{what} has several values for the experts of {x.weight.hf}: {own}")
        parts = len(x.layers[0])
        is_root = what == "alpha_pattern" and words["use_rslora"]
        values[f"^{re.escape(x.weight.hf)}"] = own.pop() * (math.sqrt(parts) if is_root else parts)
    # A key that is for single experts alone would be one that matches nothing.
    is_left = [any(map(match, model.modules)) for match, _ in patterns]
    old = zip((words[what] or {}).items(), is_left, strict=True)
    return values | {key: value for (key, value), fits in old if fits}


def _join_tensors(
    words: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    found: list[_Joined],
    model: Model,
) -> Tensors:
    factors = dict(parameters.list_factors(parameters.select(words, model), model))
    rest = dict(tensors)
    for x in found:
        for side, factor in zip(_SIDES, factors[x.weight.hf], strict=True):
            listed = x.list_names(side)
            if missing := [n for n in listed if n not in tensors]:
                raise ValueError(
                    f"tensor {missing[0]} is missing: there must be factors of all experts of "
                    f"{x.weight.hf}"
                )
            shapes = {rest[n].shape for n in listed}
            if len(shapes) > 1 or len(min(shapes)) != 2:
                raise ValueError(f"tensors of the experts of {x.weight.hf} have shapes {shapes}")
            matrices = iter([rest.pop(n) for n in listed])
            of_experts = [[next(matrices) for _ in own] for own in x.layers]
            rest[PREFIX + factor.name] = _join_experts(of_experts, side)
    return rest


def _join_experts(of_experts: list[list[np.ndarray]], side: str) -> np.ndarray:
    """Joins A by expert and then rank, and B by rank and then expert."""
    if side == "A":
        return np.concatenate([x for own in of_experts for x in own])
    blocks = np.stack([_make_blocks(own) for own in of_experts], axis=-1)
    return blocks.reshape(len(blocks), -1)


def _make_blocks(own: list[np.ndarray]) -> np.ndarray:
    """Puts matrices of one shape along a diagonal."""
    rows, columns = own[0].shape
    whole = np.zeros((rows * len(own), columns * len(own)), own[0].dtype)
    for k, x in enumerate(own):
        whole[k * rows : (k + 1) * rows, k * columns : (k + 1) * columns] = x
    return whole
