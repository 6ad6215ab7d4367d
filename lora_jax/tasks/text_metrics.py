"""BLEU and chrF of written texts against several references each, by ``sacrebleu``."""

from collections.abc import Sequence


def bleu_and_chrf(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU (Papineni et al. 2002) and chrF (Popović 2015) of a corpus, from 0 to 100.

    Args:
      texts: one for each example.
      references: the right ones for each example, one at least.

    Raises:
      ValueError: lengths differ, there are no texts, or an example has no reference.
    """
    import sacrebleu  # of use to the few programs that score texts alone

    if not texts or len(texts) != len(references) or not all(map(len, references)):
        raise ValueError(
            f"{len(texts)} texts and {len(references)} lists of references: there must be one list "
            "for each text, and a reference in each."
        )
    most = max(map(len, references))
    # One row for each reference of an example; None where an example has no more of them.
    rows = [[some[k] if k < len(some) else None for some in references] for k in range(most)]
    return {
        "bleu": sacrebleu.corpus_bleu(list(texts), rows).score,
        "chrf": sacrebleu.corpus_chrf(list(texts), rows).score,
    }
