"""Plans the tensors of an adapter file: what PEFT's words make of a model, tensor by tensor.

Reading and writing follow the same plan, and a file is whole if it has exactly the plan's tensors.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lora_jax import names
from lora_jax.factors import IN, OUT, RANK
from lora_jax.names import Weight
from lora_jax.peft import biases, layouts, parameters, target_modules, tokens
from lora_jax.peft.config import HEADS
from lora_jax.peft.methods import METHODS, Method, describe_words, find_method, find_method_for
from lora_jax.peft.parts import BASE, BETA, PREFIX, TOKENS, TRAINED, Part
from lora_jax.peft.target_modules import OUTPUTS, Model

# For targets with these names PEFT's file holds the module's frozen weight beside its factors.
_COPIED = ("embed_tokens", "lm_head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The meaning of the words for a model.

    Attributes:
      parts: tensors of the file by name; copies of frozen weights (of the role ``BASE``) may be
        absent, as they say nothing that the base does not.
      optional: further tensors by name that PEFT writes if it is told to, or has once written:
        copies of frozen weights, and embeddings and output heads that replace the base's.
      methods: method of each adapted leaf, by path.
      leaves: path of the kernel of each adapted module and of each bare parameter, by name.
      ranks: rank of each of them.
      alphas: alpha of each of them.
      parameters: names of the bare parameters among them.
      trained: names of the modules trained in full.
      tokens: ids of the trained tokens, by path of the leaf.
      biases: path of the kernel beside each adapted bias, by path of the bias.
      problems: descriptions of words that do not fit the model.
    """

    parts: dict[str, Part]
    optional: dict[str, Part]
    methods: dict[str, Method]
    leaves: dict[str, str]
    ranks: dict[str, int]
    alphas: dict[str, float]
    parameters: list[str]
    trained: list[str]
    tokens: dict[str, tuple[int, ...]]
    biases: dict[str, str]
    problems: list[str]


def make_plan(words: Mapping[str, Any], model: Model) -> Plan:
    """Plans the file for the words.

    Raises:
      ValueError: a regular expression of the words can't be used, or they ask for several methods.
    """
    method = find_method(words)
    chosen, bare = target_modules.select_adapted(words, model), parameters.select(words, model)
    trained = target_modules.select_saved(words["modules_to_save"] or [], model)
    if words["ensure_weight_tying"]:
        trained = _add_tied(trained, model)
    taken = dict.fromkeys(chosen, "adapted") | _inside(trained, model)
    problems = _find_unused(words, model, [*chosen, *bare]) + _find_unfit(
        method, chosen, trained, model, ties=words["ensure_weight_tying"]
    )
    problems += parameters.find_unfit(bare, model, taken)
    kernels = [m for m in chosen if m in model.kernels and _is_plain(model.kernels[m])]
    bare = parameters.find_fit(bare, model)
    weights = {m: model.kernels[m] for m in kernels} | {n: model.weights[n] for n in bare}
    ranks, alphas = (_choose_values(words, [*weights], what) for what in ("rank", "alpha"))
    methods = {m: find_method_for(words, model.kernels[m]) for m in kernels}
    parts = dict(_node_parts(methods, model, ranks)) | dict(_bare_parts(bare, model, ranks))
    parts |= dict(_trained_parts(trained, model)) | dict(
        _bias_parts(words["bias"], kernels, trained, model)
    )
    parts |= dict(_copy_parts(words, kernels, model))
    taken |= {names.module(n): "adapted" for n in bare}
    with_tokens = tokens.select(words, model, taken)
    parts |= dict(_token_parts(with_tokens, model))
    adapted_biases, lacking = biases.find(kernels if words[biases.WORD] else (), model)
    for m, weight in adapted_biases.items():
        parts[f"{m}{biases.BETA}"] = Part(BETA, weight, names.tensor_shape(weight))
    optional = dict(_optional_parts(kernels, trained, model))
    frozen = tokens.frozen_names(with_tokens, model)
    optional |= {n: Part(BASE, w, names.tensor_shape(w)) for n, w in frozen}
    return Plan(
        parts=_add_prefix(parts),
        optional=_add_prefix({n: part for n, part in optional.items() if n not in parts}),
        methods={w.leaf: methods.get(m, METHODS[0]) for m, w in weights.items()},
        leaves={m: w.leaf for m, w in weights.items()},
        ranks=ranks,
        alphas=alphas,
        parameters=bare,
        trained=trained,
        tokens={model.kernels[m].leaf: ids for m, ids in with_tokens.ids.items()},
        biases={w.leaf: model.kernels[m].leaf for m, w in adapted_biases.items()},
        problems=problems + with_tokens.problems + lacking,
    )


def _add_prefix(parts: Mapping[str, Part]) -> dict[str, Part]:
    with_prefix = lambda part: part._replace(others=tuple(PREFIX + n for n in part.others))
    return {PREFIX + n: with_prefix(part) for n, part in parts.items()}


def _choose_values(words: Mapping[str, Any], kernels: list[str], what: str) -> dict[str, Any]:
    patterns = target_modules.compile_patterns(words[f"{what}_pattern"], f"{what}_pattern")
    default = words[{"rank": "r", "alpha": "lora_alpha"}[what]]
    return {m: target_modules.find_value(m, patterns, default)[0] for m in kernels}


