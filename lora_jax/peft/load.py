"""``load_peft`` reads a PEFT directory as an adapter of this library."""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import names, paths
from lora_jax.adapter import base_leaves
from lora_jax.config import LoRAConfig
from lora_jax.factors import BATCH
from lora_jax.names import Name
from lora_jax.nodes import scales
from lora_jax.peft import (
    adapter_tensors,
    biases,
    directory_files,
    layouts,
    single_experts,
    target_modules,
    tokens,
    weights_file,
)
from lora_jax.peft.adapter_tensors import Plan
from lora_jax.peft.config import CONFIG, HEADS, complete, read_words
from lora_jax.peft.initial_values import COMPUTED
from lora_jax.peft.methods import Method, Reading, find_method
from lora_jax.peft.misfits import find_misfits, has_values, is_copy

PyTree = Any
_SLACK = 64 << 20  # bytes that a file may have beyond all weights of the base
_MAX_PROBLEMS = 30  # problems in one message
_ORIGINAL_BASE = (
    "The adapter in {directory} has init_lora_weights {init!r}: what it took from its base is "
    "computed again from the base given, which must be the original one, not one that PEFT has "
    "changed and saved. Saved again it has factors of twice the rank, and needs no such base."
)


def is_peft(directory: str | Path) -> bool:
    """Tells whether a directory is in PEFT's format, judged by the names of its files."""
    return (Path(directory) / CONFIG).is_file()


def load_peft(
    directory: str | Path, params: PyTree, *, names: Sequence[Name], base: str | None = None
) -> tuple[dict[str, Any], LoRAConfig]:
    """Reads an adapter that PEFT, or :func:`lora_jax.peft.save_peft`, has written.

    The factors keep the dtype that they have in the file; leaves that are trained in full get the
    dtype of the base. Both namings of transformers (4 and 5) are understood where the table has
    them. Words without a field in the config (the kind of task, the name of the base) are kept in
    ``config.origin`` for :func:`lora_jax.peft.save_peft`. As in PEFT, the adapter is for inference
    and has no dropout; to train on with the config's, call ``lift(fn, dropout=config.dropout,
    dropout_key=key)``.

    Args:
      directory: directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
      params: base parameters that the adapter must fit (arrays, since copies of frozen weights in
        the file are compared with them).
      names: table of names of the model family.
      base: name of the base at hand; if it is given, the adapter must be for this base.

    Raises:
      FileNotFoundError: there is no adapter in ``directory``.
      ValueError: the files are damaged; words are not supported, each of which is named; or the
        adapter does not fit. All problems are in one message: missing, unexpected and misshapen
        tensors, wrong dtypes, NaN, another base.

    Warns:
      UserWarning: the first values are those of PiSSA or OLoRA, so that the base must be the
        original one.
    """
    words_of_file = read_words(directory)
    words = complete(words_of_file)
    directory_files.check(directory)
    leaves = base_leaves(params)
    older, plan, tensors = _read_plan(directory, words_of_file, names, leaves)
    misfits = find_misfits(plan.parts, tensors, leaves)
    problems = plan.problems + _find_absent_heads(words, plan, misfits) + misfits
    recorded_base = words["base_model_name_or_path"]
    if base is not None and recorded_base and base != recorded_base:
        problems.append(f"it was made for base {recorded_base!r}, and this base is {base!r}")
    nodes: dict[str, Any] = {}
    if not problems:
        nodes, problems = _make_nodes(plan, tensors, leaves, root=words["use_rslora"])
    if problems:
        raise ValueError(
            f"The adapter in {directory} can't be used: {'; '.join(_shorten(problems))}."
        )
    if (init := words["init_lora_weights"]) in COMPUTED:
        warnings.warn(_ORIGINAL_BASE.format(directory=directory, init=init), stacklevel=2)
    nodes = {n: nodes[n] for n in leaves if n in nodes}
    origin = {
        "words": words_of_file,
        "older": older,
        "dtypes": _collect_dtypes(plan, tensors, leaves),
    }
    return paths.nest(jax.tree.map(jnp.asarray, nodes)), _make_config(words, plan, leaves, origin)


def list_trained(directory: str | Path, params: PyTree, *, names: Sequence[Name]) -> list[str]:
    """Lists the leaves that a PEFT directory trains in full.

    Args:
      directory: as for :func:`load_peft`.
      params: base parameters, or ``jax.ShapeDtypeStruct`` in their places.
      names: table of names of the model family.

    Raises:
      FileNotFoundError, ValueError: there is no adapter in ``directory``, or it is damaged.
    """
    leaves = base_leaves(params)
    _, plan, _ = _read_plan(directory, read_words(directory), names, leaves)
    full = {p.weight.leaf for p in plan.parts.values() if p.role == adapter_tensors.TRAINED}
    return [n for n in leaves if n in full]


