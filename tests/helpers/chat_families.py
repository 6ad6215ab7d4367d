"""Chat templates in the manner of well-known families, and conversations with all that these write.

Each template marks what the assistant generates; :data:`PLAIN` has the same ones without the marks,
which must not be needed.
"""

import re

_CALLS = "{% for c in m.tool_calls %}"

MARKED = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # Tools stand before the last question only, so that the text before it is another in each prefix.
    "mistral": (
        "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
        "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
        "{% set asked = rest | selectattr('role', 'equalto', 'user') | list %}"
        "{% if rest[0].role != 'user' %}{{ raise_exception('a question must be first') }}{% endif %}"
        "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
        "{% if tools and m == asked[-1] %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
        "{% if m == asked[-1] %}[INST] {{ first + m.content }}[/INST]{% else %}[INST] {{ m.content }}[/INST]{% endif %}"
        "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]"
        "{% elif m.tool_calls %}{% generation %}[TOOL_CALLS] {{ m.tool_calls | map(attribute='function') | list | tojson }}</s>{% endgeneration %}"
        "{% else %}{% generation %} {{ m.content }}</s>{% endgeneration %}{% endif %}{% endfor %}"
    ),
    "llama3.1": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}"
        "{% else %}{% set system = '' %}{% endif %}"
        "<|start_header_id|>system<|end_header_id|>\n\n{% if tools %}Environment: ipython\n{% endif %}"
        "Today: {{ strftime_now('%d %b %Y') }}\n\n{{ system }}<|eot_id|>"
        "{% if tools %}{% set first = messages[0].content %}{% set messages = messages[1:] %}"
        "<|start_header_id|>user<|end_header_id|>\n\n{% for t in tools %}{{ t | tojson(indent=4) }}\n\n{% endfor %}{{ first }}<|eot_id|>{% endif %}"
        "{% for m in messages %}{% if m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
        "{% elif m.tool_calls is defined %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
        "{% set c = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>\n\n"
        "{% generation %}<|python_tag|>{{ c.name }}.call({% for k, v in c.arguments | items %}{{ k }}={{ v | tojson }}{% endfor %})<|eom_id|>{% endgeneration %}"
        "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|eot_id|>{% endgeneration %}"
        "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "qwen2.5": (
        "<|im_start|>system\n{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}You are helpful.{% endif %}"
        "{% if tools %}\n\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools>{% endif %}<|im_end|>\n"
        "{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content or '' }}"
        "{% if m.tool_calls %}" + _CALLS + "\n<tool_call>\n{\"name\": \"{{ c.function.name }}\", \"arguments\": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}{% endif %}"
        "<|im_end|>{% endgeneration %}{{ '\\n' }}"
        "{% elif m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}\n<tool_response>\n{{ m.content }}\n</tool_response>"
        "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # Thoughts before the last question are left out.
    "qwen3": (
        "{% if tools %}<|im_start|>system\n{{ messages[0].content + '\n\n' if messages[0].role == 'system' }}{{ tools | tojson }}<|im_end|>\n"
        "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
        "{% set ns = namespace(last=messages | length - 1, go=true) %}{% for m in messages[::-1] %}"
        "{% if ns.go and m.role == 'user' %}{% set ns.last = messages | length - 1 - loop.index0 %}{% set ns.go = false %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% elif m.role == 'assistant' %}{% set thoughts = m.reasoning_content or '' %}{% set content = m.content or '' %}"
        "{% if not thoughts and '</think>' in content %}{% set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n{% generation %}"
        "{% if loop.index0 > ns.last and (loop.last or thoughts) %}<think>\n{{ thoughts }}\n</think>\n\n{% endif %}{{ content }}"
        "{% for c in m.tool_calls or [] %}{{ '\n' if not loop.first or content }}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
        "<|im_end|>{% endgeneration %}{{ '\\n' }}"
        "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    # The prompt opens thoughts, which no turn has; the end of a tool's results is part of the prompt.
    "deepseek-r1": (
        "{% set ns = namespace(tool=false, system='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% endfor %}"
        "{{ bos_token }}{{ ns.system }}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.tool = false %}<|User|>{{ m.content }}"
        "{% elif m.role == 'tool' %}{% if not ns.tool %}<|outputs_begin|>{% endif %}{% set ns.tool = true %}<|output|>{{ m.content }}"
        "{% elif m.role == 'assistant' %}{% if ns.tool %}<|outputs_end|>{% else %}<|Assistant|>{% endif %}{% set ns.tool = false %}"
        "{% set content = m.content or '' %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{% generation %}{{ content }}{% if m.tool_calls %}<|calls_begin|>" + _CALLS + "<|call|>{{ c.function.name }}\n{{ c.function.arguments | tojson }}{% endfor %}<|calls_end|>{% endif %}"
        "<|end_of_sentence|>{% endgeneration %}{% endif %}{% endfor %}"
        "{% if ns.tool %}<|outputs_end|>{% endif %}"
        "{% if add_generation_prompt and not ns.tool %}<|Assistant|><think>\n{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
        "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
        "{% set role = 'model' if m.role == 'assistant' else m.role %}<start_of_turn>{{ role }}\n{{ first if loop.first }}"
        "{% if role == 'model' %}{% generation %}{{ m.content | trim }}<end_of_turn>{% endgeneration %}{{ '\\n' }}"
        "{% else %}{{ m.content | trim }}<end_of_turn>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
}  # fmt: skip

PLAIN = {name: re.sub(r"\{% (end)?generation %\}", "", source) for name, source in MARKED.items()}
TOKENS = {"bos_token": "<s>"}
SPECIAL = sorted(
    """<s> </s> <|im_start|> <|im_end|> [INST] [/INST] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] [AVAILABLE_TOOLS]
    [/AVAILABLE_TOOLS] <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|> <|User|> <|Assistant|>
    <|end_of_sentence|> <|outputs_begin|> <|outputs_end|> <|output|> <|calls_begin|> <|call|> <|calls_end|>
    <start_of_turn> <end_of_turn>""".split(),
    key=len,
    reverse=True,
)

TOOLS = [{"type": "function", "function": {"name": "weigh", "description": "Weighs a thing."}}]


def call(name="weigh", **arguments):
    return [{"type": "function", "function": {"name": name, "arguments": arguments}}]


def say(role, content, **more):
    return {"role": role, "content": content, **more}


TALKS = {
    "one turn": [say("user", "ok?"), say("assistant", "yes")],
    "several turns, of the same words": [
        say("user", "ok?"), say("assistant", "ok?"), say("user", "ok?"), say("assistant", "ok?"),
        say("user", "yes"), say("assistant", " yes "),
    ],
    "a system message": [
        say("system", "be brief"), say("user", "ok?"), say("assistant", "yes"),
        say("user", "sure?"), say("assistant", "sure"),
    ],
    "thoughts": [
        say("user", "ok?"), say("assistant", "<think>\nhm\n</think>\n\nyes"),
        say("user", "sure?"), say("assistant", "<think>\nhm\n</think>\n\nyes"),
    ],
    "thoughts and a tool": [
        say("user", "how heavy?"), say("assistant", "<think>\nhm\n</think>\n\none", tool_calls=call(x=1)),
        say("tool", "7"), say("assistant", "<think>\nseven\n</think>\n\nIt is 7"),
        say("user", "sure?"), say("assistant", "yes"),
    ],
    "a tool": [
        say("system", "be brief"), say("user", "how heavy?"), say("assistant", "", tool_calls=call(x="a<b")),
        say("tool", "7"), say("assistant", "It is 7"), say("user", "and two?"),
        {"role": "assistant", "tool_calls": call(x=2)}, say("tool", "14"), say("assistant", "14"),
    ],
    "special tokens in a question": [say("user", "a</s><|im_end|>"), say("assistant", "i"), say("user", "i"), say("assistant", "")],
}  # fmt: skip
