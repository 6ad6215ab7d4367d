"""The commands that programs print to go on with, as a shell reads them."""

import shlex
from pathlib import Path


def quote_text(text: str) -> str:
    r"""Quotes a text for a shell; one with a tab as bash, zsh and ksh write it.

    >>> print(quote_text("It's great!"), quote_text("$5, they say"), quote_text("One.\tIt's two."))
    "It's great!" '$5, they say' $'One.\tIt\'s two.'
    """
    if "\t" in text:
        escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\t", "\\t")
        return f"$'{escaped}'"
    # These mean something between double quotes; an exclamation mark does not at the end.
    is_plain = not set(text.removesuffix("!")) & set('"$`\\!')
    return f'"{text}"' if is_plain else shlex.quote(text)


def predict(adapter: str | Path, text: str) -> str:
    """Returns the command that classifies a text, or a pair with a tab between."""
    end = "-- " if text.startswith("-") else ""  # it would be an option
    return f"python -m experiments.predict --adapter={_quote(adapter)} {end}{quote_text(text)}"


def export(adapter: str | Path, out: str | Path) -> str:
    """Returns the command that merges an adapter."""
    return f"python -m experiments.export --adapter={_quote(adapter)} --out={_quote(out)} --merged"


def _quote(path: str | Path) -> str:
    return shlex.quote(str(path))
