"""Tokenizers and chat templates of GGUF files, and the programs on such files."""

import json

import jax
import numpy as np
import pytest
from tokenizers import pre_tokenizers

import lora_jax as lora
from lora_jax import paths
from lora_jax.data import chat_template
from lora_jax.models import checkpoints, gguf_splits, gguf_tokenizer
from lora_jax.quantized import is_quantized
from lora_jax.tasks import chat, instruction_tuning, language_model
from tests.helpers import gguf_checkpoints, gguf_files, gguf_tokens, programs, tiny_llama
from tests.helpers.gguf_tokens import TEXTS

pytestmark = pytest.mark.xdist_group("instruct")


def read(tmp_path, words, arch="llama"):
    path = tmp_path / "m.gguf"
    about = {k: x for k, x in ({"general.architecture": arch} | words).items() if x is not None}
    path.write_bytes(gguf_files.content(about, {}))
    return gguf_tokenizer.read_tokenizer(path)


def ids(made, text, **options):
    return made.encode(text, **options).ids


# Merges of bytes.


@pytest.mark.parametrize("pre, before", [
    ("gpt-2", None), ("smollm", pre_tokenizers.Digits(individual_digits=True)),
])  # fmt: skip
def test_merges_of_bytes(pre, before, tmp_path):
    """The tokenizer that the file was made of."""
    theirs = gguf_tokens.bpe(before)
    ours = read(tmp_path, gguf_tokens.words(theirs, pre))
    for text in TEXTS:
        assert ids(ours, text) == ids(theirs, text)
        assert ours.decode(ids(ours, text)) == theirs.decode(ids(theirs, text))
    assert ours.get_vocab() == theirs.get_vocab()
    special = {x.content for x in ours.get_added_tokens_decoder().values() if x.special}
    assert special == set(gguf_tokens.SPECIAL)


SPLIT = {
    "gpt-2": "It|'s|Ġa|Ġtest|:|Ġ12345|Ġ|ĠOK|?!|ĊĊ|Ċ|next",
    "smollm": "It|'s|Ġa|Ġtest|:|Ġ|1|2|3|4|5|Ġ|ĠOK|?!|ĊĊ|Ċ|next",
    "llama-bpe": "It|'s|Ġa|Ġtest|:|Ġ|123|45|Ġ|ĠOK|?!ĊĊĊ|next",
    "qwen2": "It|'s|Ġa|Ġtest|:|Ġ|1|2|3|4|5|Ġ|ĠOK|?!ĊĊĊ|next",
    "tekken": "It|'s|Ġa|Ġtest|:|Ġ|1|2|3|4|5|Ġ|ĠOK|?!ĊĊĊ|next",
}


@pytest.mark.parametrize("pre", list(SPLIT))
def test_how_texts_are_split(pre):
    made = gguf_splits.SPLITS[pre].make()
    found = made.pre_tokenize_str("It's a test: 12345  OK?!\n\n\nnext")
    assert "|".join(word for word, _ in found) == SPLIT[pre]


def test_cases_of_words():
    word = lambda pre, text: [w for w, _ in gguf_splits.SPLITS[pre].make().pre_tokenize_str(text)]
    assert word("tekken", "camelCase/ab") == ["camel", "Case", "/ab"]
    assert word("qwen2", "camelCase/ab'LL") == ["camelCase", "/ab", "'LL"]


def test_a_token_that_no_merges_make(tmp_path):
    """With Llama 3's way a word that is a token is one."""
    words = gguf_tokens.words(gguf_tokens.bpe())
    words["tokenizer.ggml.tokens"].append("Ġunheard")
    words["tokenizer.ggml.token_type"] = np.append(words["tokenizer.ggml.token_type"], 1).astype(
        "<i4"
    )
    number = len(words["tokenizer.ggml.tokens"]) - 1
    assert number not in ids(read(tmp_path, words), " unheard")
    assert ids(read(tmp_path, words | {"tokenizer.ggml.pre": "llama-bpe"}), " unheard") == [
        1,
        number,
    ]


