"""How values of this library are shown at the prompt and in notebooks: in a line, or as a table."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp


def describe_array(x: Any) -> str:
    """Describes an array by its dtype and shape, and anything else as it describes itself.

    >>> describe_array(jnp.zeros((768, 8)))
    'f32[768,8]'
    >>> describe_array("io")
    "'io'"
    """
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        return repr(x)
    short = re.sub("(float|uint|int|complex)", lambda match: match[0][0], jnp.dtype(x.dtype).name)
    return f"{short}[{','.join(map(str, x.shape))}]"


def describe_fields(name: str, fields: Mapping[str, str]) -> str:
    """Joins the descriptions of an object's fields to that of the object.

    >>> describe_fields("LowRank", {"a": "f32[768,8]", "axes": "'io'"})
    "LowRank(a=f32[768,8], axes='io')"
    """
    return f"{name}({', '.join(f'{field}={text}' for field, text in fields.items())})"


def make_html_table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Makes a table for a notebook.

    >>> make_html_table(["kernel"], [["<w>"]]).count("&lt;w&gt;")
    1
    """
    style = "text-align: left; vertical-align: top; white-space: pre-wrap"
    make_row = lambda tag, cells: "".join(
        f"<{tag} style='{style}'>{html.escape(str(x))}</{tag}>" for x in cells
    )
    lines = [f"<tr>{make_row('td', row)}</tr>" for row in rows]
    return f"<table><tr>{make_row('th', heads)}</tr>{''.join(lines)}</table>"
