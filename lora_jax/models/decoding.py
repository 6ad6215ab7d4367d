"""Chooses tokens: the settings of a decoder, and what they do to the logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How new tokens are chosen; by default, the likeliest one is.

    Attributes:
      max_new_tokens: largest number of new tokens.
      stop: tokens that end a text; they are part of it.
      pad_id: token that fills the row after the end.
      sample: whether tokens are drawn from the model's distribution.
      temperature: divisor of the logits in sampling.
      top_k: number of tokens with the highest logits that sampling chooses from; 0 for all.
      top_p: probability of the smallest set of likeliest tokens that sampling chooses from
        (Holtzman et al. 2019).
      beams: number of texts that beam search follows at a time; 1 for no beam search.
      length_penalty: exponent in beam search; the score of a text is its log-probability divided by
        its number of tokens to this power.
      early_stopping: when beam search ends, as in ``transformers``. True: as soon as there are
        ``beams`` finished texts. False: when the best open text scores lower, at its present
        length, than the worst of them. "never": when no length could give it a higher score.
      no_repeat_ngram: length of sequences of new tokens of which none occurs twice; 0 for no such
        rule. The prompt does not count, as in the LoRA paper's code (in ``transformers`` it does).

    Raises:
      ValueError: values are out of their range, or settings would have no effect.

    >>> Decoding(max_new_tokens=5, top_k=3)
    Traceback (most recent call last):
    ...
    ValueError: Decoding: top_k is 3, which has an effect with sample=True only.
    """

    max_new_tokens: int
    stop: tuple[int, ...] = ()
    pad_id: int = 0
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    no_repeat_ngram: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop))
        problems = [*self._find_invalid(), *self._find_ineffective()]
        if problems:
            raise ValueError(f"Decoding: {'; '.join(problems)}.")

    def _find_invalid(self) -> list[str]:
        minimums = {"max_new_tokens": 1, "beams": 1, "pad_id": 0, "top_k": 0, "no_repeat_ngram": 0}
        integers = {name: getattr(self, name) for name in minimums}
        integers |= {f"stop[{k}]": token for k, token in enumerate(self.stop)}
        is_integer = lambda x: isinstance(x, int) and not isinstance(x, bool)
        problems = [
            f"{name} must be a whole number of at least {minimums.get(name, 0)}, got {x!r}"
            for name, x in integers.items()
            if not is_integer(x) or x < minimums.get(name, 0)
        ]
        if not 0 < self.temperature < math.inf:
            problems.append(f"temperature must be positive, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p must be in (0, 1], got {self.top_p!r}")
        if not math.isfinite(self.length_penalty):
            problems.append(f"length_penalty must be finite, got {self.length_penalty!r}")
        if self.early_stopping not in (True, False, "never"):
            problems.append(
                f"early_stopping must be True, False or 'never', got {self.early_stopping!r}"
            )
        return problems

    def _find_ineffective(self) -> list[str]:
        conditions: dict[str, str] = dict.fromkeys(("temperature", "top_k", "top_p"), "sample=True")
        if self.sample:
            conditions = {"beams": "sample=False"}
        if self.beams == 1:
            conditions |= dict.fromkeys(("length_penalty", "early_stopping"), "beams above 1")
        return [
            f"{field.name} is {getattr(self, field.name)!r}, which has an effect with "
            f"{conditions[field.name]} only"
            for field in dataclasses.fields(self)
            if field.name in conditions and getattr(self, field.name) != field.default
        ]


def is_stop(tokens: Array, stop: tuple[int, ...]) -> Array:
    """Tells for each token, in any shape, whether it is one of those that end a text."""
    result = jnp.zeros(tokens.shape, bool)
    for token in stop:
        result |= tokens == token
    return result


def filter_logits(logits: Array, decoding: Decoding) -> Array:
    """Applies temperature, top-k and top-p to logits ``(batch, vocab)`` before a draw."""
    logits = logits / decoding.temperature
    if decoding.top_k:
        logits = keep_top_k(logits, decoding.top_k)
    return keep_top_p(logits, decoding.top_p) if decoding.top_p < 1 else logits


def keep_top_k(logits: Array, k: int) -> Array:
    """Keeps the ``k`` highest of logits ``(..., vocab)``, and sets others to minus infinity.

    Logits that equal the lowest of the ``k`` stay, too.

    >>> keep_top_k(jnp.array([[1.0, 3.0, 2.0]]), 2).tolist()
    [[-inf, 3.0, 2.0]]
    """
    lowest = lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < lowest, -jnp.inf, logits)


def keep_top_p(logits: Array, p: float) -> Array:
    """Keeps the likeliest tokens that together have probability ``p``, of logits ``(..., vocab)``.

    The logit of a token becomes minus infinity if likelier tokens together have ``p`` or more.

    >>> logits = jnp.log(jnp.array([[0.2, 0.5, 0.3]]))
    >>> jnp.isfinite(keep_top_p(logits, 0.6)).tolist()
    [[False, True, True]]
    """
    order = jnp.argsort(-logits, axis=-1)
    sorted_probs = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    before = jnp.cumsum(sorted_probs, axis=-1) - sorted_probs
    # Nothing is before the likeliest token, so that one always stays.
    keep = jnp.take_along_axis(before < p, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(keep, logits, -jnp.inf)


def ban_repeats(logits: Array, tokens: Array, length: Array | int, size: int) -> Array:
    """Sets the logit of each token that would repeat a sequence to minus infinity.

    Args:
      logits: ``(batch, vocab)``.
      tokens: integers ``(batch, max_length)``; those from ``length`` on are not read.
      length: number of tokens so far, an integer scalar.
      size: number of tokens of a sequence; 0 for no such rule.

    Returns:
      Logits ``(batch, vocab)``.

    >>> tokens = jnp.array([[1, 2, 1, 0, 0]])
    >>> ban_repeats(jnp.zeros((1, 4)), tokens, 3, 2).tolist()
    [[0.0, 0.0, -inf, 0.0]]
    """
    batch, max_length = tokens.shape
    if not 0 < size <= max_length:
        return logits
    starts = jnp.arange(max_length - size + 1)
    windows = tokens[:, starts[:, None] + jnp.arange(size)[None, :]]
    last = lax.dynamic_slice_in_dim(tokens, length - (size - 1), size - 1, axis=1)
    is_same = (windows[..., :-1] == last[:, None, :]).all(axis=-1)
    is_same &= (starts + size <= length)[None, :]
    rows = jnp.arange(batch)[:, None]
    is_banned = jnp.zeros(logits.shape, bool).at[rows, windows[..., -1]].max(is_same)
    return jnp.where(is_banned, -jnp.inf, logits)
