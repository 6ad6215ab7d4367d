"""Builds the families' tables of names from rows."""

from collections.abc import Iterable

from lora_jax.names import STACK, Name


def linear(flax: str, hf: str, *, bias: bool = True, transpose: bool = True) -> list[Name]:
    """Makes the rows of a dense layer.

    The kernel of torch's Linear is the transpose of Flax's; that of GPT-2's Conv1D is not.

    >>> [row.flax for row in linear("dense", "output.dense")]
    ['dense/kernel', 'dense/bias']
    """
    rows = [Name(f"{flax}/kernel", f"{hf}.weight", transpose=transpose)]
    return [*rows, Name(f"{flax}/bias", f"{hf}.bias")] if bias else rows


def norm(flax: str, hf: str, *, bias: bool = True) -> list[Name]:
    """Makes the rows of a LayerNorm, or, without a bias, of an RMSNorm."""
    rows = [Name(f"{flax}/scale", f"{hf}.weight")]
    return [*rows, Name(f"{flax}/bias", f"{hf}.bias")] if bias else rows


def embedding(flax: str, hf: str) -> list[Name]:
    """Makes the row of an embedding, in a list."""
    return [Name(f"{flax}/embedding", f"{hf}.weight")]


def add_prefix(flax: str, hf: str, rows: Iterable[Name]) -> list[Name]:
    """Puts the names of a part of the model before those in its rows.

    >>> add_prefix("bert/", "bert.", embedding("words", "words"))[0][:2]
    ('bert/words/embedding', 'bert.words.weight')
    """
    prefix = lambda name: f"{hf}{name}" if name else ""
    return [
        row._replace(
            flax=f"{flax}{row.flax}",
            hf=prefix(row.hf),
            older=prefix(row.older),
            stored=tuple(map(prefix, row.stored)),
            tied=tuple(map(prefix, row.tied)),
        )
        for row in rows
    ]


def repeat_layers(
    flax: str, hf: str, rows: Iterable[Name], *, count: int, scan: bool
) -> list[Name]:
    """Makes the rows of ``count`` layers, or of one stack for a scan, from those of one layer.

    >>> rows = norm("norm", "norm", bias=False)
    >>> [row[:2] for row in repeat_layers("layer", "h", rows, count=2, scan=False)]
    [('layer_0/norm/scale', 'h.0.norm.weight'), ('layer_1/norm/scale', 'h.1.norm.weight')]
    >>> [row[:2] for row in repeat_layers("layer", "h", rows, count=2, scan=True)]
    [('layer/norm/scale', 'h.{}.norm.weight')]
    """
    rows = list(rows)
    if scan:
        return add_prefix(f"{flax}/", f"{hf}.{STACK}.", rows)
    return [row for k in range(count) for row in add_prefix(f"{flax}_{k}/", f"{hf}.{k}.", rows)]
