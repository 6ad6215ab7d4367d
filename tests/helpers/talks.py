"""A conversation, templates that render it, and files of such rows."""

import datetime
import json

NOW = datetime.datetime(2024, 7, 26)

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is red?"},
    {"role": "assistant", "content": "a colour"},
    {"role": "user", "content": "what is two?"},
    {"role": "assistant", "content": "a number"},
]

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} </s>{% endif %}{% endfor %}"
)

# Thoughts stay in the last turn only, as Qwen 3 has it.
THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}!"
    "{% endgeneration %}\n{% else %}Q: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Go on: {% endif %}"
)


def rows(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path
