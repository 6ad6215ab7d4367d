"""``save_peft`` writes an adapter of this library as a PEFT directory."""

import collections
import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from lora_jax import adapter as adapters
from lora_jax import fields, names, paths
from lora_jax.config import LoRAConfig
from lora_jax.factors import BATCH, RANK
from lora_jax.files import write_atomically
from lora_jax.methods.bias import AdaptedBias
from lora_jax.methods.tokens import Tokens
from lora_jax.names import Name, Weight
from lora_jax.nodes import Adapted, is_adapted, scale_array, scales
from lora_jax.peft import (
    adapter_tensors,
    biases,
    initial_values,
    layouts,
    methods,
    obstacles,
    parameters,
    saved_modules,
    target_modules,
    tokens,
)
from lora_jax.peft.adapter_tensors import Part, Plan
from lora_jax.peft.config import (
    CONFIG,
    DEFAULTS,
    HEADS,
    METADATA,
    canonicalize,
    complete,
    find_problems,
    list_metadata_problems,
    restrict,
    to_bytes,
)  # fmt: skip
from lora_jax.peft.misfits import base_tensor, is_exact
from lora_jax.peft.saved_modules import make_error
from lora_jax.peft.target_modules import Model
from lora_jax.peft.weights_file import WEIGHTS

PyTree = Any
_DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Content:
    """An adapter in the terms of the torch model.

    Attributes:
      nodes: entries of the adapter by path.
      kernels: adapted weights by module, and by their own names those that are bare parameters.
      trained: weights that are trained in full, by tensor name.
      ranks: ranks by the names of kernels.
      alphas: alphas by them, with which PEFT computes exactly the scales of the adapter.
      init: word of the first values that PEFT is to compute again; "" for none.
    """

    nodes: dict[str, Any]
    kernels: dict[str, Weight]
    trained: dict[str, Weight]
    ranks: dict[str, int]
    alphas: dict[str, float]
    init: str

    def name_parameters(self, chosen: Sequence[str]) -> "_Content":
        """Gives kernels that words choose as bare parameters the names of these."""
        new = {m: w.hf if w.hf in set(chosen) else m for m, w in self.kernels.items()}
        rename = lambda values: {new[m]: x for m, x in values.items()}
        return dataclasses.replace(
            self,
            kernels=rename(self.kernels),
            ranks=rename(self.ranks),
            alphas=rename(self.alphas),
        )


def save_peft(
    directory: str | Path,
    params: PyTree,
    adapter: PyTree,
    config: LoRAConfig,
    *,
    names: Sequence[Name],
    init: str = "",
    **metadata: Any,
) -> None:
    """Writes an adapter as a directory for PEFT, and for all programs that read its format.

    Ranks and scales are those of the adapter, whatever the config says. The words make PEFT select
    exactly the modules that the adapter has; an adapter that came from a PEFT directory keeps the
    words of that directory as long as they describe it. The same arguments always give the same
    bytes. Kernels that are no layer's weight, as those of experts, are in ``target_parameters``.

    Args:
      directory: directory to write to; it is made if it does not exist.
      params: base parameters.
      adapter: adapter of these parameters.
      config: config, of which dropout, ``rank_stabilized`` and ``origin`` are used.
      names: table of names of the model family.
      init: "pissa" or "olora" to write kernels that started from these values of this base under
        that word, with the trained factors alone: PEFT then reads them on the original base. By
        default they get factors of twice the rank, which any program reads.
      **metadata: PEFT's words about the adapter as a whole: ``task_type`` ("SEQ_CLS", ...),
        ``base_model_name_or_path``, ``revision``, ``auto_mapping``.

    Raises:
      ValueError: the adapter does not fit the parameters, holds NaN, or can't be expressed in
        PEFT's format; the message names the leaves.
      OSError: a file can't be written.

    Warns:
      UserWarning: there is dropout and a bare parameter, which PEFT refuses together: the words say
        0.
    """
    leaves, nodes = adapters.base_leaves(params), adapters.nodes(adapter)
    problems = adapters.misfits(leaves, nodes) + list_metadata_problems(metadata)
    if init and not problems:
        problems = initial_values.find_others(nodes, leaves, init)
    if problems:
        raise make_error(problems)
    nodes = nodes if init else initial_values.make_plain(nodes)
    older = bool(config.origin.get("older", False))
    model = target_modules.make_model(_weights(names, leaves, older=older))
    content, problems = _collect_content(nodes, model, config, init)
    if problems:
        raise make_error(problems)
    words, plan = _choose_words(content, model, config, metadata)
    dtypes = config.origin.get("dtypes")
    dtypes = dtypes if isinstance(dtypes, dict) else {}
    tensors = {
        n: _cast_as_stored(_make_tensor(part, content.nodes, leaves), dtypes.get(n))
        for n, part in plan.parts.items()
    }
    try:
        words, tensors = methods.find_method(words).collapse(words, plan.parts, tensors)
    except ValueError as error:
        raise make_error([str(error)]) from error
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    data = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    write_atomically(directory / WEIGHTS, data)
    write_atomically(directory / CONFIG, to_bytes(restrict(words)))


