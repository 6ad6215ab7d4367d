"""How texts are split into words before bytes are merged, by llama.cpp's names for the ways."""

from collections.abc import Callable
from typing import NamedTuple

from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|\p{{N}}|{_SIGNS}|{_SPACES}"
_TEKKEN = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)


class Split(NamedTuple):
    """One way to split, and what llama.cpp assumes of a tokenizer that has it.

    Attributes:
      make: makes the pre-tokenizer.
      whole: whether a word that is a token is one even where no merges lead to it.
      bos: whether texts begin with the token for the beginning where the file does not say.
    """

    make: Callable[[], PreTokenizer]
    whole: bool = False
    bos: bool = False


def _by_words() -> PreTokenizer:
    """As GPT-2 does."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _by_digits() -> PreTokenizer:
    """The same, with each digit a word."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _by_words()])


def _by(pattern: str) -> Callable[[], PreTokenizer]:
    def make() -> PreTokenizer:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, level])

    return make


_LLAMA_BPE = Split(_by(_LLAMA3), whole=True, bos=True)
SPLITS: dict[str, Split] = {
    "gpt-2": Split(_by_words),
    "smollm": Split(_by_digits),
    "starcoder": Split(_by_digits),
    "refact": Split(_by_digits),
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "smaug-bpe": Split(_by(_LLAMA3)),
    "qwen2": Split(_by(_QWEN2)),
    "deepseek-r1-qwen": Split(_by(_QWEN2)),
    "tekken": Split(_by(_TEKKEN), whole=True, bos=True),
}
