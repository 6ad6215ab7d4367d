"""Adapts one model and measures what came of it."""

import contextlib
import dataclasses
import datetime
import inspect
import re
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from examples.gallery.bridges import moved
from examples.gallery.model import Entry, Model
from lora_jax import paths

PyTree = Any
RANK = lora.LoRAConfig().rank
CLOSE_FLOAT32 = 2e-5  # of the largest entry: rounding of sums of some hundred terms
CLOSE_FLOAT64 = 1e-9  # what float64 leaves of a model that amplifies rounding 1e6 times


@dataclasses.dataclass(kw_only=True)
class Row:
    """What was measured of one model; JSON types only.

    Attributes:
      library: name and version.
      name: the model's name.
      about: what the model's entry says of it, a sentence.
      code: the entry's function, which makes the model, and the values that it takes from outside.
      inputs: dtypes and shapes of the arguments.
      summary: what ``lora_jax.summary`` counts.
      explanation: what ``lora_jax.explain`` says, without places in files.
      lines: number of lines of user code.
      kernels: number of leaves that "all-linear" adapts.
      tables: leaves that the model's entry excludes and that are not adapted.
      left_out: other leaves of two axes or more that are not adapted, with what `tabulate` says.
      factored: number of uses that stay factored.
      fallbacks: kernel and reason of each use that forms the full kernel.
      step0: for "op by op" and "jitted", the difference from the base at step 0 (0: the same bits).
      output: relative difference of lifted and merged outputs, in float32.
      gradient: relative difference of their gradients, in float32.
      float64: the same two in float64, where float32 left doubt.
      flops: of a gradient, lifted and merged, over full fine-tuning.
      problems: what should not be, in words.
      seconds: wall-clock time of all this.
      jax: version of JAX.
      date: day of the measurement.
    """

    library: str
    name: str
    about: str = ""
    code: str = ""
    inputs: list[str] = dataclasses.field(default_factory=list)
    summary: str = ""
    explanation: str = ""
    lines: int = 0
    kernels: int = 0
    tables: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    factored: int = 0
    fallbacks: list[str] = dataclasses.field(default_factory=list)
    step0: dict[str, float] = dataclasses.field(default_factory=dict)
    output: float | None = None
    gradient: float | None = None
    float64: list[float] = dataclasses.field(default_factory=list)
    flops: list[float] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    jax: str = jax.__version__
    date: str = dataclasses.field(default_factory=lambda: datetime.date.today().isoformat())


def measure(entry: Entry, version: str, *, depth: str = "all") -> Row:
    """Measures one model. A stage that raises becomes a problem, and the others go on.

    Args:
      entry: the model.
      version: of its library.
      depth: "trace" compiles nothing and finds which kernels are adapted and where they are formed;
        "values" compares values, too; "all" adds step 0 op by op, and the FLOPs.
    """
    start, row = time.monotonic(), Row(library=f"{entry.library} {version}", name=entry.name)
    with _problems_of(row, "building"):
        model = entry.build(2)
        _describe(entry, model, row)
        model = dataclasses.replace(model, params=moved(model.params))
        row.lines = model.lines
        config, adapter = _init(model, row)
        _count(entry, model, adapter, config, row=row)
        _other_traces(entry, model, adapter, config=config, row=row)
        if depth != "trace":
            _values(model, adapter, config=config, row=row, deep=depth == "all")
    row.seconds = time.monotonic() - start
    return row


def _describe(entry: Entry, model: Model, row: Row) -> None:
    row.about = (entry.build.__doc__ or "").strip()
    lines = inspect.getsource(entry.build).splitlines()
    start = next((k for k, line in enumerate(lines) if line.lstrip().startswith("def ")), 0)
    body = [x for x in lines[start:] if not x.lstrip().startswith('"""')]
    row.code = _settings(entry.build) + textwrap.dedent("\n".join(body))
    row.inputs = [
        f"{x.dtype}[{', '.join(map(str, x.shape))}]"
        for x in map(_abstract, jax.tree.leaves(model.args))
    ]


