"""The tokenizers that are built of a vocabulary, one for each class of transformers.

What a class does not say in its files is as transformers has it: byte-level merges (GPT-2, RoBERTa,
Qwen), WordPiece (BERT), and SentencePiece's merges (Llama, Gemma) and unigrams (T5, XLM-R).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from lora_jax.extras import require
from lora_jax.models import sentencepiece_model
from lora_jax.models.sentencepiece_model import BPE, UNIGRAM, SentencePieceModel
from lora_jax.models.tokenizer_settings import CONFIG, Settings, flag, make_token, name_tokens

require(__name__, "models", "tokenizers")

from tokenizers import (  # noqa: E402
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

_SPACE = "▁"
_LONGEST = 512  # characters of a piece: all its parts are looked up
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Named = Mapping[str, AddedToken]


class Made(NamedTuple):
    """A tokenizer to which the tokens that the files name are still to be added.

    Attributes:
      tokenizer: the tokenizer.
      tokens: tokens that the vocabulary itself marks as such.
    """

    tokenizer: Tokenizer
    tokens: Sequence[AddedToken] = ()


class Kind(NamedTuple):
    """A class of tokenizers.

    Attributes:
      files: files of the vocabulary.
      special: special tokens that the class has where the files name none.
      build: builds the tokenizer.
      end: puts special tokens around texts, once they have their ids.
    """

    files: tuple[str, ...]
    special: Mapping[str, str]
    build: Callable[[Settings, Named], Made]
    end: Callable[[Tokenizer, Settings, Named], processors.PostProcessor]


def bert_normalizer(settings: Settings) -> normalizers.Normalizer:
    """Makes BERT's normalizer: by default it lowers the case, and strips accents with it.

    Raises:
      ValueError: a setting is neither true nor false.
    """
    accents = settings.options.get("strip_accents")
    return normalizers.BertNormalizer(
        lowercase=flag(settings, "do_lower_case", True),
        strip_accents=None if accents is None else flag(settings, "strip_accents", False),
        handle_chinese_chars=flag(settings, "tokenize_chinese_chars", True),
    )


def _build_wordpiece(settings: Settings, named: Named) -> Made:
    path = settings.directory / "vocab.txt"
    unknown = named["unk_token"].content if "unk_token" in named else "[UNK]"
    made = Tokenizer(models.WordPiece.from_file(str(path), unk_token=unknown))
    made.normalizer = bert_normalizer(settings)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##")
    return Made(made)


def _end_bert(made: Tokenizer, settings: Settings, named: Named) -> processors.PostProcessor:
    begin, end = (_find(made, named, name, settings) for name in ("cls_token", "sep_token"))
    single = f"{begin[0]}:0 $A:0 {end[0]}:0"
    return processors.TemplateProcessing(
        single=single, pair=f"{single} $B:1 {end[0]}:1", special_tokens=[begin, end]
    )


def _build_byte_level(settings: Settings, named: Named) -> Made:
    del named
    made = Tokenizer(_read_merges(settings))
    prefix = flag(settings, "add_prefix_space", False)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    return Made(made)


def _read_merges(settings: Settings) -> models.BPE:
    files = (str(settings.directory / name) for name in ("vocab.json", "merges.txt"))
    return models.BPE.from_file(*files, continuing_subword_prefix="", end_of_word_suffix="")


def _build_qwen2(settings: Settings, named: Named) -> Made:
    del named
    made = Tokenizer(_read_merges(settings))
    made.normalizer = normalizers.NFC()
    prefix = flag(settings, "add_prefix_space", False)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return Made(made)


def _end_roberta(made: Tokenizer, settings: Settings, named: Named) -> processors.PostProcessor:
    end, begin = (_find(made, named, name, settings) for name in ("sep_token", "cls_token"))
    prefix = flag(settings, "add_prefix_space", False)
    return processors.RobertaProcessing(end, begin, add_prefix_space=prefix)


def _end_by_flags(made: Tokenizer, settings: Settings, named: Named) -> processors.PostProcessor:
    """Puts the tokens at the ends that ``add_bos_token`` and ``add_eos_token`` ask for."""
    begin, end = (
        [_find(made, named, f"{word}_token", settings)]
        if flag(settings, f"add_{word}_token", False)
        else []
        for word in ("bos", "eos")
    )
    single = [*(text for text, _ in begin), "$A", *(text for text, _ in end)]
    second = [f"{'$B' if piece == '$A' else piece}:1" for piece in single]
    return processors.TemplateProcessing(
        single=single, pair=[*single, *second], special_tokens=[*{*begin, *end}]
    )


def _build_llama(settings: Settings, named: Named) -> Made:
    del named
    model = _read_sentencepiece(settings, "tokenizer.model", BPE)
    made = Tokenizer(
        models.BPE(*_find_merges(model, settings), fuse_unk=True, byte_fallback=True),
    )
    has_prefix = flag(settings, "add_prefix_space", True)
    made.pre_tokenizer = llama_spaces(settings)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, *[decoders.Strip(" ", 1, 0)] * has_prefix])
    return Made(made, _list_marked(model))


def llama_spaces(settings: Settings) -> pre_tokenizers.PreTokenizer:
    """Makes the step that puts "▁" for spaces, and one before the text.

    With ``legacy``, one is put after each special token, too.
    """
    scheme = "always" if flag(settings, "legacy", False) else "first"
    scheme = scheme if flag(settings, "add_prefix_space", True) else "never"
    return pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False)


def _build_gemma(settings: Settings, named: Named) -> Made:
    model = _read_sentencepiece(settings, "tokenizer.model", BPE)
    made = Tokenizer(
        models.BPE(
            *_find_merges(model, settings),
            unk_token=named["unk_token"].content if "unk_token" in named else "<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    made.normalizer = normalizers.Replace(" ", _SPACE)
    made.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(steps)
    return Made(made, _list_marked(model))


def _build_t5(settings: Settings, named: Named) -> Made:
    del named
    model = _read_sentencepiece(settings, "spiece.model", UNIGRAM)
    count = settings.options.get("extra_ids", 100)
    if type(count) is not int or not 0 <= count < 10_000:
        raise ValueError(f"extra_ids in {CONFIG} is {count!r:.60}, and must be a number of tokens")
    extra = [f"<extra_id_{k}>" for k in reversed(range(count))]
    stated = [token.content for token in settings.extra if "<extra_id_" in token.content]
    if stated and len(stated) != count:
        raise ValueError(f"{CONFIG} has extra_ids {count}, and names {len(stated)} such tokens")
    pieces = [*((p.text, p.score) for p in model.pieces), *((text, 0.0) for text in extra)]
    tokens = [*_list_marked(model), *map(make_token, reversed(extra))]
    return Made(_build_unigram(pieces, model, unk_id=2), tokens)


def _build_xlm_roberta(settings: Settings, named: Named) -> Made:
    model = _read_sentencepiece(settings, "sentencepiece.bpe.model", UNIGRAM)
    # Fairseq's vocabulary begins with four tokens of its own, instead of the model's three.
    first = [named[f"{name}_token"].content for name in ("bos", "pad", "eos", "unk")]
    pieces = [(piece.text, piece.score) for piece in model.pieces[3:]]
    mask = [(named["mask_token"].content, 0.0)]
    made = _build_unigram([*((text, 0.0) for text in first), *pieces, *mask], model, unk_id=3)
    return Made(made, _list_marked(model))


def _build_unigram(
    pieces: list[tuple[str, float]], model: SentencePieceModel, *, unk_id: int
) -> Tokenizer:
    made = Tokenizer(models.Unigram(pieces, unk_id=unk_id, byte_fallback=False))
    if model.charsmap:
        made.normalizer = normalizers.Precompiled(model.charsmap)
    spaces = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="always")
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    made.decoder = decoders.Metaspace(_SPACE, prepend_scheme="always")
    return made


def _end_t5(made: Tokenizer, settings: Settings, named: Named) -> processors.PostProcessor:
    end = _find(made, named, "eos_token", settings)
    return processors.TemplateProcessing(
        single=["$A", end[0]], pair=["$A", end[0], "$B", end[0]], special_tokens=[end]
    )


def _end_xlm_roberta(made: Tokenizer, settings: Settings, named: Named) -> processors.PostProcessor:
    begin, end = (_find(made, named, name, settings) for name in ("bos_token", "eos_token"))
    single = [begin[0], "$A", end[0]]
    return processors.TemplateProcessing(
        single=single, pair=[*single, end[0], "$B", end[0]], special_tokens=[begin, end]
    )


def _find(made: Tokenizer, named: Named, name: str, settings: Settings) -> tuple[str, int]:
    """Returns text and id of the special token of a name.

    Raises:
      ValueError: there is none.
    """
    text = named[name].content if name in named else ""
    number = made.token_to_id(text)
    if number is None:
        raise ValueError(
            f"{settings.directory} names no {name}, which texts here begin or end with"
        )
    return text, number


def _read_sentencepiece(settings: Settings, file: str, kind: int) -> SentencePieceModel:
    model = sentencepiece_model.read(settings.directory / file)
    if model.kind != kind:
        words = {UNIGRAM: "unigrams", BPE: "merges"}
        raise ValueError(
            f"it has {words.get(model.kind, 'words or characters')}, and a tokenizer of this class "
            f"has {words[kind]}: set tokenizer_class in {CONFIG}"
        )
    return model


def _list_marked(model: SentencePieceModel) -> list[AddedToken]:
    marked = [piece for piece in model.pieces if piece.is_control or piece.is_user_defined]
    return [AddedToken(p.text, normalized=False, special=p.is_control) for p in marked]


def _find_merges(
    model: SentencePieceModel, settings: Settings
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Finds every way to put a piece together from two: those of the first pieces first."""
    vocabulary = {piece.text: k for k, piece in enumerate(model.pieces)}
    if len(vocabulary) < len(model.pieces):
        raise ValueError(f"{settings.directory}: a piece is there twice")
    found = []
    for text, number in vocabulary.items():
        if len(text) > _LONGEST:
            raise ValueError(f"a piece has {len(text)} characters; at most {_LONGEST} are read")
        for k in range(1, len(text)):
            left, right = text[:k], text[k:]
            if left in vocabulary and right in vocabulary:
                found.append((number, len(left), left, right))
    return vocabulary, [(left, right) for _, _, left, right in sorted(found)]


