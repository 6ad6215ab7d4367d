"""``explain``: where each adapted kernel stays factored, and where it is formed."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax import hints, paths
from lora_jax.adapter import bind, nodes
from lora_jax.display import make_html_table
from lora_jax.nodes import is_adapted_kernel
from lora_jax.transform import interpreter
from lora_jax.transform.lift import trace

PyTree = Any


@dataclasses.dataclass(frozen=True)
class KernelUse:
    """How one adapted kernel is used.

    Attributes:
      factored: number of uses that keep the sum factored.
      fallbacks: for each use that forms ``W + s·BA``, the primitive, the reason and the place.
    """

    factored: int
    fallbacks: tuple[str, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """The uses of each adapted kernel; prints as a table, where layers that are alike are one row.

    Attributes:
      kernels: uses by name of the kernel.
    """

    kernels: Mapping[str, KernelUse]

    def __str__(self) -> str:
        rows = [f"{len(self.kernels)} adapted kernels"]
        for name, count, use in paths.fold_alike(self.kernels):
            times = f" ({count} times)" if count > 1 else ""
            unused = "" if use.factored or use.fallbacks else " (never used)"
            counts = f"factored {use.factored}, formed {len(use.fallbacks)}"
            rows.append(f"{name}{times}: {counts}{unused}")
            rows += [f"    formed by {reason}" for reason in use.fallbacks]
        return "\n".join(rows)

    __repr__ = __str__  # so that the prompt shows the table

    def _repr_html_(self) -> str:
        """Returns the table for a notebook."""
        heads = ("kernel", "kernels", "factored", "formed", "formed by")
        rows = [
            (name, count, use.factored, len(use.fallbacks), "\n".join(use.fallbacks))
            for name, count, use in paths.fold_alike(self.kernels)
        ]
        return make_html_table(heads, rows)


def explain(
    fn: Callable, params: PyTree, adapter: PyTree, *args: Any, **kwargs: Any
) -> Explanation:
    """Tells for each adapted kernel how often it stays factored, and where ``W + s·BA`` is formed.

    Each place in the code counts once, also inside a loop. ``fn`` is traced and never run; arrays
    may be given as ``jax.ShapeDtypeStruct``. Dropout makes no difference.

    Raises:
      TypeError: ``fn`` is no function, but a module, say.
      ValueError: as :func:`lora_jax.bind`.
    """
    hints.check_function(fn)
    names = [n for n, node in nodes(adapter).items() if is_adapted_kernel(node)]
    events = trace(fn, (bind(params, adapter), *args), kwargs)
    uses = {name: [e for e in events if name in e.names] for name in names}
    return Explanation({name: _kernel_use(uses[name]) for name in names})


def _kernel_use(events: list[interpreter.Event]) -> KernelUse:
    fallbacks = [e for e in events if e.reason]
    format_source = lambda e: f" at {e.source}" if e.source else ""
    reasons = tuple(f"{e.primitive} ({e.reason}){format_source(e)}" for e in fallbacks)
    return KernelUse(len(events) - len(fallbacks), reasons)
