"""What ``--help`` prints: what a program does, its flags, and the fields of its config."""

import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from experiments import field_comments, lazy
from experiments.base_configs import MakeConfig

with lazy.imports():  # its flags are those of the programs with a config
    from experiments import config_flag

_HELP = {"--help", "-help", "-h", "--helpshort", "-helpshort", "-?"}
_FULL = {"--helpfull", "-helpfull", "--helpxml", "-helpxml"}
_NO_VALUE = re.compile(r"Flag --(\w+) must have a value other than None")  # absl's words
# Modules whose flags every program has: they come last.
_FRAME = ("experiments.cli", "experiments.environment", "experiments.processes")
_COLUMN = 28  # where the text of a flag begins
_VALUES = {"int": "N", "float": "X", "string": "TEXT", "multi string": "TEXT"}


def is_asked(arguments: Sequence[str]) -> bool:
    """Returns whether a command line asks for this help.

    >>> is_asked(["--config=a.py", "--help"]), is_asked(["--", "--help"]), is_asked(["--helpfull"])
    (True, False, False)
    """
    return not _HELP.isdisjoint(_cut(arguments))


def is_full_asked(arguments: Sequence[str]) -> bool:
    """Returns whether a command line asks for absl's list of all flags."""
    return not _FULL.isdisjoint(_cut(arguments))


def _cut(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments before the one that ends options."""
    arguments = list(arguments)
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def show(argv: Sequence[str], find_config: Callable[[], MakeConfig] | None) -> None:
    """Prints the help of the program.

    Args:
      argv: the whole command line. With --config, or the --workdir of a run, the fields of the
        config are shown, with their values.
      find_config: as :func:`experiments.cli.run` has it.

    Raises:
      ValueError, FileNotFoundError: something is wrong with the flags or the config; what needs
        neither is printed before.
    """
    print(f"{_describe_program()}\n\n{_describe_flags()}", flush=True)
    if find_config is None:
        return
    others = _parse(argv)
    base_config = find_config()  # a flag may say whose
    config = config_flag.read_for_help(others, base_config)
    if config is None:
        print("\nWith --config=FILE, this also lists the fields of the config.")
        return
    comments = field_comments.read(base_config)
    print(f"\n{_describe_fields(config, base_config(), comments)}")


def _parse(argv: Sequence[str]) -> list[str]:
    """Reads flags, of which those that must be given need not be; returns other arguments."""
    required = [f"--{name}=" for name in flags.FLAGS if is_required(flags.FLAGS[name])]
    given = [x for x in argv[1:] if x not in _HELP]
    flags.FLAGS.set_gnu_getopt()
    return flags.FLAGS([argv[0], *required, *given], known_only=True)[1:]


def is_required(flag: flags.Flag) -> bool:
    """Returns whether a flag must be given."""
    return any(_NO_VALUE.match(validator.message) for validator in flag.validators)


def _describe_program() -> str:
    text = textwrap.dedent(sys.modules["__main__"].__doc__ or "").strip()
    return f"{text}\n\n--helpfull lists absl's flags, too."


def _describe_flags() -> str:
    modules = flags.FLAGS.flags_by_module_dict()
    own = [m for m in modules if not m.startswith("absl") and m not in _FRAME]
    sections = (("flags:", own), ("flags of every program:", _FRAME))
    parts = []
    for title, names in sections:
        found = sorted((f for m in names for f in modules.get(m, ())), key=lambda f: f.name)
        parts.append("\n".join([title, *(line for f in found for line in _describe_flag(f))]))
    return "\n\n".join(parts)


def _describe_flag(flag: flags.Flag) -> Iterator[str]:
    name = f"  --{flag.name}{_describe_value(flag)}"
    text = re.sub(r"^<[^>]*>: ", "", " ".join(flag.help.split()))  # absl puts the values there
    details = _list_details(flag)
    text += f" ({'; '.join(details)})" if details else ""
    lines = textwrap.wrap(text, _width() - _COLUMN)
    if len(name) < _COLUMN - 1:
        yield f"{name:{_COLUMN}}{lines.pop(0)}"
    else:
        yield name
    yield from (" " * _COLUMN + line for line in lines)


def _describe_value(flag: flags.Flag) -> str:
    if flag.boolean:
        return ""
    values = getattr(flag.parser, "enum_values", None)
    return f"={'|'.join(values)}" if values else f"={_VALUES.get(flag.flag_type(), 'VALUE')}"


def _list_details(flag: flags.Flag) -> list[str]:
    details = ["required"] if is_required(flag) else []
    if flag.flag_type().startswith("multi"):
        details.append("may be repeated")
    if flag.default not in (None, False, []):
        details.append(f"default: {flag.default}")
    return details


def _width() -> int:
    return max(60, min(100, shutil.get_terminal_size((100, 24)).columns))


def _describe_fields(config: ConfigDict, base: ConfigDict, comments: Mapping[str, str]) -> str:
    path = config_flag.describe_path()
    title = f"fields of the config, as {path} has them; to be set as they stand here:"
    return "\n".join([title, *_list_fields(config, base, comments, "")])


def _list_fields(
    config: ConfigDict, base: ConfigDict, comments: Mapping[str, str], prefix: str
) -> Iterator[str]:
    """Lists the fields of a section in the order of their comments, and then those within."""
    order = {field: number for number, field in enumerate(comments)}
    names = sorted(base, key=lambda name: order.get(f"{prefix}{name}", len(order)))
    fields = [name for name in names if not _is_section(name, base)]
    for name in [*fields, *(x for x in names if x not in fields)]:
        field = f"{prefix}{name}"
        text = comments.get(field, "")
        if name in fields:
            yield from _describe_field(field, config[name], base[name], text)
        else:
            yield f"\n{field}: {text}"
            yield from _list_fields(config[name], base[name], comments, f"{field}.")


def _is_section(name: str, base: ConfigDict) -> bool:
    return isinstance(base[name], ConfigDict) and not config_flag.is_open_section(name)


def _describe_field(field: str, value: Any, default: Any, comment: str) -> Iterator[str]:
    here, there = (shlex.quote(config_flag.format_value(x)) for x in (value, default))
    yield f"  --config.{field}={here}"
    text = f"{comment[:1].upper()}{comment[1:]}"
    text += f" (default: {there})" if here != there else ""
    indent = " " * 6
    yield from textwrap.wrap(text, _width(), initial_indent=indent, subsequent_indent=indent)
