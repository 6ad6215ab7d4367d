"""The fields of a config: which there are, of which types, and which is meant by another name.

A program has a *base config*, with all of its fields and their defaults. Nothing else says which
fields there are: whatever sets one, a config file, the command line or a sweep, is compared with
it.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict, config_dict

# Sections with keys of the user's own: each counts as one field.
OPEN_SECTIONS = ("rank_pattern", "alpha_pattern", "roles", "train_tokens")
# Fields that a base config lacks: a run that starts from an adapter has them from there.
OPTIONAL = ("lora.roles",)
# Words of other libraries, and of habit, for fields here.
_WORDS = {
    "accumulate": ("gradient_accumulation_steps", "grad_accum", "accumulation_steps"),
    "batch_size": ("per_device_train_batch_size", "train_batch_size", "micro_batch_size", "bs"),
    "checkpoint_every": ("save_steps", "save_every", "steps_per_save"),
    "checkpoint_keep": ("save_total_limit",),
    "data.max_length": (
        "max_seq_length", "max_seq_len", "seq_len", "sequence_len", "cutoff_len", "context_length",
    ),
    "data.packing": ("sample_packing", "pack"),
    "data.source": ("data", "dataset", "data_path", "dataset_name", "dataset_path"),
    "data.train": ("train_file", "train_path", "data", "dataset"),
    "data.train_examples": ("max_train_samples", "num_train_examples"),
    "data.validation": ("validation_file", "eval_file", "val_file", "dev_file", "valid"),
    "early_stopping.patience": ("early_stopping_patience",),
    "epochs": ("num_train_epochs", "num_epochs", "n_epochs", "max_epochs"),
    "eval_batch_size": ("per_device_eval_batch_size", "val_batch_size"),
    "eval_every": ("eval_steps", "evaluation_strategy", "eval_strategy", "steps_per_eval"),
    "log_every": ("logging_steps", "steps_per_report"),
    "lora.alpha": ("lora_alpha",),
    "lora.dropout": ("lora_dropout",),
    "lora.rank": ("r", "lora_r", "lora_rank", "lora_dim"),
    "lora.rank_stabilized": ("use_rslora", "rslora"),
    "lora.targets": ("target_modules", "target", "modules", "lora_targets"),
    "lora.train": ("modules_to_save", "trainable"),
    "model.attention": ("attn_implementation", "flash_attention"),
    "model.dtype": ("bf16", "fp16", "precision", "torch_dtype"),
    "model.name": ("model", "base", "base_model", "model_name", "model_name_or_path", "model_path"),
    "model.quantize": ("load_in_4bit", "load_in_8bit", "bits", "quantization"),
    "model.remat": ("gradient_checkpointing", "grad_checkpoint"),
    "optimizer.b_rate": ("loraplus_lr_ratio", "loraplus_ratio", "lr_ratio", "lora_plus_ratio"),
    "optimizer.budget.begin": ("tinit",),
    "optimizer.budget.end": ("tfinal",),
    "optimizer.budget.every": ("deltaT", "delta_t"),
    "optimizer.budget.target_rank": ("target_r",),
    "optimizer.orthogonality": ("orth_reg_weight",),
    "optimizer.embedding_rate": ("loraplus_lr_embedding",),
    "optimizer.clip_norm": ("max_grad_norm", "grad_clip", "gradient_clipping", "max_norm"),
    "optimizer.decay": ("lr_scheduler_type", "lr_scheduler", "schedule", "scheduler"),
    "optimizer.learning_rate": ("lr", "rate", "learning_rates"),
    "optimizer.warmup": ("warmup_ratio", "warmup_steps", "warm_up", "num_warmup_steps"),
    "optimizer.weight_decay": ("wd", "l2"),
    "seed": ("random_seed", "random_state"),
    "steps": ("max_steps", "num_steps", "iters", "total_steps", "train_steps"),
}  # fmt: skip
_TYPES = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}


class Problem(NamedTuple):
    """What is wrong with a field: its dotted name, and a sentence without its end."""

    field: str
    text: str


def field_names(config: ConfigDict) -> list[str]:
    """Returns the dotted names of all fields; an open section counts as one field.

    >>> field_names(ConfigDict({"seed": 0, "lora": {"rank": 8, "rank_pattern": {"query": 4}}}))
    ['lora.rank', 'lora.rank_pattern', 'seed']
    """
    names = []
    for name, value in config.items():
        if isinstance(value, ConfigDict) and name not in OPEN_SECTIONS:
            names += [f"{name}.{nested}" for nested in field_names(value)]
        else:
            names.append(name)
    return names


def get_section(config: ConfigDict, field: str) -> tuple[ConfigDict, str]:
    """Returns the section that a field is in, and the field's name there."""
    *sections, name = field.split(".")
    for section in sections:
        config = config[section]
    return config, name


