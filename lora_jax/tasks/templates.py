"""Finds the chat template of a run or of an adapter: one of its own, or that of the model."""

from pathlib import Path

from lora_jax import peft, serialize
from lora_jax.data import chat_template
from lora_jax.data.chat_template import ChatTemplate
from lora_jax.files import write_atomically
from lora_jax.models.checkpoints import Checkpoint
from lora_jax.tasks import text_files

METADATA = "chat_template"  # key in an adapter's metadata


def find(
    checkpoint: Checkpoint, *, file: str | Path = "", adapter: str | Path | None = None
) -> ChatTemplate:
    """Finds a template: that of a file; or else the adapter's own; or else the model's.

    Args:
      checkpoint: the model.
      file: path of a template of one's own; "" for none.
      adapter: directory of an adapter, in either format; None, or "", for none.

    Raises:
      FileNotFoundError, ValueError: there is none, or a file is missing or damaged.
    """
    if file:
        return chat_template.read_file(file, checkpoint)
    files = text_files.find(adapter or None, checkpoint)
    if files.template is not checkpoint:
        return text_files.find_template(files, checkpoint)
    source = read(adapter) if adapter else None
    if source is None:
        return chat_template.find(checkpoint)
    return ChatTemplate(source, chat_template.read_tokens(checkpoint), f"of the adapter {adapter}")


def read(adapter: str | Path) -> str | None:
    """Returns the template that an adapter was trained with, if it brings one of its own.

    Raises:
      FileNotFoundError, ValueError: the adapter is missing or damaged.
    """
    path = Path(adapter) / chat_template.FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if peft.is_peft(adapter):
        return None
    source = serialize.read_metadata(adapter).get(METADATA)
    if not isinstance(source, str | None):
        raise ValueError(f"The adapter in {adapter} is damaged: {METADATA} is {source!r:.60}.")
    return source


def copy(adapter: str | Path, out: Path) -> None:
    """Writes the template that an adapter brings into another directory, if it brings one."""
    source = read(adapter)
    if source is not None:
        write_atomically(out / chat_template.FILE, source.encode())
