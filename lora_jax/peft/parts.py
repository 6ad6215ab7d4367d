"""``Part``: what one tensor of a PEFT file holds."""

from typing import NamedTuple

from lora_jax.names import Weight

PREFIX = "base_model.model."
TRAINED, BASE, TOKENS, BETA = "trained", "base", "tokens", "beta"


class Part(NamedTuple):
    """One tensor of the file.

    Attributes:
      role: what it holds of the weight: a field of its node by name, ``TRAINED`` for a weight that
        is trained in full, ``TOKENS`` for trained rows of it, ``BETA`` for the trained term of a
        bias, or ``BASE`` for that of the base.
      weight: weight of the model.
      shape: shape in the file.
      letters: letters of the axes of a field; see :mod:`lora_jax.peft.layouts`.
      others: names with which it is read, too.
    """

    role: str
    weight: Weight
    shape: tuple[int, ...]
    letters: str = ""
    others: tuple[str, ...] = ()