def conform(
    config: ConfigDict, base: ConfigDict, *, added: Mapping[str, Any] | None = None
) -> list[Problem]:
    """Gives a config the fields and types of a program's base config, in place.

    A field that it lacks gets its default; lists become tuples, and whole numbers floats, where the
    base config has these.

    Args:
      config: config of a run, locked or not.
      base: base config of the program.
      added: values, by field, that go before the defaults.

    Returns:
      What is wrong: fields that the base config lacks, and values of other types.

    >>> config = ConfigDict({"optimizer": {"lr": 1e-3}})
    >>> base = ConfigDict({"epochs": 3, "optimizer": {"learning_rate": 5e-4}})
    >>> conform(config, base)[0].text
    "unknown config field 'optimizer.lr' (did you mean optimizer.learning_rate?)"
    >>> config.epochs
    3
    """
    known = field_names(base)
    with config.unlocked():
        return list(_conform(config, base, "", known, added or {}))


def _conform(
    config: ConfigDict, base: ConfigDict, prefix: str, known: list[str], added: Mapping[str, Any]
) -> Iterator[Problem]:
    for name in list(config.keys()):
        field, value = f"{prefix}{name}", config[name]
        if name not in base:
            if field not in OPTIONAL:
                yield from (Problem(f, unknown(f, known)) for f in _leaves(field, value))
            continue
        is_section = isinstance(base[name], ConfigDict)
        if is_section != isinstance(value, ConfigDict | dict):
            what = "a section of fields" if is_section else "one field, and no section"
            yield Problem(field, f"{field} is {what}, got {_show(value)}")
        elif not is_section:
            yield from _conform_value(config, base, name, field)
        else:
            if isinstance(value, dict):
                config[name] = ConfigDict(value)
            if name not in OPEN_SECTIONS:
                yield from _conform(config[name], base[name], f"{field}.", known, added)
    for name in base:
        if name not in config:
            default, field = base[name], f"{prefix}{name}"
            if isinstance(default, ConfigDict):
                config[name] = ConfigDict()
                yield from _conform(config[name], default, f"{field}.", known, added)
            else:
                _put(config, name, added.get(field, default), base.get_type(name))


def _conform_value(
    config: ConfigDict, base: ConfigDict, name: str, field: str
) -> Iterator[Problem]:
    type_, value = base.get_type(name), config[name]
    try:
        new = convert(field, value, like=base)
    except ValueError as error:
        yield Problem(field, str(error))
        return
    if config.get_type(name) is not type_ or type(new) is not type(value):
        _put(config, name, new, type_)


def _put(config: ConfigDict, name: str, value: Any, type_: type) -> None:
    """Sets a field, and its type: later values are of that type, too."""
    if name in config:
        del config[name]
    config[name] = config_dict.FieldReference(value, field_type=type_) if type_ is object else value


def _leaves(field: str, value: Any) -> Iterator[str]:
    if isinstance(value, ConfigDict | dict) and value:
        for name in value:
            yield from _leaves(f"{field}.{name}", value[name])
    else:
        yield field