def _weights(table: Sequence[Name], leaves: Mapping[str, Any], *, older: bool) -> list[Weight]:
    return names.weights(table, leaves, older=older)


def _collect_content(
    nodes: Mapping[str, Any], model: Model, config: LoRAConfig, init: str
) -> tuple[_Content, list[str]]:
    by_leaf: dict[str, list[Weight]] = {}
    for weight in model.weights.values():
        by_leaf.setdefault(weight.leaf, []).append(weight)
    content = _Content(nodes=dict(nodes), kernels={}, trained={}, ranks={}, alphas={}, init=init)
    problems = []
    for leaf, node in nodes.items():
        rows = by_leaf.get(leaf, [])
        problem = obstacles.find_obstacle(leaf, node, rows)
        if problem:
            problems.append(problem)
        elif isinstance(node, AdaptedBias | Tokens):
            continue  # words of their own say where they are
        elif is_adapted(node):
            kernels = {w.hf if names.is_bare(w) else names.module(w.hf): w for w in rows}
            content.kernels.update(kernels)
            content.ranks.update(dict.fromkeys(kernels, fields.sizes(node)[RANK]))
            content.alphas.update(dict.fromkeys(kernels, _choose_alpha(node, config)))
        else:
            content.trained.update({w.hf: w for w in rows})
    if not content.kernels and not problems:
        problems.append("no kernel is adapted, and PEFT has no adapter without one")
    problems += [] if problems else biases.find_obstacles(nodes, content.kernels, model)
    if content.kernels and (mixture := methods.find_mixture(_find_methods(content))):
        problems.append(mixture)
    return content, problems


def _find_methods(content: _Content) -> list[methods.Method]:
    """Returns the methods of the adapted kernels, in their order."""
    find = methods.find_method_of
    found = [find(content.nodes[w.leaf], content.init) for w in content.kernels.values()]
    return [method for method in found if method is not None]


def _choose_alpha(node: Adapted, config: LoRAConfig) -> float:
    """Finds an alpha that gives exactly the scale of the node, the config's if that does."""
    if not scales(type(node)):
        return config.alpha
    rank, root = fields.sizes(node)[RANK], config.rank_stabilized
    scale = scale_array(node)
    divisor = methods.require_method_of(node).compute_divisor(rank, root=root)
    exact = float(scale) * divisor
    nearby = [float(np.nextafter(exact, side)) for side in (0, np.inf)]
    candidates = [
        config.alpha, *config.alpha_pattern.values(), float(round(exact)), round(exact, 4), exact,
        *nearby,
    ]  # fmt: skip
    same = lambda alpha: scale.dtype.type(alpha / divisor) == scale
    alpha = next((alpha for alpha in candidates if alpha > 0 and same(alpha)), exact)
    return int(alpha) if float(alpha).is_integer() else alpha


