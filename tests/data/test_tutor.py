"""The embedded conversations: what they promise."""

import itertools
import re

import pytest

from lora_jax.data import conversations, tutor

TALKS = {split: conversations.read(f"tutor:{split}") for split in tutor.SPLITS}


def said(talk, role):
    return [m["content"] for m in talk.messages if m["role"] == role]


def words(talk):
    return frozenset(re.findall(r"\w+", " ".join(m["content"] for m in talk.messages).lower()))


def test_counts():
    assert {split: len(talks) for split, talks in TALKS.items()} == {"train": 100, "validation": 50}
    for talk in itertools.chain(*TALKS.values()):
        roles = [m["role"] for m in talk.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
    longer = sum(len(talk.messages) > 2 for talks in TALKS.values() for talk in talks)
    assert longer == 15


@pytest.mark.parametrize("split", list(tutor.SPLITS))
def test_every_reply_has_the_form_and_is_short(split):
    for reply in itertools.chain(*(said(talk, "assistant") for talk in TALKS[split])):
        assert re.fullmatch(tutor.PATTERN, reply), reply
        parts = [line.partition(": ")[2] for line in reply.split("\n")]
        assert all(re.fullmatch(r"[^a-z\s].*[.!?]", part) for part in parts), reply
        assert all(len(part.split()) <= 22 for part in parts)
        assert "  " not in reply and not re.search(r"\s\n|\s$", reply)


@pytest.mark.parametrize(
    "reply",
    [
        "It is 56.",
        "Answer: It is 56.",
        "Answer: It is 56.\nWhy: So.\nTry: Go.\nMore",
        "Answer: It is 56.\nWhy: \nTry: Go.",
        "Answer: It is 56. Why: So. Try: Go.",
        "Sure!\nAnswer: It is 56.\nWhy: So.\nTry: Go.",
    ],
)
def test_other_forms_do_not_match(reply):
    assert not re.fullmatch(tutor.PATTERN, reply)


def test_no_question_twice_and_none_alike_across_the_splits():
    train, validation = TALKS.values()
    questions = [
        " ".join(re.findall(r"\w+", text.lower()))
        for talk in (*train, *validation)
        for text in said(talk, "user")[:1]
    ]
    assert len(set(questions)) == 150
    for one, other in itertools.product(train, validation):
        both = len(words(one) & words(other)) / len(words(one) | words(other))
        assert both < 0.5, (one, other)


def test_a_file_that_does_not_come_along():
    with pytest.raises(ValueError, match="no 'tutor:test'; the embedded files are tutor:train, "):
        conversations.read("tutor:test")
