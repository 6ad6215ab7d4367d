"""Products of two parameters, of which one may be the input of the other.

``x @ (A @ B)`` has two kernels; ``latents @ W``, the queries that a model has learned, has one. The
product is followed as if it were a parameter with two axes, one for each side. If the inputs are
contracted with one whole side of it, both are kernels, and otherwise one of them is an input.
"""

import re
from collections.abc import Callable

from jax.extend.core import JaxprEqn

from lora_jax import factors
from lora_jax.transform import forms, origins
from lora_jax.transform.findings import (
    LOOKUP,
    PAIRED,
    Pair,
    Use,
    Walk,
    has_two_sides,
    lose,
    roles_of,
    sides_of,
)
from lora_jax.transform.origins import DATA, FIXED, Value

PAIR = "\0pair "
_TABLE = re.compile(
    r"latents?|tokens?|probes?|pos|positions?|positional|emb|embed(ding)?s?|cls|prompts?|registers?|"
    r"quer(y|ies)|slots?|tables?|anchors?|seeds?"
)
_KERNEL = {"kernel", "weight", "weights", "w"}


def follow(walk: Walk, eqn: JaxprEqn, values: tuple[Value, Value]) -> Value:
    """Records a product of two parameters, and follows it as a parameter with two axes."""
    name = f"{PAIR}{next(walk.numbers)}"
    walk.pairs.append(Pair(name, eqn, values))
    (left, right), batch = (sides_of(eqn, k) for k in (0, 1)), sides_of(eqn, 0).batch
    axes: list[frozenset] = [frozenset()] * len(batch)
    for side, (sides, value) in enumerate(zip((left, right), values, strict=True)):
        free = len(value.axes or ()) - len(sides.inputs) - len(sides.batch)
        axes += [frozenset({origins.Origin(name, side, 2)})] * free
    return origins.derive(values, axes=tuple(axes), level=max(v.level for v in values))


def resolve(walk: Walk, pair: Pair) -> None:
    """Decides, when all uses are known, whether both sides are kernels or one is the input."""
    two_sided = [u for u in walk.uses.pop(pair.name, []) if has_two_sides(u.roles)]
    walk.losses.pop(pair.name, None)
    tables = [is_table(walk, v) for v in pair.values]
    if two_sided and two_sided[0].level > FIXED and tables[0] == tables[1]:
        for side in (0, 1):
            _record_side(walk, pair, side, two_sided[0].roles[side], two_sided[0].level)
        return
    side = _kernel_side(walk, pair)
    _record_side(walk, pair, side, factors.OUT, PAIRED)
    lose(walk, pair.eqn, [pair.values[1 - side]], "is the input of a product with a parameter")


def _record_side(walk: Walk, pair: Pair, side: int, free: str, level: int) -> None:
    """Records a use of one factor of the pair, whose free axes have the role ``free``."""
    swap = str.maketrans(factors.IN + factors.OUT, factors.OUT + factors.IN)
    value, sides = pair.values[side], sides_of(pair.eqn, side)
    for name, roles in roles_of(value.axes or (), sides).items():
        swapped = roles.translate(swap) if free == factors.IN else roles
        use = Use(pair.eqn.primitive.name, swapped, level, False, forms.source(pair.eqn))
        walk.uses.setdefault(name, []).append(use)


def _kernel_side(walk: Walk, pair: Pair) -> int:
    """Chooses the kernel of two parameters, the other being its input: the likelier one."""
    is_pair = lambda v: any(n.startswith(PAIR) for n in origins.names(v.axes))
    meets_inputs = lambda v: any(
        use.level == DATA and has_two_sides(use.roles)
        for name in origins.names(v.axes)
        for use in walk.uses.get(name, [])
    )
    tests: list[Callable[[Value], bool]] = [
        lambda v: not is_pair(v),
        lambda v: not is_table(walk, v),
        meets_inputs,
        lambda v: all(_last_component(name) in _KERNEL for name in origins.names(v.axes)),
    ]
    for test in tests:
        left, right = (test(v) for v in pair.values)
        if left != right:
            return 0 if left else 1
    return 1  # `latents @ W` is written more often than `W @ latents`


def _last_component(name: str) -> str:
    return re.split(r"[/.]", name)[-1].lower()


def is_table(walk: Walk, value: Value) -> bool:
    """Tells whether a parameter holds vectors, not a map of them: by its lookups, or its name."""
    names = origins.names(value.axes)
    if any(use.primitive == LOOKUP for name in names for use in walk.uses.get(name, [])):
        return True
    words = [word for name in names for word in re.split(r"[_\d]+", _last_component(name))]
    return any(_TABLE.fullmatch(word) for word in words)
