"""Pieces of which the families' tables of names are made."""

from collections.abc import Iterable

from lora_jax.names import STACK, Name


def linear(flax: str, hf: str, *, bias: bool = True, transpose: bool = True) -> list[Name]:
    """Rows of a dense layer; torch's Linear holds the kernel transposed, GPT-2's Conv1D does not.

    >>> [row.flax for row in linear("dense", "output.dense")]
    ['dense/kernel', 'dense/bias']
    """
    rows = [Name(f"{flax}/kernel", f"{hf}.weight", transpose=transpose)]
    return [*rows, Name(f"{flax}/bias", f"{hf}.bias")] if bias else rows


def norm(flax: str, hf: str, *, bias: bool = True) -> list[Name]:
    """Rows of a LayerNorm, or, without a bias, of an RMSNorm."""
    rows = [Name(f"{flax}/scale", f"{hf}.weight")]
    return [*rows, Name(f"{flax}/bias", f"{hf}.bias")] if bias else rows


def embedding(flax: str, hf: str) -> list[Name]:
    """Row of an embedding."""
    return [Name(f"{flax}/embedding", f"{hf}.weight")]


def below(flax: str, hf: str, rows: Iterable[Name]) -> list[Name]:
    """The rows of a part of the model, with the part's own names put before theirs.

    >>> below("bert/", "bert.", embedding("words", "words"))[0][:2]
    ('bert/words/embedding', 'bert.words.weight')
    """
    put = lambda name: f"{hf}{name}" if name else ""
    return [
        row._replace(
            flax=f"{flax}{row.flax}",
            hf=put(row.hf),
            older=put(row.older),
            tied=tuple(map(put, row.tied)),
        )
        for row in rows
    ]


def layers(flax: str, hf: str, rows: Iterable[Name], *, count: int, scan: bool) -> list[Name]:
    """The rows of one layer for each of ``count``, or of the layers stacked by a scan.

    >>> rows = norm("norm", "norm", bias=False)
    >>> [row[:2] for row in layers("layer", "h", rows, count=2, scan=False)]
    [('layer_0/norm/scale', 'h.0.norm.weight'), ('layer_1/norm/scale', 'h.1.norm.weight')]
    >>> [row[:2] for row in layers("layer", "h", rows, count=2, scan=True)]
    [('layer/norm/scale', 'h.{}.norm.weight')]
    """
    rows = list(rows)
    if scan:
        return below(f"{flax}/", f"{hf}.{STACK}.", rows)
    return [row for k in range(count) for row in below(f"{flax}_{k}/", f"{hf}.{k}.", rows)]
