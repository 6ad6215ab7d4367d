"""What is learned of a conversation: the assistant's turns, and nothing that others say."""

import pytest

from lora_jax.data import assistant_spans, chat_template, template_program
from lora_jax.data.chat_template import ChatTemplate
from tests.helpers import chat_families, talks
from tests.helpers.chat_families import TALKS, TOOLS, call, say

ENDS = ("<|im_end|>", "<|im_start|>", "</s>")
QWEN3 = chat_families.PLAIN["qwen3"]


def turns(source, talk, special=chat_families.SPECIAL, **options):
    template = ChatTemplate(source, chat_families.TOKENS, "here.jinja")
    written, found = assistant_spans.find_turns(template, talk, special, now=talks.NOW, **options)
    plain = chat_template.render(template, talk, now=talks.NOW, **options).text
    assert written.text == plain
    return plain, found


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("talk", list(TALKS))
@pytest.mark.parametrize("family", list(chat_families.MARKED))
def test_turns_are_found_as_the_marks_say(family, talk, tools):
    marked = turns(chat_families.MARKED[family], TALKS[talk], tools=tools)
    found = turns(chat_families.PLAIN[family], TALKS[talk], tools=tools)
    assert found == marked
    said = [k for k, m in enumerate(TALKS[talk]) if m["role"] == "assistant"]
    assert [turn.message for turn in found[1]] == said


def said(source, talk, special=ENDS, **options):
    text, found = turns(source, talk, special, **options)
    return [text[turn.begin : turn.end] for turn in found]


ASKED = [say("user", "ok?"), say("assistant", "yes"), say("user", "sure?"), say("assistant", "no")]
LOOP = "{% for m in messages %}"


@pytest.mark.parametrize("source, expected", [
    # The number of messages stands in front, so that no prefix of the text is that of a prefix.
    ("{{ messages | length }}" + LOOP + "{{ m.content }};{% endfor %}", ["yes;", "no;"]),
    ("{{ bos_token }}" + LOOP + "{{ m.role }}: {{ m.content }}{% endfor %}"
     "{% if add_generation_prompt %}assistant: {% else %}</s>{% endif %}", ["yes", "no</s>"]),
    # The end of a turn stands where the next message begins.
    (LOOP + "{{ '</s>' if m.role == 'user' and not loop.first }}[{{ m.content }}]{% endfor %}", ["[yes]</s>", "[no]"]),
    (LOOP + "[{{ m.content }}]{% endfor %}{{ '\n</s>' if not add_generation_prompt }}", ["[yes]", "[no]\n</s>"]),
    # Loops that go another way.
    ("{% for k in range(messages | length) %}{{ messages[k].content }};{% endfor %}", ["yes;", "no;"]),
    ("{% macro put(m) %}<{{ m.role }}>{{ m.content }}</s>{% endmacro %}" + LOOP + "{{ put(m) }}{% endfor %}"
     "{% if add_generation_prompt %}<assistant>{% endif %}", ["yes</s>", "no</s>"]),
    ("{% set all %}" + LOOP + " {{ m.content }};\n{% endfor %}{% endset %}{{ all | trim }}", ["\n yes;", "\n no;"]),
    (LOOP + "{% for n in messages %}{% if n is sameas m %}{{ n.content }};{% endif %}{% endfor %}{% endfor %}", ["yes;", "no;"]),
    (LOOP + "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }};{% if loop.last %}{% break %}{% endif %}"
     "{% endfor %}", ["yes;", "no;"]),
    ("{% for m in messages if m.content %}{{ m.content }};{% else %}none{% endfor %}", ["yes;", "no;"]),
    ("{% for m in messages | selectattr('content') %}{{ m.content }};{% endfor %}", ["yes;", "no;"]),
    # What ends a question stands in it only where something follows.
    (LOOP + "[{{ m.content }}{{ ']' if not loop.last }}{% endfor %}", ["[yes]", "[no"]),
    # The prompt opens thoughts that no turn has.
    (LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
     "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}", ["yes<|im_end|>", "no<|im_end|>"]),
])  # fmt: skip
def test_templates_of_every_construction(source, expected):
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    written, found = assistant_spans.find_turns(
        ChatTemplate(source, tokens, "x"), ASKED, ENDS, now=talks.NOW
    )
    assert [written.text[turn.begin : turn.end] for turn in found] == expected


