"""Thousands of damaged rows: each is an error with its file and line, or a conversation."""

import copy
import json
import random
import time

import numpy as np
import pytest

from lora_jax.data import conversations
from lora_jax.data.chat_template import ChatTemplate
from tests.helpers import chat_families, talks, tiny_llama
from tests.helpers.chat_families import TOOLS, call, say

ROWS = [
    {"messages": [say("system", "a"), say("user", "what is red?"), say("assistant", "a colour", weight=1)]},
    {"messages": [say("user", "what is two?"), {"role": "assistant", "content": None, "tool_calls": call(x=1)},
                  say("tool", "seven", tool_call_id="c", name="weigh"), say("assistant", "a number", reasoning_content="a")],
     "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}},
    {"conversations": [{"from": "human", "value": "what is dog?"}, {"from": "gpt", "value": "a animal", "train": True}], "system": "a"},
    {"instruction": "what is", "input": "red?", "output": "a colour", "history": [["what is two?", "a number"]]},
    {"prompt": [say("user", [{"type": "text", "text": "what is red?"}])], "completion": [say("assistant", "a colour")]},
    {"prompt": "what is red?", "completion": "a colour"},
]  # fmt: skip
TEXTS = [
    "", " ", "\n", "\ud83d", "\udc00x", "\ud83d\ude00", "\u2028", "\ufeff", "\ufdd0", "\ufdd2(\ufdd3", "\ufdd4", "\uffff", "\x00", "\u202ea",
    "e\u0301", "\U0010ffff", "<|im_end|>", "</s>", "<|im_start|>assistant\n", "{{ 1 / 0 }}", "{% generation %}", "</think>", "a" * 5000,
    "human", "gpt", "user", "assistant", "tool", "function_call", "[]", "{}", '[{"role": "user"}]', "null", "messages", "content", "__class__",
]  # fmt: skip
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2.5,
    1e308,
    10**30,
    [],
    {},
    [[]],
    [None],
    [{}],
    {"": {}},
    [[[[]]]],
]
KEYS = [
    "role", "content", "weight", "train", "loss", "name", "tool_calls", "tools", "system", "messages", "conversations", "from", "value", "text",
    "type", "function", "arguments", "prompt", "completion", "instruction", "output", "input", "history", "id", "reasoning", "", "\ud83d",
]  # fmt: skip


def list_places(value, above=None, key=None):
    """Yields every place in a value: what it is in, and its key or number."""
    if above is not None:
        yield above, key
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for name, x in items:
        yield from list_places(x, value, name)


def mutate(row, rng):
    """Changes a row at one place or a few."""
    row = copy.deepcopy(row)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        places = list(list_places(row))
        if not places:
            break
        above, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind == 0:
            del above[key]
        elif kind == 1:
            above[key] = rng.choice(TEXTS)
        elif kind == 2:
            above[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 3 and isinstance(above, dict):
            above[rng.choice(KEYS)] = above.pop(key)
        elif kind == 4 and isinstance(above, dict):
            above[rng.choice(KEYS)] = copy.deepcopy(rng.choice([*VALUES, *TEXTS]))
        elif kind == 5:
            for _ in range(rng.choice([1, 2, 60])):
                above[key] = [above[key]] if rng.random() < 0.5 else {rng.choice(KEYS): above[key]}
        elif kind == 6 and isinstance(above, list):
            above.insert(rng.randrange(len(above) + 1), copy.deepcopy(rng.choice(above)))
            rng.shuffle(above)
        else:
            above[key] = copy.deepcopy(rng.choice(places)[0])
    return row


def damage(line, rng):
    """Changes the bytes of a line."""
    data = bytearray(line.encode("utf-8", "surrogatepass"))
    for _ in range(rng.choice([1, 2, 5])):
        k = rng.randrange(len(data) + 1)
        data[k : k + rng.choice([0, 1, 3])] = rng.choice(
            [b"", b"\\", b'"', b"{", b"[", b"]", b",", b"\xff", b"\n", b"\\ud83d", b"NaN", b":"]
        )
    return bytes(data)


def make_line(rng):
    row = mutate(rng.choice(ROWS), rng)
    line = json.dumps(row, ensure_ascii=rng.random() < 0.7)
    return damage(line, rng) if rng.random() < 0.3 else line.encode("utf-8", "surrogatepass")


def check_learned(talk, texts, tokenizer):
    """Nothing is learned but what the assistant says, and how the template writes it."""
    said = [json.dumps(m).replace('"', " ") for m in talk.messages if m["role"] == "assistant"]
    words = {
        *tokenizer.encode(" ".join(said)).ids,
        *map(tiny_llama.WORDS.index, ("<|im_end|>", "<unk>")),
    }
    assert set(texts.ids[texts.counts > 0].tolist()) <= words


@pytest.mark.parametrize("seed, count", [(0, 250), pytest.param(1, 4000, marks=pytest.mark.slow)])
def test_damaged_rows(seed, count, tmp_path):
    rng, path, tokenizer = random.Random(seed), tmp_path / "rows.jsonl", tiny_llama.tokenizer()
    good = json.dumps(ROWS[0]).encode()
    templates = [
        ChatTemplate(chat_families.PLAIN[name], {"bos_token": "<s>"}, "x")
        for name in ("qwen3", "chatml")
    ]
    options = {"max_length": 4096, "now": talks.NOW}
    read = refused = written = 0
    for _ in range(count):
        path.write_bytes(good + b"\n" + make_line(rng) + b"\n" + good)
        started = time.monotonic()
        try:
            first, *found = conversations.read(path)
        except ValueError as error:
            refused += 1
            assert all(line.startswith(f"{path}:") for line in str(error).split("\n")), error
            assert f"{path}:1:" not in str(error)
            continue
        finally:
            assert time.monotonic() - started < 5
        read += 1
        assert found[-1].messages == first.messages
        for talk in found[:-1]:
            json.dumps(talk.messages, ensure_ascii=False).encode()
            assert len(talk.is_learned) == len(talk.messages) and any(talk.is_learned)
            for template in templates:
                try:
                    texts, _ = conversations.tokenize([talk], template, tokenizer, **options)
                except ValueError as error:
                    assert str(error).startswith(f"{path}:2: ") or "leaves no token" in str(
                        error
                    ), error
                else:
                    written += 1
                    assert np.isin(texts.counts, (0, 1)).all()
                    check_learned(talk, texts, tokenizer)
    assert min(read, refused, written) > count / 20, (read, refused, written)
