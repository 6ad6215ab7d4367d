"""Tokenizer, chat template and the tokens that end a reply: an adapter's own, or those of its base.

Trainers save them beside the adapter, since a run may add tokens or a template. Each of the three
is the adapter's if its directory has it, and the base's otherwise.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import tokenizers

from lora_jax.data import chat_template
from lora_jax.data.chat_template import ChatTemplate
from lora_jax.files import read_object, write_atomically
from lora_jax.models import added_tokens as tokens_of_models
from lora_jax.models import checkpoints
from lora_jax.models.checkpoints import Checkpoint
from lora_jax.models.hub import TOKENIZER_FILES
from lora_jax.tasks import added_tokens

# Each of them makes a tokenizer.
_READABLE = (
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
_TEMPLATE, _GENERATION, _SETTINGS = (
    "chat_template.jinja", "generation_config.json", "tokenizer_config.json",
)  # fmt: skip
_GROUP = tuple(name for name in TOKENIZER_FILES if name not in (_TEMPLATE, _GENERATION))


class TextFiles(NamedTuple):
    """Where the files about texts are: checkpoints whose directories hold them.

    Attributes:
      tokenizer: that of the tokenizer.
      template: that of the chat template.
      generation: that of the tokens that end a reply.
      notes: lines that say which of them are the adapter's own.
      added: tokens that the tokenizer gets beyond its own, with whether they are special.
    """

    tokenizer: Checkpoint
    template: Checkpoint
    generation: Checkpoint
    notes: tuple[str, ...] = ()
    added: Mapping[str, bool] = MappingProxyType({})


def find(directory: str | Path | None, checkpoint: Checkpoint) -> TextFiles:
    """Finds the files about texts of an adapter with its base.

    Args:
      directory: directory of the adapter, in either format; None for the base alone.
      checkpoint: the base.

    Raises:
      ValueError: a file of the adapter's is damaged.
    """
    if directory is None:
        return TextFiles(checkpoint, checkpoint, checkpoint)
    own = checkpoint._replace(directory=Path(directory))
    has_tokenizer = any((own.directory / name).is_file() for name in _READABLE)
    has = {
        "tokenizer": has_tokenizer,
        "chat template": _has_template(own.directory),
        "generation config (tokens that end a reply)": (own.directory / _GENERATION).is_file(),
    }
    names = [name for name, there in has.items() if there]
    notes = [f"{' and '.join(names)}: the adapter's own, not the base's"] if names else []
    files = [name for name in _GROUP if (own.directory / name).is_file()]
    if files and not has_tokenizer:
        notes.append(
            f"tokenizer: that of the base, since the adapter's files ({', '.join(files)}) make "
            f"none here without one of {', '.join(_READABLE)}"
        )
    tokenizer, template, generation = (own if there else checkpoint for there in has.values())
    added = added_tokens.read(directory)
    return TextFiles(tokenizer, template, generation, tuple(notes), added)


def load_tokenizer(files: TextFiles) -> tokenizers.Tokenizer:
    """Reads the tokenizer, and adds the adapter's tokens to it."""
    tokenizer = checkpoints.load_tokenizer(files.tokenizer)
    tokens_of_models.add(tokenizer, files.added)
    return tokenizer


def write_tokenizer(out: Path, files: TextFiles) -> None:
    """Writes a tokenizer that an adapter has added tokens to; nothing if it has added none.

    Raises:
      OSError: a file can't be written.
    """
    if not files.added:
        return
    for name, content in checkpoints.tokenizer_files(files.tokenizer).items():
        write_atomically(out / name, content)
    text = load_tokenizer(files).to_str(pretty=True)
    write_atomically(out / "tokenizer.json", text.encode())


def find_template(files: TextFiles, base: Checkpoint) -> ChatTemplate:
    """Finds the chat template, with the base's special tokens where the adapter names none.

    Raises:
      ValueError: there is none, or a file is damaged.
    """
    template = chat_template.find(files.template)
    if files.template is base or template.tokens:
        return template
    try:
        return template._replace(tokens=chat_template.find(base).tokens)
    except ValueError:  # the base has no template, and so no tokens for one
        return template


def replace(out: Path, files: TextFiles, base: Checkpoint) -> None:
    """Puts an adapter's own files into a directory to which its base's have been written.

    Args:
      out: directory of merged weights.
      files: what :func:`find` returned.
      base: the base.

    Raises:
      OSError: a file can't be written.
    """
    template = None
    if files.template is not base or files.tokenizer is not base:
        template = _read_template(files, base)
    if files.tokenizer is not base:
        for name in _GROUP:
            (out / name).unlink(missing_ok=True)
        _copy(files.tokenizer.directory, out, _GROUP)
    write_tokenizer(out, files)
    if template is not None:
        write_atomically(out / _TEMPLATE, template.source.encode())
    if files.generation is not base:
        _copy(files.generation.directory, out, (_GENERATION,))


def copy(directory: str | Path, out: Path) -> None:
    """Copies the files about texts from an adapter's directory to another.

    Raises:
      OSError: a file can't be written.
    """
    _copy(Path(directory), out, TOKENIZER_FILES)


def _read_template(files: TextFiles, base: Checkpoint) -> ChatTemplate | None:
    try:
        return find_template(files, base)
    except ValueError:
        if files.template is not base:
            raise
        return None  # the base has none


def _copy(source: Path, out: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            write_atomically(out / name, (source / name).read_bytes())


def _has_template(directory: Path) -> bool:
    if (directory / _TEMPLATE).is_file():
        return True
    return read_object(directory / _SETTINGS).get("chat_template") is not None