def _choose_words(
    content: _Content, model: Model, config: LoRAConfig, metadata: Mapping[str, Any]
) -> tuple[dict[str, Any], Plan]:
    """Chooses words that stand for exactly this adapter: those it came with, or new ones."""
    dropout = _choose_dropout(content, config)
    given = {**metadata, "lora_dropout": dropout, "use_rslora": config.rank_stabilized}
    method = _find_methods(content)[0]
    given |= {word: getattr(config, name) for name, word in method.fields.items()}
    old = config.origin.get("words", {})
    if old and not find_problems(old):
        words_of_origin = canonicalize(complete(_deduplicate(old)) | given, old)
        plan = adapter_tensors.make_plan(words_of_origin, model)
        same = content.name_parameters(plan.parameters)
        if not _find_differences(same, plan, words_of_origin):
            return words_of_origin, plan
        # The adapter has changed since; words about it as a whole still hold.
        given = {name: old.get(name) for name in METADATA} | given
    words = complete({**DEFAULTS, **method.words}) | given
    words = canonicalize(words | _make_words(content, model, words, config), {})
    plan = adapter_tensors.make_plan(words, model)
    differences = _find_differences(content, plan, words)
    if differences:
        raise make_error(differences)
    return words, plan


def _choose_dropout(content: _Content, config: LoRAConfig) -> float:
    """Returns the config's dropout, or 0 where PEFT would refuse to open the file with it."""
    bare = [n for n, w in content.kernels.items() if n == w.hf]
    if not bare or not config.dropout:
        return config.dropout
    warnings.warn(
        f"lora_dropout is written as 0 and not as {config.dropout}: PEFT has no dropout on bare "
        f"parameters, as {bare[0]} is one. It counts only where the adapter is trained on.",
        stacklevel=4,
    )
    return 0.0


def _deduplicate(words: Mapping[str, Any]) -> dict[str, Any]:
    """Removes repeated heads, which PEFT adds to modules_to_save each time it loads an adapter."""
    words = dict(words)
    if words.get("modules_to_save"):
        words["modules_to_save"] = list(dict.fromkeys(words["modules_to_save"]))
    return words


def _make_words(
    content: _Content, model: Model, words: Mapping[str, Any], config: LoRAConfig
) -> dict[str, Any]:
    """Makes the shortest words for the adapter."""
    saved, rest = saved_modules.find_whole(content.trained, model)
    heads = HEADS.get(words["task_type"], ())
    untrained = saved_modules.find_untrained_heads(heads, saved, model)
    if untrained:
        raise make_error(
            [
                f"task_type {words['task_type']} means that {', '.join(untrained)} is trained in "
                "full, and it is not"
            ]
        )
    entries = [e for e in saved_modules.find_entries(saved, model) if e not in heads]
    inside = [m for m in model.modules if any(f"{m}.".startswith(f"{s}.") for s in saved)]
    bare = [n for n, w in content.kernels.items() if n == w.hf]
    modules = {m: w for m, w in content.kernels.items() if m != w.hf}
    targets = target_modules.shortest_entries(modules, model.modules, inside)
    rank = _most_frequent(content.ranks, config.rank)
    alpha = _most_frequent(content.alphas, config.alpha)
    new = {
        "modules_to_save": [*entries, *heads] or None,
        "target_modules": targets,
        parameters.WORD: parameters.make_word(bare, model),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "bias": saved_modules.choose_bias(rest, content.trained, content.kernels, model),
        "ensure_weight_tying": any(w.row.tied for w in content.trained.values()),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": target_modules.shortest_patterns(content.ranks, model, rank),
        "alpha_pattern": target_modules.shortest_patterns(content.alphas, model, alpha),
        "fan_in_fan_out": any(names.is_conv1d(w) for w in modules.values()),
        biases.WORD: bool(biases.select(content.nodes)),
        tokens.WORD: tokens.make_word(content.nodes, model),
        **_find_methods(content)[0].words,
    }
    if set(target_modules.select_adapted(dict(words) | new, model)) != set(modules):
        # No list selects these modules: one name is the ending of another.
        new["target_modules"] = "|".join(re.escape(m) for m in sorted(modules))
    return new


