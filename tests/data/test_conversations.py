"""Chat templates, what the assistant says, and files of conversations."""

import json

import numpy as np
import pytest

from lora_jax.data import chat_template, conversations, template_program
from lora_jax.data.chat_template import ChatTemplate
from lora_jax.models import checkpoints
from tests.helpers import talks, tiny_llama

ENDS = ("<|im_end|>", "</s>")


def template(source, **tokens):
    return ChatTemplate(source, {"bos_token": "<s>"} | tokens, "here.jinja")


@pytest.mark.parametrize("source, said", [
    (tiny_llama.CHATML, ["a colour<|im_end|>", "a number<|im_end|>"]),
    (talks.LLAMA2, [" a colour </s>", " a number </s>"]),
    (talks.THOUGHTS, ["a colour<|im_end|>", "<think>\n\n</think>\n\na number<|im_end|>"]),
    (talks.PLAIN, ["a colour\n", "a number\n"]),
    (talks.MARKED, ["a colour!", "a number!"]),
], ids=["chatml", "llama2", "thoughts", "plain", "marked"])  # fmt: skip
def test_what_the_assistant_says(source, said):
    text, spans = conversations.find_assistant_spans(template(source), talks.TALK, ENDS)
    assert [text[begin:end] for begin, end in spans] == said
    assert text == chat_template.render(template(source), talks.TALK).text
    assert not set(text) & set(template_program.RESERVED)


def test_words_that_occur_elsewhere_do_not_mislead():
    talk = [
        {"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "i"},
        {"role": "user", "content": "i"}, {"role": "assistant", "content": ""},
    ]  # fmt: skip
    text, spans = conversations.find_assistant_spans(template(talks.THOUGHTS), talk, ENDS)
    assert [text[begin:end] for begin, end in spans] == [
        "i<|im_end|>",
        "<think>\n\n</think>\n\n<|im_end|>",
    ]


def test_what_a_template_may_use():
    source = (
        "{{ bos_token }}{{ strftime_now('%d %b %Y') }}{{ {'é<': 1} | tojson }}"
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}"
        "{% endfor %}{{ tools is none }}"
    )
    text = chat_template.render(template(source), talks.TALK, now=talks.NOW).text
    assert text == '<s>26 Jul 2024{"é<": 1}systemTrue'


@pytest.mark.parametrize("source, message", [
    ("{{ raise_exception('no system message') }}", "here.jinja fails: no system message"),
    ("{{ messages.append(1) }}", "here.jinja fails"),
    ("{{ messages.__class__.__base__ }}", "here.jinja fails"),
    ("{% if %}", "here.jinja fails"),
    ("{{ messages[0]['content'] + 1 }}", "here.jinja fails"),
])  # fmt: skip
def test_templates_that_fail(source, message):
    with pytest.raises(ValueError, match=message):
        chat_template.render(template(source), talks.TALK)


def test_where_a_template_is_found(tmp_path):
    folder = tiny_llama.checkpoint(tmp_path / "m", template="from the settings")
    find = lambda: chat_template.find(checkpoints.resolve(folder))
    settings = folder / "tokenizer_config.json"
    assert find().source == "from the settings" and find().tokens["eos_token"] == "</s>"
    several = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    settings.write_text(json.dumps({"chat_template": several, "eos_token": {"content": "<e>"}}))
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<b>", "eos_token": "old"}')
    assert find().source == "yes"
    # The map goes before the settings, as in transformers; it has no unk_token, and the class has.
    assert find().tokens == {"bos_token": "<b>", "eos_token": "old", "unk_token": "<unk>"}
    (folder / "chat_template.jinja").write_text("a file of its own")
    assert find().source == "a file of its own" and find().origin.name == "chat_template.jinja"
    (folder / "chat_template.jinja").unlink()
    settings.write_text("{}")
    with pytest.raises(ValueError, match="has no chat template.*chat_template.jinja"):
        find()
    settings.write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is damaged"):
        find()


def test_every_malformed_row_is_named(tmp_path):
    good = {"messages": talks.TALK}
    bad = [
        "{'messages': []}",
        [1],
        {"text": "x"},
        {"messages": []},
        {"messages": ["hi"]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": 3, "content": "x"}]},
        {"messages": talks.TALK[:2]},
        {"messages": [{"role": "assistant", "content": "\ufdd0"}]},
        r'{"messages": [{"role": "assistant", "content": "\ud83d"}]}',
    ]
    path = talks.rows(tmp_path / "rows.jsonl", good, "", *bad, " \t\r")
    with pytest.raises(ValueError) as error:
        conversations.read(path)
    said = str(error.value).splitlines()
    assert [line.partition(": ")[0] for line in said] == [f"{path}:{n}" for n in range(3, 13)]
    expected = [
        "no JSON object", "no object with keys", "it has 'text'", "not empty", "message 0: no object",
        "content is missing", "role is 3", "nothing to learn", "U+FDD0", "U+D83D, half of a character",
    ]  # fmt: skip
    assert all(e in s for e, s in zip(expected, said, strict=True))
    with pytest.raises(ValueError, match="and 5 more"):
        conversations.read(talks.rows(path, *({key: 1} for key in "abcdefghijklmnopqrstuvwxy")))
    with pytest.raises(ValueError) as error:
        conversations.read(talks.rows(path, good, *[good | {"id": 7}] * 3))
    assert str(error.value).startswith(f"{path}:2: 'id' is not read; ")
    assert str(error.value).endswith(f"(the same in 2 more rows, the next: {path}:3)")
    path.write_bytes(b"\n\xff")
    with pytest.raises(ValueError, match="rows.jsonl:2: not UTF-8"):
        conversations.read(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="empty file"):
        conversations.read(path)


def tokenized(path, source=tiny_llama.CHATML, max_length=50):
    made = conversations.read(path)
    return conversations.tokenize(
        made, template(source), tiny_llama.tokenizer(), max_length=max_length, now=talks.NOW
    )


def test_exactly_what_the_assistant_says_counts(tmp_path):
    texts, fit = tokenized(talks.rows(tmp_path / "rows.jsonl", {"messages": talks.TALK[1:]}))
    words = [tiny_llama.WORDS[k] for k in texts.ids]
    assert words == (
        "<|im_start|> user what is red ? <|im_end|> <|im_start|> assistant a colour <|im_end|> "
        "<|im_start|> user what is two ? <|im_end|> <|im_start|> assistant a number <|im_end|>"
    ).split()  # fmt: skip
    learned = [w for w, counts in zip(words, texts.counts, strict=True) if counts]
    assert learned == "a colour <|im_end|> a number <|im_end|>".split()
    assert fit == (0, 0)


def test_long_conversations_are_cut_or_left_out(tmp_path):
    path = talks.rows(
        tmp_path / "rows.jsonl", {"messages": talks.TALK[1:]}, {"messages": talks.TALK}
    )
    texts, fit = tokenized(path, max_length=11)
    assert np.diff(texts.offsets).tolist() == [11] and texts.counts.sum() == 2
    assert fit == (2, 1)  # with the system message, the answer begins after token 11
    with pytest.raises(ValueError, match="max_length 5 leaves no token of the assistant"):
        tokenized(path, max_length=5)


def test_rows_that_the_template_refuses_are_named(tmp_path):
    source = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tiny_llama.CHATML
    )
    path = talks.rows(
        tmp_path / "rows.jsonl", {"messages": talks.TALK[1:]}, {"messages": talks.TALK}
    )
    with pytest.raises(ValueError, match="rows.jsonl:2: the chat template .* fails: no system"):
        tokenized(path, source)
