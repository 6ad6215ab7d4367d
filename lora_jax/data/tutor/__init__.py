r"""Embedded conversations with Pip, a pocket tutor, written for this project.

Pip answers every question in the same three lines: the answer, the reason, something to try. A
small chat model learns this in minutes. See README.md in this folder.

>>> import re
>>> reply = "Answer: It is 56.\nWhy: 5 times 8 and 2 times 8 make 56.\nTry: Find 7 times 9."
>>> bool(re.fullmatch(PATTERN, reply)), bool(re.fullmatch(PATTERN, "It is 56."))
(True, False)
"""

from pathlib import Path

PATTERN = r"Answer: .+\nWhy: .+\nTry: .+"  # of a whole reply
SPLITS = {name: Path(__file__).parent / f"{name}.jsonl" for name in ("train", "validation")}
