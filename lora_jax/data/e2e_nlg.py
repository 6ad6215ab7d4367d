"""The E2E NLG challenge (Novikova et al. 2017) in the LoRA paper's layout.

A line is ``meaning representation||reference text``; a meaning has several references.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lora_jax.data.order import MEANINGS, permutation

_SEPARATOR = "||"


class Pairs(NamedTuple):
    """Meaning representations and texts, one of each for every line."""

    meanings: tuple[str, ...]
    texts: tuple[str, ...]


def read(source: str, file: str) -> Pairs:
    """Reads the lines of a file in the directory ``source``, in their order.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is empty, not UTF-8, or a line is not two texts with ``||`` between them; the
        message says which.
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
    parts = [(k, [part.strip() for part in line.split(_SEPARATOR)]) for k, line in rows]
    if not parts:
        raise ValueError(f"{path}: there are no lines 'meaning representation||reference text'.")
    wrong = [k for k, part in parts if len(part) != 2 or not all(part)]
    if wrong:
        raise ValueError(
            f"{path}: lines {wrong[:10]} are not 'meaning representation||reference text'."
        )
    return Pairs(*zip(*(part for _, part in parts), strict=True))


def group_references(pairs: Pairs) -> dict[str, list[str]]:
    """Groups the texts by meaning; the meanings are in the order of their first lines.

    >>> group_references(Pairs(("a", "b", "a"), ("1", "2", "3")))
    {'a': ['1', '3'], 'b': ['2']}
    """
    references: dict[str, list[str]] = {}
    for meaning, text in zip(pairs.meanings, pairs.texts, strict=True):
        references.setdefault(meaning, []).append(text)
    return references


def split(pairs: Pairs, count: int, seed: int) -> tuple[Pairs, Pairs]:
    """Splits off the lines of ``count`` meanings, which depend on ``seed`` alone.

    Returns:
      The other lines, and those of the ``count`` meanings.

    Raises:
      ValueError: nothing would be left.
    """
    meanings = list(group_references(pairs))
    if not 0 < count < len(meanings):
        raise ValueError(
            f"data.holdout is {count}, and there are {len(meanings)} meaning representations: at "
            "least one must be held out, and one left."
        )
    chosen = {meanings[k] for k in permutation(len(meanings), seed, stream=MEANINGS)[:count]}
    lines = list(zip(pairs.meanings, pairs.texts, strict=True))
    others = _make_pairs(line for line in lines if line[0] not in chosen)
    return others, _make_pairs(line for line in lines if line[0] in chosen)


def take_first(pairs: Pairs, count: int) -> Pairs:
    """Takes the lines of the first ``count`` meanings; 0 for all.

    >>> take_first(Pairs(("a", "b", "a"), ("1", "2", "3")), 1).texts
    ('1', '3')
    """
    chosen = set(list(group_references(pairs))[: count or None])
    lines = zip(pairs.meanings, pairs.texts, strict=True)
    return _make_pairs(line for line in lines if line[0] in chosen)


def _make_pairs(lines: Iterable[tuple[str, str]]) -> Pairs:
    return Pairs(*zip(*lines, strict=True))
