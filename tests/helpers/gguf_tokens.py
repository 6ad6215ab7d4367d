"""Tokenisers as GGUF files have them, trained on a few sentences, for tests."""

import json

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tests.helpers import tiny_llama

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "What is red? A colour.", "what is two?  a number: 2, 22 or 1234", "It's   a dog's life, isn't it?",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.", "naïve café — déjà vu…",
    "def f(x):\n    return x**2  # square\n\n\treturn", "日本語のテキスト", "emoji 🙂🙂 end", " leading", "trailing ",
    "a\r\nb\n\n\nc", "3.14159 + 2.71828 = 5.85987", "HelloWorld camelCase UPPER lower", "", " ", "   ",
    "<s>what is</s> <|im_start|>user\nwhat is dog?<|im_end|>", "العربية", "x\u00a0y\u2009z", "½ ² Ⅷ ١٢٣",
]  # fmt: skip


def bpe(split=None, size=600):
    """Byte-level merges; a ``split`` is what comes before GPT-2's."""
    made = tokenizers.Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = level if split is None else pre_tokenizers.Sequence([split, level])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    made.add_special_tokens(SPECIAL)
    return made


def words(made, pre="gpt-2"):
    """The metadata of such a one."""
    model = json.loads(made.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    kinds = [CONTROL if t in SPECIAL else NORMAL for t in tokens]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, "<i4"),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 4,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": tiny_llama.CHATML,
    }  # fmt: skip


def pieces(*, gemma=False):
    """The metadata of a vocabulary with scores: bytes, letters, and parts of words."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{k:02X}>" for k in range(256))]
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256
    marked = ["▁" + text.replace(" ", "▁") for text in TEXTS]
    counts = {}
    for text in marked:
        for length in range(2, 7):
            for at in range(len(text) - length + 1):
                part = text[at : at + length]
                if "<" not in part and ("▁" not in part[1:] or not part.strip("▁")):
                    counts[part] = counts.get(part, 0) + length
    common = sorted(counts, key=lambda t: (-counts[t], t))[:400]
    letters = sorted(set("".join(marked)) - set("🙂日½"))
    spelled = [
        t.replace("▁", " ") if gemma and len(t) > 1 and not t.strip("▁") else t for t in common
    ]
    tokens += [*spelled, *letters, "<think>"]
    kinds += [NORMAL] * (len(common) + len(letters)) + [USER_DEFINED]
    scores = [-1e9] * 259 + [-float(k) for k in range(len(common) + len(letters))] + [0.0]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": np.array(scores, "<f4"),
        "tokenizer.ggml.token_type": np.array(kinds, "<i4"), "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip


def best_first(text, about):
    """SentencePiece as llama.cpp has it: of all neighbours that make a token, the best is joined."""
    tokens = [
        "▁" * len(t) if len(t) > 1 and not t.strip(" ") else t
        for t in about["tokenizer.ggml.tokens"]
    ]
    ids, scores = {t: k for k, t in enumerate(tokens)}, about["tokenizer.ggml.scores"]
    parts = list(text)
    while True:
        pairs = [
            (ids.get(a + b), k) for k, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
        ]
        pairs = [(-scores[number], k) for number, k in pairs if number is not None]
        if not pairs:
            break
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    spelled = lambda p: [ids[p]] if p in ids else [ids[f"<0x{b:02X}>"] for b in p.encode()]
    return [number for part in parts for number in spelled(part)]