def _most_frequent(values: Mapping[str, Any], configured: float) -> Any:
    """Returns the config's value if it is in use, else the smallest of the most frequent."""
    counts = collections.Counter(values.values())
    return min(counts, key=lambda v: (v != configured, -counts[v], v))


def _find_differences(content: _Content, plan: Plan, words: Mapping[str, Any]) -> list[str]:
    """Says where words do not stand for exactly the adapter."""
    problems = plan.problems + parameters.find_contradictions(words)
    root = words["use_rslora"]
    modules_of_words, modules_of_adapter = set(plan.ranks), set(content.kernels)
    trained = {p.weight.hf for p in plan.parts.values() if p.role == adapter_tensors.TRAINED}
    for what, more in (
        ("would adapt", modules_of_words - modules_of_adapter),
        ("would not adapt", modules_of_adapter - modules_of_words),
        ("would train", trained - set(content.trained)),
        ("would not train", set(content.trained) - trained),
    ):
        if more:
            problems.append(f"PEFT {what} {paths.listing(sorted(more))}")
    if set(plan.biases) != set(biases.select(content.nodes)):
        problems.append("PEFT would adapt other biases than the adapter does")
    if plan.tokens != (ids := tokens.select_ids(content.nodes)):
        problems.append(f"PEFT would train tokens {plan.tokens}, and it has {ids}")
    for m in sorted(modules_of_words & modules_of_adapter):
        node = content.nodes[content.kernels[m].leaf]
        method_of_words = plan.methods[content.kernels[m].leaf]
        scale = plan.alphas[m] / method_of_words.compute_divisor(plan.ranks[m], root=root)
        exact = scale_array(node) if scales(type(node)) else np.asarray(scale)
        if methods.find_method_of(node, content.init) is not method_of_words:
            problems.append(f"PEFT would read {m} with {methods.describe_words(method_of_words)}")
        elif plan.ranks[m] != content.ranks[m]:
            problems.append(f"PEFT would give {m} rank {plan.ranks[m]}")
        elif exact.dtype.type(scale) != exact:
            problems.append(f"PEFT would give {m} scale {scale}")
    return problems


def _make_tensor(part: Part, nodes: Mapping[str, Any], leaves: Mapping[str, Any]) -> np.ndarray:
    if part.role == adapter_tensors.BASE:
        return base_tensor(part, leaves)
    node, layer = nodes[part.weight.leaf], part.weight.layer
    pick = lambda x: np.asarray(x) if layer is None else np.asarray(x)[layer]
    if part.role == adapter_tensors.TRAINED:
        return names.to_tensor(part.weight, pick(node))
    if part.role == adapter_tensors.BETA:
        return names.to_tensor(part.weight, pick(node.beta))
    if part.role == adapter_tensors.TOKENS:
        return tokens.make_tensor(node, part.weight)
    axes = methods.require_method_of(node).field_axes(part.role, part.weight)
    if BATCH not in node.table[part.role].axes:
        pick = np.asarray
    return layouts.to_file(part.weight, pick(getattr(node, part.role)), axes, part.letters)


def _cast_as_stored(value: np.ndarray, dtype: str | None) -> np.ndarray:
    """Casts to the dtype that the tensor had in the file it came from, if that loses nothing."""
    if dtype in _DTYPES and is_exact(value, jnp.dtype(dtype)):
        value = value.astype(jnp.dtype(dtype))
    return np.ascontiguousarray(value)
