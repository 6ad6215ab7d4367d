"""The base that an adapter is for, and what else its directory says: found, checked and told."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax import paths, peft
from lora_jax.manifest import JSON_NAME
from lora_jax.models import checkpoints
from lora_jax.models.architectures import read_config
from lora_jax.models.families import CAUSAL_LM, CLASSIFIER, ENCODER, SEQ2SEQ_LM
from lora_jax.models.hub import split_revision
from lora_jax.quantized import is_quantized

# Heads that PEFT's words for tasks mean.
HEADS = {
    "SEQ_CLS": CLASSIFIER,
    "CAUSAL_LM": CAUSAL_LM,
    "SEQ_2_SEQ_LM": SEQ2SEQ_LM,
    "FEATURE_EXTRACTION": ENCODER,
}
_DIRECTORIES = ("directory", "file")  # origins of a checkpoint that has no revisions


def is_peft(directory: str | Path) -> bool:
    """Tells whether an adapter is in PEFT's format, and not in this library's.

    Raises:
      ValueError: it is in the format of another program; the message names it.
    """
    path = Path(directory)
    if peft.is_peft(path):
        return True
    other = "" if (path / JSON_NAME).is_file() else peft.describe_files(path)
    if other:
        raise ValueError(f"The adapter in {directory} can't be used: {other}")
    return False


def find_base(directory: str | Path, model: str | None = None) -> str:
    """Returns the name of the base of an adapter in PEFT's format, with its revision.

    A relative path is looked for from here, and else from the adapter's directory.

    Args:
      directory: directory of the adapter.
      model: name or directory of the base, if it is not to be that in the adapter's files.

    Raises:
      FileNotFoundError: there is no such checkpoint here; the message says what to give instead.
      ValueError: the adapter does not name its base, or is damaged, or its base is; or it is for
        another task than the base.
    """
    words = peft.read_words(directory)
    name = model or words["base_model_name_or_path"]
    if not name:
        raise ValueError(
            f"The adapter in {directory} does not name its base; give it with --model."
        )
    beside = Path(directory) / name
    if not model and not Path(name).expanduser().exists() and beside.exists():
        name = os.path.abspath(beside)
    name = _add_revision(name, words)
    try:
        checkpoint = checkpoints.resolve(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{_advise(name, words)}") from error
    _check_task(directory, words["task_type"], checkpoint)
    return name


def _add_revision(name: str, words: Mapping[str, Any]) -> str:
    """Adds the adapter's revision to its base's name on the Hub; another base has none of it."""
    is_local = Path(name).expanduser().exists()
    if is_local or name != words["base_model_name_or_path"] or not words["revision"]:
        return name
    named = f"{name}@{words['revision']}"
    return named if split_revision(named) != (named, None) else name


def _check_task(
    directory: str | Path, task_type: str | None, checkpoint: checkpoints.Checkpoint
) -> None:
    """Raises ValueError if the adapter is for a kind of task that its base can't have."""
    if task_type is None:
        return
    family, _ = read_config(checkpoint)
    head = HEADS.get(task_type)
    if head in family.models:
        return
    can = [name for name, wanted in HEADS.items() if wanted in family.models]
    raise ValueError(
        f"The adapter in {directory} has task_type {task_type!r}, and the base {checkpoint.name} "
        f"is of type {checkpoint.config['model_type']!r}, which is built here for "
        f"{', '.join(can)}: they do not belong together, or the task is not built."
    )


def make_absolute(name: str) -> str:
    """Returns the path of a base as other folders find it; a name of the Hub stays as it is."""
    path = Path(name).expanduser()
    return os.path.abspath(path) if path.exists() else name


def _advise(name: str, words: dict[str, Any]) -> str:
    """Says what to give as the base, if it is a quantized checkpoint that is not here."""
    if name != words["base_model_name_or_path"] or not peft.describe_quantization(words):
        return ""
    return (
        f"\nThe adapter was trained over {name!r}, which is quantized. Give --model=DIRECTORY of "
        "that checkpoint, whose codes are kept, or --model of its original (by its name "
        f"{peft.guess_plain_base(words)!r}), which differs by what quantizing lost; a program that "
        "trains quantizes it with --config.model.quantize=nf4_double."
    )


def describe(directory: str | Path, loaded: checkpoints.Loaded) -> tuple[str, ...]:
    """Says what an adapter of either format has got as its base, and what beside it is not used."""
    base = f"base {loaded.checkpoint.name}, from {loaded.checkpoint.origin}"
    first = (base,) if peft.is_peft(directory) else ()
    return (*first, *find_differences(directory, loaded), *describe_files(directory))


def find_differences(directory: str | Path, loaded: checkpoints.Loaded) -> tuple[str, ...]:
    """Says what of its base differs from that of an adapter's training, or can't be checked.

    An adapter in this library's format has the hash of its base, which is compared on loading.
    """
    if not peft.is_peft(directory):
        return ()
    words, notes = peft.read_words(directory), []
    quantization = peft.describe_quantization(words)
    leaves = paths.named_leaves(loaded.params).values()
    if quantization and not any(map(is_quantized, leaves)):
        notes.append(f"plain numbers of it, though the adapter's was quantized ({quantization})")
    revision, name = words["revision"], words["base_model_name_or_path"]
    if revision and split_revision(loaded.checkpoint.name)[1] != revision:
        has_none = loaded.checkpoint.origin in _DIRECTORIES
        why = "a path, whose revision is not known" if has_none else "another name or revision"
        notes.append(
            f"the adapter is for revision {revision!r} of {name}; the base is given by {why}, and "
            "this is not checked"
        )
    return tuple(notes)


def describe_files(directory: str | Path) -> tuple[str, ...]:
    """Says which files beside an adapter, of either format, nothing here reads."""
    unknown = peft.find_unknown(directory)
    if peft.is_peft(directory) and (Path(directory) / JSON_NAME).is_file():
        unknown.insert(0, f"{JSON_NAME}, an adapter in this library's format")
    return (f"beside the adapter and not used: {', '.join(unknown)}",) if unknown else ()