def _find_unused(words: Mapping[str, Any], model: Model, chosen: list[str]) -> list[str]:
    """Finds words that select nothing, which PEFT passes over in silence."""
    problems = parameters.find_unused(words, model)
    if not chosen and not problems:
        problems.append("target_modules selects no module of the model")
    elif isinstance(words["target_modules"], list):
        problems += _find_no_hits("target_modules", words["target_modules"], model.modules)
    heads = HEADS.get(words["task_type"], ())
    for entry in dict.fromkeys(words["modules_to_save"] or []):
        if entry not in heads and not target_modules.select_saved([entry], model):
            problems.append(f"modules_to_save entry {entry!r} selects no module")
    for what in ("rank_pattern", "alpha_pattern"):
        patterns = target_modules.compile_patterns(words[what], what)
        used = {target_modules.find_value(m, patterns, None)[1] for m in chosen}
        for k, (key, (match, _)) in enumerate(zip(words[what] or {}, patterns, strict=True)):
            if k not in used and not any(map(match, chosen)):
                problems.append(f"{what} key {key!r} matches no adapted module")
    return problems


def _find_no_hits(what: str, entries: list[str], modules: list[str]) -> list[str]:
    """Finds entries that fit no module, not even one that other words exclude."""
    endings = {s for m in modules for s in target_modules.suffixes(m)}
    missing = [entry for entry in dict.fromkeys(entries) if entry not in endings]
    return [f"{what} entry {entry!r} selects no module" for entry in missing[:20]]


def _find_unfit(
    method: Method, chosen: list[str], trained: list[str], model: Model, *, ties: bool
) -> list[str]:
    """Finds modules that can't be adapted or trained in full as PEFT would."""
    problems = []
    for m in chosen:
        weight = model.kernels.get(m)
        if weight is None:
            problems.append(f"the module {m} has no kernel that could be adapted")
        elif names.kind(weight) not in method.kinds:
            problems.append(
                f"{m} is of the kind {names.kind(weight)}, which PEFT does not adapt with "
                f"{describe_words(method)}"
            )
        elif not names.axes(weight):
            problems.append(
                f"{weight.leaf} has shape {weight.shape}, and the table of names does not say "
                "which axes are inputs and which outputs (axes='ioo', ...)"
            )
    for weight in (model.kernels[m] for m in chosen if m in model.kernels):
        if weight.row.tied:
            problems.append(_describe_tied(weight, "changes"))
            problems[-1] += " (factors that tied weights share are not read)" if ties else ""
    full = [w for m in trained for w in module_weights(m, model)]
    names_in_full = {w.hf for w in full}
    for weight in full:
        if weight.row.tied and not {w.hf for w in _find_uses(weight, model)} <= names_in_full:
            problems.append(_describe_tied(weight, "replaces"))
    return problems


def _describe_tied(weight: Weight, verb: str) -> str:
    return (
        f"{weight.leaf} is one weight with several uses here ({weight.row.hf}, "
        f"{', '.join(weight.row.tied)}), and the adapter {verb} the use in {weight.hf} by itself; "
        "give each use a leaf of its own, as a base has that is saved with tie_word_embeddings "
        "false and both weights"
    )


def _find_uses(weight: Weight, model: Model) -> list[Weight]:
    """Finds all names of a weight, of which a tied one has several."""
    return [w for w in model.weights.values() if (w.leaf, w.layer) == (weight.leaf, weight.layer)]


def _add_tied(trained: list[str], model: Model) -> list[str]:
    """Adds the modules that hold the same weight as one of those trained."""
    weights = [w for m in trained for w in module_weights(m, model) if w.row.tied]
    tied = [names.module(use.hf) for weight in weights for use in _find_uses(weight, model)]
    return list(dict.fromkeys([*trained, *tied]))


def module_weights(module: str, model: Model) -> list[Weight]:
    """Returns the weights of a module and of those within it."""
    return [w for n, w in model.weights.items() if n.startswith(f"{module}.")]


def _is_plain(weight: Weight) -> bool:
    return bool(names.axes(weight)) and not weight.row.tied


def _node_parts(
    methods: Mapping[str, Method], model: Model, ranks: Mapping[str, int]
) -> Iterator[tuple]:
    for m, method in methods.items():
        weight = model.kernels[m]
        for tensor in method.tensors:
            shape = layouts.tensor_shape(weight, tensor.letters, {RANK: ranks[m]})
            others = tuple(f"{m}{ending}" for ending in tensor.others)
            part = Part(tensor.field, weight, shape, tensor.letters, others)
            yield f"{m}{tensor.find_ending(weight)}", part


def _bare_parts(bare: list[str], model: Model, ranks: Mapping[str, int]) -> Iterator[tuple]:
    for name, factors in parameters.list_factors(bare, model):
        weight = model.weights[name]
        for x in factors:
            shape = layouts.tensor_shape(weight, x.letters, {RANK: ranks[name]})
            yield x.name, Part(x.field, weight, shape, x.letters)


