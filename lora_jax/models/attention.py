"""Attention of all models: who may see what, which program computes it, and that program's call.

A model describes what its queries may see (:class:`lora_jax.models.attention_mask.Mask`), makes a
:class:`Plan` of that, which says how attention is computed, and hands the plan to its layers.

* ``"xla"``: the scores of all queries and keys are written to memory. The fastest for short texts.
* ``"blockwise"``: block by block, in memory that is linear in the length, on every device.
* ``"cudnn"``: by a fused kernel, on NVIDIA GPUs where its conditions hold.
* ``"auto"``: the one of these that suits the device and the shapes, by :func:`choose`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.models import blockwise_attention, cudnn_attention, plain_attention
from lora_jax.models.attention_blocks import Scoring
from lora_jax.models.attention_mask import Mask, make_bias
from lora_jax.models.relative_positions import RelativeBias, make_relative_bias

Array = jax.Array
_AS_QUERIES: Any = None  # the default of a number of keys, which is that of the queries

AUTO, XLA, CUDNN, BLOCKWISE = "auto", "xla", "cudnn", "blockwise"
IMPLEMENTATIONS = (AUTO, XLA, CUDNN, BLOCKWISE)

# Bytes of scores below which they are written, whatever else the layer keeps.
FLOOR = 2**26
# Activations that a layer keeps besides scores, in arrays of the width of all its heads: 34 bytes
# a number of two (Korthikanti et al. 2022, section 4.1).
_KEPT = 17


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """The attention of a model, as its config describes it.

    Attributes:
      count: number of heads of queries.
      groups: number of heads of keys.
      size: width of a head.
      softcap: bound of the absolute value of a scaled product; None for none.
      dropout: probability that a weight is dropped in training.
      is_relative: whether scores of self-attention have terms for relative positions.
    """

    count: int
    groups: int
    size: int
    softcap: float | None = None
    dropout: float = 0.0
    is_relative: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What the choice of a program depends on.

    Attributes:
      heads: the model's attention.
      batch: number of rows.
      queries: number of queries in a row.
      keys: number of keys in a row; None for that of queries.
      dtype: dtype of the activations.
      deterministic: whether no weights are dropped.
      has_segments: whether a row holds several texts.
      has_cache: whether keys come from a cache.
      is_cross: whether keys come from another text.
    """

    heads: Heads
    batch: int
    queries: int
    keys: int = _AS_QUERIES
    dtype: DTypeLike
    deterministic: bool = True
    has_segments: bool = False
    has_cache: bool = False
    is_cross: bool = False

    def __post_init__(self) -> None:
        if self.keys is None:
            object.__setattr__(self, "keys", self.queries)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("mask", "bias"),
    meta_fields=("implementation",),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How the attention of a model's layers is computed.

    Attributes:
      mask: what the queries may see; None for "xla", where it is in the bias.
      bias: for "xla", what is added to the scores; otherwise the terms of relative positions.
      implementation: "xla", "cudnn" or "blockwise".
    """

    mask: Any
    bias: Any
    implementation: str


class WeightDropout(NamedTuple):
    """Dropout of attention's weights.

    Attributes:
      rate: probability that a weight becomes zero.
      apply: drops from all weights, and scales those that it keeps.
      make_key: makes the PRNG key for dropping from a block at a time.
    """

    rate: float
    apply: Callable[[Array], Array]
    make_key: Callable[[], Array]


def check_attention(implementation: str) -> None:
    """Raises ValueError unless ``implementation`` is one of :data:`IMPLEMENTATIONS`."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention must be one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}"
        )


def make_plan(
    mask: Mask, case: Case, implementation: str, *, bias: RelativeBias | None = None
) -> Plan:
    """Decides how attention is computed; what all layers have in common is computed here.

    Args:
      mask: what the queries may see.
      case: the shapes.
      implementation: one of :data:`IMPLEMENTATIONS`.
      bias: terms that are added to the scores by distance, for which the mask has the places of
        queries and keys; None for none.

    Raises:
      ValueError: as :func:`choose`.
    """
    chosen = choose(case, implementation)
    if chosen != XLA:
        return Plan(mask=mask, bias=bias, implementation=chosen)
    if bias is None:
        return Plan(mask=None, bias=make_bias(mask), implementation=chosen)
    terms = make_relative_bias(bias, mask.queries.index, mask.keys.index)
    return Plan(mask=None, bias=make_bias(mask, terms[None]), implementation=chosen)


