"""Rows and files of conversations as people have them: each key is used, or refused by its name."""

import json

import pytest

from lora_jax.data import conversation_files, conversations
from lora_jax.data.chat_template import ChatTemplate
from tests.helpers import chat_families, talks, tiny_llama
from tests.helpers.chat_families import TOOLS, call, say

Q, A = say("user", "what is red?"), say("assistant", "a colour")
GOOD = {"messages": [Q, A]}


def read(tmp_path, *rows, **options):
    return conversations.read(talks.rows(tmp_path / "rows.jsonl", *rows), **options)


@pytest.mark.parametrize("row, expected", [
    (GOOD, [Q, A]),
    ({"messages": [Q, A], "system": "be brief"}, [say("system", "be brief"), Q, A]),
    ({"messages": [Q, A], "system": "", "id": None}, [Q, A]),
    ({"messages": json.dumps([Q, A])}, [Q, A]),
    ({"conversations": [{"from": "system", "value": "be brief"}, {"from": "human", "value": Q["content"]}, {"from": "gpt", "value": "a colour"}]},
     [say("system", "be brief"), Q, A]),
    ({"conversations": [Q, A]}, [Q, A]),
    ({"conversations": [{"from": "human", "value": "?"}, {"from": "function_call", "value": '{"name": "weigh", "arguments": {"x": 1}}'},
                        {"from": "observation", "value": "7"}, {"from": "gpt", "value": "It is 7"}]},
     [say("user", "?"), say("assistant", "", tool_calls=call(x=1)), say("tool", "7"), say("assistant", "It is 7")]),
    ({"instruction": "what is red?", "input": "", "output": "a colour"}, [Q, A]),
    ({"instruction": "what is red?", "output": "a colour"}, [Q, A]),
    ({"instruction": "what is", "input": "red?", "output": "a colour", "system": "be brief"},
     [say("system", "be brief"), say("user", "what is\nred?"), A]),
    ({"instruction": "b", "input": "", "output": "c", "history": [["what is red?", "a colour"]]}, [Q, A, say("user", "b"), say("assistant", "c")]),
    ({"prompt": "what is red?", "completion": "a colour"}, [Q, A]),
    ({"prompt": [Q], "completion": [A]}, [Q, A]),
])  # fmt: skip
def test_formats_are_found_by_their_keys(row, expected, tmp_path):
    (found,) = read(tmp_path, row)
    assert found.messages == expected
    assert found.is_learned == tuple(m["role"] == "assistant" for m in expected)


def test_only_the_completion_of_a_prompt_is_learned(tmp_path):
    (found,) = read(tmp_path, {"prompt": [Q, A, Q], "completion": [A]})
    assert found.is_learned == (False, False, False, True)


@pytest.mark.parametrize("row, message", [
    ({"text": "x"}, "messages: messages; sharegpt: conversations; alpaca: instruction, output; .*it has 'text'"),
    ({}, "it has no keys"),
    (GOOD | {"id": 3, "source": "x"}, "'id', 'source' is not read; .*data.ignore"),
    (GOOD | {"functions": []}, "'functions' is not read"),
    (GOOD | {"prompt": "a", "completion": "b"}, "fits messages and prompt_completion; set data.format"),
    (GOOD | {"system": 3}, "system is 3"),
    ({"messages": [say("system", "a"), Q, A], "system": "b"}, "system is a second system message"),
    (GOOD | {"tools": "x"}, "tools is a text that is no JSON"),
    (GOOD | {"tools": {"a": 1}}, "tools must be a list of objects"),
    (GOOD | {"chat_template_kwargs": {"messages": []}}, "can't set 'messages'"),
    (GOOD | {"chat_template_kwargs": [1]}, "must be an object"),
    ({"messages": "x"}, "messages is a text that is no JSON"),
    ({"conversations": []}, "a list that is not empty"),
    ({"conversations": [{"from": "cat", "value": "x"}]}, "message 0: from is 'cat'; there are human"),
    ({"conversations": [{"from": "human", "value": 3}]}, "message 0: content is 3"),
    ({"conversations": [{"from": "human", "content": "x"}]}, "message 0 has from or value, and also content"),
    ({"conversations": [{"from": "function_call", "value": "x"}]}, "message 0: the value of a function_call is a text that is no JSON"),
    ({"instruction": 1, "output": "a"}, "instruction is 1"),
    ({"instruction": "a", "output": "a", "history": [["a"]]}, "history must be a list of pairs"),
    ({"instruction": "a", "output": ["a"]}, "message 1: part 0 of the content is 'a'"),
    ({"prompt": "a", "completion": [A]}, "two texts, or two lists"),
    ({"prompt": [A], "completion": [Q]}, "as their weights say"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "it has 'prompt', 'chosen', 'rejected'"),
])  # fmt: skip
def test_rows_that_are_refused(row, message, tmp_path):
    with pytest.raises(ValueError, match=rf"rows.jsonl:2: .*{message}"):
        read(tmp_path, GOOD, row)


