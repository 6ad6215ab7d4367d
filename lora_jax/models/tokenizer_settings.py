"""What the files beside a vocabulary say: the class, its settings, special and added tokens.

They are read as transformers reads them, so that a directory of any of its generations gives the
same tokens here.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.extras import require
from lora_jax.files import read_object

require(__name__, "models", "tokenizers")

from tokenizers import AddedToken  # noqa: E402

CONFIG = "tokenizer_config.json"
# The special tokens that transformers knows by a name, in its order.
NAMES = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
_MAP, _ADDED = "special_tokens_map.json", "added_tokens.json"
_LISTS = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_GENERIC = ("", "PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What lies beside a vocabulary.

    Attributes:
      directory: directory of the files.
      options: content of ``tokenizer_config.json``.
      class_name: class that the files name, without "Fast"; "" for none, or for one that leaves all
        to ``tokenizer.json``.
      is_generic: whether the files name a class that leaves all to ``tokenizer.json``.
      model_type: ``model_type`` of ``config.json``; "" for none.
      special: special tokens by name, ``bos_token`` and so on; None for a name of which the files
        say that there is no such token.
      extra: special tokens without a name.
      added: tokens by the id that the files give them.
      source: file that ``added`` is from.
    """

    directory: Path
    options: Mapping[str, Any]
    class_name: str
    is_generic: bool
    model_type: str
    special: Mapping[str, AddedToken | None]
    extra: tuple[AddedToken, ...]
    added: Mapping[int, AddedToken]
    source: str


def read(directory: Path) -> Settings:
    """Reads the settings in a directory, of which every file may be missing.

    ``added_tokens_decoder`` of ``tokenizer_config.json`` holds all that older files say in
    ``special_tokens_map.json`` and ``added_tokens.json``: where it is there, they are not read.

    Raises:
      ValueError: a file is damaged, or says what is not built here.
    """
    options, model = read_object(directory / CONFIG), read_object(directory / "config.json")
    words, source = dict(options), CONFIG
    is_new = "added_tokens_decoder" in options
    if not is_new:
        words |= read_object(directory / _MAP)
        source = _ADDED
    try:
        special, extra = _find_special(words)
        added = (
            _read_decoder(options["added_tokens_decoder"])
            if is_new
            else _read_added(read_object(directory / _ADDED), _list_texts(special, extra))
        )
    except (TypeError, ValueError, AttributeError) as error:
        files = CONFIG if is_new else f"{CONFIG}, {_MAP} or {_ADDED}"
        raise ValueError(f"{directory}: a token in {files} is damaged: {error}") from error
    names = (options.get("tokenizer_class"), model.get("tokenizer_class"))
    name = str(next((name for name in names if name), "")).removesuffix("Fast")
    return Settings(
        directory=directory,
        options=options,
        class_name="" if name in _GENERIC else name,
        is_generic=bool(name) and name in _GENERIC,
        model_type=str(model.get("model_type") or ""),
        special=special,
        extra=extra,
        added=added,
        source=source,
    )


def flag(settings: Settings, name: str, default: bool) -> bool:
    """Returns a setting that is true or false; the default where it is missing or null.

    Raises:
      ValueError: it is neither.
    """
    value = settings.options.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(
            f"{settings.directory / CONFIG}: {name} is {value!r:.60}, and must be true or false."
        )
    return value


def refuse_unbuilt(settings: Settings) -> None:
    """Refuses settings that change tokens and are not built here.

    Raises:
      ValueError: names them.
    """
    built = {"split_special_tokens": False, "do_basic_tokenize": True}
    wrong = [name for name, value in built.items() if flag(settings, name, value) != value]
    wrong += [name for name in ("never_split", "sp_model_kwargs") if settings.options.get(name)]
    if wrong:
        listed = ", ".join(f"{name} {settings.options[name]!r:.60}" for name in wrong)
        raise ValueError(
            f"{settings.directory / CONFIG} has {listed}, which is not built here: save the "
            "tokenizer without it, as transformers' tokenizer.save_pretrained does."
        )


def _find_special(
    words: Mapping[str, Any],
) -> tuple[dict[str, AddedToken | None], tuple[AddedToken, ...]]:
    """Finds the special tokens with a name, and those without."""
    found = {n: x for n, x in words.items() if n.endswith("_token") and _is_token(x)}
    absent = {name: None for name in NAMES if name in words and not words[name]}
    lists = (words.get(name) for name in _LISTS)
    extra: Any = next((tokens for tokens in lists if tokens), [])
    if isinstance(extra, dict):  # tokens with names of their own
        found |= {name: token for name, token in extra.items() if _is_token(token)}
        extra = []
    special = {name: make_token(token) for name, token in found.items()}
    for token in special.values():  # a name makes a token special
        token.special = True
    return absent | special, tuple(make_token(token) for token in extra)


def _is_token(value: Any) -> bool:
    return isinstance(value, str | dict) and bool(value)


def make_token(value: str | Mapping[str, Any], *, special: bool = True) -> AddedToken:
    """Makes a token of what the files hold, its text, or an object with its settings.

    Raises:
      TypeError, ValueError: it is neither.

    >>> make_token({"content": "<mask>", "lstrip": True}).lstrip
    True
    """
    if isinstance(value, str):
        return AddedToken(value, special=special)
    words = {name: x for name, x in value.items() if name != "__type"}
    text = words.pop("content", None)
    if not isinstance(text, str) or not text:
        raise ValueError(f"a token needs a text, and {value!r:.80} has none")
    if unknown := set(words) - set(_FLAGS):
        raise ValueError(f"the token {text!r} has {sorted(unknown)}, which is not known")
    return AddedToken(text, **{"special": special} | words)


def _read_decoder(words: Mapping[str, Any]) -> dict[int, AddedToken]:
    return {int(number): make_token(word, special=False) for number, word in words.items()}


def _list_texts(
    special: Mapping[str, AddedToken | None], extra: tuple[AddedToken, ...]
) -> set[str]:
    return {token.content for token in (*special.values(), *extra) if token is not None}


def _read_added(words: Mapping[str, Any], special: set[str]) -> dict[int, AddedToken]:
    """Reads ``added_tokens.json``, which has the id of each token."""
    found: dict[int, AddedToken] = {}
    for text, number in words.items():
        if type(number) is not int or number < 0 or number in found:
            raise ValueError(f"the id of {text!r} is {number!r:.60}: no number, or another's")
        found[number] = AddedToken(text, special=text in special)
    return found


def name_tokens(
    settings: Settings, defaults: Mapping[str, str] | None = None
) -> dict[str, AddedToken]:
    """Returns the special tokens that have a name, in transformers' order.

    Args:
      settings: what the files say.
      defaults: tokens that the class has where the files say nothing.
    """
    made = {name: make_token(text) for name, text in (defaults or {}).items()}
    named = {n: token for n, token in (made | dict(settings.special)).items() if token is not None}
    order = [*(n for n in NAMES if n in named), *(n for n in named if n not in NAMES)]
    return {name: named[name] for name in order}


def list_tokens(settings: Settings, named: Mapping[str, AddedToken]) -> list[AddedToken]:
    """Lists each token to add once, in transformers' order: by id, by name, without a name.

    Args:
      settings: what the files say.
      named: the special tokens that have a name.
    """
    numbered = [token for _, token in sorted(settings.added.items())]
    texts = {token.content for token in named.values()}
    for token in numbered:
        token.special = token.special or token.content in texts
    tokens = [*numbered, *named.values(), *settings.extra]
    first: dict[str, AddedToken] = {}
    for token in tokens:
        first.setdefault(token.content, token)
    return list(first.values())
