"""Finds the columns of a table that hold the texts and the labels, by their usual names."""

import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

from lora_jax.data.tables import Table, is_missing

# Of each group the first names are asked for first; two columns of one line can't both be meant.
_TEXTS = (
    ("text", "texts", "sentence", "sentences", "content", "contents", "review", "reviews",
     "reviewtext", "reviewbody", "comment", "comments", "commenttext", "tweet", "message",
     "utterance", "document", "post", "feedback"),
    ("body", "article", "articletext", "headline", "title", "description", "abstract", "question",
     "query", "input", "inputs", "passage", "paragraph", "transcript", "summary", "statement",
     "fulltext", "rawtext", "cleantext"),
)  # fmt: skip
_PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("text1", "text2"), ("texta", "textb"), ("sentencea", "sentenceb"), ("s1", "s2"),
    ("question", "sentence"), ("question", "passage"), ("question", "context"),
    ("query", "passage"), ("query", "document"), ("claim", "evidence"), ("text", "textpair"),
)  # fmt: skip
_LABELS = (
    ("label", "labels", "class", "classes", "category", "categories", "target", "targets",
     "goldlabel", "isduplicate", "classlabel"),
    ("sentiment", "intent", "topic", "tag", "emotion", "polarity", "classindex", "classname",
     "labeltext", "labelname", "labelid", "airlinesentiment", "stance", "y", "rating", "stars",
     "score", "group", "genre", "type", "language"),
)  # fmt: skip
_NUMBERS = (
    ("score", "scores", "similarity", "similarityscore", "rating", "target", "value", "label",
     "labels", "y"),
    ("stars", "number", "relevance", "relatednessscore", "gradescore", "grade", "price"),
)  # fmt: skip
_NUMBERING = ("", "id", "idx", "index", "uid", "guid", "no", "nr", "number", "row", "rowid")


class Columns(NamedTuple):
    """Numbers of the columns of a table.

    Attributes:
      texts: columns of the texts, two for pairs.
      label: column of the label; None if it is not needed.
    """

    texts: tuple[int, ...]
    label: int | None


def find_columns(
    table: Table, *, text: str = "", label: str = "", is_regression: bool = False
) -> Columns:
    """Finds the columns of texts and labels.

    Args:
      table: the table.
      text: name of the column with the texts, or of two for pairs, separated by a comma; "" for one
        with a usual name.
      label: name of the column with the labels; "" for one with a usual name.
      is_regression: whether labels are real numbers.

    Raises:
      ValueError: there is no such column, or it is not clear which; the message lists all.

    >>> table = Table(path="a.csv", columns=("Review Text", "Rating"), rows=(), lines=())
    >>> find_columns(table)
    Columns(texts=(0,), label=1)
    """
    named = find_texts(table, text) if text else ()
    label_column = _find_named(table, label, "data.label") if label else None
    if label_column is None:
        usual = _NUMBERS if is_regression else _LABELS
        label_column = _find_usual(table, usual, taken=named, field="data.label")
    taken = () if label_column is None else (label_column,)
    texts = named or _find_pair(table, taken) or _find_text(table, taken)
    if label_column is None:
        label_column = _find_rest(table, texts)
    if not texts or label_column is None:
        raise _explain_missing(table, "texts" if not texts else "labels")
    if label_column in texts:
        name = table.columns[label_column]
        raise ValueError(f"{_header(table)}: {name!r} can't be both the text and the label")
    return Columns(texts, label_column)


def find_texts(table: Table, names: str | Sequence[str]) -> tuple[int, ...]:
    """Finds columns of texts by their names.

    Args:
      table: the table.
      names: one or two names; a string is that of one column, or of two with a comma between.

    Raises:
      ValueError: there is no such column, or it occurs twice, or there are more than two.
    """
    if isinstance(names, str):
        is_one = names in table.columns or "," not in names
        names = [names] if is_one else [name.strip() for name in names.split(",")]
    if not 1 <= len(names) <= 2 or len(set(names)) < len(names):
        raise ValueError(f"data.text must name one column, or two for pairs, got {list(names)}")
    return tuple(_find_named(table, name, "data.text") for name in names)


def find_texts_again(table: Table, names: Sequence[str], *, count: int | None) -> tuple[int, ...]:
    """Finds the columns of texts of a table without labels, for a model that was trained before.

    Args:
      table: the table.
      names: names of the columns that the model was trained on; where the table lacks them, columns
        with usual names are taken.
      count: number of texts of an example, 1 or 2; None for either.

    Raises:
      ValueError: there are no such columns, or it is not clear which, or they are too few or many.
    """
    known = {_normalize(column) for column in table.columns}
    if names and all(_normalize(name) in known for name in names):
        return find_texts(table, names)
    texts = (() if count == 1 else _find_pair(table, ())) or _find_text(table, ())
    if len(texts) != (count or len(texts)) or not texts:
        wanted = f"the columns {list(names)}" if names else f"{count or 1} with texts"
        raise ValueError(
            f"{_header(table)}: the adapter needs {wanted}, and there are {list(table.columns)}; "
            "name them with --text"
        )
    return texts


