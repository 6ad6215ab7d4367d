"""Makes tests/goldens/tokenizers: tiny tokenizers of old generations, and their tokens.

The tokens are those of transformers' AutoTokenizer for the same files. Needs transformers,
protobuf and sentencepiece, and is run from the root of the checkout:

    python scripts/make_tokenizer_goldens.py
"""

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.helpers import tokenizer_files as made

GOLDENS = Path("tests/goldens/tokenizers")
FAMILIES = (made.bert, made.roberta, made.gpt2, made.qwen2, *made.SENTENCEPIECE)


def main():
    """Writes a directory for each family, with ``ids.json`` in it, and what they were made by."""
    shutil.rmtree(GOLDENS, ignore_errors=True)
    for family in FAMILIES:
        directory = GOLDENS / family.__name__
        size = family(directory)
        made.write(directory, added_tokens=made.numbers(size))
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        made.write(directory, ids={text: tokenizer(text)["input_ids"] for text in made.TEXTS})
    versions = {name: version(name) for name in ("transformers", "tokenizers", "sentencepiece")}
    made_by = {"script": "scripts/make_tokenizer_goldens.py", **versions}
    (GOLDENS / "made_by.json").write_text(json.dumps(made_by, indent=2) + "\n")


if __name__ == "__main__":
    main()
