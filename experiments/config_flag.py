"""The flags --config and --workdir, and --config.FIELD=VALUE for each field of a program's config.

    --config=configs/quickstart.py --config.epochs=3 --config.lora.targets=query,value

Whatever sets a field is compared with the program's base config: the file, the command line. What
is no flag and no field is an error that says which may be meant.
"""

import ast
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from experiments import lazy

with lazy.imports():
    from lora_jax.training import config_fields, config_files, workdirs

_CONFIG = flags.DEFINE_string(
    "config",
    None,
    "Config: a file of Python with get_config(), with :ARGUMENT behind it if that takes one, or "
    "the config.json of a run; by default that of --workdir. --config.FIELD=VALUE sets a field.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)

_FIELD_FLAG = re.compile(r"--?(no)?config\.([^=]+)(?:=(.*))?", re.DOTALL)
_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}
_TRUTH = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
# Words of other programs for flags here.
_FLAG_WORDS = {"output_dir": "workdir", "out": "workdir", "eval": "eval_only", "test": "eval_only"}


class Command(NamedTuple):
    """What the command line says of a run.

    Attributes:
      config: config of the run, with all fields that the program has.
      workdir: directory of the run.
      path: path of the config, with its argument.
      overrides: values of the fields that the command line sets, by their dotted names.
    """

    config: ConfigDict
    workdir: Path
    path: str
    overrides: dict[str, Any]


def read(arguments: Sequence[str], base_config: Callable[[], ConfigDict] | None) -> Command:
    """Reads the config of a run, with the fields that the command line sets.

    Args:
      arguments: what is left of the command line when the program's other flags are read.
      base_config: as :class:`lora_jax.training.task.Recipe` has it.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: something is wrong in the file, or on the command line.
    """
    workdir = Path(_WORKDIR.value)
    path = _CONFIG.value or _find_config(workdir, arguments)
    config = config_files.load(path)
    base = config if base_config is None else base_config()
    added = workdirs.ADDED if path.endswith(".json") else {}
    config_files.check(config, base, path, added=added)
    texts, others = _split(arguments, base)
    _check_others(others, config_fields.field_names(base))
    overrides = _override(config, texts, base)
    return Command(config.lock(), workdir, path, overrides)


def read_for_help(
    arguments: Sequence[str], base_config: Callable[[], ConfigDict]
) -> ConfigDict | None:
    """Reads the config that a command line names, whose other arguments may be missing.

    Returns:
      The config, with all fields that the program has; None if the command line names none.

    Raises:
      FileNotFoundError, ValueError: as :func:`read`.
    """
    path = describe_path()
    if not path:
        return None
    config, base = config_files.load(path), base_config()
    config_files.check(config, base, path, added=workdirs.ADDED if path.endswith(".json") else {})
    texts, _ = _split(arguments, base)
    _override(config, texts, base)
    return config


def describe_path() -> str:
    """Returns the path of the config that the flags name; "" if they name none."""
    if _CONFIG.value:
        return _CONFIG.value
    stored = Path(_WORKDIR.value) / workdirs.CONFIG if _WORKDIR.value else None
    return str(stored) if stored and stored.is_file() else ""


def is_open_section(name: str) -> bool:
    """Returns whether a section has keys of the user's own, so that it is set as one field."""
    return name in config_fields.OPEN_SECTIONS


def format_value(value: Any) -> str:
    """Formats a value as the command line takes it.

    >>> format_value(("query", "value")), format_value(5e-4), format_value(True), format_value(())
    ('query,value', '0.0005', 'True', '')
    """
    if isinstance(value, ConfigDict):
        return str(value.to_dict())
    if not isinstance(value, tuple):
        return str(value)
    plain = ",".join(map(str, value))
    return plain if parse_list(plain) == value else str(value)