def _normalize(name: str) -> str:
    """Returns what two spellings of a column's name have in common."""
    return re.sub(r"[\W_]+", "", name).casefold()


def _find_named(table: Table, name: str, field: str) -> int:
    found = [k for k, column in enumerate(table.columns) if column == name]
    if not found:
        found = [k for k, x in enumerate(table.columns) if _normalize(x) == _normalize(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise _explain_twice(table, table.columns[found[0]])
    near = difflib.get_close_matches(name, table.columns, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(
        f"{_header(table)}: there is no column {name!r} ({field}){hint}; there are "
        f"{list(table.columns)}"
    )


def _find_usual(
    table: Table, usual: Sequence[Sequence[str]], *, taken: Sequence[int], field: str
) -> int | None:
    """Finds the only column with a name of the first group that any column has a name of."""
    left = [k for k in range(len(table.columns)) if k not in taken]
    for group in usual:
        found = [k for k in left if _normalize(table.columns[k]) in group]
        if len(found) > 1:
            names = [table.columns[k] for k in found]
            if len(set(names)) == 1:
                raise _explain_twice(table, names[0])
            raise ValueError(
                f"{_header(table)}: the columns {names} could each be meant; say which with "
                f"--config.{field}={names[0]!r}, for example"
            )
        if found:
            return found[0]
    return None


def _find_pair(table: Table, taken: Sequence[int]) -> tuple[int, ...]:
    names = [_normalize(column) for column in table.columns]
    free = [name for k, name in enumerate(names) if k not in taken]
    for pair in _PAIRS:
        if all(free.count(name) == 1 for name in pair):
            columns = tuple(names.index(name) for name in pair)
            other = _find_usual(table, _TEXTS[:1], taken=(*taken, *columns), field="data.text")
            if other is not None:
                both = [table.columns[k] for k in columns]
                raise ValueError(
                    f"{_header(table)}: the texts could be the pairs {both} or the column "
                    f"{table.columns[other]!r}; say which with --config.data.text="
                    f"'{both[0]},{both[1]}', or with the one column"
                )
            return columns
    return ()


def _find_text(table: Table, taken: Sequence[int]) -> tuple[int, ...]:
    found = _find_usual(table, _TEXTS, taken=taken, field="data.text")
    if found is not None:
        return (found,)
    rest = _find_rest(table, taken) if taken else None
    if rest is not None and _has_words(table, rest):
        return (rest,)
    return ()


def _find_rest(table: Table, taken: Sequence[int]) -> int | None:
    """Finds the only column that is left, besides those that number rows."""
    free = [k for k in range(len(table.columns)) if k not in taken]
    left = [k for k in free if _normalize(table.columns[k]) not in _NUMBERING]
    return left[0] if taken and len(left) == 1 else None


def _has_words(table: Table, column: int) -> bool:
    """Returns whether most cells of a column hold several words."""
    cells = [row[column] for row in table.rows if not is_missing(row[column])]
    words = [x for x in cells if isinstance(x, str) and len(x.split()) > 1]
    return 2 * len(words) > len(cells)


def _header(table: Table) -> str:
    """Returns where the names of the columns stand."""
    return f"{table.path}:1" if table.has_lines else table.path


def _explain_twice(table: Table, name: str) -> ValueError:
    """Makes the error for a column whose name another has, too."""
    return ValueError(
        f"{_header(table)}: the column {name!r} occurs more than once among "
        f"{list(table.columns)}; give each a name of its own"
    )


def _explain_missing(table: Table, what: str) -> ValueError:
    """Makes the error for a table without a column of texts, or of labels."""
    field, other = ("data.text", "data.label") if what == "texts" else ("data.label", "data.text")
    listing = f"no column with {what} was found among {list(table.columns)}: name it with"
    advice = f"--config.{field}=NAME (and the other with --config.{other})"
    header = ""
    if table.has_lines and table.form.startswith("fields"):
        header = (
            ". If the first line is a row already, name the columns in their order, such as "
            "--config.data.columns=text,label"
        )
    if len(table.columns) == 1:
        header += ". If fields are separated by an unusual character, give it as data.delimiter"
    return ValueError(f"{_header(table)}: {listing} {advice}{header}")