def _settings(build: Callable[[int], Model]) -> str:
    """The values that the function takes from the one in which it is defined, as assignments.

    By them models that one function registers are told apart.
    """
    values = inspect.getclosurevars(build).nonlocals
    data = {k: x for k, x in values.items() if isinstance(x, str | int | float | tuple | dict)}
    lines = [f"{name} = {_literal(value)}\n" for name, value in data.items()]
    return "".join([*lines, "\n" if lines else ""])


def _literal(value: Any) -> str:
    text = repr(value).replace("'", '"')
    if len(text) <= 80 or not isinstance(value, dict):
        return text
    return "{\n" + "".join(f"    {_literal(k)}: {_literal(v)},\n" for k, v in value.items()) + "}"


def _values(
    model: Model, adapter: PyTree, *, config: lora.LoRAConfig, row: Row, deep: bool
) -> None:
    with _problems_of(row, "step 0"):
        _step_zero(model, adapter, row=row, deep=deep)
    stirred = stir(model.params, adapter)
    with _problems_of(row, "lift against merge"):
        output = _compare(model, stirred, row=row, deep=deep)
        if not row.fallbacks:  # dropout refuses a kernel that is formed
            with _problems_of(row, "dropout"):
                _dropout(model, stirred, output)
    with _problems_of(row, "save and load"):
        _round_trip(model, stirred, config)


