"""Reads the tokenizers of checkpoints from the files beside the weights."""

import json
from pathlib import Path
from typing import Any

from lora_jax.extras import require

require(__name__, "models", "tokenizers")

import tokenizers  # noqa: E402
from tokenizers import implementations, processors  # noqa: E402

from lora_jax.models import gguf_tokenizer  # noqa: E402
from lora_jax.models.gguf import is_gguf  # noqa: E402
from lora_jax.models.hub import TOKENIZER_FILES, Checkpoint  # noqa: E402


def load_tokenizer(checkpoint: Checkpoint) -> tokenizers.Tokenizer:
    """Reads the tokenizer of a checkpoint; see :func:`read_tokenizer`."""
    if is_gguf(checkpoint.directory):
        return gguf_tokenizer.read_tokenizer(checkpoint.directory)
    return read_tokenizer(checkpoint.directory)


def tokenizer_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Returns the files of a checkpoint's tokenizer, by name, for a copy of the checkpoint.

    Raises:
      ValueError: the checkpoint is a GGUF file, and its tokenizer can't be read.
    """
    if is_gguf(checkpoint.directory):
        return _convert_gguf(checkpoint)
    there = (checkpoint.directory / name for name in TOKENIZER_FILES)
    return {path.name: path.read_bytes() for path in there if path.is_file()}


def _convert_gguf(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Writes the tokenizer of a GGUF file as transformers' files."""
    made = load_tokenizer(checkpoint)
    template, tokens = gguf_tokenizer.read_template(checkpoint.directory)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
    settings |= {"clean_up_tokenization_spaces": False}
    settings |= {"chat_template": template} if template is not None else {}
    return {
        "tokenizer.json": made.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
    }


def read_tokenizer(directory: str | Path) -> tokenizers.Tokenizer:
    """Reads the tokenizer in a directory, from tokenizer.json or else from its vocabulary.

    A vocabulary is ``vocab.txt``, as BERT has it, or ``vocab.json`` with ``merges.txt``, as GPT-2
    and RoBERTa have it. BERT's tokenizer adds ``[CLS]`` and ``[SEP]``; RoBERTa's, which is the one
    whose vocabulary has them, adds ``<s>`` and ``</s>``; GPT-2's adds nothing. The tokenizer does
    not pad or truncate, even if its file says so.

    Raises:
      ValueError: there is no such file, or it is damaged.
    """
    directory = Path(directory)
    readers = {
        "tokenizer.json": _read_json,
        "vocab.txt": _read_wordpiece,
        "vocab.json": _read_byte_level,
    }
    source = next((name for name in readers if (directory / name).is_file()), None)
    if source is None:
        files = ", ".join(sorted(p.name for p in directory.glob("*"))) or "nothing"
        raise ValueError(
            f"No tokenizer in {directory}, which holds {files}; put the model's tokenizer.json, "
            "vocab.txt, or vocab.json with merges.txt there."
        )
    try:
        tokenizer = readers[source](directory)
    except Exception as error:  # the Rust library raises bare Exception for a damaged file
        raise ValueError(
            f"The tokenizer {directory / source} is damaged: {error}. Download or copy it again."
        ) from error
    tokenizer.no_padding()  # the data pipeline pads to its own lengths
    tokenizer.no_truncation()
    return tokenizer


def _read_json(directory: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


_ROBERTA = ("<s>", "<pad>", "</s>", "<unk>")


def _read_byte_level(directory: Path) -> tokenizers.Tokenizer:
    files = (str(directory / "vocab.json"), str(directory / "merges.txt"))
    options = _read_settings(directory)
    wrapper = implementations.ByteLevelBPETokenizer.from_file(
        *files, add_prefix_space=options.get("add_prefix_space", False)
    )
    special = ("<|endoftext|>", *_ROBERTA)
    wrapper.add_special_tokens([t for t in special if wrapper.token_to_id(t) is not None])
    tokenizer = tokenizers.Tokenizer.from_str(wrapper.to_str())
    if all(tokenizer.token_to_id(t) is not None for t in _ROBERTA):
        # The mask takes in the space before it.
        tokenizer.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
        ends = [(t, tokenizer.token_to_id(t)) for t in ("</s>", "<s>")]
        tokenizer.post_processor = processors.RobertaProcessing(
            *ends, add_prefix_space=options.get("add_prefix_space", False)
        )
    return tokenizer


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _read_wordpiece(directory: Path) -> tokenizers.Tokenizer:
    options = _read_settings(directory)
    wrapper = implementations.BertWordPieceTokenizer(
        str(directory / "vocab.txt"),
        lowercase=options.get("do_lower_case", True),
        strip_accents=options.get("strip_accents"),
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
    )
    # The implementation is a wrapper; the JSON that it gives is that of the tokenizer inside.
    return tokenizers.Tokenizer.from_str(wrapper.to_str())
