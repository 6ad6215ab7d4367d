"""The methods of adaptation in PEFT's files: the words that ask for each, and its tensors.

A method is a row of :data:`METHODS`. All else in this package follows from it: which tensors a file
must hold, how they become a node, which words a node is written with, and what
:class:`~lora_jax.config.LoRAConfig` a directory is read as.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax import names
from lora_jax.factors import BATCH
from lora_jax.lowrank import LowRank
from lora_jax.methods.dora import DoRA, compute_norms
from lora_jax.methods.offset import Offset
from lora_jax.names import Weight
from lora_jax.nodes import Adapted
from lora_jax.peft import initial_values


class Tensor(NamedTuple):
    """One tensor of an adapted module in the file.

    Attributes:
      field: field of the node that it holds.
      letters: one letter for each of its axes; see :mod:`lora_jax.peft.layouts`.
      ending: ending of its name, behind that of the module.
      of_embedding: ending for an embedding.
      others: endings with which it is read, too.
    """

    field: str
    letters: str
    ending: str
    of_embedding: str
    others: tuple[str, ...] = ()

    def find_ending(self, weight: Weight) -> str:
        """Returns the ending of the name for a weight."""
        return self.of_embedding if names.kind(weight) == names.EMBEDDING else self.ending


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What a node is made of when it has been read.

    Attributes:
      node: class of the node.
      values: fields of the node that the file has, by name, with the axis of layers first.
      scale: number that the product of the factors is multiplied by.
      axes: role of each axis of the kernel.
      name: path of the kernel, for messages.
      kernel: frozen kernel of the base: an array, a quantized one, or only its shape.
    """

    node: type[Adapted]
    values: Mapping[str, np.ndarray]
    scale: float
    axes: str
    name: str
    kernel: Any


def _make_node(reading: Reading) -> Adapted:
    """Makes a node that has a scale, and whose other fields are all in the file."""
    return reading.node(**reading.values, scale=reading.scale, axes=reading.axes)


def _make_dora(reading: Reading) -> Adapted:
    """Makes a node with the norms of the base's kernel, of which PEFT's files have none."""
    if isinstance(reading.kernel, jax.ShapeDtypeStruct):
        raise ValueError(
            "is adapted by DoRA, which needs the numbers of the base, and there is only a shape; "
            "give the parameters themselves"
        )
    norm = np.asarray(compute_norms(reading.kernel, reading.axes))
    values = {**reading.values, "norm": norm}
    return reading.node(**values, scale=reading.scale, axes=reading.axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """How the nodes of one class stand in PEFT's files.

    Attributes:
      node: class of the nodes.
      words: words that ask for it, which have other values otherwise.
      tensors: tensors of each adapted module.
      config: fields of ``LoRAConfig`` for such an adapter.
      make_node: function that makes a node of what was read. It raises ``ValueError``, with a
        message that goes on from the name of the kernel, where it can't.
      spares: kinds of weights that PEFT adapts as plain LoRA in spite of the words.
    """

    node: type[Adapted]
    words: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    config: Mapping[str, Any]
    make_node: Callable[[Reading], Adapted] = _make_node
    spares: tuple[str, ...] = ()

    def field_axes(self, field: str) -> str:
        """Returns the letters of the axes that a field has for one layer."""
        return self.node.table[field].axes.replace(BATCH, "")


_FACTORS = (
    Tensor("a", "ri", ".lora_A.weight", ".lora_embedding_A"),
    Tensor("b", "or", ".lora_B.weight", ".lora_embedding_B"),
)
_MAGNITUDE = Tensor(
    "magnitude",
    "o",
    ".lora_magnitude_vector",
    ".lora_magnitude_vector",
    others=(".lora_magnitude_vector.weight",),
)


def _make_computed(init: str) -> Method:
    """Makes the row of first values that are computed from the base."""

    def make_node(reading: Reading) -> Adapted:
        first = {"a0": reading.values["a"], "b0": reading.values["b"]}
        node = Offset(**reading.values, **first, scale=reading.scale, axes=reading.axes)
        return initial_values.rebuild(node, reading.kernel, init)

    return Method(
        node=Offset,
        words={"init_lora_weights": init},
        tensors=_FACTORS,
        config={"method": "lora", "init": init},
        make_node=make_node,
        spares=(names.EMBEDDING,),
    )


# The first has no words of its own: it is what PEFT does if nothing else is asked for.
METHODS: tuple[Method, ...] = (
    Method(node=LowRank, words={}, tensors=_FACTORS, config={"method": "lora"}),
    Method(
        node=DoRA,
        words={"use_dora": True},
        tensors=(*_FACTORS, _MAGNITUDE),
        config={"method": "dora"},
        make_node=_make_dora,
    ),
    *map(_make_computed, initial_values.COMPUTED),
)


def find_method(words: Mapping[str, Any]) -> Method:
    """Returns the method that words ask for.

    Raises:
      ValueError: they ask for several.
    """
    plain, *others = METHODS
    wanted = [m for m in others if all(words.get(n) == v for n, v in m.words.items())]
    if len(wanted) > 1:
        asked = " and ".join(describe_words(m) for m in wanted)
        raise ValueError(f"{asked} can't be read together")
    return wanted[0] if wanted else plain


def find_method_for(words: Mapping[str, Any], weight: Weight) -> Method:
    """Returns the method with which words adapt a weight; see :func:`find_method`."""
    method = find_method(words)
    return METHODS[0] if names.kind(weight) in method.spares else method


def find_method_of(node: Adapted, init: str = "") -> Method | None:
    """Returns the method of a node; None if it has no form in PEFT's files.

    Args:
      node: the node.
      init: word of its first values, where several go with its class.
    """
    fits = lambda m: m.node is type(node) and init in ("", m.config.get("init", init))
    return next((m for m in METHODS if fits(m)), None)


def describe_words(method: Method) -> str:
    """Describes the words that ask for a method.

    >>> describe_words(METHODS[0])
    'plain LoRA'
    """
    return ", ".join(f"{n} {v!r}" for n, v in method.words.items()) or "plain LoRA"


def find_mixture(methods: Sequence[Method]) -> str:
    """Says that words can't stand for several methods; "" if there is one at most."""
    different = list({id(m): m for m in methods}.values())
    if len(different) < 2:
        return ""
    kinds = " and ".join(repr(m.node.kind) for m in different)
    return f"its kernels are adapted by the methods {kinds}, and a file of PEFT has one"
