"""The nodes of an adapter: what a method of adaptation is, as a class with a table of its arrays.

A method is a class of nodes derived from :class:`Adapted`. From the fields of a node and the frozen
kernel it gives the terms of ``W' = gain ⊙ W + a·b``, and nothing else knows how they are made. The
class says as data, in ``table``, which axes each of its fields carries and which of them are
trained. From this table follow shapes, names in files, labels, counts, sharding, widening, and the
padding of ranks in a sweep: see :mod:`lora_jax.fields`. The decorator
:func:`lora_jax.registration.register` makes the class known by its kind.

A leaf that is trained in full is a plain array in an adapter, so that an adapter is a tree like its
parameters. :func:`as_node` turns such an array into a node with a table, too.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.display import describe_array, describe_fields
from lora_jax.factors import BATCH, OUT, WHOLE, materialize, positions, spread, wide_dtype
from lora_jax.quantized import as_array, is_quantized

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Array = jax.Array


class Field(NamedTuple):
    """What a class of nodes says of one of its arrays.

    Attributes:
      axes: one letter for each group of axes, in the array's order. "b", "i" and "o" stand for all
        axes of the kernel with this role, other letters for axes of the array's own. "r" is the
        rank: zeros along it, in every field that has it, change nothing.
      is_trained: whether the array is trained; if not, no gradient reaches it.
      scales: name of the field that this one multiplies, if it is a scale. A scale belongs to the
        structure of the tree while it is a Python float, and is a leaf if it is an array.
      has_b_rate: whether it is trained at the learning rate of the factor ``b``, which LoRA+ sets
        apart from that of ``a``.
      is_index: whether the array holds places along an axis. It is a tuple of Python integers,
        which belongs to the structure of the tree: nothing can train it, and no gradient of the
        tree meets integers.
    """

    axes: str
    is_trained: bool = True
    scales: str = ""
    has_b_rate: bool = False
    is_index: bool = False


class Terms(NamedTuple):
    """The terms of ``W' = gain ⊙ W + a·b``.

    Attributes:
      a: ``(*batch, *in, rank)``.
      b: ``(*batch, rank, *out)``, with the scale.
      gain: ``(*batch, *out)``, or ``(*batch, *in)``; None if the frozen kernel stays as it is.
      gain_side: role of the axes along which the gain varies.
    """

    a: Array
    b: Array
    gain: Array | None = None
    gain_side: str = OUT


class Node:
    """The content of an adapter for one leaf.

    Attributes:
      kind: name of the class in files.
      table: rows of its arrays, in the order of the leaves and of the arguments of the class.
    """

    kind: ClassVar[str]
    table: ClassVar[Mapping[str, Field]]
    if TYPE_CHECKING:  # each subclass is a dataclass, and this one is none
        __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def bind(self, w: Array, name: str) -> "Node":
        """Returns the node as it stands in a bound tree, for the leaf ``w`` called ``name``."""
        raise NotImplementedError

    def merge(self, w: Array) -> Array:
        """Returns the plain array that the node makes of the leaf ``w``."""
        raise NotImplementedError

    def describe_misfit(self, shape: tuple[int, ...]) -> str:
        """Says why the node is not for a leaf of a shape that its arrays fit; "" if it is."""
        return ""

    def __repr__(self) -> str:
        """Describes arrays by dtype and shape, as in ``LowRank(a=f32[768,8], ..., axes='io')``."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        is_left_out = lambda x: x is None or (isinstance(x, str | float) and not x)
        # Of a quantized kernel it is to be seen that it is one.
        describe = lambda x: repr(x) if is_node(x) or is_quantized(x) else describe_array(x)
        shown = {name: describe(x) for name, x in fields.items() if not is_left_out(x)}
        return describe_fields(type(self).__name__, shown)

    def __jax_array__(self) -> Array:
        """Refuses to be an array, for functions that take a bound tree for plain parameters.

        Raises:
          TypeError: always.
        """
        name = getattr(self, "name", "")
        leaf = f"The leaf {name!r}" if name else "A leaf"
        raise TypeError(
            f"{leaf} of the parameters is bound to an adapter, and is no array. Call "
            "lift(fn)(bound, ...) in place of fn(bound, ...), or give fn the plain arrays of "
            "merge(params, adapter)."
            if is_bound(self)
            else "An entry of an adapter is no array: bind(params, adapter) puts it onto the "
            "parameters, for lift(fn), and merge(params, adapter) makes plain arrays."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Trained(Node):
    """A leaf that the adapter replaces in full; a plain array until it is bound."""

    kind: ClassVar[str] = "full"
    table: ClassVar[Mapping[str, Field]] = {"value": Field(WHOLE)}

    value: Array

    def bind(self, w: Array, name: str) -> "Trained":
        """Returns the node itself, since the frozen leaf is not used."""
        return self

    def merge(self, w: Array) -> Array:
        """Returns the trained array."""
        return self.value


class Adapted(Node):
    """A kernel ``W' = gain ⊙ W + a·b``, alone or with the frozen ``W``: the base of every method.

    A subclass is a frozen dataclass without equality, with a field for each row of its table and
    the four below, with the defaults None, "io", "" and 0.0.

    Attributes:
      reads_kernel: whether ``terms`` makes use of the frozen kernel, which may be quantized.
      has_penalty: whether ``penalties`` are added to the loss in training.
      is_kernel: whether it has two sides; one that has not, as a bias, is formed before use.
      has_dropout: whether a lifted function may drop inputs of ``a·b``.
      w: frozen kernel in a bound tree; None in an adapter.
      axes: role of each kernel axis, for example "io"; see :mod:`lora_jax.factors`.
      name: path of the kernel in a bound tree, for messages.
      dropout: rate in [0, 1) of the dropout on the input of the branch, for :func:`lora_jax.lift`.

    Raises:
      ValueError: a scale is NaN or infinite, or the rate of dropout is out of its range.
    """

    reads_kernel: ClassVar[bool] = True
    has_penalty: ClassVar[bool] = False
    is_kernel: ClassVar[bool] = True
    has_dropout: ClassVar[bool] = True

    w: Array | None
    axes: str
    name: str
    dropout: float

    def __post_init__(self) -> None:
        notify_observers()
        for name in scales(type(self)):
            object.__setattr__(self, name, _check_scale(name, getattr(self, name)))
        for name in indices(type(self)):
            object.__setattr__(self, name, _check_index(name, getattr(self, name)))
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(
                f"The dropout of a low-rank term must be a number in [0, 1), got {self.dropout!r}; "
                "a rate that is an array is for lift(fn, dropout=rate)."
            )
        object.__setattr__(self, "dropout", float(self.dropout))  # the dataclass is frozen

    def terms(self, w: Array) -> Terms:
        """Computes the terms of the adapted kernel from the fields and the frozen kernel ``w``."""
        raise NotImplementedError

    def penalties(self) -> Array:
        """Computes what the loss is to grow by, apart from a weight, as an array of any shape.

        The mean over all entries of all nodes is what counts.
        """
        raise NotImplementedError

    def bind(self, w: Array, name: str) -> "Adapted":
        """Returns the unevaluated sum."""
        return dataclasses.replace(self, w=w, name=name)

    def merge(self, w: Array) -> Array:
        """Computes ``gain ⊙ W + a·b``, with the shape and dtype of ``w``."""
        a, b, gain, side = terms(self, w)
        if gain is not None:
            gain = spread(gain, positions(self.axes, BATCH + side), w.ndim)
        return materialize(w, a, b, self.axes, gain)


KINDS: dict[str, type[Node]] = {}  # `registration.register` fills it

_observers: list[Callable[[], bool]] = []


def observe(observer: Callable[[], bool]) -> None:
    """Registers a function that is called whenever a node is made, until it returns True.

    By it these classes become known to a library that is imported later.
    """
    _observers.append(observer)


def notify_observers() -> None:
    """Calls the observers that have not returned True yet."""
    if _observers:
        _observers[:] = [observer for observer in _observers if not observer()]


def terms(node: Adapted, w: Array) -> Terms:
    """Computes the terms of an adapted kernel, with no gradient to fields that are not trained."""
    is_frozen = lambda name: not (node.table[name].is_trained or is_static(node, name))
    frozen = [n for n, field in node.table.items() if is_frozen(n) and not field.scales]
    if frozen:
        node = dataclasses.replace(node, **{n: lax.stop_gradient(getattr(node, n)) for n in frozen})
    return node.terms(as_array(w) if node.reads_kernel else w)


def is_node(x: Any) -> "TypeIs[Node]":
    """Tells whether ``x`` is a node that this library puts in place of an array."""
    return isinstance(x, Node)


def is_adapted(x: Any) -> "TypeIs[Adapted]":
    """Tells whether ``x`` is the node of a method, not a leaf that is trained in full."""
    return isinstance(x, Adapted)


def is_adapted_kernel(x: Any) -> bool:
    """Tells whether ``x`` is the node of a method for a kernel."""
    return is_adapted(x) and x.is_kernel


def is_bound(x: Any) -> bool:
    """Tells whether ``x`` is a node that :func:`lora_jax.bind` has put into a tree."""
    return isinstance(x, Trained) or (is_adapted(x) and x.w is not None)


def as_node(x: Any) -> Node:
    """Returns the node that an entry of an adapter stands for; a plain array is trained in full."""
    return x if is_node(x) else Trained(x)


# ---- Scales, and other numbers of the structure --------------------------------------------------

LEAF_SCALES = "_leaf_scales"  # names of scales that are leaves of a node made by a tree map


def _is_number(x: Any) -> bool:
    # A mask has True and False in place of arrays, and they stay leaves. numpy's scalars are
    # numbers; its arrays without axes are arrays.
    return isinstance(x, int | float | np.floating | np.integer) and not isinstance(x, bool)


def _check_scale(name: str, value: Any) -> Any:
    if not _is_number(value):
        return value
    if not math.isfinite(value):
        raise ValueError(f"The {name} of a low-rank term must be finite, got {float(value)}.")
    return float(value)


def scales(cls: type[Node]) -> list[str]:
    """Returns the names of the fields that are scales."""
    return [name for name, field in cls.table.items() if field.scales]


def indices(cls: type[Node]) -> list[str]:
    """Returns the names of the fields that hold places along an axis."""
    return [name for name, field in cls.table.items() if field.is_index]


def _check_index(name: str, value: Any) -> tuple[int, ...]:
    array = np.asarray(value)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"The {name} of a node must be a row of whole numbers, got {value!r}.")
    return tuple(map(int, array))


