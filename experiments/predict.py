"""Classifies sentences with a trained adapter.

python -m experiments.predict --adapter=runs/quickstart/adapter "The movie was wonderful!"
python -m experiments.predict --adapter=runs/quickstart/adapter --json < sentences.txt
"""

import json
import sys
from pathlib import Path

from absl import flags

from experiments import classifier, cli

_ADAPTER = flags.DEFINE_string("adapter", None, "Directory of the adapter.", required=True)
_MODEL = flags.DEFINE_string("model", None, "The base model, if it moved since training.")
_FILE = flags.DEFINE_string("file", None, "File with one sentence a line; - for stdin.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object a line.")


def sentences(arguments: list[str], file: str | None) -> list[str]:
    """The sentences from the arguments, a file, or stdin; blank lines are left out.

    Raises:
      ValueError: there are none, or both arguments and a file.
      OSError: the file can't be read.
    """
    if arguments and file:
        raise ValueError("Give sentences as arguments or in --file, not both.")
    if arguments:
        lines = arguments
    elif file and file != "-":
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    else:
        lines = sys.stdin.read().splitlines()
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(
            "No sentences: give them as arguments, in --file, or on stdin, one a line."
        )
    return found


def main(argv: list[str]) -> None:
    """Prints a label and its probability for each sentence."""
    given = sentences(argv, _FILE.value)
    model = classifier.load(_ADAPTER.value, model=_MODEL.value)
    for sentence, row in zip(given, classifier.probabilities(model, given), strict=True):
        best = int(row.argmax())
        label, probability = model.labels[best], round(float(row[best]), 4)
        if _JSON.value:
            print(json.dumps({"sentence": sentence, "label": label, "probability": probability}))
        else:
            print(f"{label} ({probability:.4f})\t{sentence}")


if __name__ == "__main__":
    cli.run(main)
