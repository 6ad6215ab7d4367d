"""Reads the tokenizers of checkpoints from the files beside the weights.

The tokens are those of transformers' ``AutoTokenizer`` for the same directory, of old generations
(a vocabulary, and small files that say how it is used) and of new ones (``tokenizer.json``, whose
settings ``tokenizer_config.json`` may change).
"""

import functools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.extras import require
from lora_jax.files import read_object

require(__name__, "models", "tokenizers")

import tokenizers  # noqa: E402
from tokenizers import decoders, models, normalizers, pre_tokenizers  # noqa: E402

from lora_jax.models import gguf_tokenizer, tokenizer_kinds, tokenizer_settings  # noqa: E402
from lora_jax.models.gguf import is_gguf  # noqa: E402
from lora_jax.models.hub import TOKENIZER_FILES, UNREAD_TOKENIZERS, Checkpoint  # noqa: E402
from lora_jax.models.tokenizer_kinds import CLASSES, KINDS, Kind  # noqa: E402
from lora_jax.models.tokenizer_settings import CONFIG, Settings, flag  # noqa: E402

_JSON = "tokenizer.json"
Step = normalizers.Normalizer | pre_tokenizers.PreTokenizer | decoders.Decoder
_log = logging.getLogger(__name__)


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
    return read_files(checkpoint.directory)


def read_files(directory: str | Path) -> dict[str, bytes]:
    """Returns the files of the tokenizer in a directory, by name, whether they are read or not."""
    there = (Path(directory) / name for name in (*TOKENIZER_FILES, *UNREAD_TOKENIZERS))
    return {path.name: path.read_bytes() for path in there if path.is_file()}


def _convert_gguf(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Writes the tokenizer of a GGUF file as transformers' files."""
    made = load_tokenizer(checkpoint)
    template, tokens = gguf_tokenizer.read_template(checkpoint.directory)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
    settings |= {"clean_up_tokenization_spaces": False}
    settings |= {"chat_template": template} if template is not None else {}
    return {
        "tokenizer.json": made.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
    }


def read_tokenizer(directory: str | Path) -> tokenizers.Tokenizer:
    """Reads the tokenizer in a directory, from ``tokenizer.json`` or else from its vocabulary.

    A vocabulary is ``vocab.txt`` (BERT), ``vocab.json`` with ``merges.txt`` (GPT-2, RoBERTa, Qwen),
    ``spiece.model`` (T5), ``sentencepiece.bpe.model`` (XLM-R) or ``tokenizer.model`` (Llama,
    Gemma). Which class of transformers it is for, is said by ``tokenizer_config.json`` or
    ``config.json``, or else follows from the files; the tokens of ``added_tokens.json``,
    ``special_tokens_map.json`` and ``added_tokens_decoder`` are added. The tokenizer does not pad
    or truncate, even if its file says so.

    Raises:
      ValueError: there is no such file, it is damaged, or of a class that is not built here; or the
        files give tokens other ids than they would have.
    """
    settings = tokenizer_settings.read(Path(directory))
    tokenizer_settings.refuse_unbuilt(settings)
    source, build = settings.directory / _JSON, _read_json
    if not source.is_file():
        kind = _find_kind(settings)
        source, build = settings.directory / kind.files[0], functools.partial(_build, kind=kind)
    try:
        tokenizer = build(settings)
    except BaseException as error:  # the Rust library raises bare Exception, or panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"The tokenizer {source} is damaged, or not the one that its settings describe: "
            f"{error}. Download or copy it again."
        ) from error
    _check_added(tokenizer, settings)
    tokenizer.no_padding()  # the data pipeline pads to its own lengths
    tokenizer.no_truncation()
    return tokenizer


