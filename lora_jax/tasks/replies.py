"""Replies to held-out conversations, without and with a trained adapter."""

import datetime
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lora_jax.data.chat_template import Message
from lora_jax.tasks import chat, instruction_tuning


class Replies(NamedTuple):
    """First replies to conversations, in the same order.

    Attributes:
      prompts: messages of each conversation up to the reply.
      base: replies of the model without the adapter.
      adapted: replies of the model with it.
      left_out: number of conversations in which the assistant answers no user.
    """

    prompts: Sequence[Sequence[Message]]
    base: list[str]
    adapted: list[str]
    left_out: int = 0


def generate(config: ConfigDict, adapter: str | Path) -> Replies:
    """Generates the first reply in each conversation that a run is evaluated on.

    Args:
      config: config of the run.
      adapter: directory of the adapter, in either format.

    Raises:
      FileNotFoundError, ValueError: adapter, base or conversations are missing or damaged.
    """
    _, held_out = instruction_tuning.load_conversations(config)
    cut = [x._replace(messages=cut_before_reply(x.messages), is_learned=()) for x in held_out]
    asked = [conversation for conversation in cut if conversation.messages]
    prompts = [conversation.messages for conversation in asked]
    if not asked:
        return Replies([], [], [], len(cut))
    options: dict[str, Any] = {
        "batch_size": config.replies.batch_size,
        "now": datetime.datetime.fromisoformat(config.data.date),
    }
    models = chat.load_pair(
        adapter,
        model=config.model.name,
        template=config.data.chat_template,
        max_new_tokens=config.replies.max_new_tokens,
    )
    base, adapted = (chat.reply_to_all(model, asked, **options) for model in models)
    return Replies(prompts, base, adapted, len(cut) - len(prompts))


def cut_before_reply(messages: Sequence[Message]) -> list[Message]:
    """Returns the messages before the assistant's first answer to a user; none if there is none.

    >>> cut_before_reply([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
    [{'role': 'user', 'content': '?'}]
    >>> cut_before_reply([{"role": "assistant", "content": "Hello!"}])
    []
    """
    roles = [message["role"] for message in messages]
    answers = [k for k, x in enumerate(roles) if x == "assistant" and "user" in roles[:k]]
    return list(messages[: answers[0]]) if answers else []


def count_matches(pattern: str, replies: Sequence[str]) -> int:
    """Counts the replies that a regular expression describes as a whole.

    >>> count_matches("Yes|No", ["Yes", "Yes, it is.", "No"])
    2
    """
    return sum(re.fullmatch(pattern, reply) is not None for reply in replies)