def attention(
    query: Array,
    key: Array,
    value: Array,
    plan: Plan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    drop: WeightDropout | None = None,
) -> Array:
    """Computes ``softmax(scale·QKᵀ + bias)·V`` for each head (Vaswani et al. 2017, eq. 1).

    Args:
      query: ``(batch, queries, heads, d)``; each ``heads / groups`` neighboring heads share a head
        of keys (Ainslie et al. 2023).
      key: ``(batch, keys, groups, d)``.
      value: the same shape.
      plan: what the queries may see, and how it is computed.
      scale: factor of the products; None for ``1/√d``.
      softcap: bound of the absolute value of a scaled product, which a tanh keeps; None for none.
      drop: dropout of the weights; None for none.

    Returns:
      ``(batch, queries, heads, d)`` in the dtype of ``value``. The scores, the sum of the weights
      and the result are computed in float32 or a wider dtype. What a query gets that may see no
      key (padding) is finite, and differs between programs.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    arrays = query, key, value
    if plan.implementation == XLA:
        options: dict[str, Any] = {} if drop is None else {"drop": drop.apply}
        return plain_attention.attend(*arrays, plan.bias, scale=factor, softcap=softcap, **options)
    if plan.implementation == CUDNN:
        return cudnn_attention.attend(*arrays, plan.mask, scale=factor)
    scoring = Scoring(factor, softcap, plan.bias)
    dropped = None if drop is None else (drop.rate, drop.make_key())
    return blockwise_attention.attend(*arrays, plan.mask, scoring, drop=dropped)


def choose(case: Case, implementation: str) -> str:
    """Chooses the program: "xla", "cudnn" or "blockwise".

    "auto" is cuDNN on an NVIDIA GPU, if it can compute the case (of rows with several texts, it
    needs a mask, which must not take more than a layer keeps anyway); otherwise blockwise, if the
    scores would take more memory than everything else that a layer keeps for its gradient, and
    more than :data:`FLOOR`; otherwise XLA. A call with a cache, which cuDNN does not compute, is
    "auto" where cuDNN is asked for, so that a model that is trained with it can generate.

    Raises:
      ValueError: there is no such implementation, or cuDNN is asked for and can't compute the case;
        the message has all reasons.

    >>> heads = Heads(count=32, groups=8, size=128)
    >>> case = Case(heads=heads, batch=1, queries=4096, dtype=jnp.bfloat16)
    >>> choose(case, "auto"), choose(dataclasses.replace(case, queries=512, keys=512), "auto")
    ('blockwise', 'xla')
    """
    check_attention(implementation)
    if implementation == CUDNN and not case.has_cache:
        problems = [*_cudnn_problems(case)]
        if problems:
            raise ValueError(
                f"attention can't be computed by 'cudnn': {'; '.join(problems)}. Choose 'auto', "
                "'blockwise' (memory linear in the length) or 'xla' (fast for short texts)."
            )
    if implementation in (XLA, BLOCKWISE):
        return implementation
    if implementation == CUDNN and not case.has_cache or next(_cudnn_problems(case), None) is None:
        return CUDNN
    return BLOCKWISE if _is_long(case) else XLA


def describe(case: Case, implementation: str) -> str:
    """Says which program is chosen, in a line for the report at the start of a run.

    Raises:
      ValueError: as :func:`choose`.

    >>> heads = Heads(count=16, groups=16, size=64)
    >>> describe(Case(heads=heads, batch=4, queries=2048, dtype=jnp.float32), "auto")
    'attention: blockwise (scores would take 1.1 GB a layer)'
    """
    chosen = choose(case, implementation)
    verb = "take" if chosen == XLA else "would take"
    return f"attention: {chosen} (scores {verb} {_count_score_bytes(case) / 1e9:.2g} GB a layer)"


def _count_score_bytes(case: Case) -> int:
    return 4 * case.batch * case.heads.count * case.queries * case.keys


def _is_long(case: Case) -> bool:
    sizes = (case.batch, case.queries, case.keys)
    if not all(isinstance(size, int) for size in sizes):  # symbols, while a model is exported
        return False
    return _count_score_bytes(case) > _count_kept_bytes(case)


def _count_kept_bytes(case: Case) -> int:
    """Counts what a layer keeps besides scores, or the bytes below which nobody minds."""
    width = case.heads.count * case.heads.size * jnp.dtype(case.dtype).itemsize
    return max(_KEPT * case.batch * case.queries * width, FLOOR)


def _segment_problems(case: Case) -> Iterator[str]:
    """Says what keeps cuDNN from computing rows that hold several texts."""
    if case.queries % 2 or case.keys % 2:
        yield f"rows of {case.queries} tokens hold several texts, and it takes even numbers"
    elif cudnn_attention.count_mask_bytes(case.batch, case.queries, case.keys) > _count_kept_bytes(
        case
    ):
        yield (
            f"rows of {case.queries} tokens hold several texts, whose mask would take more memory "
            "than all else that a layer keeps"
        )


def _cudnn_problems(case: Case) -> Iterator[str]:
    """Says what keeps cuDNN from computing a case."""
    yield from cudnn_attention.shape_problems(case.dtype, case.heads.size)
    if case.heads.softcap is not None:
        yield f"scores have a bound (attn_logit_softcapping {case.heads.softcap})"
    if case.heads.dropout and not case.deterministic:
        yield f"attention weights are dropped (rate {case.heads.dropout})"
    if case.has_segments:
        yield from _segment_problems(case)
    if case.heads.is_relative and not case.is_cross:
        yield "scores have terms for relative positions"
    if case.has_cache:
        yield "keys come from a cache"
    yield from cudnn_attention.device_problems()
