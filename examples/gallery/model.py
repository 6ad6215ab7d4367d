"""What a model of the gallery is: a function of parameters, and what must not be adapted in it."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

PyTree = Any
# Vectors, also where a scan stacks them.
VECTORS = r"(^|[/._])(bias|b|scale|gamma|beta|offset)(#\d+)?$"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model with small random parameters.

    Attributes:
      fn: ``fn(params, *args)`` gives arrays, in any containers.
      params: any containers of arrays.
      args: the inputs.
      lines: number of lines of user code that make ``fn`` and ``params`` of the library's model.
    """

    fn: Callable[..., PyTree]
    params: PyTree
    args: tuple[Any, ...]
    lines: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A model by name.

    Attributes:
      library: name of the distribution, such as "dm-haiku".
      name: name of the model.
      build: makes the model for a number of rows; the parameters do not depend on it.
      tables: regular expressions that name the leaves which are no kernels: tables that are looked
        up or added (embeddings, positions, class tokens) and scales.
    """

    library: str
    name: str
    build: Callable[[int], Model]
    tables: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Library and name, by which ``--only`` selects."""
        return f"{self.library}: {self.name}"

    def is_table(self, leaf: str) -> bool:
        """Whether a leaf is one that must not be adapted."""
        return any(re.search(pattern, leaf) for pattern in (*self.tables, VECTORS))


class Library:
    """The models of one library, in the order of their definitions."""

    def __init__(self, distribution: str) -> None:
        self.distribution = distribution
        self.entries: list[Entry] = []

    def model(self, name: str, *, tables: tuple[str, ...] = ()) -> Callable:
        """Registers a function of the number of rows that makes a :class:`Model`."""

        def register(build: Callable[[int], Model]) -> Callable[[int], Model]:
            entry = Entry(library=self.distribution, name=name, build=build, tables=tables)
            self.entries.append(entry)
            return build

        return register
