"""BLEU and chrF of generated texts against several references each, by ``sacrebleu``."""

import itertools
from collections.abc import Sequence


def bleu_and_chrf(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Computes BLEU (Papineni et al. 2002) and chrF (Popović 2015) of a corpus, from 0 to 100.

    Args:
      texts: one text for each example.
      references: at least one reference for each example.

    Raises:
      ValueError: the lengths differ, there are no texts, or an example has no reference.
    """
    import sacrebleu  # only the programs that score texts need it

    if not texts or len(texts) != len(references) or not all(map(len, references)):
        raise ValueError(
            f"{len(texts)} texts and {len(references)} lists of references: there must be one list "
            "for each text, and a reference in each."
        )
    # One row for each reference of an example; None where an example has no more of them.
    rows = [list(row) for row in itertools.zip_longest(*references)]
    return {
        "bleu": sacrebleu.corpus_bleu(list(texts), rows).score,
        "chrf": sacrebleu.corpus_chrf(list(texts), rows).score,
    }
