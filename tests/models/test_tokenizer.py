"""Tokenizers of old and new directories; the tokens are those of transformers (goldens)."""

import json
import shutil

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from lora_jax.models import checkpoints, sentencepiece_model
from lora_jax.models.tokenizer import read_special_tokens, read_tokenizer
from tests.helpers import tiny_encoder
from tests.helpers import tokenizer_files as made
from tests.helpers.places import GOLDENS

FILES = GOLDENS / "tokenizers"
FAMILIES = sorted(path.name for path in FILES.iterdir() if path.is_dir())
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "Hello", "<", ">", "user", "é"]


def bert(directory, **files):
    made.write(directory, **files)
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return directory


def ids(directory, text):
    return read_tokenizer(directory).encode(text).ids


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_old_directories(family):
    tokenizer = read_tokenizer(FILES / family)
    golden = json.loads((FILES / family / "ids.json").read_text())
    assert list(golden) == made.TEXTS
    for text, numbers in golden.items():
        assert tokenizer.encode(text).ids == numbers, text


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_as_one_file(family, tmp_path):
    """What transformers would save: all in tokenizer.json, read with the same config."""
    shutil.copy(FILES / family / "config.json", tmp_path)
    read_tokenizer(FILES / family).save(str(tmp_path / "tokenizer.json"))
    golden = json.loads((FILES / family / "ids.json").read_text())
    assert {text: ids(tmp_path, text) for text in golden} == golden


SAID = {
    "added_tokens": {"added_tokens": {"<user>": 11}},
    "special_tokens_map": {"special_tokens_map": {"additional_special_tokens": ["<user>"]}},
    "object": {"special_tokens_map": {"additional_special_tokens": [{"content": "<user>"}]}},
    "extra_special_tokens": {"tokenizer_config": {"extra_special_tokens": ["<user>"]}},
    "named": {"tokenizer_config": {"extra_special_tokens": {"user_token": "<user>"}}},
    "model's own": {"tokenizer_config": {"user_token": "<user>"}},
    "eos_token": {"tokenizer_config": {"eos_token": "<user>"}},
    "decoder": {"tokenizer_config": {"added_tokens_decoder": {"11": {"content": "<user>"}}}},
}


@pytest.mark.parametrize("said", SAID)
def test_added_tokens(said, tmp_path):
    bert(tmp_path / "old", **SAID[said])
    assert ids(tmp_path / "old", "hello <user> hello") == [2, 5, 11, 5, 3]
    # Beside a tokenizer.json that has them not yet.
    read_tokenizer(bert(tmp_path / "plain")).save(str(tmp_path / "old" / "tokenizer.json"))
    assert ids(tmp_path / "old", "hello <user> hello") == [2, 5, 11, 5, 3]


def test_a_token_of_the_decoder_keeps_its_flags(tmp_path):
    token = {"content": "<user>", "lstrip": True, "rstrip": True, "special": True}
    bert(tmp_path, tokenizer_config={"added_tokens_decoder": {"11": token}})
    assert read_tokenizer(tmp_path).encode("hello <user> hello").offsets[2] == (5, 13)


@pytest.mark.parametrize("options, expected", [
    ({}, [5, 5, 1]), ({"do_lower_case": False}, [6, 5, 10]),
    ({"strip_accents": False}, [5, 5, 10]), ({"do_lower_case": False, "strip_accents": True}, [6, 5, 1]),
])  # fmt: skip
@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
def test_case_and_accents(options, expected, file, tmp_path):
    bert(tmp_path, config={"model_type": "bert"})
    if file == "tokenizer.json":  # which says otherwise
        stored = read_tokenizer(tmp_path)
        stored.normalizer = normalizers.BertNormalizer(
            lowercase=not options.get("do_lower_case", True)
        )
        stored.save(str(tmp_path / file))
    made.write(tmp_path, tokenizer_config=options)
    assert ids(tmp_path, "Hello hello é")[1:-1] == expected