def test_a_format_and_keys_to_leave_out_can_be_named(tmp_path):
    both = GOOD | {"prompt": "a", "completion": "b", "id": 7}
    (found,) = read(tmp_path, both, format="messages", ignore=("prompt", "completion", "id"))
    assert found.messages == [Q, A]
    (found,) = read(tmp_path, both, format="prompt_completion", ignore=("messages", "id"))
    assert found.messages == [say("user", "a"), say("assistant", "b")]
    with pytest.raises(
        ValueError, match="rows.jsonl:1: instruction and output is missing; it has no"
    ):
        read(tmp_path, {}, format="alpaca")


@pytest.mark.parametrize("message, learned", [
    (say("assistant", "x", weight=0), False), (say("assistant", "x", weight=1), True),
    (say("assistant", "x", weight=1.0), True), (say("assistant", "x", train=False), False),
    (say("assistant", "x", train=True, weight=1), True), (say("assistant", "x", loss=False), False),
    (say("user", "x", weight=0, train=False), False), (say("tool", "x", loss=0), False),
])  # fmt: skip
def test_keys_that_say_what_is_learned(message, learned, tmp_path):
    (found,) = read(tmp_path, {"messages": [Q, A, message]})
    assert found.is_learned == (False, True, learned)
    assert found.messages[2] == say(message["role"], "x")


@pytest.mark.parametrize("message, problem", [
    (say("user", "x", train=True), "train asks to learn what the role 'user' says"),
    (say("assistant", "x", weight=0.5), "weight is 0.5, and must be 0 or 1"),
    (say("assistant", "x", loss="no"), "loss is 'no'"),
    (say("assistant", "x", train=True, weight=0), "weight and train contradict each other"),
    (say("assistant", "x", train_detail=[]), "'train_detail' is not read; the keys are role, content"),
    (say("assistant", None), "content is missing"),
    (say("assistant", "x", function_call={}), "'function_call' is not read"),
    (say("user", [{"type": "image_url", "image_url": "x"}]), "part 0 of the content is 'image_url'; only texts"),
    (say("user", [{"type": "text", "text": 3}]), "part 0 of the content: text is 3"),
    (say("user", [{"type": "text", "text": "a", "cache": 1}]), "'cache' is not read"),
    (say("user", []), r"content is \[\]"),
    (say("user", "a", tool_calls=call(x=1)), "tool_calls are for messages of the role 'assistant'"),
    (say("assistant", "a", tool_calls="x"), "tool_calls must be a list"),
    (say("assistant", "a", tool_calls=["x"]), "a call in tool_calls must be an object"),
    (say("assistant", "a", tool_calls=[{"function": "x"}]), "the function of a call is 'x'"),
    (say("assistant", "a", tool_calls=[{"function": {}}]), "the name of a call is missing"),
    (say("assistant", "a", tool_calls=[{"function": {"name": "f", "arguments": "{x"}}]), "arguments of a call is '{x'"),
    (say("user", "a", name=3), "name is 3"),
    (say("user", "a", reasoning="x"), "reasoning is for messages of the role 'assistant'"),
    (say("assistant", "a", reasoning="x", thinking="x"), "thinking and reasoning are one thing"),
    (say("", "a"), "role is ''"),
])  # fmt: skip
def test_messages_that_are_refused(message, problem, tmp_path):
    with pytest.raises(ValueError, match=rf"rows.jsonl:1: message 2: .*{problem}"):
        read(tmp_path, {"messages": [Q, A, message]})