@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({}, [[], []]),
        ({"tokenizer.ggml.add_bos_token": True}, [[1], []]),
        ({"tokenizer.ggml.add_eos_token": True}, [[], [4]]),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, [[1], [4]]),
        ({"tokenizer.ggml.pre": "llama-bpe"}, [[1], []]),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, [[], []]),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}, [[], []]),
    ],
)
def test_ends_of_texts(changes, wanted, tmp_path):
    ours = read(tmp_path, gguf_tokens.words(gguf_tokens.bpe()) | changes)
    inner = ids(ours, "red", add_special_tokens=False)
    assert ids(ours, "red") == [*wanted[0], *inner, *wanted[1]]
    pair = ours.encode("red", "red")
    assert pair.ids == ids(ours, "red") * 2
    assert pair.type_ids == [0] * (len(pair.ids) // 2) + [1] * (len(pair.ids) // 2)


# Pieces with scores.


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_with_scores(prefix, tmp_path):
    about = gguf_tokens.pieces()
    ours = read(tmp_path, about if prefix else about | {"tokenizer.ggml.add_space_prefix": False})
    for text in TEXTS:
        if "<" in text or not text:
            continue
        marked = text.replace(" ", "▁")
        if prefix and not marked.startswith("▁"):
            marked = "▁" + marked
        assert ids(ours, text) == [1, *gguf_tokens.best_first(marked, about)], text
        decoded = ours.decode(ids(ours, text))
        assert decoded == (text.removeprefix(" ") if prefix else text)


def test_pieces_of_gemma(tmp_path):
    """In the order of the file, whatever the scores; runs of spaces stand for themselves there."""
    about = gguf_tokens.pieces(gemma=True)
    ours = read(tmp_path, about | {"tokenizer.ggml.scores": None}, arch="gemma2")
    ordered = about | {"tokenizer.ggml.scores": -np.arange(len(about["tokenizer.ggml.tokens"]))}
    for text in TEXTS:
        if "<" not in text:
            marked = text.replace(" ", "▁")
            assert ids(ours, text) == [1, *gguf_tokens.best_first(marked, ordered)], text
            assert ours.decode(ids(ours, text)) == text


def test_tokens_of_users_are_whole(tmp_path):
    about = gguf_tokens.pieces()
    ours, number = read(tmp_path, about), about["tokenizer.ggml.tokens"].index("<think>")
    assert number in ids(ours, "a<think>b")
    assert ours.decode([number]) == "<think>"
    assert {x.content: x.special for x in ours.get_added_tokens_decoder().values()} == {
        "<unk>": True, "<s>": True, "</s>": True, "<think>": False,
    }  # fmt: skip


# What is refused.

G = "tokenizer.ggml."


@pytest.mark.parametrize(
    "changes, says",
    [
        ({f"{G}model": "t5"}, "tokenizer.ggml.model is 't5'; built here are gpt2 and llama"),
        ({f"{G}model": None}, "tokenizer.ggml.model is None"),
        ({f"{G}pre": "gpt-4o"}, "pre, which says how .* is 'gpt-4o'; built here are gpt-2, smollm"),
        ({f"{G}pre": None}, "is None; built here"),
        ({f"{G}tokens": None}, "has no tokenizer.ggml.tokens"),
        ({f"{G}tokens": np.arange(9, dtype="<i4")}, "has no tokenizer.ggml.tokens"),
        ({f"{G}merges": None}, "no tokenizer.ggml.merges"),
        ({f"{G}merges": ["a"]}, "can't be built"),
        ({f"{G}merges": ["no pe"]}, "can't be built"),
        ({f"{G}token_type": np.ones(3, "<i4")}, "token_type must have a number for each of"),
        ({f"{G}bos_token_id": 10_000}, "bos_token_id is 10000, which is no token"),
        ({f"{G}eos_token_id": "x"}, "eos_token_id is 'x', which is no token"),
    ],
)
def test_tokenizers_that_are_refused(changes, says, tmp_path):
    with pytest.raises(ValueError, match=f"m.gguf.*{says}"):
        read(tmp_path, gguf_tokens.words(gguf_tokens.bpe()) | changes)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({f"{G}scores": None}, "there is no tokenizer.ggml.scores"),
        ({f"{G}scores": np.ones(3, "<f4")}, "scores must have a number for each of"),
        ({f"{G}tokens": ["a", "b", "a"]}, "the token 'a' is there twice|scores must have"),
    ],
)
def test_pieces_that_are_refused(changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        read(tmp_path, gguf_tokens.pieces() | changes)


def test_a_gemma_that_begins_texts_with_a_space_is_refused(tmp_path):
    with pytest.raises(ValueError, match="add_space_prefix is true, and Gemma adds no space"):
        words = gguf_tokens.pieces(gemma=True) | {f"{G}add_space_prefix": True}
        read(tmp_path, words, arch="gemma2")


def test_a_token_that_is_a_book(tmp_path):
    about = gguf_tokens.pieces()
    tokens = about[f"{G}tokens"]
    tokens[-2] = "x" * 100_000
    with pytest.raises(ValueError, match="a token has 100000 characters; at most 512 are read"):
        read(tmp_path, about)


# Programs.


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same model in Hugging Face's files and in one of GGUF."""
    root = tmp_path_factory.mktemp("both")
    made = gguf_tokens.bpe()
    size = made.get_vocab_size()
    changes = {"vocab_size": size, "max_position_embeddings": 128, "num_hidden_layers": 1}
    words = gguf_tokens.words(made)
    folder, path = gguf_checkpoints.make(root, "llama", changes=changes, words=words)
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    settings = {"chat_template": tiny_llama.CHATML, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    about = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 4}
    (folder / "config.json").write_text(json.dumps(about))
    return folder, path


def test_chat_templates(both, tmp_path):
    folder, path = both
    theirs, ours = (chat_template.find(checkpoints.resolve(x)) for x in both)
    assert (ours.source, ours.tokens, ours.origin) == (theirs.source, theirs.tokens, path)
    talk = [tiny_llama.question("red"), tiny_llama.answer("red")]
    assert chat_template.render(ours, talk).text == chat_template.render(theirs, talk).text
    _, silent = gguf_checkpoints.make(tmp_path, "llama")
    with pytest.raises(ValueError, match="m.gguf has no chat template: .* tokenizer.chat_template"):
        chat_template.find(checkpoints.resolve(silent))
    _, odd = gguf_checkpoints.make(tmp_path, "llama", words={"tokenizer.chat_template": 7})
    with pytest.raises(ValueError, match="m.gguf: tokenizer.chat_template is 7, not a text"):
        chat_template.find(checkpoints.resolve(odd))


def test_both_reply_alike(both):
    speakers = [chat.load(None, model=str(path), max_new_tokens=12) for path in both]
    assert speakers[0].decoding == speakers[1].decoding
    said = [chat.reply(speaker, [tiny_llama.question("dog")]) for speaker in speakers]
    assert said[0] == said[1] != ""


def test_what_is_exported_is_whole(both, tmp_path):
    _, path = both
    loaded = checkpoints.load(path, head="causal-lm")
    checkpoints.save_hf(tmp_path, loaded.params, loaded.checkpoint, head="causal-lm")
    again = checkpoints.load(tmp_path, head="causal-lm")
    assert again.model.config == loaded.model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    for text in TEXTS:
        made = [checkpoints.load_tokenizer(x.checkpoint) for x in (loaded, again)]
        assert ids(made[0], text) == ids(made[1], text)
    ours, theirs = (chat_template.find(x.checkpoint) for x in (loaded, again))
    assert ours[:2] == theirs[:2]


def test_a_classifier_is_refused(both):
    with pytest.raises(ValueError, match="of type 'llama', which has no head 'classifier' here"):
        checkpoints.load(both[1], head="classifier")


@pytest.mark.slow
def test_programs(both, tmp_path):
    """Training on rows that are the same, and talking to the result."""
    tiny_llama.data(tmp_path / "data.jsonl", 24)
    changes = {"epochs": 1, "data.max_length": 64, "data.holdout": 4}
    rows = []
    for model in both:
        config = tiny_llama.config(tmp_path, **changes, **{"model.name": model})
        task, _ = instruction_tuning.make_task(config)
        rows.append(list(task.eval_batches()))
    jax.tree.map(np.testing.assert_array_equal, *rows)
    # From here on over 4-bit codes.
    words = gguf_tokens.words(gguf_tokens.bpe())
    path = gguf_files.convert(both[0], tmp_path / "q.gguf", "Q4_1", words=words)
    fields = tiny_llama.overrides(tmp_path) | changes | {"model.name": path}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    workdir = tmp_path / "run"
    programs.succeed(
        "instruct", "--config=configs/instruct_llama.py", f"--workdir={workdir}", *flags
    )
    adapter = f"--adapter={workdir / 'adapter'}"
    said = [
        programs.succeed("chat", f"--{option}", "--max_new_tokens=3", "what is two?").strip()
        for option in (adapter.removeprefix("--"), f"model={path}")
    ]
    assert all(said)
    programs.succeed("export", adapter, f"--out={tmp_path / 'merged'}", "--merged")
    merged = checkpoints.load(tmp_path / "merged", head="causal-lm")
    assert merged.fresh == () and merged.checkpoint.config["torch_dtype"] == "float32"
    found = language_model.load(workdir / "adapter")
    leaves = paths.named_leaves(found.loaded.params).values()
    assert sum(map(is_quantized, leaves)) == 7  # of the stack
    wanted = lora.merge(found.loaded.params, found.adapter)["params"]["lm_head"]["kernel"]
    np.testing.assert_array_equal(merged.params["params"]["lm_head"]["kernel"], wanted)
