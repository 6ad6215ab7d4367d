"""The E2E NLG challenge (Novikova et al. 2017) in the LoRA paper's layout.

A line is ``meaning representation||reference text``; a meaning has several references.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lora_jax.data.order import MEANINGS, permutation

_MARK = "||"


class Pairs(NamedTuple):
    """Meaning representations and texts, one of each a line."""

    meanings: tuple[str, ...]
    texts: tuple[str, ...]


def read(source: str, file: str) -> Pairs:
    """The lines of a file in the directory ``source``, in their order.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is empty, not UTF-8, or a line is not two texts parted by ``||``; the message
        says which.
    """
    path = Path(source) / file
    if not source or not path.is_file():
        raise FileNotFoundError(
            f"data.source is {source!r}, and there is no file {file!r} in it: give the directory "
            "with the E2E data, in which a line is 'meaning representation||reference text'."
        )
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}; convert it.") from error
    rows = [(k, line.strip()) for k, line in enumerate(lines, 1) if line.strip()]
    parts = [(k, [part.strip() for part in line.split(_MARK)]) for k, line in rows]
    wrong = [k for k, part in parts if len(part) != 2 or not all(part)]
    if wrong or not parts:
        what = f"lines {wrong[:10]} are" if wrong else "there are no lines; a line is"
        raise ValueError(f"{path}: {what} not 'meaning representation||reference text'.")
    return Pairs(*zip(*(part for _, part in parts), strict=True))


def references(pairs: Pairs) -> dict[str, list[str]]:
    """The texts of each meaning, meanings in order of their first line.

    >>> references(Pairs(("a", "b", "a"), ("1", "2", "3")))
    {'a': ['1', '3'], 'b': ['2']}
    """
    found: dict[str, list[str]] = {}
    for meaning, text in zip(pairs.meanings, pairs.texts, strict=True):
        found.setdefault(meaning, []).append(text)
    return found


def split(pairs: Pairs, count: int, seed: int) -> tuple[Pairs, Pairs]:
    """Parts off the lines of ``count`` meanings, chosen by ``seed`` alone.

    Raises:
      ValueError: nothing would be left.
    """
    meanings = list(references(pairs))
    if not 0 < count < len(meanings):
        raise ValueError(
            f"data.holdout is {count}, and there are {len(meanings)} meaning representations: at "
            "least one must be held out, and one left."
        )
    chosen = {meanings[k] for k in permutation(len(meanings), seed, stream=MEANINGS)[:count]}
    lines = list(zip(pairs.meanings, pairs.texts, strict=True))
    return _pairs(x for x in lines if x[0] not in chosen), _pairs(
        x for x in lines if x[0] in chosen
    )


def first(pairs: Pairs, count: int) -> Pairs:
    """The lines of the first ``count`` meanings; 0 for all.

    >>> first(Pairs(("a", "b", "a"), ("1", "2", "3")), 1).texts
    ('1', '3')
    """
    chosen = set(list(references(pairs))[: count or None])
    return _pairs(x for x in zip(pairs.meanings, pairs.texts, strict=True) if x[0] in chosen)


def _pairs(lines: Iterable[tuple[str, str]]) -> Pairs:
    return Pairs(*zip(*lines, strict=True))
