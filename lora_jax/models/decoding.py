"""How tokens are chosen: the settings of a decoder, and what they do to the logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How new tokens are chosen; greedily by default.

    Attributes:
      max_new_tokens: how many there are at most.
      stop: tokens that end a text; they are part of it.
      pad_id: what stands after the end.
      sample: whether tokens are drawn from the distribution of the model.
      temperature: when sampling, divides the logits.
      top_k: when sampling, only so many tokens with the highest logits; 0 for all.
      top_p: when sampling, only the fewest tokens that together have this probability (Holtzman et
        al. 2019).
      beams: the texts that beam search follows at a time; 1 for no beam search.
      length_penalty: of beam search; a text's score is its log-probability divided by its number of
        tokens to this power.
      early_stopping: of beam search, as in ``transformers``: True to end as soon as there are
        ``beams`` ended texts; False to end when the best open one scores lower at its present
        length than the worst of them; "never" to go on as long as any length could score higher.
      no_repeat_ngram: no sequence of so many new tokens occurs twice; 0 for no such rule. The
        prompt does not count, as in the LoRA paper's code (in ``transformers`` it does).

    Raises:
      ValueError: values out of their range, or settings that would have no effect.

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
        problems = [*self._out_of_range(), *self._without_effect()]
        if problems:
            raise ValueError(f"Decoding: {'; '.join(problems)}.")

    def _out_of_range(self) -> list[str]:
        least = {"max_new_tokens": 1, "beams": 1, "pad_id": 0, "top_k": 0, "no_repeat_ngram": 0}
        whole = {name: getattr(self, name) for name in least}
        whole |= {f"stop[{k}]": token for k, token in enumerate(self.stop)}
        is_whole = lambda x: isinstance(x, int) and not isinstance(x, bool)
        problems = [
            f"{name} must be a whole number of at least {least.get(name, 0)}, got {x!r}"
            for name, x in whole.items()
            if not is_whole(x) or x < least.get(name, 0)
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

    def _without_effect(self) -> list[str]:
        needs = {"temperature": "sample=True", "top_k": "sample=True", "top_p": "sample=True"}
        if self.sample:
            needs = {"beams": "sample=False"}
        if self.beams == 1:
            needs |= dict.fromkeys(("length_penalty", "early_stopping"), "beams above 1")
        return [
            f"{field.name} is {getattr(self, field.name)!r}, which has an effect with "
            f"{needs[field.name]} only"
            for field in dataclasses.fields(self)
            if field.name in needs and getattr(self, field.name) != field.default
        ]


def is_stop(tokens: Array, stop: tuple[int, ...]) -> Array:
    """Whether each token is one of those that end a text."""
    ends = jnp.zeros(tokens.shape, bool)
    for token in stop:
        ends |= tokens == token
    return ends


def filtered(logits: Array, decoding: Decoding) -> Array:
    """Logits ``(batch, vocab)`` of the distribution that is sampled: temperature, top-k, top-p."""
    logits = logits / decoding.temperature
    if decoding.top_k:
        logits = top_k(logits, decoding.top_k)
    return top_p(logits, decoding.top_p) if decoding.top_p < 1 else logits


def top_k(logits: Array, k: int) -> Array:
    """Minus infinity for all but the ``k`` highest logits, and those equal to the lowest of them.

    >>> top_k(jnp.array([[1.0, 3.0, 2.0]]), 2).tolist()
    [[-inf, 3.0, 2.0]]
    """
    least = lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def top_p(logits: Array, p: float) -> Array:
    """Minus infinity for each token before which, in order of probability, there is ``p`` or more.

    >>> logits = jnp.log(jnp.array([[0.2, 0.5, 0.3]]))
    >>> jnp.isfinite(top_p(logits, 0.6)).tolist()
    [[False, True, True]]
    """
    order = jnp.argsort(-logits, axis=-1)
    sorted_probs = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    before = jnp.cumsum(sorted_probs, axis=-1) - sorted_probs
    # The first has nothing before it, so that one always stays.
    keep = jnp.take_along_axis(before < p, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(keep, logits, -jnp.inf)


def no_repeat(logits: Array, tokens: Array, made: Array | int, size: int) -> Array:
    """Minus infinity for each token that would repeat a sequence of ``size`` tokens.

    Args:
      logits: ``(batch, vocab)``.
      tokens: ``(batch, room)``, of which the first ``made`` are there.
      made: their number.
      size: of the sequences; 0 for no such rule.

    >>> tokens = jnp.array([[1, 2, 1, 0, 0]])
    >>> no_repeat(jnp.zeros((1, 4)), tokens, 3, 2).tolist()
    [[0.0, 0.0, -inf, 0.0]]
    """
    batch, room = tokens.shape
    if not 0 < size <= room:
        return logits
    starts = jnp.arange(room - size + 1)
    windows = tokens[:, starts[:, None] + jnp.arange(size)[None, :]]
    last = lax.dynamic_slice_in_dim(tokens, made - (size - 1), size - 1, axis=1)
    same = (windows[..., :-1] == last[:, None, :]).all(axis=-1)
    same &= (starts + size <= made)[None, :]
    rows = jnp.arange(batch)[:, None]
    banned = jnp.zeros(logits.shape, bool).at[rows, windows[..., -1]].max(same)
    return jnp.where(banned, -jnp.inf, logits)
