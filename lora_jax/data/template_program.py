"""Runs chat templates, and tells which part of a text each message was written to.

A template is a program in Jinja that others wrote. It runs in Jinja's sandbox, with the functions
that transformers provides. To follow it, every loop over messages is made to write marks: where it
begins, which message it has come to, and where it ends. The marks are noncharacters of Unicode, and
are removed from the text.
"""

import collections
import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2 import ext, nodes, parser, sandbox

Message = Mapping[str, Any]
Span = tuple[int, int]

# What the assistant generates, by the template's own {% generation %}.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
# Around the number of a message, or "(" and ")" for the begin and the end of a loop.
_LEFT, _RIGHT = "\ufdd2", "\ufdd3"
PROBE = "\ufdd4"  # content of a message that no message has
RESERVED = (OPEN, CLOSE, _LEFT, _RIGHT, PROBE)

_MARK = re.compile(f"({OPEN}|{CLOSE}|{_LEFT}[^{_RIGHT}]*{_RIGHT})")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Traced(NamedTuple):
    """A text, and the parts of it that messages were written to.

    Attributes:
      text: the text, without marks.
      generated: begin and end of each part that the template marks as generated; None if the
        template marks none.
      parts: begin and end of the part of each message, by its number, in characters. Messages that
        were written to no part of their own, or to several, are missing.
    """

    text: str
    generated: list[Span] | None
    parts: dict[int, Span]


class _Numbered(dict):
    """A message that knows its number in the conversation."""

    def __init__(self, message: Message, number: int):
        super().__init__(message)
        self.number = number


def marks_generation(source: str) -> bool:
    """Returns whether a template says itself what the assistant generates.

    >>> marks_generation("{%- generation -%}{{ content }}{% endgeneration %}")
    True
    """
    return _GENERATION.search(source) is not None


def run(source: str, messages: Sequence[Message], now: datetime.datetime, **values: Any) -> Traced:
    """Writes messages by a template, as transformers does.

    Args:
      source: text of the template.
      messages: messages, in which what is None is left out.
      now: time that the template takes for the present.
      **values: further values that the template may use.

    Raises:
      Exception: any that the template raises.
    """
    return _read_marks(source, _render(_compile(source), messages, now, values))


def trace(
    source: str, messages: Sequence[Message], now: datetime.datetime, **values: Any
) -> Traced:
    """Does what :func:`run` does, and finds the part of each message.

    The template runs with marks in it. A template that looks at what its own loops have written may
    then write another text: compare it with that of :func:`run`.
    """
    numbered = [_Numbered(message, k) for k, message in enumerate(messages)]
    return _read_marks(source, _render(_compile(source, traced=True), numbered, now, values))


def _render(
    template: jinja2.Template,
    messages: Sequence[Message],
    now: datetime.datetime,
    values: Mapping[str, Any],
) -> str:
    return template.render(**values, messages=list(messages), strftime_now=now.strftime)


def _read_marks(source: str, marked: str) -> Traced:
    """Removes the marks from a text, and returns their places."""
    texts, generated, opened, length = [], [], 0, 0
    pieces: list[tuple[str, int, int]] = []  # marks, or "" for a text, with begin and end of it
    for k, piece in enumerate(_MARK.split(marked)):
        if k % 2 == 0:  # what stands between marks
            texts.append(piece)
            pieces.append(("", length, length + len(piece)))
            length += len(piece)
        elif piece == OPEN:
            opened = length
        elif piece == CLOSE:
            generated.append((opened, length))
        else:
            pieces.append((piece[1:-1], length, length))
    spans = [(begin, end) for begin, end in generated if begin < end]
    return Traced("".join(texts), spans if marks_generation(source) else None, _find_parts(pieces))


def _find_parts(pieces: Iterable[tuple[str, int, int]]) -> dict[int, Span]:
    """Finds the part of each message by following the loops, of which the innermost counts."""
    loops: list[int | None] = [None]  # the message that each loop has come to
    spans: list[tuple[int | None, int, int]] = []
    for mark, begin, end in pieces:
        if mark == "(":
            loops.append(loops[-1])
        elif mark == ")":
            loops.pop()
        elif mark and loops:
            loops[-1] = int(mark)
        if not loops:
            return {}  # the template has cut off what a loop of its own had written
        if begin < end and spans and spans[-1][0] == loops[-1]:
            spans[-1] = (loops[-1], spans[-1][1], end)
        elif begin < end:
            spans.append((loops[-1], begin, end))
    if len(loops) > 1:
        return {}
    counts = collections.Counter(owner for owner, _, _ in spans)
    return {k: (begin, end) for k, begin, end in spans if k is not None and counts[k] == 1}


class _Generation(ext.Extension):
    """The block ``{% generation %}...{% endgeneration %}``, which the assistant generates."""

    tags = {"generation"}

    def parse(self, parser: parser.Parser) -> nodes.Node:
        """Parses the block into a call that marks it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, **options: Any) -> str:
    # The filter of Jinja escapes characters that mean something in HTML.
    settings: dict[str, Any] = {"ensure_ascii": False} | options
    return json.dumps(value, **settings)


@functools.lru_cache(maxsize=64)
def _compile(source: str, *, traced: bool = False) -> jinja2.Template:
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    if not traced:
        return environment.from_string(source)
    environment.globals |= {"_mark_begin": _mark_begin, "_mark_end": _mark_end}
    environment.globals["_mark_message"] = _mark_message
    tree = environment.parse(source)
    _mark_loops(tree)
    code = environment.compile(tree)
    return jinja2.Template.from_code(environment, code, environment.make_globals(None))


def _mark_loops(node: nodes.Node) -> None:
    """Puts marks before, into and after every loop below a node of the syntax tree."""
    for field in node.fields:
        value = getattr(node, field)
        if not isinstance(value, list):
            continue
        for child in value:
            if isinstance(child, nodes.Node):
                _mark_loops(child)
        setattr(node, field, [x for child in value for x in _mark_loop(child)])
    for _, child in node.iter_fields():
        if isinstance(child, nodes.Node):
            _mark_loops(child)


def _mark_loop(node: Any) -> Iterator[Any]:
    """Yields a loop with its marks, or the node as it is."""
    if not isinstance(node, nodes.For) or not isinstance(node.target, nodes.Name):
        yield node
        return
    target = nodes.Name(node.target.name, "load")
    node.body.insert(0, _call("_mark_message", target, node.lineno))
    yield _call("_mark_begin", node.iter, node.lineno)
    yield node
    yield _call("_mark_end", node.iter, node.lineno)


def _call(name: str, argument: Any, line: int) -> nodes.Node:
    call = nodes.Call(nodes.Name(name, "load"), [argument], [], None, None)
    output = nodes.Output([call])
    for node in (output, call, call.node):
        node.set_lineno(line)
    return output


def _mark_begin(items: Any) -> str:
    return f"{_LEFT}({_RIGHT}" if _has_messages(items) else ""


def _mark_end(items: Any) -> str:
    return f"{_LEFT}){_RIGHT}" if _has_messages(items) else ""


def _mark_message(item: Any) -> str:
    return f"{_LEFT}{item.number}{_RIGHT}" if isinstance(item, _Numbered) else ""


def _has_messages(items: Any) -> bool:
    # An expression such as `messages | select(...)` makes a new iterator for each mark.
    if not isinstance(items, list | tuple | Iterator):
        return False
    return any(isinstance(item, _Numbered) for item in items)