def _inside(trained: list[str], model: Model) -> dict[str, str]:
    """Returns the modules that are trained in full, with those within them."""
    inside = lambda m: any(f"{m}.".startswith(f"{other}.") for other in trained)
    return {m: "trained in full" for m in model.modules if inside(m)}


def _token_parts(with_tokens: tokens.Chosen, model: Model) -> Iterator[tuple]:
    for m, ids in with_tokens.ids.items():
        weight = model.kernels[m]
        letters = tokens.find_letters(weight)
        shape = layouts.tensor_shape(weight, letters, {"k": len(ids)})
        yield f"{m}{tokens.ROWS}", Part(TOKENS, weight, shape, letters)


def _trained_parts(trained: list[str], model: Model) -> Iterator[tuple]:
    for m in trained:
        for weight in module_weights(m, model):
            yield weight.hf, Part(TRAINED, weight, names.tensor_shape(weight))


def _bias_parts(bias: str, kernels: list[str], trained: list[str], model: Model) -> Iterator[tuple]:
    if bias == "none":
        return
    for name, weight in model.weights.items():
        module, _, last = name.rpartition(".")
        shape = names.tensor_shape(weight)
        saved = next((m for m in trained if name.startswith(f"{m}.")), None)
        if last != "bias" or (bias == "lora_only" and module not in kernels):
            continue
        if module in kernels:
            yield f"{module}.base_layer.bias", Part(TRAINED, weight, shape)
        elif saved:
            # PEFT holds a frozen and a trained copy of the module, and saves the biases of both.
            rest = name.removeprefix(f"{saved}.")
            yield f"{saved}.modules_to_save.{rest}", Part(TRAINED, weight, shape)
            yield f"{saved}.original_module.{rest}", Part(BASE, weight, shape)
        else:
            yield name, Part(TRAINED, weight, shape)


def _copy_parts(words: Mapping[str, Any], kernels: list[str], model: Model) -> Iterator[tuple]:
    targets = words["target_modules"]
    if isinstance(targets, str) or not set(targets or ()) & set(_COPIED):
        return
    for m in kernels:
        weight = model.kernels[m]
        if m.rpartition(".")[2] in _COPIED:
            yield f"{m}.base_layer.weight", Part(BASE, weight, names.tensor_shape(weight))


def _optional_parts(kernels: list[str], trained: list[str], model: Model) -> Iterator[tuple]:
    """Yields what `save_embedding_layers` and state dicts add, with the names of old versions."""
    for m in kernels:
        weight = model.kernels[m]
        part = Part(BASE, weight, names.tensor_shape(weight))
        yield f"{m}.base_layer.weight", part
        yield weight.hf, part  # before PEFT 0.7
    for m in trained:
        for weight in module_weights(m, model):
            rest = weight.hf.removeprefix(f"{m}.")
            shape = names.tensor_shape(weight)
            yield f"{m}.original_module.{rest}", Part(BASE, weight, shape)
    for m, weight in model.kernels.items():
        if _has_tokens(weight) and m not in kernels:
            yield weight.hf, Part(TRAINED, weight, names.tensor_shape(weight))


def _has_tokens(weight: Weight) -> bool:
    """Tells whether a kernel is an embedding, or an output head of a language model."""
    is_head = names.module(weight.hf).rpartition(".")[2] in OUTPUTS
    return is_head or names.kind(weight) == names.EMBEDDING


def find_token_axis(part: Part) -> int | None:
    """Finds the axis of a part that has one entry for each token; None if there is none."""
    if not _has_tokens(part.weight):
        return None
    if part.role in (TRAINED, BASE):
        return 0
    side = IN if names.kind(part.weight) == names.EMBEDDING else OUT
    return part.letters.index(side) if side in part.letters else None


def choose_parts(
    plan: Plan, tensors: Mapping[str, Any], is_copy: Callable[[str, Part], bool]
) -> dict[str, Part]:
    """Chooses the parts that a file is to have, of those that a plan allows.

    Args:
      plan: the plan.
      tensors: tensors of the file by name.
      is_copy: whether a tensor that may replace the base's is the same as that.

    Returns:
      All parts of the plan but the copies that the file lacks, and the optional parts that it has.
    """
    parts = {n: part for n, part in plan.parts.items() if n in tensors or part.role != BASE}
    for name, part in plan.optional.items():
        if name in tensors:
            is_old = part.role == TRAINED and is_copy(name, part)
            parts[name] = part._replace(role=BASE) if is_old else part
    return parts


def rename_others(plan: Plan, names: Iterable[str]) -> dict[str, str]:
    """Maps names of tensors that a part may have, too, to the one that it has in the plan.

    Among them are those that PEFT before 0.7 gave to the biases of adapted modules.
    """
    names = set(names)
    absent = {n: part for n, part in plan.parts.items() if n not in names}
    others = {other: n for n, part in absent.items() for other in part.others}
    biases = [n for n in absent if n.endswith(".base_layer.bias")]
    others |= {n.replace(".base_layer.bias", ".bias"): n for n in biases}
    return {name: new for name, new in others.items() if name in names and name not in plan.parts}
