"""Tokenizers and chat templates from the metadata of GGUF files.

A file has the vocabulary and the merges, and names how texts are split before (``gpt2``, bytes) or
has SentencePiece's scores instead of merges (``llama``). What it does not say is as llama.cpp and
transformers take it: there is no Unicode normalisation.
"""

from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.extras import require
from lora_jax.models import gguf
from lora_jax.models.gguf import GGUF

require(__name__, "models", "tokenizers")

import tokenizers  # noqa: E402
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers  # noqa: E402
from tokenizers.processors import TemplateProcessing  # noqa: E402

from lora_jax.models.gguf_splits import SPLITS, Split  # noqa: E402

_CONTROL, _USER_DEFINED = 3, 4
_LONGEST = 512  # characters of a token with SentencePiece: all its pieces are looked up
_SPACE = "▁"


def read_tokenizer(path: str | Path) -> tokenizers.Tokenizer:
    """Builds the tokenizer of a GGUF file, which neither pads nor truncates.

    Raises:
      ValueError: there is none, it is damaged, or of a kind that is not built here.
    """
    header = gguf.read_header(path)
    kind = _word(header, "model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"{header.path}: tokenizer.ggml.model is {kind!r:.60}; built here are gpt2 and llama."
        )
    try:
        made = _byte_level(header) if kind == "gpt2" else _sentencepiece(header)
        _add_tokens(made, header)
        _add_ends(made, header, bos=kind == "llama" or _split(header).bos)
    except Exception as error:  # the Rust library raises bare Exception for odd vocabularies
        raise ValueError(f"The tokenizer in {header.path} can't be built: {error}.") from error
    return made


def special_tokens(header: GGUF) -> dict[str, str]:
    """Returns the texts of the special tokens that the file names, by ``bos_token`` and so on.

    Raises:
      ValueError: an id is that of no token.
    """
    words, found = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}, {}
    for name, word in words.items():
        number = _word(header, f"{word}_token_id")
        if number is None:
            continue
        tokens = _tokens(header)
        if type(number) is not int or not 0 <= number < len(tokens):
            raise ValueError(
                f"{header.path}: {word}_token_id is {number!r:.60}, which is no token."
            )
        found[f"{name}_token"] = tokens[number]
    return found


def read_template(path: str | Path) -> tuple[str | None, dict[str, str]]:
    """Returns the chat template, or None, and the special tokens that it may use.

    Raises:
      ValueError: the file is damaged.
    """
    header = gguf.read_header(path)
    source = header.metadata.get("tokenizer.chat_template")
    if not isinstance(source, str | None):
        raise ValueError(f"{header.path}: tokenizer.chat_template is {source!r:.60}, not a text.")
    return source, special_tokens(header)


def _word(header: GGUF, name: str) -> Any:
    return header.metadata.get(f"tokenizer.ggml.{name}")


def _tokens(header: GGUF) -> list[str]:
    found = _word(header, "tokens")
    if not isinstance(found, list) or not found:
        raise ValueError(f"{header.path} has no tokenizer.ggml.tokens.")
    return found


def _numbers(header: GGUF, name: str) -> np.ndarray | None:
    """An array with a number for each token."""
    found, count = _word(header, name), len(_tokens(header))
    if found is None:
        return None
    if not isinstance(found, np.ndarray) or len(found) != count:
        raise ValueError(f"tokenizer.ggml.{name} must have a number for each of {count} tokens")
    return found


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    found = {token: k for k, token in enumerate(tokens)}
    if len(found) < len(tokens):
        twice = next(token for k, token in enumerate(tokens) if found[token] != k)
        raise ValueError(f"the token {twice!r:.60} is there twice")
    return found


def _split(header: GGUF) -> Split:
    name = _word(header, "pre")
    if not isinstance(name, str) or name not in SPLITS:
        raise ValueError(
            f"tokenizer.ggml.pre, which says how texts are split, is {name!r:.60}; built here are "
            f"{', '.join(SPLITS)}"
        )
    return SPLITS[name]


