"""Directories with the files of tiny tokenizers, as the old generations of transformers have them."""

import json

import tokenizers

LINES = [
    "The cat sat on the mat, and the dog didn't.",
    "Hello world! It's 2024; 12345 lines of text.",
    "naïve café 電影 — good  food\tand\n\nnew lines",
    "hello user, bye assistant",
]
ADDED = {"<user>": False, "<|im_end|>": True}  # whether each is special
TEXTS = [
    "Hello world! It's 2024; 12345 lines.",
    "  The cat  sat\ton the\n\nmat ",
    "naïve CAFÉ 電影 — Ünknown ☃",
    "hello <user> bye<|im_end|>",
    "<|im_end|>user hello <USER>x<user>",
    "a [MASK] b [SEP] c <mask> d </s> e <s>f <pad> g <|endoftext|>h",
    "<extra_id_0> in <extra_id_99>",
    "<bos>x<eos> <unk>y",
    "",
]


def write(directory, **contents):
    """Writes JSON files, by their names without the ending."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def wordpiece(directory):
    """Writes ``vocab.txt``, and returns the number of tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = tokenizers.BertWordPieceTokenizer(lowercase=False)
    made.train_from_iterator(LINES * 3, vocab_size=150, special_tokens=special, show_progress=False)
    words = [*made.get_vocab(with_added_tokens=False).items()]
    words = [word for word, _ in sorted(words, key=lambda item: item[1])]
    words += [w for w in ("hello", "the", "cafe", "naive") if w not in words]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return len(words)


def merges(directory, special):
    """Writes ``vocab.json`` and ``merges.txt``, and returns the number of tokens."""
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(
        LINES * 3, vocab_size=330, special_tokens=list(special), show_progress=False
    )
    directory.mkdir(parents=True, exist_ok=True)
    made.save_model(str(directory))
    return made.get_vocab_size()


def sentencepiece(path, kind, *, rules="", **options):
    """Trains a model of the kind "unigram" or "bpe" with Google's library."""
    import io

    import sentencepiece

    if rules:
        options["normalization_rule_tsv"] = str(path.with_suffix(".tsv"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tsv").write_text(rules)
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 20), model_writer=file, model_type=kind,
        vocab_size=options.pop("vocab_size", 120), hard_vocab_limit=False, minloglevel=2,
        character_coverage=0.98, **options,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file.getvalue())
    path.with_suffix(".tsv").unlink(missing_ok=True)
    return len(sentencepiece.SentencePieceProcessor(model_proto=file.getvalue()))


LLAMA = {"byte_fallback": True, "normalization_rule_name": "identity", "vocab_size": 380}
LLAMA |= {"remove_extra_whitespaces": False}
GEMMA = LLAMA | {
    "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "add_dummy_prefix": False,
    "eos_piece": "<eos>", "bos_piece": "<bos>", "user_defined_symbols": "<start_of_turn>,▁▁",
}  # fmt: skip
# Tab, line feed, and E with an accent, by the numbers of the characters: the usual rules are 240 kB.
UNIGRAM = {"vocab_size": 90, "rules": "9\t20\nA\t20\nC9\t45\n"}
T5 = UNIGRAM | {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}


# A directory of each family; a function writes it, and returns the number of tokens.


def bert(directory):
    return wordpiece(write(directory, config={"model_type": "bert"}))


def distilbert(directory):
    return wordpiece(write(directory, config={"model_type": "distilbert"}))


def roberta(directory):
    write(directory, config={"model_type": "roberta"})
    return merges(directory, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])


def gpt2(directory):
    return merges(write(directory, config={"model_type": "gpt2"}), ["<|endoftext|>"])


def qwen2(directory):
    return merges(write(directory, config={"model_type": "qwen2"}), [])


def qwen3(directory):
    return merges(write(directory, config={"model_type": "qwen3"}), [])


def t5(directory):
    write(directory, config={"model_type": "t5"})
    return sentencepiece(directory / "spiece.model", "unigram", **T5) + 100


def xlm_roberta(directory):
    write(directory, config={"model_type": "xlm-roberta"})
    path = directory / "sentencepiece.bpe.model"
    return sentencepiece(path, "unigram", **UNIGRAM) + 2


def llama(directory):
    about = {"model_type": "llama", "tokenizer_class": "LlamaTokenizer"}
    write(directory, config=about)
    return sentencepiece(directory / "tokenizer.model", "bpe", **LLAMA)


def gemma(directory):
    write(directory, config={"model_type": "gemma"})
    return sentencepiece(directory / "tokenizer.model", "bpe", **GEMMA)


MERGES = (bert, distilbert, roberta, gpt2, qwen2, qwen3)
SENTENCEPIECE = (t5, xlm_roberta, llama, gemma)
FAMILIES = (*MERGES, *SENTENCEPIECE)


def numbers(first, special=True):
    """Ids of the added tokens, after a vocabulary of a size."""
    names = [name for name in ADDED if special or not ADDED[name]]
    return {name: first + k for k, name in enumerate(names)}


def decoder(first):
    """The same, as ``added_tokens_decoder`` has them."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    return {
        str(number): {"content": name, "special": ADDED[name], "normalized": not ADDED[name]}
        | flags
        for name, number in numbers(first).items()
    }