def test_a_class_of_its_own_is_left_as_it_is(tmp_path):
    bert(tmp_path, config={"model_type": "bert"})
    stored = read_tokenizer(tmp_path)
    stored.normalizer = normalizers.BertNormalizer(lowercase=False)
    stored.save(str(tmp_path / "tokenizer.json"))
    made.write(tmp_path, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"})
    assert ids(tmp_path, "Hello") == [2, 6, 3]


def test_spaces_of_llama(tmp_path):
    """With legacy, a space is put after each special token, and not only before the text."""
    directory = tmp_path / "llama"
    shutil.copytree(FILES / "llama", directory)
    tokens = {}
    for legacy in (False, True):
        made.write(directory, tokenizer_config={"legacy": legacy, "add_bos_token": True})
        tokens[legacy] = read_tokenizer(directory).encode("a<|im_end|>a").tokens
    assert tokens[False][0] == tokens[True][0] == "<s>"
    assert tokens[False][-2:] == ["<|im_end|>", "a"] and tokens[True][-2:] == ["▁", "a"]


@pytest.mark.parametrize("family, changes, expected", [
    ("gemma", {}, {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}),
    ("llama", {"eos_token": "</e>"}, {"bos_token": "<s>", "eos_token": "</e>", "unk_token": "<unk>"}),
    ("gpt2", {"bos_token": None}, {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}),
])  # fmt: skip
def test_special_tokens_that_only_the_class_names(family, changes, expected, tmp_path):
    shutil.copytree(FILES / family, tmp_path / family)
    made.write(tmp_path / family, tokenizer_config=changes)
    found = read_special_tokens(tmp_path / family)
    assert expected.items() <= found.items()
    assert not {name for name in changes if changes[name] is None} & found.keys()


@pytest.mark.parametrize("named", ["<user>", {"content": "<user>", "special": False}], ids=str)
def test_a_token_with_a_name_is_special_whatever_the_file_says(named, tmp_path):
    bert(tmp_path, added_tokens={"<user>": 11})
    read_tokenizer(tmp_path).save(str(tmp_path / "tokenizer.json"))
    assert read_tokenizer(tmp_path).decode([5, 11]) == "hello <user>"
    made.write(tmp_path, tokenizer_config={"tokenizer_class": "X", "eos_token": named})
    assert read_tokenizer(tmp_path).decode([5, 11]) == "hello"


def test_ends_that_the_file_does_not_have_are_told(tmp_path, caplog):
    vocabulary = {"<s>": 0, "a": 1}
    stored = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    stored.pre_tokenizer = pre_tokenizers.Whitespace()
    stored.save(str(tmp_path / "tokenizer.json"))
    made.write(tmp_path, tokenizer_config={"bos_token": "<s>", "add_bos_token": True})
    with caplog.at_level("WARNING"):
        assert ids(tmp_path, "a") == [1]
    assert "add_bos_token True" in caplog.text
    caplog.clear()
    made.write(tmp_path, tokenizer_config={"bos_token": "<s>", "add_bos_token": False})
    ids(tmp_path, "a")
    assert not caplog.text


# --- What is refused


@pytest.mark.parametrize("files, message", [
    ({"tokenizer_config": {"tokenizer_class": "BertJapaneseTokenizer"}}, "BertJapaneseTokenizer.*not built"),
    ({"tokenizer_config": {"tokenizer_class": "RobertaTokenizerFast"}}, "RobertaTokenizer.*vocab.json and merges.txt"),
    ({"config": {"tokenizer_class": "BertweetTokenizer"}}, "BertweetTokenizer.*save_pretrained"),
    ({"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"}}, "No tokenizer.*tokenizer.json"),
    ({"tokenizer_config": {"split_special_tokens": True}}, "split_special_tokens True.*not built"),
    ({"tokenizer_config": {"do_basic_tokenize": False}}, "do_basic_tokenize False"),
    ({"tokenizer_config": {"never_split": ["a"]}}, r"never_split \['a'\]"),
    ({"tokenizer_config": {"do_lower_case": "no"}}, "do_lower_case is 'no'.*true or false"),
    ({"tokenizer_config": {"added_tokens_decoder": {"11": {"content": "x", "up": 1}}}}, "'up'.*not known"),
    ({"tokenizer_config": {"added_tokens_decoder": {"13": {"content": "<x>"}}}},
     "tokenizer_config.json gives '<x>' the id 13.* it has 11"),
    ({"added_tokens": {"<x>": 12, "<y>": 13}}, "added_tokens.json gives '<x>' the id 12.*it has 11"),
    ({"added_tokens": {"<x>": "12"}}, "the id of '<x>' is '12'"),
    ({"added_tokens": {"<x>": 11, "<y>": 11}}, "the id of '<y>' is 11"),
    ({"added_tokens": ["<x>"]}, "added_tokens.json is damaged: it holds no JSON object"),
    ({"special_tokens_map": {"cls_token": {"lstrip": True}}}, "a token needs a text"),
])  # fmt: skip
def test_refused(files, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_tokenizer(bert(tmp_path, **files))


def test_damaged_settings(tmp_path):
    (bert(tmp_path) / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is damaged.*again"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("file, name", [
    ("tokenizer.model", "LlamaTokenizer"), ("spiece.model", "T5Tokenizer"),
])  # fmt: skip
def test_models_that_are_not_sentencepiece(file, name, tmp_path):
    made.write(tmp_path, tokenizer_config={"tokenizer_class": name})
    whole = (FILES / "t5" / "spiece.model").read_bytes()
    # Ranks of bytes as in Llama 3's tokenizer.model, an empty file, one that is cut off.
    for content in (b"IQ== 0\nIg== 1\nIw== 2\n", b"", whole[:-3], b"\xff" * 30):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(ValueError, match=f"{file} is no SentencePiece model, or damaged"):
            read_tokenizer(tmp_path)


