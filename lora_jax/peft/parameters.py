"""Bare parameters in PEFT's files: ``target_parameters`` and the tensors that belong to it.

PEFT wraps the module of a parameter, and that wrapper again for the next one, so that the first is
the innermost. A tensor's name is that of the module with ``.base_layer`` for each wrapper around,
and does not say which parameter it is for: the words do.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from lora_jax import names
from lora_jax.factors import BATCH, IN, OUT, RANK
from lora_jax.names import Weight
from lora_jax.peft import target_modules
from lora_jax.peft.initial_values import COMPUTED
from lora_jax.peft.target_modules import Model

WORD = "target_parameters"
_KINDS = (names.LINEAR, names.EMBEDDING)
_OF_SIDES = {IN: "a", OUT: "b"}  # the factor that has the axes of a side


class Factor(NamedTuple):
    """One tensor of an adapted parameter.

    Attributes:
      name: its name in the file, without the prefix of all names.
      field: field of the node that it holds.
      letters: letters of its axes; see :mod:`lora_jax.peft.layouts`.
    """

    name: str
    field: str
    letters: str


def is_word(x: Any) -> bool:
    """Tells whether a value of the word is well-formed."""
    return x is None or (isinstance(x, list) and all(isinstance(s, str) and s for s in x))


def find_contradictions(words: Mapping[str, Any]) -> list[str]:
    """Says which words PEFT does not take together with bare parameters."""
    if not words.get(WORD):
        return []
    others = {
        "use_dora": bool(words.get("use_dora")),
        "lora_bias": bool(words.get("lora_bias")),
        "lora_dropout": bool(words.get("lora_dropout")),
        "fan_in_fan_out": bool(words.get("fan_in_fan_out")),
        "init_lora_weights": words.get("init_lora_weights") in COMPUTED,
        "peft_type": words.get("peft_type", "LORA") != "LORA",
    }
    return [
        f"{WORD} can't be used with {name} {words[name]!r}: PEFT has plain LoRA without dropout "
        "for bare parameters"
        for name, is_set in others.items()
        if is_set
    ]


def select(words: Mapping[str, Any], model: Model) -> list[str]:
    """Selects the parameters that PEFT would adapt, by whole names or their ends, in order."""
    entries = set(words[WORD] or ())
    is_chosen = lambda name: not entries.isdisjoint(target_modules.suffixes(name))
    return [name for name in model.weights if is_chosen(name)]


def find_unused(words: Mapping[str, Any], model: Model) -> list[str]:
    """Finds entries that select no parameter, which PEFT passes over in silence."""
    endings = {s for name in model.weights for s in target_modules.suffixes(name)}
    missing = [entry for entry in dict.fromkeys(words[WORD] or ()) if entry not in endings]
    return [f"{WORD} entry {entry!r} selects no parameter" for entry in missing[:20]]


def find_unfit(chosen: Iterable[str], model: Model, taken: Mapping[str, str]) -> list[str]:
    """Finds parameters that can't be adapted as PEFT would.

    Args:
      chosen: names of the parameters.
      model: model that they are of.
      taken: what becomes of modules that are adapted or trained in full.
    """
    problems = []
    for name in chosen:
        if problem := describe_unfit(model.weights[name]):
            problems.append(f"{WORD} is for {name}, {problem}")
        elif other := taken.get(names.module(name)):
            problems.append(f"{WORD} is for {name}, and its module is {other} as well")
    return problems


def describe_unfit(weight: Weight) -> str:
    """Says why PEFT does not adapt a parameter; "" if it does."""
    if not names.module(weight.hf):
        return "which no module within the model has, and PEFT adapts none of the model itself"
    if weight.row.tied:
        return "which is one weight with several uses here, and PEFT changes one of them by itself"
    if names.kind(weight) not in _KINDS or len(names.tensor_shape(weight)) > 3:
        return "which is no matrix, or one for each of several experts"
    if not names.axes(weight):
        return (
            f"of shape {weight.shape}, and the table of names does not say which axes are inputs "
            "and which outputs (axes='bio', ...)"
        )
    return ""


def find_fit(chosen: Iterable[str], model: Model) -> list[str]:
    """Returns those of the parameters that PEFT adapts."""
    return [name for name in chosen if not describe_unfit(model.weights[name])]


def list_factors(chosen: Iterable[str], model: Model) -> Iterator[tuple[str, list[Factor]]]:
    """Yields each parameter, and the tensors of its factors.

    A has the last axis of the parameter and B the one before, which are inputs and outputs as in a
    torch Linear, or the reverse, as in an embedding. Of experts A has the inputs.
    """
    by_module: dict[str, list[str]] = {}
    for name in chosen:
        by_module.setdefault(names.module(name), []).append(name)
    for module, own in by_module.items():
        for k, name in enumerate(own):
            around = ".base_layer" * (len(own) - 1 - k)
            letters = _find_letters(model.weights[name])
            yield (
                name,
                [
                    Factor(f"{module}{around}.lora_{x}.weight", field, axes)
                    for x, (field, axes) in zip("AB", letters, strict=True)
                ],
            )


def _find_letters(weight: Weight) -> list[tuple[str, str]]:
    """Returns field and letters of A and of B."""
    if names.batch_shape(weight):
        return [("a", BATCH + RANK + IN), ("b", OUT + RANK + BATCH)]
    first, last = (OUT, IN) if weight.row.transpose else (IN, OUT)
    return [(_OF_SIDES[last], RANK + last), (_OF_SIDES[first], first + RANK)]


def make_word(chosen: Iterable[str], model: Model) -> list[str] | None:
    """Makes the word with the shortest entries for parameters; None if there are none."""
    return target_modules.shortest_entries(chosen, model.weights) or None