def _find_config(workdir: Path, arguments: Sequence[str]) -> str:
    """Returns the path of the config of the run in a directory."""
    path = workdir / workdirs.CONFIG
    if not path.is_file():
        if files := _list_files(arguments):
            raise ValueError(f"There is no --config (did you mean --config={files[0]}?)")
        raise ValueError(
            f"There is no --config, and no run in {workdir} whose {workdirs.CONFIG} could stand "
            "for it: give a file, as in --config=configs/quickstart.py."
        )
    return str(path)


def _split(arguments: Iterable[str], base: ConfigDict) -> tuple[dict[str, list[str]], list[str]]:
    """Splits arguments into texts by field, in their order, and others."""
    known = config_fields.field_names(base)
    texts: dict[str, list[str]] = {}
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        match = _FIELD_FLAG.fullmatch(argument)
        if not match:
            others.append(argument)
            continue
        negation, field, text = match.groups()
        if field not in known and _find_open(field, known) is None:
            raise ValueError(f"{argument}: {_explain_field(field, text, known)}")
        if text is None:
            text = _read_next(argument, rest, is_bool=_is_bool(field, base), negation=negation)
        elif negation:
            raise ValueError(f"{argument}: give --config.{field}=False")
        texts.setdefault(field, []).append(text)
    return texts, others


def _is_bool(field: str, base: ConfigDict) -> bool:
    section, name = config_fields.get_section(base, field)
    return name in section and section.get_type(name) is bool


def _read_next(argument: str, rest: Iterator[str], *, is_bool: bool, negation: str | None) -> str:
    """Returns the value of a flag that has none behind it: for True and False, that is one."""
    if is_bool:
        return "false" if negation else "true"
    text = None if negation else next(rest, None)
    if text is None:
        raise ValueError(f"{argument} lacks a value: give {argument}=VALUE")
    return text


def _find_open(field: str, known: Sequence[str]) -> str | None:
    """Returns the open section that a field is in, such as lora.rank_pattern."""
    section = field.rpartition(".")[0]
    is_open = section in known and section.rpartition(".")[2] in config_fields.OPEN_SECTIONS
    return section if is_open else None


def _override(config: ConfigDict, texts: dict[str, list[str]], base: ConfigDict) -> dict[str, Any]:
    """Sets fields of a config; returns their values, by names of fields."""
    values = {}
    for field, given in texts.items():
        section, name = config_fields.get_section(config, field)
        try:
            if name not in section:
                with section.unlocked():
                    section[name] = _parse_literal(given[-1])
                values[field.rpartition(".")[0]] = section
                continue
            like, _ = config_fields.get_section(base, field)
            values[field] = section[name] = parse(field, given, like)
        except ValueError as error:
            raise ValueError(f"--config.{field}={given[-1]}: {error}") from error
    return values


def parse(field: str, texts: Sequence[str], like: ConfigDict) -> Any:
    """Parses the texts of a field, of which a tuple takes all, and other fields the last one.

    Args:
      field: dotted name of the field.
      texts: texts of the command line.
      like: section of the base config that the field is in.

    Raises:
      ValueError: it is of another type than the field.
    """
    name, text = field.rpartition(".")[2], texts[-1]
    type_, default = like.get_type(name), like[name]
    if isinstance(default, ConfigDict):
        value = _parse_literal(text)
        if not isinstance(value, dict):
            raise ValueError(f"{field} must be a dictionary, such as {{'query': 4}}")
        return ConfigDict(value)
    if type_ is tuple:
        values = tuple(x for text in texts for x in parse_list(text))
        is_text = any(isinstance(x, str) for x in default)
        return config_fields.convert(
            field, tuple(map(str, values)) if is_text else values, like=like
        )
    if type_ is bool:
        return config_fields.convert(field, _TRUTH.get(text.lower(), text), like=like)
    if type_ is str:
        return text
    return config_fields.convert(field, _parse_number(text, type_), like=like)


