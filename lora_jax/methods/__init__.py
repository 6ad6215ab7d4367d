"""The methods of adaptation, by the names that ``LoRAConfig(method=...)`` takes.

A method is a function from a :class:`~lora_jax.methods.start.Start` to the node that a kernel
starts with. A new one is a file in this folder, with a class of nodes and such a function, and a
line in ``METHODS``.
"""

import functools
from collections.abc import Callable

from lora_jax.methods.adalora import start_adalora
from lora_jax.methods.dora import add_magnitudes
from lora_jax.methods.initial_values import INITS
from lora_jax.methods.lora_fa import freeze_a
from lora_jax.methods.start import Start
from lora_jax.methods.vera import start_vera
from lora_jax.nodes import Adapted


def _freeze_if_asked(start: Start, factors: Adapted) -> Adapted:
    return factors if start.train_a else freeze_a(factors, start.init)


# What methods make of factors, whose first values `LoRAConfig(init=...)` chooses. The other methods
# have first values of their own.
FROM_FACTORS: dict[str, Callable[[Start, Adapted], Adapted]] = {
    "lora": _freeze_if_asked,
    "dora": add_magnitudes,
}


def _start_from_init(method: str, start: Start) -> Adapted:
    return FROM_FACTORS[method](start, INITS[start.init](start))


METHODS: dict[str, Callable[[Start], Adapted]] = {
    **{name: functools.partial(_start_from_init, name) for name in FROM_FACTORS},
    "vera": start_vera,
    "adalora": start_adalora,
}
# Methods that may have a rank above that of the kernel, since they train no factors.
ANY_RANK = ("vera",)
# What PEFT adds to the rank that alpha is divided by.
RANK_OFFSETS = {"adalora": 1e-5}

# Fields of `LoRAConfig` that are for some methods alone.
_OWN_FIELDS: dict[str, tuple[str, ...]] = {"train_a": ("lora",), "projection_seed": ("vera",)}
# Fields for most methods that one has no use for.
_UNUSED_FIELDS: dict[str, tuple[str, ...]] = {
    "adalora": ("init", "rank_stabilized"),
    "vera": ("init", "alpha", "alpha_pattern", "rank_pattern", "rank_stabilized"),
}


def unused_fields(method: str) -> tuple[str, ...]:
    """Returns the fields of ``LoRAConfig`` that must be left at their defaults for a method.

    >>> unused_fields("lora")
    ('projection_seed',)
    """
    of_others = tuple(name for name, users in _OWN_FIELDS.items() if method not in users)
    return (*_UNUSED_FIELDS.get(method, ()), *of_others)
