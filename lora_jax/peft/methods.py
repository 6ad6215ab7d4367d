"""The methods of adaptation in PEFT's files: the words that ask for each, and its tensors.

A method is a row of :data:`METHODS`. All else in this package follows from it: which tensors a file
must hold, how they become a node, which words a node is written with, and what
:class:`~lora_jax.config.LoRAConfig` a directory is read as.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import names
from lora_jax.factors import BATCH, IN, OUT, delta, positions
from lora_jax.lowrank import LowRank
from lora_jax.methods import RANK_OFFSETS
from lora_jax.methods.adalora import AdaLoRA
from lora_jax.methods.dora import DoRA, DoRAOffset
from lora_jax.methods.lora_fa import FrozenA
from lora_jax.methods.offset import Offset, WithOffset, to_plain
from lora_jax.methods.output_norms import compute_norms
from lora_jax.methods.vera import Vera
from lora_jax.names import Weight
from lora_jax.nodes import Adapted
from lora_jax.peft import initial_values, translations

_ROUNDING = 1e-6  # of a sum in float32, as a part of the sum of its terms' sizes


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

    node: Callable[..., Adapted]
    values: Mapping[str, Any]
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
    values = {**reading.values, "norm": np.asarray(compute_norms(reading.kernel, reading.axes))}
    return reading.node(**values, scale=reading.scale, axes=reading.axes)


def _make_vera(reading: Reading) -> Adapted:
    return reading.node(**reading.values, axes=reading.axes)


def _find_zero_outputs(node: DoRA) -> str:
    """Finds outputs of which PEFT would divide zero by zero, so that all of its results are NaN."""
    is_zero = np.asarray(node.norm) == 0
    count = int(np.sum(is_zero & ~_has_term(node))) if np.any(is_zero) else 0
    if not count:
        return ""
    return (
        f"has {count} outputs that are zero in the base and in the factors, which PEFT's DoRA "
        "divides by their norm, zero; train the adapter, merge it, or save it with lora_jax.save"
    )


def _has_term(node: DoRA) -> np.ndarray:
    """Tells of each output whether its low-rank term is more than what rounding leaves of zero."""
    a, b, axes = jnp.asarray(node.a), jnp.asarray(node.b), node.axes
    multiply = functools.partial(delta, axes=axes, precision=jax.lax.Precision.HIGHEST)
    term, size = multiply(a, b), multiply(jnp.abs(a), jnp.abs(b))
    order = positions(axes, IN + BATCH + OUT)
    is_more = jnp.transpose(jnp.abs(term) > _ROUNDING * size, order)
    return np.asarray(jnp.any(is_more, axis=tuple(range(axes.count(IN)))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """How the nodes of one class stand in PEFT's files.

    Attributes:
      node: class of the nodes.
      words: words that ask for it, which have other values otherwise.
      tensors: tensors of each adapted module.
      config: fields of ``LoRAConfig`` for such an adapter.
      fields: words that further fields of ``LoRAConfig`` have.
      make_node: function that makes a node of what was read. It raises ``ValueError``, with a
        message that goes on from the name of the kernel, where it can't.
      find_problem: function that says why a node can't be written, with a message that goes on from
        the name of the kernel; it returns "" if nothing is the matter.
      spared: rows by which PEFT adapts weights of some kinds in spite of the words, by kind.
      alike: further classes of nodes that are written in the same way.
      kinds: kinds of weights that PEFT adapts with it; see :mod:`lora_jax.names`.
      expand: function that makes the tensors of each module of those of a file; see
        :mod:`lora_jax.peft.translations`.
      collapse: function that inverts it, and returns the words as well.
    """

    node: type[Adapted]
    words: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    config: Mapping[str, Any]
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    make_node: Callable[[Reading], Adapted] = _make_node
    find_problem: Callable[[Any], str] = lambda node: ""
    spared: "Mapping[str, Method]" = dataclasses.field(default_factory=dict)
    alike: tuple[type[Adapted], ...] = ()
    kinds: tuple[str, ...] = (names.LINEAR, names.EMBEDDING, names.CONV)
    expand: translations.Expand = translations.keep
    collapse: translations.Collapse = translations.keep_all

    def compute_divisor(self, rank: int, *, root: bool) -> float:
        """Computes what alpha is divided by: the rank, or its root with use_rslora."""
        divisor = rank + RANK_OFFSETS.get(self.config["method"], 0)
        return math.sqrt(divisor) if root else divisor

    def field_axes(self, field: str, weight: Weight) -> str:
        """Returns the letters of the axes that a field has for one layer of a weight."""
        axes = self.node.table[field].axes
        return axes if names.batch_shape(weight) else axes.replace(BATCH, "")


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


def _make_computed(plain: Method, node: type[WithOffset], init: str) -> Method:
    """Makes the row of a method with first values that are computed from the base.

    Args:
      plain: row of the method with other first values.
      node: class of nodes with an offset.
      init: word of the first values.
    """

    def make_node(reading: Reading) -> Adapted:
        first = {"a0": reading.values["a"], "b0": reading.values["b"]}
        values = {**reading.values, **first}
        made = plain.make_node(dataclasses.replace(reading, values=values))
        return initial_values.rebuild(cast("WithOffset", made), reading.kernel, init)

    return Method(
        node=node,
        words={**plain.words, "init_lora_weights": init},
        tensors=plain.tensors,
        config={**plain.config, "init": init},
        make_node=make_node,
        find_problem=lambda made: plain.find_problem(to_plain(made)),
        spared={names.EMBEDDING: plain},
    )


_LORA = Method(
    node=LowRank, words={}, tensors=_FACTORS, config={"method": "lora"}, alike=(FrozenA,)
)
_DORA = Method(
    node=DoRA,
    words={"use_dora": True},
    tensors=(*_FACTORS, _MAGNITUDE),
    config={"method": "dora"},
    make_node=_make_dora,
    find_problem=_find_zero_outputs,
)
# The first has no words of its own: it is what PEFT does if nothing else is asked for.
METHODS: tuple[Method, ...] = (
    _LORA,
    _DORA,
    *(_make_computed(_LORA, Offset, init) for init in initial_values.COMPUTED),
    *(_make_computed(_DORA, DoRAOffset, init) for init in initial_values.COMPUTED),
    Method(
        node=AdaLoRA,
        words={"peft_type": "ADALORA"},
        tensors=(
            Tensor("a", "ri", ".lora_A", ""),
            Tensor("b", "or", ".lora_B", ""),
            Tensor("e", "r1", ".lora_E", ""),
        ),
        config={"method": "adalora"},
        kinds=(names.LINEAR,),
        expand=translations.restore_triplets,
        collapse=translations.drop_triplets,
    ),
    Method(
        node=Vera,
        words={"peft_type": "VERA"},
        tensors=(
            Tensor("a", "ri", ".vera_A", ""),
            Tensor("b", "or", ".vera_B", ""),
            Tensor("lambda_b", "o", ".vera_lambda_b", ""),
            Tensor("lambda_d", "r", ".vera_lambda_d", ""),
        ),
        config={"method": "vera"},
        fields={"projection_seed": "projection_prng_key"},
        make_node=_make_vera,
        kinds=(names.LINEAR,),
        expand=translations.share_projections,
        collapse=translations.join_projections,
    ),
)


def find_method(words: Mapping[str, Any]) -> Method:
    """Returns the method that words ask for.

    Raises:
      ValueError: they ask for several.
    """
    wanted = [m for m in METHODS if all(words.get(n) == v for n, v in m.words.items())]
    # One that asks for all that another does, and for more, is meant.
    is_part = lambda m: any(m.words.items() < other.words.items() for other in wanted)
    narrowest = [m for m in wanted if not is_part(m)]
    if len(narrowest) > 1:
        asked = " and ".join(describe_words(m) for m in narrowest)
        raise ValueError(f"{asked} can't be read together")
    return narrowest[0]


def find_method_for(words: Mapping[str, Any], weight: Weight) -> Method:
    """Returns the method with which words adapt a weight; see :func:`find_method`."""
    method = find_method(words)
    return method.spared.get(names.kind(weight), method)


def find_method_of(node: Adapted, init: str = "") -> Method | None:
    """Returns the method of a node; None if it has no form in PEFT's files.

    Args:
      node: the node.
      init: word of its first values, where several go with its class.
    """
    fits = lambda m: type(node) in (m.node, *m.alike) and init in ("", m.config.get("init", init))
    return next((m for m in METHODS if fits(m)), None)


def require_method_of(node: Adapted) -> Method:
    """Returns the method of a node that has one.

    Raises:
      ValueError: it has no form in PEFT's files.
    """
    method = find_method_of(node)
    if method is None:
        raise ValueError(f"A node of the kind {node.kind!r} has no form in PEFT's files.")
    return method


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