def _parse_number(text: str, type_: type) -> int | float | str:
    """Parses a number; what is none stays a text, as a duration may be."""
    for kind in (float,) if type_ is float else (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _parse_literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parse_list(text: str) -> tuple:
    """Parses a list: in Python, or with its entries as they are, between commas.

    Commas in brackets, as regular expressions have them, separate nothing. Entries are numbers if
    all of them can be.

    Raises:
      ValueError: it begins as Python does, and is none.

    >>> parse_list("query,value"), parse_list("8, 16"), parse_list("('a', 'b')"), parse_list("")
    (('query', 'value'), (8, 16), ('a', 'b'), ())
    >>> parse_list("re:.{1,3}/kernel,dense")
    ('re:.{1,3}/kernel', 'dense')
    """
    value = _parse_literal(text)
    if isinstance(value, tuple | list):
        return tuple(value)
    if not isinstance(value, str):
        return (value,)
    if text.strip()[:1] in ("(", "[", "'", '"') and value == text:
        raise ValueError("this is no tuple of Python; leave out brackets and quotes, as in a,b")
    return tuple(part for part in split_list(value) if part)


def split_list(text: str) -> list[str]:
    """Splits a text at its commas, but for those in brackets.

    >>> split_list("re:.{1,3}/kernel, dense,")
    ['re:.{1,3}/kernel', 'dense', '']
    """
    parts, depth = [""], 0
    for character in text:
        depth += _BRACKETS.get(character, 0)
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _check_others(arguments: Sequence[str], known: Sequence[str]) -> None:
    """Raises an error for the first argument that is neither a flag nor a field."""
    for argument in arguments:
        if argument.startswith("-") and argument.strip("-"):
            name, equals, text = argument.lstrip("-").partition("=")
            hint = _suggest(name, text if equals else None, known)
            raise ValueError(f"unknown flag {argument}{hint}")
    if arguments:
        files = _list_files(arguments)
        meant = [f"--config={files[0]}"] if files else _find_flags(arguments, known)
        hint = f" (did you mean {meant[0]}?)" if meant else ""
        raise ValueError(f"Unexpected arguments {list(arguments)}{hint}; options start with --.")


def _find_flags(arguments: Sequence[str], known: Sequence[str]) -> list[str]:
    """Lists the flags that arguments would be with dashes before them, other than long ones."""
    plain = [x.lstrip("-\N{EN DASH}\N{EM DASH}\N{MINUS SIGN}") for x in arguments]
    fields = [f"config.{field}" for field in known]
    return [f"--{x}" for x in plain if x.partition("=")[0] in [*fields, *_list_flags()]]


def _list_files(arguments: Sequence[str]) -> list[str]:
    """Lists the arguments that are config files."""
    return [x for x in arguments if config_files.split_argument(x)[0].endswith((".py", ".json"))]


def _explain_field(field: str, text: str | None, known: Sequence[str]) -> str:
    """Says that a field on the command line is none; the flag of its name may be meant."""
    if field in _list_flags():
        return f"{field} is no field of the config: did you mean {_format_flag(field, text)}?"
    return config_fields.unknown(field, known)


def _suggest(name: str, text: str | None, known: Sequence[str]) -> str:
    word = name.lower().replace("-", "_")
    own = difflib.get_close_matches(_FLAG_WORDS.get(word, word), _list_flags(), n=1, cutoff=0.8)
    fields = config_fields.suggest(name, known)
    meant = [_format_flag(x, text) for x in own] or [
        _format_flag(f"config.{field}", text) for field in fields
    ]
    return f" (did you mean {' or '.join(meant)}?)" if meant else "; --helpshort lists the flags"


def _format_flag(name: str, text: str | None) -> str:
    return f"--{name}" if text is None else f"--{name}={text}"


def _list_flags() -> list[str]:
    """Lists the flags of the programs, without those of absl."""
    modules = flags.FLAGS.flags_by_module_dict().items()
    return [flag.name for module, own in modules if not module.startswith("absl") for flag in own]