def test_a_row_of_which_nothing_is_learned_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="rows.jsonl:1: no message of the assistant is to be learned"
    ):
        read(tmp_path, {"messages": [Q, A | {"weight": 0}]})


def test_calls_may_have_their_arguments_as_text_and_no_content(tmp_path):
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "weigh", "arguments": '{"x": 1}'}}
    ]
    row = {
        "messages": [
            Q,
            {"role": "assistant", "content": None, "tool_calls": calls, "refusal": None},
            say("tool", "7", tool_call_id="c1"),
            A,
        ]
    }
    (found,) = read(tmp_path, row)
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == '{"x": 1}'
    assert "content" not in found.messages[1]


# ---- Files ---------------------------------------------------------------------------------------


def places(path, **options):
    return [talk.place.removeprefix(str(path)) for talk in conversations.read(path, **options)]


@pytest.mark.parametrize("text, lines", [
    (json.dumps([GOOD, GOOD]), [":1", ":1"]),
    ("[\n" + json.dumps(GOOD) + ",\n\n" + json.dumps(GOOD) + "\n]\n", [":2", ":4"]),
    (json.dumps(GOOD, indent=2), [":1"]),
    ("\ufeff" + json.dumps(GOOD) + "\r\n\r\n" + json.dumps(GOOD), [":1", ":3"]),
    ("\n \n" + json.dumps(GOOD), [":3"]),
    (json.dumps({"messages": [Q, say("assistant", "a\u2028b")]}, ensure_ascii=False), [":1"]),
])  # fmt: skip
def test_json_of_every_layout(text, lines, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    assert places(path) == lines


@pytest.mark.parametrize("text, message", [
    ("[]", "no row"),
    ("[\n" + json.dumps(GOOD) + "\n" + json.dumps(GOOD) + "]", ":3: the array that the file is goes on with"),
    ("[\n" + json.dumps(GOOD) + ",\n]", ":3: no JSON in the array"),
    ("[\n" + json.dumps(GOOD), ":2: the array that the file is"),
    ("[" + json.dumps(GOOD) + "]\n[" + json.dumps(GOOD) + "]", ":1: the array that the file is goes on"),
    ("[3,\n4]", ":1: no object with keys and values, but 3\n.*:2: no object"),
    ('{"messages": [], "messages": []}', ":1: .*the key 'messages' occurs twice"),
    ('{"messages": NaN}', ":1: .*NaN is no JSON"),
    ('{"messages": 1e999}', ":1: .*1e999 is too large"),
    ("[" * 100_000, "nested too deeply"),
    ('{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}", ":1: .*nested too deeply"),
    ('{"messages": ' + "9" * 5000 + "}", ":1: no JSON object"),
])  # fmt: skip
def test_json_that_is_refused(text, message, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="(?s)data.json.*" + message):
        conversations.read(path)


@pytest.mark.parametrize("text", [
    'prompt,completion\nwhat is red?,a colour\n\n"what is\nred?","a ""colour"""\n',
    "prompt;completion\r\nwhat is red?;a colour\r\n\r\n\"what is\nred?\";\"a \"\"colour\"\"\"\r\n",
    'prompt\tcompletion\nwhat is red?\ta colour\n\n"what is\nred?"\t"a ""colour"""\n',
], ids=["comma", "semicolon", "tab"])  # fmt: skip
def test_tables(text, tmp_path):
    path = tmp_path / "data.csv"
    path.write_text(text, encoding="utf-8", newline="")
    found = conversations.read(path)
    assert [talk.messages for talk in found] == [
        [Q, A], [say("user", "what is\nred?"), say("assistant", 'a "colour"')],
    ]  # fmt: skip
    assert places(path) == [":2", ":4"]
    path = path.rename(tmp_path / "data.TSV")
    assert (places(path) == [":2", ":4"]) if "\t" in text else True


@pytest.mark.parametrize("text, message", [
    ("prompt,completion\n", "no row"),
    ("prompt,completion\na\n", ":2: 1 cells, where the header has 2"),
    ("prompt,prompt\na,b\n", ":1: each column must have a name of its own"),
    ("prompt,\na,b\n", ":1: each column must have a name"),
    ('prompt,completion\na,"b\n', ":2: no table"),
    ("prompt,completion\na,\n", ":2: .*it has 'prompt'"),
    ("question,answer\na,b\n", ":2: .*it has 'question', 'answer'"),
])  # fmt: skip
def test_tables_that_are_refused(text, message, tmp_path):
    path = tmp_path / "data.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="data.csv" + message if message[0] == ":" else message):
        conversations.read(path)


def test_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {"messages": [Q, A | {"weight": 0}, A], "tools": json.dumps(TOOLS)},
        {"messages": [say("system", "be brief"), Q, A], "tools": None},
    ]
    path = tmp_path / "data.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    first, second = conversations.read(path)
    assert first.messages == [Q, A, A] and first.is_learned == (False, False, True)
    assert first.tools == TOOLS and second.tools is None
    assert second.place == f"{path}: row 2"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="data.parquet can't be read as Parquet"):
        conversations.read(path)


