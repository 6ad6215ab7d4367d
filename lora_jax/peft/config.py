"""``adapter_config.json``: PEFT's words for an adapter, checked by reading and written whole."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_jax.peft import biases, parameters, tokens
from lora_jax.peft.initial_values import COMPUTED
from lora_jax.peft.producers import describe_files, describe_keys

CONFIG = "adapter_config.json"
VERSION = "0.21.2"  # the version of PEFT that has these keys
_MAX_BYTES = 4 << 20  # PEFT's own files have a few thousand
_MAX_RANK = 1 << 16
_MAX_SEED = 1 << 63
_MAX_ENTRIES = 5000  # of a list or of patterns

TASKS = (
    "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION",
)  # fmt: skip
# Modules that PEFT trains in full by itself for a task, those of them that the model has.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# Every key that PEFT writes, with its default.
DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
    "auto_mapping": None, "base_model_name_or_path": None, "bias": "none", "corda_config": None,
    "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None,
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False,
    "lora_dropout": 0.0, "lora_ga_config": None, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None,
    "peft_type": "LORA", "peft_version": VERSION, "qalora_group_size": 16, "r": 8,
    "rank_pattern": {}, "revision": None, "target_modules": None, "target_parameters": None,
    "task_type": None, "trainable_token_indices": None, "use_bdlora": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False, "velora_config": None,
}  # fmt: skip
# The same for VeRA. Words that plain LoRA has under other names are in `_OTHER_NAMES`.
VERA_DEFAULTS: dict[str, Any] = {
    "auto_mapping": None, "base_model_name_or_path": None, "bias": "none", "d_initial": 0.1,
    "fan_in_fan_out": False, "inference_mode": True, "init_weights": True, "layers_pattern": None,
    "layers_to_transform": None, "modules_to_save": None, "peft_type": "VERA",
    "peft_version": VERSION, "projection_prng_key": 0, "r": 256, "revision": None,
    "save_projection": True, "target_modules": None, "task_type": None, "vera_dropout": 0.0,
}  # fmt: skip
# The same for AdaLoRA. PEFT itself has no default for the number of steps, and demands one.
ADALORA_DEFAULTS: dict[str, Any] = DEFAULTS | {
    "beta1": 0.85, "beta2": 0.85, "deltaT": 1, "init_r": 12, "orth_reg_weight": 0.5,
    "peft_type": "ADALORA", "rank_pattern": None, "target_r": 8, "tfinal": 0, "tinit": 0,
    "total_step": 1,
}  # fmt: skip
# Every key of each type of adapter that is read.
TYPES: dict[str, dict[str, Any]] = {
    "LORA": DEFAULTS, "VERA": VERA_DEFAULTS, "ADALORA": ADALORA_DEFAULTS,
}  # fmt: skip
KEPT = "kept_triplets"  # what AdaLoRA has in rank_pattern: which triplets of a module are left
_OTHER_NAMES = {
    "VERA": {"vera_dropout": "lora_dropout"}, "ADALORA": {"init_r": "r", "rank_pattern": KEPT},
}  # fmt: skip
# Words that PEFT has in a type, and passes over.
_WITHOUT_EFFECT = {"ADALORA": {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}}
# Words about an adapter that do not change what it computes; the caller of `save_peft` sets them.
METADATA = ("task_type", "base_model_name_or_path", "revision", "auto_mapping")
# Words that finished factors do not need, with the reason; `docs/formats.md` lists them.
IGNORED: dict[str, str] = {
    "auto_mapping": "class of the base in torch; the base's own files tell",
    "inference_mode": "always true in files; whoever loads an adapter says what it is for",
    "peft_version": "version that wrote the file; the words themselves are checked",
    "eva_config": "how factors were first drawn",
    "corda_config": "acts with init_lora_weights 'corda' alone, which is refused",
    "loftq_config": "acts with init_lora_weights 'loftq' alone, which is refused",
    "lora_ga_config": "acts with init_lora_weights 'lora_ga' alone, which is refused",
    "megatron_core": "acts with megatron_config alone, which is refused",
    "qalora_group_size": "acts with use_qalora alone, which is refused",
    "runtime_config": "where numbers are kept while PEFT runs",
    "quantization_config": "how the base was loaded; a base that is not quantized is told of",
    "merge_weights": "whether PEFT before 0.3 merged for evaluation",
    "target_r": "how AdaLoRA chose ranks in training",
    "tinit": "how AdaLoRA chose ranks in training",
    "tfinal": "how AdaLoRA chose ranks in training",
    "deltaT": "how AdaLoRA chose ranks in training",
    "beta1": "how AdaLoRA chose ranks in training",
    "beta2": "how AdaLoRA chose ranks in training",
    "orth_reg_weight": "how AdaLoRA chose ranks in training",
    "total_step": "how AdaLoRA chose ranks in training",
    "d_initial": "how the vectors of VeRA were first set",
    "init_weights": "how the vectors of VeRA were first set",
}
# Words of PEFT that ask for what is not built here, when they are set.
REFUSED: dict[str, str] = {
    "alora_invocation_tokens": "an adapter that acts from some tokens on (aLoRA)",
    "arrow_config": "routing between adapters (Arrow)",
    "enable_lora": "factors for parts of a fused kernel (PEFT before 0.3)",
    "kasa_config": "a base without its smallest singular values (KaSA)",
    "layer_replication": "a base with layers repeated",
    "megatron_config": "layers of Megatron",
    "monteclora_config": "factors that are drawn (MonteCLoRA)",
    "use_bdlora": "factors of blocks (BD-LoRA)",
    "use_qalora": "inputs that are averaged in groups (QA-LoRA)",
    "velora_config": "compressed activations (VeLoRA)",
}
# Initial values that leave the base as it is, and those that the base alone gives again. The others
# (a randomized PiSSA, CorDA, LoftQ, LoRA-GA) change the base by what no file says.
_INITS = (True, False, "gaussian", "eva", "orthogonal", *COMPUTED)


def read_words(directory: str | Path) -> dict[str, Any]:
    """Reads and checks ``adapter_config.json``; absent keys of its type have PEFT's defaults.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or asks for unsupported features; the message names them all.
    """
    path = Path(directory) / CONFIG
    words = _parse(path)
    problems = find_problems(words)
    if problems:
        raise ValueError(f"{path} can't be used: {'; '.join(problems)}.")
    return TYPES[words["peft_type"]] | words


def complete(words: Mapping[str, Any]) -> dict[str, Any]:
    """Adds plain LoRA's words to those of another type, so that all types can be read alike.

    >>> complete({"peft_type": "VERA", "vera_dropout": 0.1})["lora_dropout"]
    0.1
    """
    type_ = words["peft_type"]
    named = {new: words[n] for n, new in _OTHER_NAMES.get(type_, {}).items() if n in words}
    return {**DEFAULTS, **TYPES[type_], **words, **_WITHOUT_EFFECT.get(type_, {}), **named}


def restrict(words: Mapping[str, Any]) -> dict[str, Any]:
    """Inverts :func:`complete`: keeps the words that an adapter's type has."""
    type_ = words["peft_type"]
    others = _OTHER_NAMES.get(type_, {})
    foreign = {*others.values(), *set().union(*TYPES.values())} - set(TYPES[type_])
    own = {n: value for n, value in words.items() if n not in foreign}
    unused = {new: TYPES[type_][new] for new in others.values() if new in TYPES[type_]}
    return own | unused | {n: words[new] for n, new in others.items() if new in words}


