"""Tokenisers of checkpoints, read from the files beside the weights."""

import json
from pathlib import Path

import tokenizers
from tokenizers import implementations

from lora_jax.models.hub import Checkpoint


def load_tokenizer(checkpoint: Checkpoint) -> tokenizers.Tokenizer:
    """The checkpoint's own tokeniser, from tokenizer.json or, failing that, vocab.txt.

    It adds ``[CLS]`` and ``[SEP]``; it neither pads nor truncates, whatever the file says.

    Raises:
      ValueError: there is neither file, or it is damaged.
    """
    directory = checkpoint.directory
    fast, vocabulary = directory / "tokenizer.json", directory / "vocab.txt"
    if not fast.is_file() and not vocabulary.is_file():
        there = ", ".join(sorted(p.name for p in directory.iterdir())) or "nothing"
        raise ValueError(
            f"No tokeniser in {directory}, which holds {there}; put the model's tokenizer.json or "
            "vocab.txt there."
        )
    source = fast if fast.is_file() else vocabulary
    try:
        if source is fast:
            tokenizer = tokenizers.Tokenizer.from_file(str(fast))
        else:
            tokenizer = _wordpiece(directory)
    except Exception as error:  # the Rust library raises bare Exception for a damaged file
        raise ValueError(
            f"The tokeniser {source} is damaged: {error}. Download or copy it again."
        ) from error
    tokenizer.no_padding()  # the data pipeline pads to its own lengths
    tokenizer.no_truncation()
    return tokenizer


def _wordpiece(directory: Path) -> tokenizers.Tokenizer:
    settings = directory / "tokenizer_config.json"
    options = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    made = implementations.BertWordPieceTokenizer(
        str(directory / "vocab.txt"),
        lowercase=options.get("do_lower_case", True),
        strip_accents=options.get("strip_accents"),
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
    )
    # The implementation wraps the tokeniser proper, which its JSON form gives back.
    return tokenizers.Tokenizer.from_str(made.to_str())