@pytest.mark.parametrize("source, message", [
    (LOOP + "{{ 'A' if m.role == 'assistant' else 'Q' }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}Go on: {% endif %}",
     "message 1: the prompt for it is written differently.*generation"),
    # Answers are written where their questions are.
    ("{% for m in messages if m.role == 'user' %}{{ loop.length }}{{ m.content }}{% set k = 2 * loop.index %}{% if k <= messages | length %}{{ messages[k - 1].content }}{% endif %}{% endfor %}",
     "message 1: the prompt for it is written differently"),
    # A sum of what is written, and an end, which stand in each prompt, too.
    ("{% set all %}" + LOOP + "{{ m.content }};{% endfor %}{% endset %}{{ all }}{{ all | length }}",
     "message 1: the prompt for it is written differently"),
    (LOOP + "[{{ m.content }}]{% endfor %}</s>", "message 1: the prompt for it is written differently"),
    ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "message 1: .*written"),
    # A question is written into the answer before it.
    (LOOP + "{% if m.role == 'assistant' or loop.first %}{{ m.content }};{{ messages[loop.index].content if m.role == 'assistant' and not loop.last }}{% endif %}{% endfor %}",
     "message 2: it is written into a turn of the assistant's.*generation"),
    # Answers before questions.
    ("{% for m in messages[::-1] %}{{ m.role }}{{ m.content }}{% endfor %}{{ raise_exception('x') if messages | length < 4 }}",
     "message 1: the prompt for it can't be written .*x"),
    (LOOP + "{% if m.role == 'user' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}",
     "written for no message of the assistant's|marks"),
])  # fmt: skip
def test_templates_that_hide_the_turns_are_refused(source, message):
    talk = [*ASKED, say("user", "well?")]
    with pytest.raises(ValueError, match=message):
        said(source, talk)


def test_a_turn_whose_thoughts_are_left_out_is_not_looked_for_further_on():
    talk = [say("user", "ok?"), say("assistant", "<think>\nhm\n</think>\n\nyes"),
            say("user", "<think>\nhm\n</think>\n\nyes<|im_end|>"), say("assistant", "no")]  # fmt: skip
    assert said(QWEN3, talk) == ["yes<|im_end|>", "<think>\n\n</think>\n\nno<|im_end|>"]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_of_their_own(key):
    talk = [say("user", "ok?"), say("assistant", "yes", **{key: "hm"})]
    assert said(QWEN3, talk) == ["<think>\nhm\n</think>\n\nyes<|im_end|>"]


def test_values_for_the_template_move_the_prompt():
    talk = [say("user", "ok?"), say("assistant", "yes")]
    options = {"values": {"enable_thinking": False}}
    assert said(QWEN3, talk, **options) == ["yes<|im_end|>"]


@pytest.mark.parametrize("family", ["chatml", "qwen2.5", "qwen3", "gemma", "deepseek-r1"])
def test_the_assistant_begins(family):
    talk = [say("assistant", "hello"), *ASKED]
    marked = turns(chat_families.MARKED[family], talk)
    assert turns(chat_families.PLAIN[family], talk) == marked
    assert len(marked[1]) == 3


def test_two_turns_in_a_row():
    talk = [say("user", "ok?"), say("assistant", "yes"), say("assistant", "no")]
    for family in ("chatml", "qwen2.5", "gemma"):
        assert turns(chat_families.PLAIN[family], talk) == turns(chat_families.MARKED[family], talk)


def test_several_calls_at_once():
    talk = [say("user", "ok?"), {"role": "assistant", "tool_calls": [*call(x=1), *call(x=2)]},
            say("tool", "1"), say("tool", "2"), say("assistant", "3")]  # fmt: skip
    for family in ("mistral", "qwen2.5", "qwen3", "deepseek-r1"):
        assert turns(chat_families.PLAIN[family], talk) == turns(chat_families.MARKED[family], talk)
    with pytest.raises(ValueError, match="here.jinja fails: one call at a time"):
        turns(chat_families.PLAIN["llama3.1"], talk)


def test_marks_that_stand_for_part_of_a_turn_or_for_nothing():
    source = LOOP + ("{% if m.role == 'assistant' %}{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}"
                     "{% else %}{{ m.content }}{% endif %}{% else %}{{ m.content }}{% endif %};{% endfor %}")  # fmt: skip
    assert said(source, ASKED) == ["no"]
    assert said(source, [*ASKED, say("user", "ok?")]) == []


def test_no_mark_stays():
    for family, source in chat_families.PLAIN.items():
        text, _ = turns(source, TALKS["a tool"], tools=TOOLS)
        assert not set(text) & set(template_program.RESERVED), family