@contextlib.contextmanager
def _problems_of(row: Row, stage: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        row.problems.append(f"{stage}: {type(error).__name__}: {text[:300]}")


def _init(model: Model, row: Row) -> tuple[lora.LoRAConfig, PyTree]:
    """Adapts all linear kernels at the default rank, or at the largest lower one that is taken."""
    rank, refused = RANK, None
    while True:
        config = lora.LoRAConfig(rank=rank)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # adapters of tiny kernels are not smaller than these
            try:
                adapter = lora.init(jax.random.key(1), model.fn, model.params, config, *model.args)
                break
            except ValueError as error:
                refused, rank = refused or str(error), rank // 2
                if rank == 0:
                    raise
    if refused:
        row.problems.append(f"refuses rank {RANK} (measured at {rank}): {refused[:160]}")
    return config, adapter


def _nodes(adapter: PyTree) -> dict[str, Any]:
    return paths.named_leaves(adapter, is_leaf=lambda x: hasattr(x, "axes"))


def _count(
    entry: Entry, model: Model, adapter: PyTree, config: lora.LoRAConfig, *, row: Row
) -> None:
    names = list(_nodes(adapter))
    row.kernels = len(names)
    taken = [n for n in names if entry.is_table(n)]
    if taken:
        row.problems.append(f"takes for kernels: {paths.listing(taken)}")
    explanation = lora.explain(model.fn, model.params, adapter, *model.args)
    row.summary = lora.summary(model.params, adapter)
    row.explanation = "\n".join(map(_without_place, str(explanation).splitlines()))
    row.factored = sum(use.factored for use in explanation.kernels.values())
    for name, use in explanation.kernels.items():
        row.fallbacks += [f"{name}: {_without_place(reason)}" for reason in use.fallbacks]
        if not use.factored and not use.fallbacks:
            row.problems.append(f"never used: {name}")
    _list_left_out(entry, model, config, row=row)


def _list_left_out(entry: Entry, model: Model, config: lora.LoRAConfig, *, row: Row) -> None:
    table = lora.tabulate(model.fn, model.params, config, *model.args)
    for name, found in table.rows.items():
        if found.action == "adapted" or len(found.leaf.shape or ()) < 2:
            continue
        if not found.note:
            row.problems.append(f"not adapted, in silence: {name}")
        text = f"{name} {found.leaf.shape}: {_without_place(found.note)}"
        (row.tables if entry.is_table(name) else row.left_out).append(text)


def _without_place(reason: str) -> str:
    """A reason without the file and line, which differ between machines."""
    return re.sub(r" at [^;]*[/\\][^;]*", "", reason)


def _other_traces(
    entry: Entry, model: Model, adapter: PyTree, *, config: lora.LoRAConfig, row: Row
) -> None:
    """One row, and arguments without values, must find the same kernels."""
    init = lambda fn, args: lora.init(jax.random.key(1), fn, model.params, config, *args)
    abstract, one = jax.tree.map(_abstract, model.args), entry.build(1)
    others = {
        "abstract arguments": lambda: init(model.fn, abstract),
        "a batch of one": lambda: init(one.fn, one.args),
    }
    for name, other in others.items():
        with _problems_of(row, name):
            want, have = _axes(_nodes(adapter)), _axes(_nodes(other()))
            if have != want:
                row.problems.append(f"{name}: {_difference(want, have)}")


def _axes(nodes: dict[str, Any]) -> dict[str, str]:
    return {name: getattr(node, "axes", "") for name, node in nodes.items()}


def _difference(want: dict[str, str], have: dict[str, str]) -> str:
    words = {
        "takes also": have.keys() - want.keys(),
        "leaves out": want.keys() - have.keys(),
        "other axes for": {n for n in want.keys() & have.keys() if want[n] != have[n]},
    }
    return "; ".join(f"{word} {paths.listing(sorted(n))}" for word, n in words.items() if n)


def _abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x


def _step_zero(model: Model, adapter: PyTree, *, row: Row, deep: bool) -> None:
    base = lambda params, adapter, *args: model.fn(params, *args)
    modes = {"jitted": jax.jit} | ({"op by op": lambda f: f} if deep else {})
    for mode, wrap in modes.items():
        runs = [wrap(run)(model.params, adapter, *model.args) for run in (lifted(model.fn), base)]
        row.step0[mode] = relative(*runs)
        # JAX compiles the body of a loop in either mode.
        is_compiled = mode == "jitted" or _has_loops(model)
        if row.step0[mode] > (1e-6 if is_compiled else 0):
            row.problems.append(f"step 0 {mode} differs from the base by {row.step0[mode]:.0e}")


def _has_loops(model: Model) -> bool:
    text = str(jax.make_jaxpr(model.fn)(model.params, *model.args))
    return re.search(r"= (scan|while)\[", text) is not None


def lifted(fn: Callable, **options: Any) -> Callable:
    """The function of parameters, adapter and inputs, kept factored."""
    return lambda params, adapter, *args: lora.lift(fn, **options)(
        lora.bind(params, adapter), *args
    )


def merged(fn: Callable) -> Callable:
    """The same by its definition."""
    return lambda params, adapter, *args: fn(lora.merge(params, adapter), *args)


def stir(params: PyTree, adapter: PyTree) -> PyTree:
    """Puts noise into both factors; the change becomes a third of the kernel's size."""
    rng, leaves = np.random.default_rng(1), paths.named_leaves(params)

    def stir_node(name: str, node: Any) -> Any:
        # A kernel of zeros gets a change of the size of a small initial value.
        size = max(float(np.std(leaves[name])), 0.02)
        a = np.asarray(node.a) * (1 + 0.3 * rng.normal(size=node.a.shape))
        each = float(node.scale) * np.sqrt(node.a.shape[-1]) * max(float(np.std(a)), 1e-6)
        b = 0.3 * size / each * rng.normal(size=node.b.shape)
        cast = lambda x, like: jnp.asarray(x, like.dtype)
        return dataclasses.replace(node, a=cast(a, node.a), b=cast(b, node.b))

    return paths.nest({n: stir_node(n, node) for n, node in _nodes(adapter).items()})


def _compare(model: Model, adapter: PyTree, *, row: Row, deep: bool) -> PyTree:
    """Fills the row's differences and FLOPs; returns the lifted output."""
    (gradients, outputs), flops = _gradients(model, adapter)
    row.output, row.gradient = relative(*outputs), relative(*gradients)
    if deep:
        full = _full_flops(model)
        row.flops = [x / full for x in flops]
    if max(row.output, row.gradient) > CLOSE_FLOAT32:
        with jax.enable_x64(True):
            wide = {"params": _widened(model.params), "args": _widened(model.args)}
            results, _ = _gradients(dataclasses.replace(model, **wide), _widened(adapter))
            gradients, wide_outputs = results
            row.float64 = [relative(*wide_outputs), relative(*gradients)]
        if max(row.float64) > CLOSE_FLOAT64:
            row.problems.append("lifted and merged differ")
    return outputs[0]


def _widened(tree: PyTree) -> PyTree:
    def widen(x: Any) -> Any:
        if not isinstance(x, jax.Array) or not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        return x.astype(jnp.complex128 if jnp.iscomplexobj(x) else jnp.float64)

    return jax.tree.map(widen, tree)


def _gradients(model: Model, adapter: PyTree) -> tuple[tuple[tuple, tuple], list[float]]:
    """Gradients and outputs, of the lifted and the merged function each; and their FLOPs."""
    trained, frozen = _split(adapter)
    results, flops = [], []
    for run in (lifted(model.fn), merged(model.fn)):
        loss = lambda trained, params, *args, run=run: _probe(
            run(params, _joined(trained, frozen), *args)
        )
        program = jax.jit(jax.grad(loss, has_aux=True))
        program = program.lower(trained, model.params, *model.args).compile()
        results.append(program(trained, model.params, *model.args))
        flops.append(_flops(program))
    return tuple(zip(*results, strict=True)), flops


def _full_flops(model: Model) -> float:
    floats, rest = _split(model.params)
    loss = lambda floats, *args: _probe(model.fn(_joined(floats, rest), *args))
    return _flops(jax.jit(jax.grad(loss, has_aux=True)).lower(floats, *model.args).compile())


def _flops(program: Any) -> float:
    cost = program.cost_analysis()
    return float((cost[0] if isinstance(cost, list) else cost)["flops"])


def _split(tree: PyTree) -> tuple[list[Any], tuple]:
    """The real and complex leaves, and all that is needed to put them back."""
    is_scale = lambda path: bool(path) and getattr(path[-1], "name", None) == "scale"
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    moves = [
        hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact) and not is_scale(path)
        for path, x in leaves
    ]
    floats = [x for (_, x), move in zip(leaves, moves, strict=True) if move]
    rest = [None if move else x for (_, x), move in zip(leaves, moves, strict=True)]
    return floats, (treedef, moves, rest)