def is_static(node: Node, name: str) -> bool:
    """Tells whether a field is a number of the structure, or a row of them, not a leaf."""
    return node.table[name].is_index or (
        bool(node.table[name].scales)
        and isinstance(getattr(node, name), float)
        and name not in node.__dict__.get(LEAF_SCALES, ())
    )


def saved_array(node: Node, name: str) -> Any:
    """Returns a field as it is saved; see :func:`scale_array` for scales."""
    if node.table[name].is_index:
        return np.asarray(getattr(node, name), np.int32)
    return scale_array(node, name) if node.table[name].scales else getattr(node, name)


def scale_array(node: Node, name: str = "scale") -> np.ndarray:
    """Returns a scale as it is saved: in the precision of what it scales, float32 at least."""
    value = getattr(node, name)
    if not is_static(node, name):
        return np.asarray(value)
    return np.asarray(value, _scale_dtype(node, name))


def _scale_dtype(node: Node, name: str) -> Any:
    return wide_dtype(getattr(node, node.table[name].scales).dtype)


A = TypeVar("A", bound=Adapted)


def with_array_scale(node: A) -> A:
    """Replaces the scales of a node by arrays, over which a sweep can map."""
    static = [name for name in scales(type(node)) if is_static(node, name)]
    new = {name: jnp.asarray(getattr(node, name), _scale_dtype(node, name)) for name in static}
    return dataclasses.replace(node, **new) if new else node
