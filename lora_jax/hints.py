"""Hints for errors: other libraries' words for a config's fields, and arguments of a wrong kind."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

_OTHER_NAMES = {
    "adapt_bias": ("lora_bias",),
    "alpha": ("lora_alpha",),
    "dropout": ("lora_dropout", "dropout_rate"),
    "init": ("init_lora_weights",),
    "projection_seed": ("projection_prng_key",),
    "rank": ("r", "lora_rank", "lora_r", "lora_dim", "init_r"),
    "rank_stabilized": ("use_rslora", "rslora", "rank_stabilised"),
    "targets": (
        "target_modules", "target_parameters", "module_path", "lora_attn_modules", "target",
        "modules", "include",
    ),
    "train": ("modules_to_save", "trainable", "trainable_modules"),
    "train_tokens": ("trainable_token_indices", "trainable_tokens", "token_indices"),
}  # fmt: skip
_FIELDS = {word: field for field, words in _OTHER_NAMES.items() for word in words}
_ALTERNATIVES = {
    "bias": 'to train biases use train, for example train=("re:.*/bias",)',
    "exclude_modules": 'a regular expression in targets can do it, as "re:(?!.*head).*"',
    "fan_in_fan_out": "which axes of a kernel are inputs is read off the function",
    "inference_mode": "an adapter has no mode; give lift(fn, dropout=0.0) for evaluation",
    "layers_pattern": 'use a regular expression in targets, as "re:.*layers/[0-3]/.*"',
    "layers_to_transform": 'use a regular expression in targets, as "re:.*layers/[0-3]/.*"',
    "peft_type": 'the method is a value of method, such as "vera"',
    "target_r": "it is optimizer.budget.target_rank of a run's config",
    "vera_dropout": "it is dropout",
    "task_type": "the function says what it computes; lora_jax.peft.save_peft takes a task_type",
    "use_dora": 'DoRA is method="dora"',
    "weight_qtype": "quantized training is not supported",
    "base_model_name_or_path": "lora_jax.save takes the id of the base",
}


# What a module of each library is given as, in place of itself.
_MODULES = {
    "flax.linen": "give module.apply, whose first argument are the variables",
    "flax.nnx": "lora_jax.from_nnx(module) makes a function and its parameters of it",
    "keras": "lora_jax.from_keras(model) makes a function and its parameters of it",
}


def check_function(fn: Any) -> None:
    """Checks that ``fn`` is a function of parameters, and not a module that holds its own.

    Raises:
      TypeError: it is none; the message says what to give.
    """
    homes = [x.__module__ for x in type(fn).__mro__ if x.__name__ in ("Module", "Layer")]
    fits = lambda library: any(home == library or home.startswith(f"{library}.") for home in homes)
    if hint := next((text for library, text in _MODULES.items() if fits(library)), ""):
        raise TypeError(
            f"A function fn(params, ...) is wanted, and {type(fn).__name__} is a module: {hint}."
        )
    if not callable(fn):
        raise TypeError(f"A function fn(params, ...) is wanted, got {_describe(fn)}.")


def check_key(key: Any) -> None:
    """Checks that a PRNG key is none of Python's numbers.

    Raises:
      TypeError: it is one; the message says how to make a key.
    """
    if isinstance(key, int):
        raise TypeError(f"A PRNG key is wanted, got int {key}: jax.random.key({key}) makes one.")


def check_config(config: Any, cls: type) -> None:
    """Checks that ``config`` is one of this library.

    Raises:
      TypeError: it is none; the message says how to make one.
    """
    if not isinstance(config, cls):
        how = ": LoRAConfig(**config) makes one" if isinstance(config, Mapping) else ""
        raise TypeError(f"A LoRAConfig is wanted, got {_describe(config)}{how}.")


def _describe(x: Any) -> str:
    """Describes an argument by its type, and by its value if that is short."""
    text = repr(x)
    return type(x).__name__ + (f" {text}" if len(text) <= 60 else "")


def unknown_fields(unknown: Iterable[str], fields: Iterable[str]) -> str:
    """Says which fields a config lacks, and which ones to use instead.

    >>> unknown_fields(["r"], ["rank", "alpha"])
    "Unknown LoRAConfig fields ['r']; the fields are ['rank', 'alpha']. rank is this library's name for r."
    """  # noqa: E501
    unknown, fields = list(unknown), list(fields)
    hints = [hint for name in unknown if (hint := _hint(name, fields))]
    return " ".join([f"Unknown LoRAConfig fields {unknown}; the fields are {fields}.", *hints])


def _hint(name: str, fields: list[str]) -> str:
    if name in _FIELDS:
        return f"{_FIELDS[name]} is this library's name for {name}."
    if name in _ALTERNATIVES:
        return f"There is no {name} here: {_ALTERNATIVES[name]}."
    near = difflib.get_close_matches(name, fields, n=1)
    return f"Did you mean {near[0]} for {name}?" if near else ""