@pytest.mark.parity
def test_data_sets_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "files").mkdir()
    path = talks.rows(tmp_path / "files" / "train.jsonl", GOOD, GOOD)
    options = {"data_files": {"train": str(path)}, "cache_dir": str(tmp_path / "cache")}
    made = datasets.load_dataset("json", **options)
    made["train"].save_to_disk(tmp_path / "one")
    made.save_to_disk(tmp_path / "splits")
    for name in ("one", "splits", "files"):
        assert places(tmp_path / name) == [": row 1", ": row 2"]
        assert places(f"datasets:{tmp_path / name}") == [": row 1", ": row 2"]


class _Library:
    """Stands for ``datasets``, which needs no network here."""

    def __init__(self, **splits):
        self.splits = splits

    def load_dataset(self, name, config):
        if name != "someone/talks":
            raise FileNotFoundError(f"no {name}")
        return {split: _Split(rows, config) for split, rows in self.splits.items()}


class _Split:
    def __init__(self, rows, config):
        self.rows, self.config = rows, config

    def to_list(self):
        return [row | ({"system": self.config} if self.config else {}) for row in self.rows]


def test_names_of_data_sets(monkeypatch):
    library = _Library(train=[GOOD, GOOD], test=[GOOD])
    monkeypatch.setattr(conversation_files, "_import", lambda *_: library)
    assert len(conversations.read("datasets:someone/talks")) == 2
    (found,) = conversations.read("datasets:someone/talks@english:test")
    assert found.messages[0] == say("system", "english")
    with pytest.raises(ValueError, match="no split 'dev'; there are train, test"):
        conversations.read("datasets:someone/talks:dev")
    with pytest.raises(
        ValueError, match="datasets:another can't be read with datasets: no another"
    ):
        conversations.read("datasets:another")


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    missing = lambda name: (_ for _ in ()).throw(ModuleNotFoundError(f"No module named {name!r}"))
    monkeypatch.setattr(conversation_files.importlib, "import_module", missing)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        ValueError, match=r"needs the package pyarrow: pip install 'lora_jax\[data\]'"
    ):
        conversations.read(tmp_path / "data.parquet")
    for source in (tmp_path, "datasets:someone/talks"):
        with pytest.raises(ValueError, match="needs the package datasets"):
            conversations.read(source)


@pytest.mark.parametrize("data, message", [
    (b"\x1f\x8b123", "gzip archive, which is not read; unpack it"), (b"PK\x03\x04", "ZIP archive"),
    ('{"messages": []}'.encode("utf-16"), "UTF-16, which is not read; convert it to UTF-8"),
    (b"{}\n\xff", "data.jsonl:2: not UTF-8 at byte 3"), (b"", "empty file"), (b" \n", "empty file"),
])  # fmt: skip
def test_files_of_other_kinds(data, message, tmp_path):
    (tmp_path / "data.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        conversations.read(tmp_path / "data.jsonl")


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="write datasets:someone/talks"):
        conversations.read("someone/talks")
    with pytest.raises(FileNotFoundError):
        conversations.read(tmp_path / "data.jsonl")


