r"""Classifies sentences with a trained adapter.

python -m experiments.predict --adapter=runs/quickstart/adapter "The movie was wonderful!"
python -m experiments.predict --adapter=runs/quickstart/adapter --json < sentences.txt
python -m experiments.predict --adapter=runs/news/adapter --file=more_news.csv

The adapter may be in this library's format or in PEFT's. If its task is on pairs of sentences, the
two are separated by a tab: $'A man eats.\tSomebody eats.' A file that ends in .csv, .jsonl, .json
or .parquet is a table, of which the columns with the texts are read; so is one in .tsv, for an
adapter of experiments.classify. Any other has one sentence a line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from experiments import cli, lazy

with lazy.imports():
    from lora_jax.data import characters, columns, labelled_rows, table_sources, tables
    from lora_jax.data import examples as example_rows
    from lora_jax.tasks import classifier

if TYPE_CHECKING:
    import numpy as np

    from lora_jax.data.examples import Examples

_ADAPTER = flags.DEFINE_string("adapter", None, "Directory of the adapter.", required=True)
_MODEL = flags.DEFINE_string("model", None, "The base model, if it moved since training.")
_FILE = flags.DEFINE_string(
    "file", None, "File with one sentence a line, or a table (.csv, .jsonl, ...); - for stdin."
)
_TEXT = flags.DEFINE_string(
    "text", None, "Column of the texts of a table, or two with a comma between; found by default."
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object a line.")


def sentences(arguments: list[str], file: str | None) -> list[str]:
    """Returns the sentences of the arguments, a file, or stdin, without blank lines.

    Raises:
      ValueError: there are no sentences, or one is no text; or there are both arguments and a file.
      OSError: the file can't be read.
    """
    if arguments and file:
        raise ValueError("Give sentences as arguments or in --file, not both.")
    # Not splitlines(), which also splits at characters that stand within sentences (U+0085, ...).
    lines = arguments or _read(file).split("\n")
    result = [line.strip() for line in lines if line.strip()]
    if not result:
        raise ValueError(
            "No sentences: give them as arguments, in --file, or on stdin, one a line."
        )
    for sentence in result:
        characters.check(sentence)
    return result


def _read(file: str | None) -> str:
    if (not file or file == "-") and sys.stdin.isatty():
        return ""  # a person would not know that the program waits for a line
    data = Path(file).read_bytes() if file and file != "-" else sys.stdin.buffer.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file or 'stdin'}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); convert it."
        ) from error


def read_table(file: str, model: classifier.Classifier) -> Examples:
    """Reads the texts of a table; rows without them are left out, and told.

    Raises:
      ValueError: the file is damaged, or has no such columns.
      OSError: the file can't be read.
    """
    table = table_sources.read_file(Path(file))
    count = {None: None, True: 2, False: 1}[model.pairs]
    if _TEXT.value:
        found = columns.find_texts(table, _TEXT.value)
    else:
        found = columns.find_texts_again(table, model.columns, count=count)
    if len(found) != (count or len(found)):
        raise ValueError(f"--text={_TEXT.value}: the adapter takes {count} texts for each row.")
    rows = labelled_rows.take(table, columns.Columns(found, None))
    for note in rows.notes:
        print(note, file=sys.stderr)
    texts = list(zip(*rows.texts, strict=True))
    return example_rows.Examples(texts[0], None, texts[1] if len(texts) == 2 else None)


def _predict_table(file: str, model: classifier.Classifier) -> tuple[list[str], np.ndarray]:
    """Predicts for the rows of a table; returns their texts, too."""
    found = read_table(file, model)
    pairs = found.pairs or [None] * len(found.sentences)
    both = zip(found.sentences, pairs, strict=True)
    texts = ["\t".join(x for x in row if x is not None) for row in both]
    return texts, classifier.predict_examples(model, found, say=_note)


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


def _find_kind(file: str | None) -> str:
    """Returns "table" or "lines" by a file's ending; "either" where the adapter decides."""
    ending = tables.suffix(file) if file else ""
    if ending in (".tsv", ".tab"):  # rows of a table, or lines with the two texts of a pair
        return "either"
    return "table" if ending in tables.FORMATS else "lines"


def main(argv: list[str]) -> None:
    """Prints a label and its probability for each sentence, or the number of a regression."""
    file, kind = _FILE.value, _find_kind(_FILE.value)
    if argv and file:
        raise ValueError("Give sentences as arguments or in --file, not both.")
    if _TEXT.value and kind == "lines":
        raise ValueError("--text names columns of a table; give a table with --file.")
    texts = [] if kind == "table" else sentences(argv, file)
    model = classifier.load(_ADAPTER.value, model=_MODEL.value)
    for note in model.notes:
        print(f"assumed: {note}", file=sys.stderr)
    if file and (kind == "table" or (kind == "either" and (model.columns or _TEXT.value))):
        texts, values = _predict_table(file, model)
    else:
        values = classifier.predict(model, texts, say=_note)
    for sentence, row in zip(texts, values, strict=True):
        best = int(row.argmax())
        label, value = model.labels[best], round(float(row[best]), 4)
        if len(model.labels) == 1:
            fields: dict[str, str | float] = {label: value}
            text = f"{label} {value:.4f}"
        else:
            fields, text = {"label": label, "probability": value}, f"{label} ({value:.4f})"
        line = f"{text}\t{sentence.replace(chr(10), ' ')}"
        print(json.dumps({"sentence": sentence, **fields}) if _JSON.value else line)


if __name__ == "__main__":
    cli.run(main)
