"""The parts of an HTML page that needs no other file, and reads well on a telephone."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 1rem 0.3rem 0; text-align: left; border-bottom: 1px solid #ddd;
         vertical-align: top; white-space: nowrap; }
th { border-bottom: 2px solid #888; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1rem; margin: 1rem 0; }
dt { color: #555; } dd { margin: 0; min-width: 0; }
img { max-width: min(100%, 44rem); height: auto; } figure { margin: 0; }
figcaption, .note { color: #555; font-size: 0.9rem; }
pre { overflow-x: auto; background: #f5f5f5; padding: 0.7rem; font-size: 0.85rem; }
details { margin: 1rem 0; } summary { cursor: pointer; color: #06c; } a { color: #06c; }
@media (max-width: 40rem) { body { margin: 1rem auto; } h1 { font-size: 1.35rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 0.5rem; } }
"""


class Link(NamedTuple):
    """A cell of a table that leads to another page."""

    text: str
    target: str


class Picture(NamedTuple):
    """A figure as a PNG.

    Attributes:
      name: name of the file, without its suffix.
      title: title above the figure.
      caption: sentences below the figure.
      png: content of the file.
    """

    name: str
    title: str
    caption: str
    png: bytes


def make_page(title: str, parts: Iterable[str]) -> str:
    """Writes a page; the title is text, the parts are HTML."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
{"".join(parts)}</body>
</html>
"""


def heading(text: str) -> str:
    """Writes the heading of a section."""
    return f"<h2>{html.escape(text)}</h2>\n"


def paragraph(text: str, *, is_note: bool = False) -> str:
    """Writes a paragraph."""
    kind = ' class="note"' if is_note else ""
    return f"<p{kind}>{html.escape(text)}</p>\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str | Link]]) -> str:
    """Writes a table that scrolls within its place, not with the page."""
    lines = [_row("th", header), *(_row("td", row) for row in rows)]
    return "\n".join(['<div class="scroll"><table>', *lines, "</table></div>\n"])


def _row(tag: str, cells: Sequence[str | Link]) -> str:
    return f"<tr>{''.join(f'<{tag}>{_cell(cell)}</{tag}>' for cell in cells)}</tr>"


def _cell(cell: str | Link) -> str:
    if isinstance(cell, Link):
        return f'<a href="{html.escape(cell.target)}">{html.escape(cell.text)}</a>'
    return html.escape(cell)


def facts(values: Mapping[str, str]) -> str:
    """Writes names and what they are; an empty value is left out."""
    rows = [f"<dt>{html.escape(k)}</dt><dd>{html.escape(x)}</dd>" for k, x in values.items() if x]
    return f"<dl>{''.join(rows)}</dl>\n"


def details(summary: str, text: str) -> str:
    """Writes a text that is folded until it is asked for."""
    return (
        f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre>"
        "</details>\n"
    )


def figure(picture: Picture) -> str:
    """Writes a figure with its heading and its caption."""
    data = base64.b64encode(picture.png).decode()
    title = html.escape(picture.title)
    return (
        f'<h2>{title}</h2>\n<figure><img alt="{title}" src="data:image/png;base64,{data}">\n'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>\n"
    )