def test_another_kind_of_sentencepiece_model(tmp_path):
    made.write(tmp_path, config={"model_type": "llama"})
    shutil.copy(FILES / "t5" / "spiece.model", tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match="it has unigrams.*has merges"):
        read_tokenizer(tmp_path)


def test_fields_of_a_sentencepiece_model():
    model = sentencepiece_model.read(FILES / "gemma" / "tokenizer.model")
    assert model.kind == sentencepiece_model.BPE and not model.has_prefix and not model.charsmap
    texts = [piece.text for piece in model.pieces]
    assert texts[:4] == ["<pad>", "<eos>", "<bos>", "<unk>"] and model.unk_id == 3
    assert {p.text for p in model.pieces if p.is_user_defined} == {"<start_of_turn>", "▁▁"}
    assert {p.text for p in model.pieces if p.is_control} == {"<pad>", "<eos>", "<bos>"}


# --- What is exported


@pytest.mark.parametrize("files", [
    {"added_tokens": {"<user>": 20}, "tokenizer_config": {"do_lower_case": False}},
    {"special_tokens_map": {"additional_special_tokens": ["<user>"]}},
])  # fmt: skip
def test_an_export_has_the_same_tokens(files, tmp_path):
    base = made.write(tiny_encoder.checkpoint(tmp_path / "base"), **files)
    loaded = checkpoints.load(base, head="encoder")
    checkpoints.save_hf(tmp_path / "out", loaded.params, loaded.checkpoint, head="encoder")
    text = "Good <user> film"
    assert ids(tmp_path / "out", text) == ids(base, text)
    assert 20 in ids(base, text)


# --- Damaged files


def damage(content, rng):
    """One of four mutations of bytes."""
    place, content = int(rng.integers(len(content))), bytearray(content)
    match int(rng.integers(4)):
        case 0:
            return bytes(content[:place])
        case 1:
            content[place] = int(rng.integers(256))
        case 2:
            del content[place : place + int(rng.integers(1, 20))]
        case _:
            content[place:place] = rng.bytes(8)
    return bytes(content)


@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_damaged_files(family, count, tmp_path):
    """An error that names a file, or a tokenizer that works."""
    shutil.copytree(FILES / family, tmp_path / family)
    files = [p for p in (tmp_path / family).iterdir() if p.name not in ("ids.json", "config.json")]
    rng = np.random.default_rng(0)
    for _ in range(count):
        path = files[int(rng.integers(len(files)))]
        whole = path.read_bytes()
        path.write_bytes(damage(whole, rng))
        try:
            read_tokenizer(tmp_path / family).encode(made.TEXTS[0])
        except ValueError as error:
            assert str(tmp_path / family) in str(error)
        path.write_bytes(whole)
