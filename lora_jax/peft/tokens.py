"""Trained tokens in PEFT's files: ``trainable_token_indices`` and the rows that belong to it."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax import names
from lora_jax.methods.tokens import TiedRows, Tokens, TrainedOutputs, TrainedRows, describe_ids
from lora_jax.names import Weight
from lora_jax.peft import target_modules
from lora_jax.peft.target_modules import Model

WORD = "trainable_token_indices"
ROWS = ".token_adapter.trainable_tokens_delta"  # rows, not differences, whatever it is called
FROZEN = ".token_adapter.base_layer.weight"
# Last names of the module that a model looks tokens up in; a list of ids without a name is for it.
_INPUTS = ("embed_tokens", "wte", "word_embeddings", "shared")
Ids = tuple[int, ...]


class Chosen(NamedTuple):
    """What the word chooses.

    Attributes:
      ids: ids by module, of which each has a tensor in the file.
      problems: descriptions of what does not fit the model.
    """

    ids: dict[str, Ids]
    problems: list[str]


def is_word(x: Any) -> bool:
    """Tells whether a value of the word is well-formed."""
    by_module = isinstance(x, dict) and bool(x) and all(map(_is_ids, x.values()))
    return x is None or _is_ids(x) or by_module


def _is_ids(x: Any) -> bool:
    is_id = lambda k: isinstance(k, int) and not isinstance(k, bool) and k >= 0
    return isinstance(x, list) and bool(x) and all(map(is_id, x)) and len(set(x)) == len(x)


def select(words: Mapping[str, Any], model: Model, taken: Mapping[str, str]) -> Chosen:
    """Selects the modules of which tokens are trained.

    Args:
      words: words of the adapter.
      model: model that they are for.
      taken: what becomes of modules that are adapted or trained in full.
    """
    chosen = Chosen({}, [])
    value = words[WORD]
    if value is None:
        return chosen
    for entry, ids in _name_input(value, model, chosen.problems).items():
        hits = target_modules.select_saved([entry], model)
        if not hits:
            chosen.problems.append(f"{WORD} entry {entry!r} selects no module")
        for m in hits:
            _add(m, tuple(ids), model, taken, chosen)
    _check_tied(chosen, model)
    return chosen


def _name_input(value: Any, model: Model, problems: list[str]) -> Mapping[str, Any]:
    if isinstance(value, dict):
        return value
    by_leaf = {w.leaf: m for m, w in reversed(model.kernels.items()) if _is_input(m)}
    if len(by_leaf) == 1:
        return dict.fromkeys(by_leaf.values(), value)
    problems.append(
        f"{WORD} names no module, and the model has {', '.join(by_leaf.values()) or 'none'} that "
        'could be its input embedding; name it, as in {"embed_tokens": [...]}'
    )
    return {}


def _is_input(module: str) -> bool:
    return module.rpartition(".")[2] in _INPUTS


def _add(m: str, ids: Ids, model: Model, taken: Mapping[str, str], chosen: Chosen) -> None:
    weight = model.kernels.get(m)
    if weight is None or weight.layer is not None or len(weight.shape) != 2:
        chosen.problems.append(f"{WORD} is for {m}, which is no table of tokens")
    elif m in taken:
        chosen.problems.append(f"{WORD} is for {m}, which is {taken[m]} as well")
    elif problem := describe_ids(ids, count_tokens(weight)):
        chosen.problems.append(
            f"{WORD} is for {m}, but {problem} (where tokens were added, the base is the one with "
            "the new rows, as transformers' model.resize_token_embeddings makes it)"
        )
    else:
        chosen.ids[m] = ids


def count_tokens(weight: Weight) -> int:
    """Returns the number of tokens of an embedding or a head."""
    is_table = names.kind(weight) == names.EMBEDDING
    return weight.shape[names.axes(weight).index("i" if is_table else "o")]


def _check_tied(chosen: Chosen, model: Model) -> None:
    """Leaves one module of those that share a weight: PEFT trains the same rows for all of them."""
    for m, ids in list(chosen.ids.items()):
        weight = model.kernels[m]
        if not weight.row.tied or names.module(weight.row.hf) == m:
            continue
        first = next((n for n in chosen.ids if model.kernels[n].leaf == weight.leaf and n != m), m)
        if first == m or chosen.ids[first] != ids:
            chosen.problems.append(
                f"{weight.leaf} is one weight with several uses here ({weight.row.hf}, "
                f"{', '.join(weight.row.tied)}), and {WORD} changes the use in {m} by itself"
            )
        del chosen.ids[m]


def find_class(weight: Weight) -> type[TrainedRows | TrainedOutputs]:
    """Returns the class of the node for a weight."""
    if names.kind(weight) != names.EMBEDDING:
        return TrainedOutputs
    return TiedRows if weight.row.tied else TrainedRows


def find_letters(weight: Weight) -> str:
    """Returns the letters of the tensor: rows of the embedding, or of the head in torch."""
    return "ko" if names.kind(weight) == names.EMBEDDING else "ki"


def make_node(weight: Weight, values: Any, ids: Ids) -> Tokens:
    """Makes the node of rows that were read."""
    values = values if names.kind(weight) == names.EMBEDDING else values.T
    return find_class(weight)(values, ids, axes=names.axes(weight))


def make_tensor(node: Tokens, weight: Weight) -> np.ndarray:
    """Inverts :func:`make_node`."""
    values = np.asarray(node.values)
    return values if names.kind(weight) == names.EMBEDDING else values.T


def find_obstacle(leaf: str, node: Tokens, weight: Weight) -> str:
    """Says why a node can't be written; "" if it can."""
    if not np.all(np.isfinite(np.asarray(node.values))):
        return f"NaN or infinity in {leaf}"
    is_one = weight.layer is None and node.axes == names.axes(weight)
    if is_one and names.kind(weight) and node.side == find_class(weight).side:
        return ""
    return f"{leaf} is no table of tokens in the table of names, and some tokens of it are trained"


def select_ids(nodes: Mapping[str, Any]) -> dict[str, Ids]:
    """Returns the ids of an adapter's trained tokens, by path of the leaf."""
    return {n: node.ids for n, node in nodes.items() if isinstance(node, Tokens)}


def make_word(nodes: Mapping[str, Any], model: Model) -> dict[str, list[int]] | None:
    """Makes the word for the entries of an adapter; None if there are no trained tokens."""
    modules = {w.leaf: m for m, w in reversed(model.kernels.items())}
    ids = {modules[leaf]: ids for leaf, ids in select_ids(nodes).items()}
    return {_find_entry(m, model): list(ids[m]) for m in sorted(ids)} or None


def _find_entry(module: str, model: Model) -> str:
    """Finds the shortest name that selects the module and no other."""
    fits = lambda entry: target_modules.select_saved([entry], model) == [module]
    return next((s for s in target_modules.suffixes(module) if fits(s)), module)


def frozen_names(chosen: Chosen, model: Model) -> Iterator[tuple[str, Weight]]:
    """Yields the names of copies of the base that a file has if the vocabulary was resized."""
    for m in chosen.ids:
        leaf = model.kernels[m].leaf
        for other, weight in model.kernels.items():
            if weight.leaf == leaf:
                yield f"{other}{FROZEN}", weight
