"""Chat templates as transformers renders them, live."""

import datetime

import numpy as np
import pytest

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")


import tokenizers  # noqa: E402
from tokenizers import models, pre_tokenizers  # noqa: E402

from lora_jax.data import assistant_spans, chat_template, conversations  # noqa: E402
from lora_jax.models import checkpoints, tokenizer  # noqa: E402
from tests.helpers import chat_families, talks, tiny_llama  # noqa: E402
from tests.helpers.chat_families import call, say  # noqa: E402
from tests.helpers.places import GOLDENS  # noqa: E402

SOURCES = {name: getattr(talks, name) for name in ("LLAMA2", "THOUGHTS", "PLAIN", "MARKED")} | {
    "CHATML": tiny_llama.CHATML
}


@pytest.mark.parametrize("name", list(SOURCES))
@pytest.mark.parametrize("prompt", [False, True])
def test_the_same_text(name, prompt, tmp_path):
    folder = tiny_llama.checkpoint(tmp_path / "model", template=SOURCES[name])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = chat_template.find(checkpoints.resolve(folder))
    talk = talks.TALK[: 4 if prompt else 5]
    text = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
    assert chat_template.render(ours, talk, prompt=prompt).text == text


def test_the_same_tokens_of_the_assistant(tmp_path):
    folder = tiny_llama.checkpoint(tmp_path / "model", template=talks.MARKED)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(
        talks.TALK, return_assistant_tokens_mask=True, return_dict=True
    )
    path = talks.rows(tmp_path / "rows.jsonl", {"messages": talks.TALK})
    checkpoint = checkpoints.resolve(folder)
    texts, _ = conversations.tokenize(
        conversations.read(path), chat_template.find(checkpoint), tiny_llama.tokenizer(),
        max_length=99, now=talks.NOW,
    )  # fmt: skip
    np.testing.assert_array_equal(texts.ids, theirs["input_ids"])
    np.testing.assert_array_equal(texts.counts, theirs["assistant_masks"])


def byte_tokenizer(template):
    """A token for each byte and each special token, as transformers and as tokenizers has it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({byte: k for k, byte in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(chat_families.SPECIAL)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")
    theirs.chat_template = template
    return made, theirs


@pytest.mark.parametrize("tools", [None, chat_families.TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("talk", list(chat_families.TALKS))
@pytest.mark.parametrize("family", list(chat_families.MARKED))
def test_the_same_tokens_of_the_assistant_in_each_family(family, talk, tools):
    messages = chat_families.TALKS[talk]
    tokenizer, theirs = byte_tokenizer(chat_families.MARKED[family])
    expected = theirs.apply_chat_template(
        messages, tools=tools, return_assistant_tokens_mask=True, return_dict=True
    )
    for source in (chat_families.MARKED[family], chat_families.PLAIN[family]):
        template = chat_template.ChatTemplate(source, chat_families.TOKENS, "here.jinja")
        now = datetime.datetime.now()
        written, turns = assistant_spans.find_turns(
            template, messages, chat_families.SPECIAL, tools=tools, now=now
        )
        spans = [(turn.begin, turn.end) for turn in turns]
        ids, counts = conversations._encode(tokenizer, written.text, spans)
        np.testing.assert_array_equal(ids, expected["input_ids"])
        np.testing.assert_array_equal(counts, expected["assistant_masks"])


@pytest.mark.parametrize("family", list(chat_families.MARKED))
def test_the_same_mask_of_a_row(family, tmp_path):
    """From the file on: a row with tools and parts, as it is read."""
    tokenizer, theirs = byte_tokenizer(chat_families.MARKED[family])
    calls = [say("assistant", "", tool_calls=call(x=1)), say("tool", "7")]
    middle = calls if "tool_calls" in chat_families.MARKED[family] else []
    messages = [say("user", "a ü ✓?"), *middle, say("assistant", "Straße 7")]
    tools = chat_families.TOOLS if "tools" in chat_families.MARKED[family] else None
    expected = theirs.apply_chat_template(
        messages, tools=tools, return_assistant_tokens_mask=True, return_dict=True
    )
    row = {"messages": messages} | ({"tools": tools} if tools else {})
    template = chat_template.ChatTemplate(
        chat_families.PLAIN[family], chat_families.TOKENS, "here.jinja"
    )
    texts, _ = conversations.tokenize(
        conversations.read(talks.rows(tmp_path / "rows.jsonl", row)), template, tokenizer,
        max_length=9999, now=datetime.datetime.now(),
    )  # fmt: skip
    np.testing.assert_array_equal(texts.ids, expected["input_ids"])
    np.testing.assert_array_equal(texts.counts, expected["assistant_masks"])


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_the_same_thoughts(key):
    messages = [say("user", "ok?"), say("assistant", "yes", **{key: "hm"})]
    _, theirs = byte_tokenizer(chat_families.PLAIN["qwen3"])
    template = chat_template.ChatTemplate(theirs.chat_template, chat_families.TOKENS, "x")
    for values in ({}, {"enable_thinking": False}):
        text = theirs.apply_chat_template(messages, tokenize=False, **values)
        assert chat_template.render(template, messages, values=values).text == text


@pytest.mark.parametrize("content", [None, "a"])
def test_the_same_text_of_calls_with_arguments_as_text(content):
    """As DeepSeek's template takes them, and as OpenAI's rows have them."""
    source = (
        "{% for m in messages %}{% if m['role'] == 'assistant' and m['tool_calls'] and m['content'] is none %}<A>"
        "{% for c in m['tool_calls'] %}{{ c['function']['name'] + c['function']['arguments'] }}{% endfor %}</s>"
        "{% elif m['role'] == 'assistant' and m['tool_calls'] %}<A>{{ m['content'] }}{% for c in m['tool_calls'] %}"
        "{{ c['function']['name'] + c['function']['arguments'] }}{% endfor %}</s>"
        "{% else %}<{{ m['role'] }}>{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}"
    )  # fmt: skip
    calls = [{"type": "function", "function": {"name": "weigh", "arguments": '{"x":1}'}}]
    messages = [say("user", "ok?"), say("assistant", content, tool_calls=calls), say("tool", "7")]
    _, theirs = byte_tokenizer(source)
    row = conversations.Conversation(messages, "x:1")
    template = chat_template.ChatTemplate(source, chat_families.TOKENS, "x")
    text, _ = conversations._write(row, template, chat_families.SPECIAL, talks.NOW)
    assert text == theirs.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("family", ["gemma", "gpt2", "llama", "qwen2"])
def test_the_same_special_tokens(family):
    folder = GOLDENS / "tokenizers" / family
    theirs = transformers.AutoTokenizer.from_pretrained(folder).special_tokens_map
    expected = {name: text for name, text in theirs.items() if isinstance(text, str)}
    assert tokenizer.read_special_tokens(folder) == expected
