"""Tokens of tiny directories of old and new generations, as transformers' AutoTokenizer has them."""

import pytest

from lora_jax.models.tokenizer import read_tokenizer
from tests.helpers import tokenizer_files as made
from tests.helpers.tokenizer_files import TEXTS

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")


MERGES, SENTENCEPIECE, FAMILIES = made.MERGES, made.SENTENCEPIECE, made.FAMILIES
bert, roberta, gpt2, qwen2, t5 = made.bert, made.roberta, made.gpt2, made.qwen2, made.t5
qwen3, llama, gemma = made.qwen3, made.llama, made.gemma
# What is said of added tokens: nothing, or in each of the files that have said it.
SAID = {
    "nothing": lambda n: {},
    "added_tokens": lambda n: {"added_tokens": made.numbers(n)},
    "special_tokens_map": lambda n: {
        "special_tokens_map": {"additional_special_tokens": list(made.ADDED)}
    },
    "both": lambda n: {
        "added_tokens": made.numbers(n),
        "special_tokens_map": {"additional_special_tokens": ["<|im_end|>"]},
    },
    "extra_special_tokens": lambda n: {"tokenizer_config": {"extra_special_tokens": [*made.ADDED]}},
    "added_tokens_decoder": lambda n: {"tokenizer_config": {"added_tokens_decoder": made.decoder(n)}},
    "mask": lambda n: {"special_tokens_map": {"mask_token": {"content": "<mask>", "lstrip": True}}},
}  # fmt: skip


def build(family, directory):
    if family in SENTENCEPIECE:
        pytest.importorskip("sentencepiece")
    return family(directory)


def check(directory):
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = read_tokenizer(directory)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"], (text, type(theirs))
        pair = theirs(text, "and you")
        assert ours.encode(text, "and you").ids == pair["input_ids"], text
        if "token_type_ids" in pair:
            assert ours.encode(text, "and you").type_ids == pair["token_type_ids"]
    assert ours.get_vocab() == theirs.get_vocab()


# Here transformers 5 takes the list that it makes of a SentencePiece model for that of the files, which
# it forgets (of T5, it forgets the <extra_id_...> instead); earlier versions added both.
FORGOTTEN = {(family, "special_tokens_map") for family in SENTENCEPIECE}
FORGOTTEN |= {(t5, "extra_special_tokens")}
# Its class for Qwen adds each special token anew, without the spaces that it takes in.
FORGOTTEN |= {(family, "mask") for family in (qwen2, qwen3)}
CASES = [(f, said) for f in FAMILIES for said in SAID if (f, said) not in FORGOTTEN]


@pytest.mark.parametrize("family, said", CASES)
def test_old_generation_and_what_is_saved_of_it(family, said, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    made.write(old, **SAID[said](build(family, old)))
    check(old)
    transformers.AutoTokenizer.from_pretrained(old).save_pretrained(new)
    (new / "config.json").write_bytes((old / "config.json").read_bytes())
    check(new)
    (new / "config.json").unlink()
    check(new)


OPTIONS = [
    *((bert, {name: value}) for name in ("do_lower_case", "strip_accents", "tokenize_chinese_chars") for value in (True, False)),
    (roberta, {"add_prefix_space": True}),
    *((gpt2, {name: True}) for name in ("add_prefix_space", "add_bos_token", "add_eos_token")),
    (qwen2, {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    (qwen2, {"tokenizer_class": "PreTrainedTokenizerFast"}),
    (t5, {"extra_ids": 0}), (t5, {"extra_ids": 7}),
    *((llama, o) for o in ({"add_bos_token": True, "add_eos_token": False}, {"add_bos_token": True, "add_eos_token": True},
                           {"legacy": True}, {"legacy": False}, {"add_prefix_space": False}, {"eos_token": "<user>"})),
    (gemma, {"add_bos_token": True, "add_eos_token": False}),
    (gemma, {"tokenizer_class": "GemmaTokenizerFast"}),
]  # fmt: skip


@pytest.mark.parametrize("family, options", OPTIONS)
def test_settings(family, options, tmp_path):
    old, new, changed = (tmp_path / name for name in ("old", "new", "changed"))
    build(family, old)
    made.write(old, tokenizer_config=options)
    check(old)
    # The same settings beside a tokenizer.json that was made without them.
    build(family, changed)
    transformers.AutoTokenizer.from_pretrained(changed).save_pretrained(new)
    made.write(new, tokenizer_config=options)
    (new / "config.json").write_bytes((old / "config.json").read_bytes())
    check(new)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_class_that_leaves_all_to_the_file(family, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    build(family, old)
    saved = transformers.AutoTokenizer.from_pretrained(old)
    saved.save_pretrained(new)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False}
    made.write(new, tokenizer_config=settings | {"added_tokens_decoder": made.decoder(len(saved))})
    check(new)