def _joined(floats: list[Any], others: tuple) -> PyTree:
    treedef, moves, rest = others
    floats = iter(floats)
    return treedef.unflatten([next(floats) if m else x for m, x in zip(moves, rest, strict=True)])


def _probe(output: PyTree) -> tuple[jax.Array, PyTree]:
    """A random linear function of the output, which amplifies no rounding, and the output."""
    rng, total = np.random.default_rng(2), 0.0
    for x in jax.tree.leaves(output):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            total += jnp.sum(jnp.real(x) * rng.normal(size=x.shape).astype(jnp.real(x).dtype))
    return total, output


def relative(have: PyTree, want: PyTree) -> float:
    """The largest difference, of each leaf relative to its largest entry.

    A leaf that is small beside the others, as the gradient of what hardly matters, is compared
    with a thousandth of the largest entry of all.
    """
    have, want = jax.tree.leaves(have), jax.tree.leaves(want)
    pairs = [(np.asarray(x), np.asarray(y)) for x, y in zip(have, want, strict=True)]
    pairs = [(x, y) for x, y in pairs if y.size and y.dtype.kind in "fc"]
    sizes = [float(np.max(np.abs(y))) for _, y in pairs]
    worst = 0.0
    for (x, y), size in zip(pairs, sizes, strict=True):
        difference = float(np.max(np.abs(x - y)))
        if not np.isfinite(difference):
            return float("inf")
        if difference:
            size = max(size, 1e-3 * max(sizes))
            worst = max(worst, difference / size if size else float("inf"))
    return worst


def _dropout(model: Model, adapter: PyTree, output: PyTree) -> None:
    # The generator makes no difference here, and this one is compiled quickly.
    key = jax.random.key(3, impl="rbg")
    dropped = jax.jit(lifted(model.fn, dropout=0.1, dropout_key=key))
    difference = relative(dropped(model.params, adapter, *model.args), output)
    if not 1e-5 < difference < float("inf"):
        raise ValueError(f"dropout changes the output by {difference}")


def _round_trip(model: Model, adapter: PyTree, config: lora.LoRAConfig) -> None:
    with tempfile.TemporaryDirectory() as directory:
        lora.save(directory, adapter, config)
        again, config_again = lora.load(directory, model.params)
    same = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), adapter, again)
    if config_again != config or not all(jax.tree.leaves(same)):
        raise ValueError("what is loaded is not what was saved")