# ---- What a template writes of it ----------------------------------------------------------------


def tokenized(tmp_path, row, source):
    template = ChatTemplate(source, {"bos_token": "<s>"}, "here.jinja")
    options = {"max_length": 99, "now": talks.NOW}
    texts, _ = conversations.tokenize(
        read(tmp_path, row), template, tiny_llama.tokenizer(), **options
    )
    return [tiny_llama.WORDS[k] for k in texts.ids], [
        tiny_llama.WORDS[k] for k in texts.ids[texts.counts > 0]
    ]


CHATML = tiny_llama.CHATML
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
WITH_VALUES = "{% if mood %}{{ mood }}{% endif %}" + CHATML


def test_tools_system_and_values_reach_the_template(tmp_path):
    tools = [{"type": "function", "function": {"name": "dog"}}]
    assert "dog" in tokenized(tmp_path, GOOD | {"tools": tools}, WITH_TOOLS)[0]
    assert "dog" in tokenized(tmp_path, GOOD | {"tools": json.dumps(tools)}, WITH_TOOLS)[0]
    assert "horse" in tokenized(tmp_path, GOOD | {"system": "horse"}, CHATML)[0]
    row = GOOD | {"chat_template_kwargs": {"mood": "dog"}}
    assert "dog" in tokenized(tmp_path, row, WITH_VALUES)[0]


def test_weights_say_which_turns_are_learned(tmp_path):
    row = {
        "messages": [
            Q,
            A | {"weight": 0},
            say("user", "what is two?"),
            say("assistant", "a number"),
        ]
    }
    assert tokenized(tmp_path, row, CHATML)[1] == ["a", "number", "<|im_end|>"]
    marked = chat_families.MARKED["chatml"]
    assert tokenized(tmp_path, row, marked)[1] == ["a", "number", "<|im_end|>"]


def test_parts_of_a_content_are_joined_or_handed_over(tmp_path):
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "red?"}]
    row = {
        "messages": [say("user", parts), say("assistant", [{"type": "text", "text": "a colour"}])]
    }
    plain = tokenized(tmp_path, GOOD, CHATML)
    assert tokenized(tmp_path, row, CHATML) == plain
    takes_parts = CHATML.replace(
        "{{ m['content'] }}", "{% for p in m.content %}{{ p.text }} horse {% endfor %}"
    )
    assert tokenized(tmp_path, row, takes_parts)[1] == ["a", "colour", "horse", "<|im_end|>"]
    row["messages"][1]["content"] = [{"type": "text", "text": x} for x in ("a", "colour")]
    expected = ["a", "horse", "colour", "horse", "<|im_end|>"]
    assert tokenized(tmp_path, row, takes_parts)[1] == expected


def test_a_template_may_write_messages_as_json(tmp_path):
    source = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}"
    row = {"messages": [say("user", 'what is\n"red"?'), say("assistant", 'a\n"colour"')]}
    words, learned = tokenized(tmp_path, row, source)
    assert "red" in words and "red" not in learned and "colour" in learned


@pytest.mark.parametrize("row, source, message", [
    (GOOD | {"tools": TOOLS}, CHATML, "does not write tools; leave that out, or give a template .*data.chat_template"),
    (GOOD | {"tools": TOOLS}, "{# tools #}" + CHATML, "does not write tools"),
    (GOOD | {"chat_template_kwargs": {"mood": 1}}, CHATML, "does not write mood"),
    ({"messages": [Q, say("assistant", "", tool_calls=call(x=1)), say("tool", "7"), A]}, CHATML, "message 1: .*does not write tool_calls"),
    ({"messages": [Q, say("assistant", "a", reasoning="x")]}, CHATML, "message 1: .*does not write reasoning"),
    ({"messages": [Q | {"name": "dog"}, A]}, WITH_TOOLS + "{{ x.name }}", "message 0: .*does not write name"),
    ({"messages": [say("asistant", "a"), Q, A]}, CHATML, "message 0: .*has no word of the role 'asistant'"),
    ({"messages": [say("system", "horse"), Q, A]}, talks.LLAMA2, "message 0: .*does not write this message, of the role 'system'"),
    ({"messages": [Q, say("assistant", "a colour", tool_calls=call(x=1))]}, chat_families.PLAIN["llama3.1"],
     "message 1: .*does not write its content beside its tool_calls"),
    (GOOD, chat_families.MARKED["chatml"].replace("== 'assistant'", "== 'nobody'"), "marks nothing of it as generated"),
])  # fmt: skip
def test_what_a_template_does_not_write_is_refused(row, source, message, tmp_path):
    with pytest.raises(ValueError, match="rows.jsonl:1: .*" + message):
        tokenized(tmp_path, row, source)


