"""Trained tokens: some rows of a table of tokens are trained, and replace those of the base.

There are two forms in the algebra, and both start as the base bit for bit, with no copy of the
table. Where rows are only looked up, a gain of 0 at the trained rows and one-hot ``a`` give exactly
the trained values, ``W'[ids] = 0·W[ids] + 1·rows``. A product with ``rows`` is rounded otherwise
than one with ``W``, and so tables that are multiplied, as a tied head is, take the change
``b = rows - W[ids]``, which is zero at first.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lora_jax.factors import BATCH, IN, OUT, positions
from lora_jax.nodes import Adapted, Field, Terms
from lora_jax.registration import register

Array = jax.Array


class Tokens(Adapted):
    """A kernel of which some entries along one axis, one for each token, are trained.

    Attributes:
      side: role of the axis of tokens.
      ids: places along this axis, each once.
    """

    side: ClassVar[str]
    has_dropout: ClassVar[bool] = False

    ids: tuple[int, ...]

    @property
    def values(self) -> Array:
        """Trained entries, in the order of ``ids``."""
        return getattr(self, next(iter(self.table)))

    def terms(self, w: Array) -> Terms:
        """Makes one-hot factors of the ids, and the change of their entries."""
        change = self.values - take(w, self.axes, self.ids, self.side).astype(self.values.dtype)
        one_hot = _make_one_hot(self, w)
        if self.side == IN:
            return Terms(one_hot, change)
        return Terms(change, jnp.swapaxes(one_hot, -1, -2))

    def merge(self, w: Array) -> Array:
        """Replaces the entries of the ids."""
        axis, order = self.axes.index(self.side), _order_of_values(self.axes)
        values = jnp.transpose(self.values, [order.index(k) for k in range(w.ndim)])
        where = (*[slice(None)] * axis, jnp.asarray(self.ids))
        return jnp.asarray(w).at[where].set(values.astype(w.dtype), unique_indices=True)

    def describe_misfit(self, shape: tuple[int, ...]) -> str:
        """Says why the ids are no places of a leaf of the given shape; "" if they are."""
        if self.axes.count(self.side) != 1:
            return f"its axes {self.axes!r} have not one axis of tokens ({self.side!r})"
        return describe_ids(self.ids, shape[self.axes.index(self.side)])


def _order_of_values(axes: str) -> list[int]:
    """Returns the axes of the kernel in the order in which the trained entries have them."""
    return positions(axes, BATCH + IN + OUT)


def _make_one_hot(node: Tokens, w: Array) -> Array:
    """Returns ``(*batch, tokens, ids)`` with a one for each id."""
    size = w.shape[node.axes.index(node.side)]
    batch = tuple(w.shape[k] for k in positions(node.axes, BATCH))
    one_hot = jnp.arange(size)[:, None] == jnp.asarray(node.ids)[None]
    return jnp.broadcast_to(one_hot.astype(node.values.dtype), (*batch, *one_hot.shape))


def take(w: Array, axes: str, ids: tuple[int, ...], side: str) -> Array:
    """Takes the entries of the ids, ``(*batch, *in, *out)`` with the ids on one of the sides."""
    axis, w = axes.index(side), jnp.asarray(w)
    spec = [*getattr(getattr(jax.typeof(w), "sharding", None), "spec", ())]
    where = w.at[(*[slice(None)] * axis, jnp.asarray(ids))]
    if any(entry is not None for entry in spec):  # only explicit sharding is in the type
        taken = where.get(out_sharding=PartitionSpec(*spec[:axis], None, *spec[axis + 1 :]))
    else:
        taken = where.get()
    return jnp.transpose(taken, _order_of_values(axes))


@register
@dataclasses.dataclass(frozen=True, eq=False)
class TrainedRows(Tokens):
    """Trained rows of a table that is looked up: ``W'[ids] = rows``, exactly.

    Attributes:
      rows: ``(*batch, ids, *out)``.
      ids: numbers of the rows, each once.
      w: frozen table in a bound tree; None in an adapter.
      axes: role of each axis of the table, with one "i".
      name: path of the table in a bound tree, for messages.
      dropout: 0.0, since rows are never dropped.

    >>> node = TrainedRows(jnp.ones((1, 2)), (2,))
    >>> node.merge(jnp.zeros((4, 2)))[:, 0].tolist()
    [0.0, 0.0, 1.0, 0.0]
    """

    kind: ClassVar[str] = "tokens"
    reads_kernel: ClassVar[bool] = False
    side: ClassVar[str] = IN
    table: ClassVar[Mapping[str, Field]] = {
        "rows": Field("bko"),
        "ids": Field("k", is_trained=False, is_index=True),
    }

    rows: Array
    ids: tuple[int, ...]
    w: Array | None = None
    axes: str = "io"
    name: str = ""
    dropout: float = 0.0

    def terms(self, w: Array) -> Terms:
        """Makes one-hot factors of the ids, and a gain that is 0 at them."""
        one_hot = _make_one_hot(self, w)
        return Terms(one_hot, self.rows, 1 - one_hot.sum(-1), IN)


@register
@dataclasses.dataclass(frozen=True, eq=False)
class TiedRows(TrainedRows):
    """Trained rows of a table that is a head, too, or is multiplied elsewhere; see above."""

    kind: ClassVar[str] = "tied_tokens"
    reads_kernel: ClassVar[bool] = True
    terms = Tokens.terms


@register
@dataclasses.dataclass(frozen=True, eq=False)
class TrainedOutputs(Tokens):
    """Trained columns of a head with one output for each token: ``W'[:, ids] = columns``.

    Attributes:
      columns: ``(*batch, *in, ids)``.
      ids: numbers of the outputs, each once.
      w: frozen kernel in a bound tree; None in an adapter.
      axes: role of each axis of the kernel, with one "o".
      name: path of the kernel in a bound tree, for messages.
      dropout: 0.0, since columns are never dropped.
    """

    kind: ClassVar[str] = "token_outputs"
    side: ClassVar[str] = OUT
    table: ClassVar[Mapping[str, Field]] = {
        "columns": Field("bik"),
        "ids": Field("k", is_trained=False, is_index=True),
    }

    columns: Array
    ids: tuple[int, ...]
    w: Array | None = None
    axes: str = "io"
    name: str = ""
    dropout: float = 0.0


def describe_ids(ids: tuple[int, ...], size: int) -> str:
    """Says what is wrong with ids of a table of ``size`` tokens; "" if nothing is.

    >>> describe_ids((2, 7, 2), 4)
    'the ids [7] are none of its 4 tokens, 0 to 3; the ids [2] are there more than once'
    """
    beyond = sorted({k for k in ids if not 0 <= k < size})
    twice = sorted({k for k in ids if ids.count(k) > 1}) if len(set(ids)) < len(ids) else []
    problems = [f"the ids {beyond} are none of its {size} tokens, 0 to {size - 1}"] * bool(beyond)
    problems += [f"the ids {twice} are there more than once"] * bool(twice)
    return "; ".join(problems)


def start_tokens(
    cls: "type[TrainedRows | TrainedOutputs]",
    kernel: Any,
    axes: str,
    ids: tuple[int, ...],
    dtype: Any,
) -> Tokens:
    """Makes the node that starts with a copy of the kernel's own entries.

    Args:
      cls: class of the node.
      kernel: numbers of the kernel.
      axes: role of each of its axes.
      ids: places along its axis of tokens.
      dtype: dtype of what is trained.
    """
    return cls(take(kernel, axes, ids, cls.side).astype(dtype), ids, axes=axes)