def find_problems(words: Any) -> list[str]:
    """Says which of an adapter's words are malformed or not supported."""
    if not isinstance(words, dict):
        return ["no JSON object"]
    if other := describe_keys(words):
        return [other]
    ill_formed = {name: _describe_ill_formed(name, words) for name in _CHECKS}
    problems = _find_unsupported(words) + [
        f"{n}: {error}" for n, error in ill_formed.items() if error
    ]
    return problems or _find_contradictions(words)


def describe_quantization(words: Mapping[str, Any]) -> str:
    """Describes how the base of an adapter was quantized, as far as its words tell; "" if not.

    >>> describe_quantization({"base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit"})
    'bnb-4bit'
    """
    about = words.get("quantization_config")
    found = _QUANTIZED.search(str(words.get("base_model_name_or_path") or ""))
    if found:
        return found[1]
    return json.dumps(about, default=str)[:200] if about else ""


# As in names on the Hub: "...-unsloth-bnb-4bit", "...-GPTQ-Int4", "...-AWQ".
_QUANTIZED = re.compile(
    r"[-_.]((?:unsloth-)?bnb-[48]bit|(?:gptq|awq|hqq|aqlm|exl2|fp8|int[48]|[48]-?bit|w4a16|w8a8)"
    r"(?:[-_.][\w.-]*)?)$",
    re.IGNORECASE,
)