_BERT = Kind(
    ("vocab.txt",),
    {
        "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
    _build_wordpiece,
    _end_bert,
)  # fmt: skip
_ROBERTA = {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>",
    "pad_token": "<pad>", "cls_token": "<s>", "mask_token": "<mask>",
}  # fmt: skip
_END = "<|endoftext|>"
_MERGES = ("vocab.json", "merges.txt")
_GPT2 = Kind(
    _MERGES, dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END),
    _build_byte_level, _end_by_flags,
)  # fmt: skip
KINDS: dict[str, Kind] = {
    **dict.fromkeys(("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer"), _BERT),
    "RobertaTokenizer": Kind(_MERGES, _ROBERTA, _build_byte_level, _end_roberta),
    "GPT2Tokenizer": _GPT2,
    "Qwen2Tokenizer": Kind(
        _MERGES, dict.fromkeys(("unk_token", "eos_token", "pad_token"), _END),
        _build_qwen2, _end_by_flags,
    ),
    "LlamaTokenizer": Kind(
        ("tokenizer.model",), {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        _build_llama, _end_by_flags,
    ),
    "GemmaTokenizer": Kind(
        ("tokenizer.model",),
        {
            "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
        _build_gemma, _end_by_flags,
    ),
    "T5Tokenizer": Kind(
        ("spiece.model",), {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        _build_t5, _end_t5,
    ),
    "XLMRobertaTokenizer": Kind(
        ("sentencepiece.bpe.model",), _ROBERTA, _build_xlm_roberta, _end_xlm_roberta
    ),
}  # fmt: skip
# The class of each type of models, where the files name none.
CLASSES = {
    "bert": "BertTokenizer", "distilbert": "BertTokenizer", "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer", "gpt2": "GPT2Tokenizer", "t5": "T5Tokenizer",
    "llama": "LlamaTokenizer", "mistral": "LlamaTokenizer", "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer", "gemma": "GemmaTokenizer", "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer", "gemma3_text": "GemmaTokenizer",
}  # fmt: skip


def special_tokens(kind: Kind, settings: Settings) -> Named:
    """Returns the special tokens with a name that the files or the class name."""
    return name_tokens(settings, kind.special)