def _read_plan(
    directory: str | Path,
    words_of_file: Mapping[str, Any],
    table: Sequence[Name],
    leaves: Mapping[str, Any],
) -> tuple[bool, Plan, dict[str, np.ndarray]]:
    """Reads the tensors, and finds the plan that the file fits, with its generation of names."""
    words = complete(words_of_file)
    tensors = weights_file.read(Path(directory), _max_bytes(leaves))
    try:
        model = target_modules.make_model(names.weights(table, leaves))
        words, tensors = single_experts.join(words, tensors, model)
        older, plan = _best_plan(words, table, leaves, tensors)
    except ValueError as error:
        raise ValueError(f"{Path(directory) / CONFIG} can't be used: {error}.") from error
    renamed = adapter_tensors.rename_others(plan, tensors)
    tensors = {renamed.get(n, n): value for n, value in tensors.items()}
    try:
        tensors = find_method(words).expand(words_of_file, plan.parts, tensors)
    except ValueError as error:
        raise ValueError(f"The adapter in {directory} can't be used: {error}.") from error
    return older, _fit_plan(plan, tensors, leaves), tensors


def _shorten(problems: list[str]) -> list[str]:
    more = len(problems) - _MAX_PROBLEMS
    return [*problems[:_MAX_PROBLEMS], f"and {more} more"] if more > 0 else problems


def _max_bytes(leaves: Mapping[str, Any]) -> int:
    return _SLACK + 8 * sum(math.prod(np.shape(x)) for x in leaves.values())


def _best_plan(
    words: Mapping[str, Any],
    table: Sequence[Name],
    leaves: Mapping[str, Any],
    tensors: Mapping[str, Any],
) -> tuple[bool, Plan]:
    """Returns the plan with the generation of names that the file fits better."""
    candidates = []
    for older in (False, True)[: 1 + any(row.older for row in table)]:
        model = target_modules.make_model(names.weights(table, leaves, older=older))
        plan = adapter_tensors.make_plan(words, model)
        n_differences = len(set(tensors) ^ set(plan.parts))
        candidates.append((n_differences, older, plan))
    return min(candidates, key=lambda c: c[:2])[1:]


def _fit_plan(plan: Plan, tensors: Mapping[str, np.ndarray], leaves: Mapping[str, Any]) -> Plan:
    """Fits a plan to what the file may have or lack."""

    def is_old(name: str, part: adapter_tensors.Part) -> bool:
        is_whole = tensors[name].shape == part.shape and has_values(leaves[part.weight.leaf])
        return is_whole and is_copy(tensors[name], part, leaves)

    return dataclasses.replace(plan, parts=adapter_tensors.choose_parts(plan, tensors, is_old))


def _find_absent_heads(words: Mapping[str, Any], plan: Plan, misfits: Sequence[str]) -> list[str]:
    """Says that the kind of task asks for a head that the model lacks, if something is amiss."""
    heads = HEADS.get(words["task_type"], ())
    ends = tuple(f".{head}" for head in heads)
    if not misfits or not heads or any(f".{m}".endswith(ends) for m in plan.trained):
        return []
    return [
        f"its task_type is {words['task_type']!r}, for a model with a head called "
        f"{' or '.join(heads)}, and this base has none: it is for another kind of task"
    ]


def _make_nodes(
    plan: Plan, tensors: Mapping[str, np.ndarray], leaves: Mapping[str, Any], *, root: bool
) -> tuple[dict[str, Any], list[str]]:
    """Makes the adapter's entries by path; the layers of a stacked leaf become one."""
    by_leaf: dict[str, dict[str, dict]] = {}
    problems = []
    for name, part in plan.parts.items():
        layers = by_leaf.setdefault(part.weight.leaf, {}).setdefault(part.role, {})
        if not np.array_equal(layers.setdefault(part.weight.layer, tensors[name]), tensors[name]):
            problems.append(f"tensor {name} differs from its other copy")
    weight = {part.weight.leaf: part.weight for part in plan.parts.values()}
    letters: dict[str, dict[str, str]] = {}
    for part in plan.parts.values():
        letters.setdefault(part.weight.leaf, {})[part.role] = part.letters
    numbers = _ranks_and_alphas(plan)
    nodes: dict[str, Any] = {}
    for leaf, roles in by_leaf.items():
        roles.pop(adapter_tensors.BASE, None)
        numbers_of_leaf = numbers.get(plan.biases.get(leaf, leaf), set())
        problem = _describe_uneven(leaf, roles, leaves[leaf], numbers_of_leaf, weight[leaf])
        if problem:
            problems.append(problem)
        elif leaf in plan.methods:
            method = plan.methods[leaf]
            ((rank, alpha),) = numbers[leaf]
            scale = alpha / method.compute_divisor(rank, root=root)
            values = _collect_values(method, weight[leaf], roles, letters[leaf])
            try:
                nodes[leaf] = method.make_node(
                    Reading(
                        node=method.node,
                        values=values,
                        scale=scale,
                        axes=layouts.node_axes(weight[leaf]),
                        name=leaf,
                        kernel=leaves[leaf],
                    )
                )
            except ValueError as error:
                problems.append(f"{leaf} {error}")
        elif adapter_tensors.BETA in roles:
            kernel = plan.biases[leaf]
            ((rank, alpha),) = numbers[kernel]
            of_layers = {k: names.from_tensor(weight[leaf], x) for k, x in roles["beta"].items()}
            scale = alpha / plan.methods[kernel].compute_divisor(rank, root=root)
            nodes[leaf] = biases.make_node(_stack(of_layers), weight[leaf], scale)
        elif adapter_tensors.TOKENS in roles:
            (rows,) = roles[adapter_tensors.TOKENS].values()
            nodes[leaf] = tokens.make_node(weight[leaf], rows, plan.tokens[leaf])
        elif adapter_tensors.TRAINED in roles:
            whole = {
                k: names.from_tensor(weight[leaf], x)
                for k, x in roles[adapter_tensors.TRAINED].items()
            }
            nodes[leaf] = _stack(whole).astype(leaves[leaf].dtype)
    return nodes, problems