def guess_plain_base(words: Mapping[str, Any]) -> str:
    """Returns what the plain base of an adapter is likely to be called, by the name of its base.

    >>> guess_plain_base({"base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit"})
    'unsloth/llama-3-8b'
    """
    return _QUANTIZED.sub("", str(words.get("base_model_name_or_path") or ""))


def _parse(path: Path) -> dict[str, Any]:
    if not path.is_file():
        files = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else None
        state = "does not exist" if files is None else f"holds {files[:20] or 'nothing'}"
        other = describe_files(path.parent)
        if inside := sorted(str(p.parent) for p in path.parent.glob(f"*/{CONFIG}")):
            other = f"There are adapters inside: give {' or '.join(inside[:3])}."
        raise FileNotFoundError(
            f"No PEFT adapter in {path.parent}: no {CONFIG}; the directory {state}."
            + (f" {other}" if other else "")
        )
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; no adapter's config is so big.")
    try:
        words = json.loads(
            path.read_bytes().decode(),
            object_pairs_hook=_refuse_duplicates,
            parse_constant=_refuse_constant,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if not isinstance(words, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object.")
    return words


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twins = [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]
    if twins:
        raise ValueError(f"the keys {twins[:5]} are there more than once")
    return dict(pairs)


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _find_unsupported(words: Mapping[str, Any]) -> list[str]:
    """Says which words ask for something that this library does not do."""
    type_ = words.get("peft_type")
    if not isinstance(type_, str) or type_ not in TYPES:
        supported = " and ".join(map(repr, TYPES))
        return [f"peft_type is {_abbreviate(type_)}, and only {supported} are supported"]
    problems = []
    foreign = set().union(*TYPES.values()) - set(TYPES[type_]) - set(IGNORED)
    known = {*READ, *IGNORED} - foreign
    for name, value in words.items():
        # Such values stand for a feature of a newer PEFT that is not in use.
        is_empty = isinstance(value, str | list | dict) and not value
        is_off = value is None or value is False or is_empty
        if name not in known and not is_off:
            what = "is not known here"
            if name in REFUSED:
                what = f"is not supported ({REFUSED[name]})"
            elif name in foreign:
                what = f"is no word of {type_}"
            problems.append(f"{name} is {_abbreviate(value)}, which {what}")
    return problems


def _abbreviate(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:60]}..."


def _describe_ill_formed(name: str, words: Mapping[str, Any]) -> str:
    check = _CHECKS_OF_TYPES.get((str(words.get("peft_type")), name), _CHECKS.get(name))
    if check is None or name not in words:
        return ""
    wanted, fits = check
    return "" if fits(words[name]) else f"must be {wanted}, got {_abbreviate(words[name])}"


def _find_contradictions(words: Mapping[str, Any]) -> list[str]:
    targets = words.get("target_modules")
    problems = []
    if targets in (None, [], "") and not words.get(parameters.WORD):
        problems.append(
            "target_modules names nothing; write down the modules that the adapter is for"
        )
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(targets, str) and words.get(name) not in (None, [], ""):
            problems.append(f"{name} can't be used with target_modules {targets!r}, a string")
    if words.get("layers_pattern") and words.get("layers_to_transform") is None:
        problems.append("layers_pattern needs layers_to_transform")
    return problems + parameters.find_contradictions(words)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(_as_float(x))


def _as_float(x: float) -> float:
    try:
        return float(x)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf


def _is_rank(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 1 <= x <= _MAX_RANK


def _is_mask(x: Any) -> bool:
    is_small = isinstance(x, list) and len(x) <= _MAX_RANK
    return is_small and all(isinstance(entry, bool) for entry in x)


def _is_seed(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < _MAX_SEED


def _is_alpha(x: Any) -> bool:
    return _is_number(x) and 1e-30 < x < 1e30  # so that float32 holds every scale


def _is_strings(x: Any) -> bool:
    is_small = isinstance(x, list) and len(x) <= _MAX_ENTRIES
    return is_small and all(isinstance(s, str) and s for s in x)


def _is_revision(x: Any) -> bool:
    return x is None or (isinstance(x, str) and ".." not in x and not set(x) & set("@\\\0"))


def _is_choice(x: Any) -> bool:
    return x is None or isinstance(x, str) or _is_strings(x)


def _is_layers(x: Any) -> bool:
    is_whole = lambda k: isinstance(k, int) and not isinstance(k, bool)
    return x is None or is_whole(x) or (isinstance(x, list) and all(map(is_whole, x)))


def _make_map_check(is_value: Callable[[Any], bool]) -> Callable[[Any], bool]:
    is_small = lambda x: isinstance(x, dict) and len(x) <= _MAX_ENTRIES
    return lambda x: x is None or (is_small(x) and all(map(is_value, x.values())))


_BOOL = ("true or false", lambda x: isinstance(x, bool))
_CHOICE = (f"a list of up to {_MAX_ENTRIES} names, or a regular expression", _is_choice)
_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": (f"a whole number from 1 to {_MAX_RANK}", _is_rank),
    "init_r": (f"a whole number from 1 to {_MAX_RANK}", _is_rank),
    "lora_alpha": ("a positive number, of sensible size", _is_alpha),
    "lora_dropout": ("a number in [0, 1)", lambda x: _is_number(x) and 0 <= x < 1),
    "use_dora": _BOOL,
    "use_rslora": _BOOL,
    "fan_in_fan_out": _BOOL,
    biases.WORD: _BOOL,
    "ensure_weight_tying": _BOOL,
    "bias": ("none, all or lora_only", lambda x: x in ("none", "all", "lora_only")),
    "target_modules": _CHOICE,
    "exclude_modules": _CHOICE,
    "layers_pattern": _CHOICE,
    "layers_to_transform": ("a whole number or a list of them", _is_layers),
    "modules_to_save": ("a list of names", lambda x: x is None or _is_strings(x)),
    "rank_pattern": (f"an object with ranks from 1 to {_MAX_RANK}", _make_map_check(_is_rank)),
    "alpha_pattern": (
        "an object with positive numbers, of sensible size",
        _make_map_check(_is_alpha),
    ),
    "init_lora_weights": (
        f"one of {_INITS}: others freeze a factor, or change the base by what no file says. Of "
        "these PEFT makes plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion"
        "=the adapter before its first step)",
        lambda x: isinstance(x, bool | str) and x in _INITS,
    ),
    parameters.WORD: ("null or a list of names", parameters.is_word),
    tokens.WORD: (
        "null, a list of ids from 0 on, each once, or an object with such a list for each module",
        tokens.is_word,
    ),
    "projection_prng_key": (f"a whole number below {_MAX_SEED}", _is_seed),
    "save_projection": _BOOL,
    "vera_dropout": ("a number in [0, 1)", lambda x: _is_number(x) and 0 <= x < 1),
    "task_type": (f"null or one of {TASKS}", lambda x: x is None or x in TASKS),
    "base_model_name_or_path": ("null or a name", lambda x: x is None or isinstance(x, str)),
    "revision": ("null or the name of a branch, a tag or a commit", _is_revision),
}
_CHECKS_OF_TYPES = {
    ("ADALORA", "rank_pattern"): (
        "null or an object with lists of true and false",
        _make_map_check(_is_mask),
    ),
}
READ = ("peft_type", *_CHECKS)  # every other word is in IGNORED or in REFUSED


def to_bytes(words: Mapping[str, Any]) -> bytes:
    """Makes the file's content, laid out as PEFT does; keys are sorted, also within patterns."""
    return json.dumps(words, indent=2, sort_keys=True, allow_nan=False).encode()


def canonicalize(words: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the words as they will be read: keys sorted, equal numbers written as in ``old``."""
    words = {n: old[n] if n in old and old[n] == v else v for n, v in words.items()}
    return json.loads(to_bytes(words))


def list_metadata_problems(metadata: Mapping[str, Any]) -> list[str]:
    """Says what is wrong with words about an adapter as a whole."""
    problems = [f"{n} is none of the words {METADATA}" for n in metadata if n not in METADATA]
    if metadata.get("task_type") not in (None, *TASKS):
        problems.append(f"task_type {metadata['task_type']!r} is none of {TASKS}")
    return problems
