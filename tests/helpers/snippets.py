"""The Python blocks of the pages of `docs/`, and what stands below them."""

import re

from tests.helpers.places import ROOT


def snippets(text):
    """The Python blocks of a page, each with the text block right below it, which it prints, or ""."""
    return re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", text, flags=re.DOTALL)


def section(page, heading):
    """The text of a section of a page; "" stands for what is above the first."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))[heading]


def run(snippet, space):
    """Runs a block in a name space."""
    exec(compile(snippet, "a block of a page", "exec"), space)