def read_special_tokens(directory: str | Path) -> dict[str, str]:
    """Reads the special tokens with a name, "bos_token" and so on, that chat templates may use.

    Where the files do not name a token, it is that of the class, if the tokenizer has it.

    Raises:
      ValueError: a file is damaged.
    """
    settings = tokenizer_settings.read(Path(directory))
    name = _find_class(settings)
    defaults = dict(KINDS[name].special) if name in KINDS else {}
    if not defaults.keys() <= settings.special.keys():
        made = read_tokenizer(directory)
        defaults = {n: text for n, text in defaults.items() if made.token_to_id(text) is not None}
    named = tokenizer_settings.name_tokens(settings, defaults)
    return {name: token.content for name, token in named.items()}


def _find_kind(settings: Settings) -> Kind:
    """Finds the kind of tokenizer that a vocabulary is for.

    Raises:
      ValueError: there is no vocabulary, or it is of a class that is not built here.
    """
    directory, name = settings.directory, settings.class_name
    has_files = lambda kind: all((directory / file).is_file() for file in kind.files)
    if settings.model_type == "qwen2":  # whose files often name another class
        name = "Qwen2Tokenizer"
    if name in KINDS and has_files(KINDS[name]):
        return KINDS[name]
    if name:
        hint = f"reads {' and '.join(KINDS[name].files)}" if name in KINDS else "is not built here"
        raise ValueError(
            f"{directory} names the class {name} for its tokenizer, which {hint}; there is "
            f"{_list_files(directory)}. {_ADVICE}"
        )
    by_model = KINDS.get(CLASSES.get(settings.model_type, ""))
    if by_model is not None and has_files(by_model):
        return by_model
    found = [KINDS[name] for name in _BY_FILES if has_files(KINDS[name])]
    if not found or settings.is_generic:
        raise ValueError(
            f"No tokenizer in {directory}, which holds {_list_files(directory)}; put the model's "
            "tokenizer.json, vocab.txt, vocab.json with merges.txt, spiece.model, "
            f"sentencepiece.bpe.model or tokenizer.model there. {_ADVICE}"
        )
    is_roberta = found[0] is KINDS["GPT2Tokenizer"] and _has_roberta_tokens(directory)
    return KINDS["RobertaTokenizer"] if is_roberta else found[0]


_BY_FILES = ("BertTokenizer", "GPT2Tokenizer", "T5Tokenizer", "XLMRobertaTokenizer")
_ADVICE = (
    "What transformers reads, it saves as a tokenizer.json: "
    "AutoTokenizer.from_pretrained(old).save_pretrained(new)."
)


def _has_roberta_tokens(directory: Path) -> bool:
    vocabulary = read_object(directory / "vocab.json")
    return all(token in vocabulary for token in ("<s>", "<pad>", "</s>", "<unk>"))


def _list_files(directory: Path) -> str:
    return ", ".join(sorted(path.name for path in directory.glob("*"))) or "nothing"


def _build(settings: Settings, *, kind: Kind) -> tokenizers.Tokenizer:
    """Builds a tokenizer of a vocabulary, and adds the tokens that the files name."""
    named = tokenizer_kinds.special_tokens(kind, settings)
    made = kind.build(settings, named)
    tokens = tokenizer_settings.list_tokens(settings, named)
    texts = {token.content for token in tokens}
    tokens += [token for token in made.tokens if token.content not in texts]
    made.tokenizer.add_tokens(tokens)
    made.tokenizer.post_processor = kind.end(made.tokenizer, settings, named)
    return made.tokenizer


def _read_json(settings: Settings) -> tokenizers.Tokenizer:
    """Reads ``tokenizer.json``, with the changes that the settings of its class ask for."""
    made = tokenizers.Tokenizer.from_file(str(settings.directory / _JSON))
    if settings.options.get("auto_map"):
        _log.warning("%s: auto_map names a program, which is not run", settings.directory / CONFIG)
    name = _find_class(settings)
    defaults: Mapping[str, str] = {}
    if name in KINDS:
        special = KINDS[name].special
        defaults = {n: text for n, text in special.items() if made.token_to_id(text) is not None}
        if _change_steps(made, settings, name):
            _log.info("%s: %s is changed to what %s is", settings.directory, _JSON, name)
            # Its added tokens are found by the new steps only if it is made anew.
            made = tokenizers.Tokenizer.from_str(made.to_str())
    there = made.get_added_tokens_decoder().values()
    known = {token.content for token in there}
    known -= {token.content for token in settings.added.values()}
    named = tokenizer_settings.name_tokens(settings, defaults)
    tokens = tokenizer_settings.list_tokens(settings, named)
    # Of a token that the file has, the file says more than its mere text.
    made.add_tokens([token for token in tokens if token.content not in known])
    texts = {token.content for token in named.values()}
    made.add_special_tokens(
        [token for token in there if token.content in texts and not token.special]
    )
    _tell_ends(made, settings)
    return made


