"""``lift``: a function of arrays becomes a function of low-rank sums, evaluated factored.

``lift(fn)`` traces ``fn`` to a jaxpr, in which each node of a method (see :mod:`lora_jax.nodes`) is
the array that it stands for, and :mod:`lora_jax.transform.interpreter` evaluates the jaxpr.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from lora_jax import hints
from lora_jax.nodes import Adapted, Node, Trained, is_adapted, is_adapted_kernel, is_node, terms
from lora_jax.quantized import is_quantized
from lora_jax.transform import origins, roles
from lora_jax.transform.control import evaluate
from lora_jax.transform.deferred import Deferred, materialize
from lora_jax.transform.findings import Findings
from lora_jax.transform.forms import body_of, has_places, varying_axes
from lora_jax.transform.interpreter import OUTPUT, Event, Scope, fall_back
from lora_jax.transform.kernel import Kernel

Array = jax.Array
PyTree = Any
Rate = Array | float | None
P = ParamSpec("P")
R = TypeVar("R")


def lift(
    fn: Callable[P, R],
    *,
    strict: bool = False,
    dropout: Rate = None,
    dropout_key: Array | None = None,
) -> Callable[P, R]:
    """Transforms ``fn`` into a function that takes low-rank sums in place of arrays.

    ``lift(fn)(bind(params, adapter), *args)`` equals ``fn(merge(params, adapter), *args)`` up to
    rounding, but computes ``x·W + s·(x·A)·B`` and never forms ``W + s·BA`` or its gradient (Hu et
    al. 2021, eq. 3). It composes with ``jit``, ``grad``, ``vmap``, ``scan``, ``checkpoint`` and
    sharding; arguments other than low-rank sums are passed to ``fn`` as they are.

    Args:
      fn: any function that JAX can trace.
      strict: whether to raise where a sum cannot stay factored, instead of forming ``W + s·BA``.
      dropout: rate in [0, 1) of the dropout on the input of each low-rank branch, a Python or JAX
        scalar; every use of a kernel draws its own mask. A looked-up row counts as one input. None
        is the adapter's own rate, ``LoRAConfig.dropout``; for evaluation give 0.0.
      dropout_key: PRNG key for the dropout.

    Raises:
      ValueError: a rate has no key or is out of range; in the lifted function: the adapter has a
        rate, and neither a key nor a rate is given; there is a fallback with ``strict`` or with
        dropout, which a formed ``W + s·BA`` cannot have, except that a kernel may be returned.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((1, 3))
    >>> fn = lambda params, x: x @ params["w"]
    >>> config = lora.LoRAConfig(rank=1, targets=("w",))
    >>> adapter = lora.init(jax.random.key(0), fn, params, config, x)
    >>> lora.lift(fn)(lora.bind(params, adapter), x)
    Array([[3., 3.]], dtype=float32)
    """
    hints.check_function(fn)
    rate = _check_dropout(dropout, dropout_key)

    @functools.wraps(fn)
    def lifted(*args: P.args, **kwargs: P.kwargs) -> R:
        scope = Scope(strict=strict, rate=rate, key=dropout_key)
        return _run(scope, fn, args, kwargs, use_node_rates=dropout is None)

    return lifted


def measure_inputs(fn: Callable) -> Callable:
    """Transforms ``fn`` into one in which low-rank terms measure the inputs of their kernels.

    It computes what ``fn`` does with the frozen kernels. The gradient by a factor ``a`` says what
    the kernel's inputs are like: see :mod:`lora_jax.transform.input_moments`.

    Raises:
      ValueError: in the new function: a kernel is used in another way than as a factor.
    """

    @functools.wraps(fn)
    def measuring(*args: Any, **kwargs: Any) -> Any:
        return _run(Scope(strict=True, measures=True), fn, args, kwargs)

    return measuring


def _check_dropout(rate: Rate, key: Array | None) -> Rate:
    if rate is None:
        return None
    if isinstance(rate, int | float):
        if not 0 <= rate < 1:
            raise ValueError(f"dropout must be in [0, 1), got {rate}.")
        if rate == 0:
            return None
    if key is None:
        raise ValueError(
            f"dropout={rate} needs a PRNG key: lift(fn, dropout={rate}, dropout_key=key)"
        )
    return rate


def trace(fn: Callable, args: tuple, kwargs: dict) -> list[Event]:
    """Lists the uses of the low-rank sums in ``args`` by ``fn``, without running it.

    Arrays and ``jax.ShapeDtypeStruct`` are both accepted.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs))
    abstract = [k for k, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)]
    events: dict[tuple, Event] = {}
    scope = Scope(events=events)

    def run(*values: Array) -> Any:
        filled = dict(zip(abstract, values, strict=True))
        merged = [filled.get(k, x) for k, x in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(treedef, merged)
        return _run(scope, fn, args, kwargs)

    jax.eval_shape(run, *[leaves[k] for k in abstract])
    return list(events.values())


def trace_roles(
    fn: Callable, params: PyTree, args: tuple, kwargs: dict, *, names: Mapping[int, str]
) -> Findings:
    """Finds out how ``fn(params, *args, **kwargs)`` uses its parameters, without running it.

    Args:
      fn: any function that JAX can trace.
      params: its parameters, arrays or ``jax.ShapeDtypeStruct``.
      args: its other arguments, of the same kinds.
      kwargs: its keyword arguments, of the same kinds.
      names: names of the leaves of ``params`` to follow, by the number of the leaf.
    """
    leaves, treedef = jax.tree.flatten((params, args, kwargs))
    n_params = len(jax.tree.leaves(params))
    is_input = lambda k, x: k >= n_params and isinstance(x, jax.Array | np.ndarray)
    needed = [k for k, x in enumerate(leaves) if k in names or isinstance(x, jax.ShapeDtypeStruct)]
    inputs = [k for k, x in enumerate(leaves) if is_input(k, x)]
    try:
        closed = _make_jaxpr(fn, leaves, treedef, traced=sorted({*needed, *inputs}))
    except Exception:
        # The function needs the values of its inputs, for an `if` or a shape. Then they are
        # constants of the jaxpr, and can't be told from other constants.
        inputs = []
        closed = _make_jaxpr(fn, leaves, treedef, traced=needed)
    traced = sorted({*needed, *inputs})
    named = lambda k: origins.parameter_value(names[k], len(leaves[k].shape))
    other = lambda k: roles.input_value(leaves[k]) if k >= n_params else origins.Value()
    values = [named(k) if k in names else other(k) for k in traced]
    # A batch that is closed over is the input where no argument is one: keys are none.
    has_inputs = any(v.level == origins.DATA for v in values)
    return roles.find_roles(closed, values, consts_are_data=not has_inputs)


def _make_jaxpr(
    fn: Callable, leaves: Sequence, treedef: Any, *, traced: Sequence[int]
) -> ClosedJaxpr:
    def run(*values: Array) -> Any:
        filled = dict(zip(traced, values, strict=True))
        merged = [filled.get(k, x) for k, x in enumerate(leaves)]
        params, args, kwargs = jax.tree.unflatten(treedef, merged)
        return fn(params, *args, **kwargs)

    return jax.make_jaxpr(run)(*[leaves[k] for k in traced])


def _run(
    scope: Scope, fn: Callable, args: tuple, kwargs: dict, *, use_node_rates: bool = False
) -> Any:
    is_leaf = lambda x: is_node(x) or is_quantized(x)
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_leaf)
    leaves = [_form(leaf) if is_node(leaf) else leaf for leaf in leaves]
    nodes = {k: leaf for k, leaf in enumerate(leaves) if is_adapted(leaf) or is_quantized(leaf)}

    def call(*kernels: Array) -> Any:
        filled = dict(zip(nodes, kernels, strict=True))
        merged = [filled.get(k, x) for k, x in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(treedef, merged)
        return fn(*args, **kwargs)

    if not nodes:
        return call()
    # Only the kernels are traced here. Everything else is closed over and so reaches `fn` as it
    # was given: flags stay Python values, concrete arrays stay concrete, outer tracers outer.
    values = [_make_value(node, use_node_rates=use_node_rates) for node in nodes.values()]
    kernels = [v for v in values if isinstance(v, Kernel)]
    varies = any(_has_varying_factors(k) for k in kernels)
    scope = dataclasses.replace(_check_key(scope, kernels), varies=varies)
    closed, shapes = jax.make_jaxpr(call, return_shape=True)(*map(_find_type, values))
    outs = evaluate(scope, body_of(closed), values)
    outs = [fall_back(scope, x, OUTPUT, "is returned by the function") for x in outs]
    return jax.tree.unflatten(jax.tree.structure(shapes), outs)


def _form(node: Node) -> Any:
    """Forms what a node stands for where that is no kernel; returns the node itself otherwise."""
    if isinstance(node, Trained):
        return node.value
    if not is_adapted(node) or is_adapted_kernel(node) or node.w is None:
        return node
    return node.merge(node.w)


def _make_value(leaf: Any, *, use_node_rates: bool) -> Kernel | Deferred | Array:
    if is_quantized(leaf):
        return _defer(leaf)
    return _make_kernel(leaf, leaf.dropout if use_node_rates else 0.0)


def _defer(w: Any) -> Any:
    """Makes of a frozen kernel what the interpreter carries: one that is quantized stays so.

    Where its type would say more than shape and dtype, as in a ``shard_map`` or with explicit
    sharding, it becomes an array at once.
    """
    if not is_quantized(w):
        return w
    value = Deferred(w)
    return materialize(value) if has_places(value) else value


def _find_type(value: Any) -> Any:
    """Finds what a function is traced with in place of a kernel."""
    w = value.w if isinstance(value, Kernel) else value
    return w.aval if isinstance(w, Deferred) else w


def _has_varying_factors(kernel: Kernel) -> bool:
    """Tells whether a factor varies over devices over which its kernel does not."""
    parts = [x for x in (kernel.a, kernel.b, kernel.gain) if x is not None]
    return bool(frozenset().union(*map(varying_axes, parts)) - varying_axes(kernel.w))


def _check_key(scope: Scope, kernels: list[Kernel]) -> Scope:
    dropping = next((k for k in kernels if k.rate), None)
    if dropping is None and scope.rate is None:
        return dataclasses.replace(scope, key=None)
    if scope.key is None and dropping is not None:  # `lift` checks a rate of its own
        raise ValueError(
            f"The adapter has dropout {dropping.rate} (at {dropping.names[0]!r}), and there is no "
            "key for it: give lift(fn, dropout_key=...) while training, lift(fn, dropout=0.0) for "
            "evaluation."
        )
    return scope


def _make_kernel(node: Adapted, rate: float) -> Kernel:
    if node.w is None:
        raise ValueError(
            "Got an adapter where a bound tree is expected; "
            "call lift(fn)(bind(params, adapter), ...)."
        )
    a, b, gain, side = terms(node, node.w)
    return Kernel(
        w=_defer(node.w),
        a=a,
        b=b,
        gain=gain,
        axes=node.axes,
        gain_side=side,
        names=(node.name,),
        rate=rate if node.has_dropout else None,
    )