# As DeepSeek's: a call is written only where there is no content, and its arguments are a text.
TEXTS_OF_CALLS = (
    "{% for m in messages %}{% if m.role == 'assistant' and m['content'] is none %}{% for c in m.tool_calls %}"
    "<A>{{ c['function']['name'] + ' ' + c['function']['arguments'] }}</s>{% endfor %}"
    "{% elif m.role == 'assistant' %}<A>{{ m['content'] + '</s>' }}{% else %}<{{ m.role }}>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A>{% endif %}"
)  # fmt: skip
OBJECTS_OF_CALLS = chat_families.PLAIN["qwen2.5"]


def learn(source, message):
    template = ChatTemplate(source, {}, "here.jinja")
    (row,) = [conversations.Conversation([Q, message, say("tool", "7"), A], "x:1")]
    text, spans = conversations._write(row, template, ["</s>", "<|im_end|>"], talks.NOW)
    return text[slice(*spans[0])]


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}], ids=str)
@pytest.mark.parametrize("arguments", [{"x": "ü"}, '{"x":"ü"}'], ids=["object", "text"])
def test_calls_in_the_form_that_the_template_takes(content, arguments):
    calls = [{"type": "function", "function": {"name": "weigh", "arguments": arguments}}]
    message = {"role": "assistant", **content, "tool_calls": calls}
    written = arguments if isinstance(arguments, str) else '{"x": "ü"}'
    assert learn(TEXTS_OF_CALLS, message) == f"weigh {written}</s>"
    assert '"arguments": {"x": "ü"}}' in learn(OBJECTS_OF_CALLS, message)
    # What would be written as Python has it, or as "None", is handed over in another form.
    plain = CHATML.replace("{{ m['content'] }}", "{{ m.content }}{% for c in m.tool_calls or [] %}"
                           "{{ c.function.name }} {{ c.function.arguments }}{% endfor %}")  # fmt: skip
    assert learn(plain, message) == f"weigh {written}<|im_end|>"


def test_calls_without_a_function_around_them():
    flat = [{"name": "weigh", "arguments": '{"x": 1}'}]
    source = TEXTS_OF_CALLS.replace("c['function']", "c")
    assert learn(source, {"role": "assistant", "tool_calls": flat}) == 'weigh {"x": 1}</s>'


@pytest.mark.parametrize("message, source, problem", [
    (say("assistant", "a", tool_calls=call(x=1)), TEXTS_OF_CALLS, "all of its tool_calls beside its content"),
    ({"role": "assistant", "tool_calls": [*call(x=1), *call(x=2)]}, TEXTS_OF_CALLS.replace("in m.tool_calls", "in m.tool_calls[:1]"),
     "all of its tool_calls;"),
])  # fmt: skip
def test_calls_that_a_template_drops_are_refused(message, source, problem):
    with pytest.raises(ValueError, match=f"message 1: .*does not write {problem}"):
        learn(source, message)


def test_a_template_of_its_own_for_tools():
    template = ChatTemplate(CHATML, {}, "here.jinja", WITH_TOOLS)
    tools = [{"type": "function", "function": {"name": "dog"}}]
    for talk, expected in ((None, False), (tools, True)):
        row = conversations.Conversation([Q, A], "x:1", tools=talk)
        options = {"max_length": 99, "now": talks.NOW}
        texts, _ = conversations.tokenize([row], template, tiny_llama.tokenizer(), **options)
        assert (tiny_llama.WORDS.index("dog") in texts.ids) == expected