def _find_class(settings: Settings) -> str:
    """Returns the class that the files name, or that of the type of model; "" for none."""
    if settings.class_name or settings.is_generic:
        return settings.class_name
    return CLASSES.get(settings.model_type, "")


def _change_steps(made: tokenizers.Tokenizer, settings: Settings, name: str) -> bool:
    """Changes the steps that the class takes from its settings; returns whether any is another."""
    before = (made.normalizer, made.pre_tokenizer)
    normalizer, pieces = before
    if KINDS[name] is KINDS["BertTokenizer"] and isinstance(made.model, models.WordPiece):
        normalizer = tokenizer_kinds.bert_normalizer(settings)
    elif KINDS[name].files == KINDS["GPT2Tokenizer"].files and _is_byte_level(pieces):
        pieces = pre_tokenizers.ByteLevel(
            add_prefix_space=flag(settings, "add_prefix_space", False),
            trim_offsets=getattr(pieces, "trim_offsets", True),  # not in tokenizers 0.20
            use_regex=pieces.use_regex,
        )
    elif settings.class_name == name == "LlamaTokenizer" and _has_spaces(made, settings):
        normalizer, pieces = None, tokenizer_kinds.llama_spaces(settings)
    if list(map(_describe, before)) == [_describe(normalizer), _describe(pieces)]:
        return False
    made.normalizer, made.pre_tokenizer = normalizer, pieces
    return True


def _is_byte_level(step: pre_tokenizers.PreTokenizer | None) -> bool:
    return isinstance(step, pre_tokenizers.ByteLevel)


def _has_spaces(made: tokenizers.Tokenizer, settings: Settings) -> bool:
    """Tells whether a tokenizer of Llama's class has merges of pieces with "▁", not of bytes.

    That of Mistral is left as it is, whatever its class.
    """
    if settings.model_type == "mistral" or not isinstance(made.model, models.BPE):
        return False
    return "ByteLevel" not in _describe(made.pre_tokenizer) + _describe(made.decoder)


def _describe(step: Step | None) -> str:
    """Returns the JSON of a step, "" for none."""
    return "" if step is None else step.__getstate__().decode()


def _tell_ends(made: tokenizers.Tokenizer, settings: Settings) -> None:
    """Tells where ``tokenizer.json`` puts other tokens around a text than the settings say."""
    ids = made.encode("a").ids
    for word in ("bos", "eos"):
        name, token = f"add_{word}_token", settings.special.get(f"{word}_token")
        wanted = settings.options.get(name)
        if token is None or not isinstance(wanted, bool):
            continue
        if wanted != (made.token_to_id(token.content) in (ids[:1] if word == "bos" else ids[-1:])):
            _log.warning(
                "%s: %s says %s %s, and tokenizer.json does otherwise, which holds, as in "
                "transformers 5",
                *(settings.directory, CONFIG, name, wanted),
            )


def _check_added(made: tokenizers.Tokenizer, settings: Settings) -> None:
    """Raises ValueError where a token has another id than the files give it."""
    for number, token in settings.added.items():
        found = made.token_to_id(token.content)
        if found != number:
            raise ValueError(
                f"{settings.directory / settings.source} gives {token.content!r} the id {number}, "
                f"and after the vocabulary and the tokens before it, it has {found}: some are "
                "missing, or the files are not of one tokenizer. Copy all of its files."
            )