def _ranks_and_alphas(plan: Plan) -> dict[str, set[tuple[int, float]]]:
    """Returns rank and alpha of each adapted leaf; several if its layers differ."""
    by_leaf: dict[str, set] = {}
    for module, rank in plan.ranks.items():
        by_leaf.setdefault(plan.leaves[module], set()).add((rank, plan.alphas[module]))
    return by_leaf


def _describe_uneven(leaf: str, roles: dict, value: Any, numbers: set, weight: names.Weight) -> str:
    """Says why the layers of a stacked leaf can't be one entry."""
    if weight.layer is None:
        return ""
    n_layers = np.shape(value)[0]
    layers = {role: sorted(by_layer) for role, by_layer in roles.items()}
    if any(present != list(range(n_layers)) for present in layers.values()):
        first = next(iter(layers.values()))
        return (
            f"{leaf} holds {n_layers} layers in one array, and the adapter has only "
            f"layers {first} of it"
        )
    if len(numbers) > 1:
        return f"{leaf} holds all layers in one array, and their ranks or alphas differ"
    return ""


def _collect_values(
    method: Method, weight: names.Weight, roles: dict, letters: Mapping[str, str]
) -> dict[str, Any]:
    """Makes the fields of a node of the tensors that hold them, by field and layer."""
    values = {}
    for field in (tensor.field for tensor in method.tensors):
        axes = method.field_axes(field, weight)
        layers = {
            k: layouts.from_file(weight, x, axes, letters[field]) for k, x in roles[field].items()
        }
        is_shared = BATCH not in method.node.table[field].axes
        values[field] = next(iter(layers.values())) if is_shared else _stack(layers)
    return values


def _stack(layers: dict[int | None, np.ndarray]) -> np.ndarray:
    if None in layers:
        return layers[None]
    return np.stack([layers[k] for k in sorted(k for k in layers if k is not None)])


def _collect_dtypes(
    plan: Plan, tensors: Mapping[str, np.ndarray], leaves: Mapping[str, Any]
) -> dict[str, str]:
    """Returns the dtypes in the file of leaves that have another one here."""
    return {
        name: str(tensors[name].dtype)
        for name, part in plan.parts.items()
        if part.role in (adapter_tensors.TRAINED, adapter_tensors.BASE)
        and tensors[name].dtype != leaves[part.weight.leaf].dtype
    }


def _make_config(
    words: Mapping[str, Any],
    plan: Plan,
    leaves: Mapping[str, Any],
    origin: dict[str, Any],
) -> LoRAConfig:
    """Expresses the same selection and hyperparameters as a config of this library."""
    numbers = {leaf: next(iter(values)) for leaf, values in _ranks_and_alphas(plan).items()}
    full = {p.weight.leaf for p in plan.parts.values() if p.role == adapter_tensors.TRAINED}
    # A pattern of targets may also match leaves that are no kernels and are not trained.
    others = [n for n, x in leaves.items() if np.ndim(x) > 1 or n in full]
    method = find_method(words)
    scaled = {
        "alpha": words["lora_alpha"],
        "rank_stabilized": words["use_rslora"],
        "alpha_pattern": {n: a for n, (_, a) in numbers.items() if a != words["lora_alpha"]},
    }
    return LoRAConfig(
        **method.config,
        **(scaled if scales(method.node) else {}),
        **{name: words[word] for name, word in method.fields.items()},
        rank=words["r"],
        targets=_find_patterns(set(numbers), others),
        train=_find_patterns(full, leaves),
        train_tokens={_find_pattern(n, {n}, others): ids for n, ids in plan.tokens.items()},
        dropout=words["lora_dropout"],
        adapt_bias=words[biases.WORD],
        rank_pattern={n: rank for n, (rank, _) in numbers.items() if rank != words["r"]},
        origin=origin,
    )


def _find_patterns(wanted: set[str], leaves: Iterable[str]) -> tuple[str, ...]:
    """Finds the shortest patterns that select exactly the wanted leaves."""
    patterns = dict.fromkeys(_find_pattern(n, wanted, leaves) for n in leaves if n in wanted)
    return tuple(patterns)


def _find_pattern(name: str, wanted: set[str], leaves: Iterable[str]) -> str:
    parts = name.split("/")
    for last in (len(parts) - 1, len(parts)):
        for first in range(last - 1, -1, -1):
            candidate = "/".join(parts[first:last])
            if all(n in wanted for n in leaves if paths.matches(candidate, n)):
                return candidate
    return name
