r"""Classifies sentences with a trained adapter.

python -m experiments.predict --adapter=runs/quickstart/adapter "The movie was wonderful!"
python -m experiments.predict --adapter=runs/quickstart/adapter --json < sentences.txt

The adapter may be in this library's format or in PEFT's. If its task is
on pairs of sentences, the two are separated by a tab: $"A man eats.\tSomebody eats."
"""

import json
import sys
from pathlib import Path

from absl import flags

from experiments import cli
from lora_jax.tasks import classifier

_ADAPTER = flags.DEFINE_string("adapter", None, "Directory of the adapter.", required=True)
_MODEL = flags.DEFINE_string("model", None, "The base model, if it moved since training.")
_FILE = flags.DEFINE_string("file", None, "File with one sentence a line; - for stdin.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object a line.")


def sentences(arguments: list[str], file: str | None) -> list[str]:
    """Returns the sentences of the arguments, a file, or stdin, without blank lines.

    Raises:
      ValueError: there are no sentences, or there are both arguments and a file.
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


def main(argv: list[str]) -> None:
    """Prints a label and its probability for each sentence, or the number of a regression."""
    texts = sentences(argv, _FILE.value)
    model = classifier.load(_ADAPTER.value, model=_MODEL.value)
    for note in model.notes:
        print(f"assumed: {note}", file=sys.stderr)
    for sentence, row in zip(texts, classifier.predict(model, texts), strict=True):
        best = int(row.argmax())
        label, value = model.labels[best], round(float(row[best]), 4)
        if len(model.labels) == 1:
            fields, text = {label: value}, f"{label} {value:.4f}"
        else:
            fields, text = {"label": label, "probability": value}, f"{label} ({value:.4f})"
        print(
            json.dumps({"sentence": sentence, **fields}) if _JSON.value else f"{text}\t{sentence}"
        )


if __name__ == "__main__":
    cli.run(main)
