"""The methods of adaptation, by the names that ``LoRAConfig(method=...)`` takes.

A method is a function from a :class:`~lora_jax.methods.start.Start` to the node that a kernel
starts with. A new one is a file in this folder, with a class of nodes and such a function, and a
line in ``METHODS``.
"""

from collections.abc import Callable

from lora_jax.methods.dora import start_dora
from lora_jax.methods.initial_values import INITS
from lora_jax.methods.start import Start
from lora_jax.nodes import Adapted


def _start_lora(start: Start) -> Adapted:
    return INITS[start.init](start)


METHODS: dict[str, Callable[[Start], Adapted]] = {"lora": _start_lora, "dora": start_dora}