def convert(field: str, value: Any, *, like: ConfigDict) -> Any:
    """Converts a value to the type of a field.

    Args:
      field: dotted name of the field.
      value: a value of Python or numpy.
      like: section of the base config that the field is in.

    Raises:
      ValueError: it is of another type; the message names the field.

    >>> convert("optimizer.learning_rate", 1, like=ConfigDict({"learning_rate": 5e-4}))
    1.0
    """
    name = field.rpartition(".")[2]
    type_, default = like.get_type(name), like[name]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(default, ConfigDict):
        raise ValueError(f"{field} must be a dictionary, got {_show(value)}")
    if type_ is object:  # a duration, which has a check of its own
        return value
    if type_ is tuple:
        return _convert_tuple(field, value, default)
    if type_ is float and _is(value, int):
        return float(value)
    if not _is(value, type_):
        raise ValueError(f"{field} must be {_TYPES[type_]}, got {_show(value)}")
    return value


def _convert_tuple(field: str, value: Any, default: tuple) -> tuple:
    example = f" such as {default}" if default else ""
    if not isinstance(value, tuple | list):
        raise ValueError(f"{field} must be a tuple{example}, got {_show(value)}")
    types = {type(x) for x in default}
    values = tuple(x.item() if isinstance(x, np.generic) else x for x in value)
    if len(types) == 1 and not all(_is(x, *types) for x in values):
        raise ValueError(f"{field} must be a tuple{example}, got {_show(values)}")
    return values


def _is(value: Any, type_: type) -> bool:
    """Returns whether a value is of a type; True and False are no numbers."""
    return isinstance(value, type_) and (type_ is bool or not isinstance(value, bool))


def _show(value: Any) -> str:
    return repr(value.to_dict() if isinstance(value, ConfigDict) else value)


def unknown(field: str, known: Sequence[str]) -> str:
    """Says that there is no such field, and which may be meant."""
    if near := suggest(field, known):
        return f"unknown config field {field!r} (did you mean {' or '.join(near)}?)"
    section = field.rpartition(".")[0]
    if inside := [name for name in known if name.startswith(f"{field}.")]:
        return f"unknown config field {field!r}: it is a section, with {', '.join(inside)}"
    sections = sorted({name.rpartition(".")[0] for name in known} - {""})
    if close := difflib.get_close_matches(field, sections, n=1, cutoff=0.75):
        return f"unknown config field {field!r} (did you mean the section {close[0]}?)"
    same = [name for name in known if name.rpartition(".")[0] == section]
    where = f"the fields of {section} are" if section and same else "the fields are"
    return f"unknown config field {field!r}; {where} {', '.join(same or known)}"


def suggest(field: str, known: Sequence[str]) -> list[str]:
    """Returns the fields that may be meant by an unknown one; at most three.

    >>> known = ["lora.rank", "lora.alpha", "optimizer.learning_rate"]
    >>> suggest("lora.rnak", known), suggest("lr", known)
    (['lora.rank'], ['optimizer.learning_rate'])
    """
    section, _, word = field.lower().replace("-", "_").rpartition(".")
    last = {name: name.rpartition(".")[2] for name in known}
    in_section = {name: x for name, x in last.items() if name.rpartition(".")[0] == section}
    ways = (
        lambda: [name for name, words in _WORDS.items() if word in words and name in last],
        lambda: [name for name in known if word == last[name] or field == name],
        lambda: _find_close(word, in_section, cutoff=0.6),
        lambda: _find_close(word, last, cutoff=0.75),
        lambda: [name for name, x in last.items() if word in re.split("_", x)],
    )
    return next((found[:3] for way in ways if (found := way())), [])


def _find_close(word: str, names: Mapping[str, str], cutoff: float) -> list[str]:
    close = difflib.get_close_matches(word, names.values(), n=1, cutoff=cutoff)
    return [name for name, x in names.items() if x in close]


def describe_type(name: str) -> str:
    """Describes a type of fields by its name in Python.

    >>> describe_type("int")
    'a whole number'
    """
    names = {type_.__name__: text for type_, text in _TYPES.items()} | {"tuple": "a tuple"}
    last = name.rpartition(".")[2]
    return "a section of fields" if last == "ConfigDict" else names.get(last, last)


def join(problems: Sequence[str], limit: int) -> str:
    """Joins what is wrong into one line, of which a limit keeps the length."""
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return f"{'; '.join(problems[:limit])}{more}"