def _byte_level(header: GGUF) -> tokenizers.Tokenizer:
    """Merges of bytes, which are written as letters (Radford et al. 2019)."""
    split, merges = _split(header), _word(header, "merges")
    if not isinstance(merges, list):
        raise ValueError("there is no tokenizer.ggml.merges")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    model = models.BPE(_vocabulary(_tokens(header)), pairs, ignore_merges=split.whole)
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = split.make()
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(header: GGUF) -> tokenizers.Tokenizer:
    gemma = str(header.metadata.get("general.architecture")).startswith("gemma")
    if gemma and _word(header, "add_space_prefix") is True:
        raise ValueError("tokenizer.ggml.add_space_prefix is true, and Gemma adds no space")
    tokens = _tokens(header)
    if gemma:
        # Runs of spaces, which stand for themselves in the file; its scores are not in the order
        # of the merges, and its tokens are.
        tokens = [_SPACE * len(t) if t.strip(" ") == "" and len(t) > 1 else t for t in tokens]
        scores: np.ndarray | None = -np.arange(len(tokens))
    else:
        scores = _numbers(header, "scores")
    if scores is None:
        raise ValueError("there is no tokenizer.ggml.scores")
    vocabulary = _vocabulary(tokens)
    unknown = {"unk_token": special_tokens(header).get("unk_token")} if gemma else {}
    merges = _merges(vocabulary, scores)
    model = models.BPE(vocabulary, merges, fuse_unk=True, byte_fallback=True, **unknown)
    made = tokenizers.Tokenizer(model)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if gemma:
        made.normalizer = normalizers.Replace(" ", _SPACE)
        made.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    else:
        prefix = _word(header, "add_space_prefix") is not False
        scheme = "first" if prefix else "never"
        made.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False)
        steps += [decoders.Strip(" ", 1, 0)] * prefix
    made.decoder = decoders.Sequence(steps)
    return made


def _merges(vocabulary: dict[str, int], scores: np.ndarray) -> list[tuple[str, str]]:
    """Every way to put a token together from two: those of the best tokens first.

    >>> _merges({"a": 0, "b": 1, "ab": 2, "aab": 3, "aa": 4}, np.array([0, 0, 3, 1, 2]))
    [('a', 'b'), ('a', 'a'), ('aa', 'b'), ('a', 'ab')]
    """
    found = []
    for token, number in vocabulary.items():
        if len(token) > _LONGEST:
            raise ValueError(f"a token has {len(token)} characters; at most {_LONGEST} are read")
        halves = [(token[:k], token[k:]) for k in range(1, len(token))]
        halves = [(a, b) for a, b in halves if a in vocabulary and b in vocabulary]
        halves.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(float(scores[number]), len(a), len(b), a, b) for a, b in halves]
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [merge[3:] for merge in found]


def _add_tokens(made: tokenizers.Tokenizer, header: GGUF) -> None:
    """Has special tokens, and those that users have defined, found as a whole in any text."""
    tokens, kinds = _tokens(header), _numbers(header, "token_type")
    there = made.get_vocab()
    of_kind = lambda kind: (
        [] if kinds is None else [tokens[k] for k in np.flatnonzero(kinds == kind)]
    )
    special = dict.fromkeys([*of_kind(_CONTROL), *special_tokens(header).values()])
    plain = [token for token in of_kind(_USER_DEFINED) if token in there and token not in special]
    add = lambda token, kind: AddedToken(token, normalized=False, special=kind)
    made.add_special_tokens([add(token, True) for token in special])
    made.add_tokens([add(token, False) for token in plain])


def _add_ends(made: tokenizers.Tokenizer, header: GGUF, *, bos: bool) -> None:
    """Has texts begin and end with the tokens that the file wants there."""
    begin, end = _end(header, "bos", bos), _end(header, "eos", False)
    single = [*begin, "$A", *end]
    made.post_processor = TemplateProcessing(
        single=single,
        pair=[*single, *(f"{piece}:1" for piece in (*begin, "$B", *end))],
        special_tokens=[(token, made.token_to_id(token)) for token in {*begin, *end}],
    )


def _end(header: GGUF, word: str, default: bool) -> list[str]:
    """The token at one end of every text; none where the file wants none."""
    wanted, token = _word(header, f"add_{word}_token"), special_tokens(header).get(f"{word}_token")
    return [token] if token is not None and (default if wanted is None else wanted) else []
