"""Finds out which parameters of a function are kernels, and what each of their axes is.

The jaxpr is walked, not evaluated: :mod:`.origins` says where the axes of each array come from, and
where an array whose axes come from parameters meets the inputs in a product, the axes that are
summed over are its inputs ("i"), those that are paired with axes of the other operand are batch
axes ("b"), as are those of which one entry was taken before, and the rest are outputs ("o").

An array keeps its origins only through operations whose other operands come from parameters and
constants. So what is found does not depend on the shapes of the inputs: a position embedding that
is added to a batch of one example becomes an activation there.

A jaxpr of a form that is not known is never passed over: its name is among the findings.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from lora_jax import lowrank
from lora_jax.transform import forms, origins, uses
from lora_jax.transform.forms import Body, UnknownForm
from lora_jax.transform.kernel import Unfactored
from lora_jax.transform.origins import DATA, FIXED, NOISE, Value

LOOKUP = "gather"
_CONSTANT, _INPUT = Value(), Value(level=DATA)


class Use(NamedTuple):
    """One use of one parameter.

    Attributes:
      primitive: what used it; "gather" for a lookup.
      roles: one letter for each axis.
      level: what the other operand depends on; ``PAIRED`` if it is another parameter.
      is_picked: rows of it were picked before, by something that depends on the inputs.
      source: file and line in the user's code.
    """

    primitive: str
    roles: str
    level: int
    is_picked: bool
    source: str


PAIRED = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """What a walk has found.

    Attributes:
      uses: by parameter, in the order of the code.
      losses: by parameter, where it stopped to be one, and why.
      hidden: the primitive that can't be looked into, by parameter that goes into one.
      unknown: equations of a form that is not known, with JAX's version.
    """

    uses: Mapping[str, list[Use]]
    losses: Mapping[str, list[str]]
    hidden: Mapping[str, str]
    unknown: list[str]


class _Pair(NamedTuple):
    """A product of two arrays that both come from parameters: one kernel and its input, or two."""

    name: str
    eqn: Any
    values: tuple[Value, Value]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Walk:
    """What is written down on the way; ``is_final`` is False while a loop settles."""

    uses: dict[str, list[Use]]
    losses: dict[str, list[str]]
    hidden: dict[str, str]
    unknown: list[str]
    pairs: list[_Pair]
    seen: dict[tuple, list[Value]]
    numbers: Iterator[int]
    is_final: bool = True


def find(jaxpr: Any, values: Sequence[Value], *, consts_are_data: bool = False) -> Findings:
    """Walks a closed jaxpr, given what is known of its inputs.

    Args:
      jaxpr: as ``jax.make_jaxpr`` gives it.
      values: one for each input; parameters as :func:`origins.of_parameter` makes them.
      consts_are_data: arrays that the function closes over are inputs of its.
    """
    walk = _Walk(
        uses={}, losses={}, hidden={}, unknown=[], pairs=[], seen={}, numbers=itertools.count()
    )
    body = forms.body_of(jaxpr)
    _walk(walk, body, values, consts=_INPUT if consts_are_data else _CONSTANT)
    for pair in reversed(walk.pairs):  # a pair may be a side of a later one
        _resolve(walk, pair)
    return Findings(uses=walk.uses, losses=walk.losses, hidden=walk.hidden, unknown=walk.unknown)


def _walk(walk: _Walk, body: Body, values: Sequence[Value], consts: Value = _CONSTANT) -> list:
    """What is known of the outputs of a jaxpr."""
    key = (id(body.jaxpr), walk.is_final, tuple(values))
    if key not in walk.seen:  # a function that is called twice with the same arrays
        env = dict.fromkeys(body.jaxpr.constvars, consts)
        env.update(zip(body.jaxpr.invars, values, strict=True))
        read = lambda atom: _CONSTANT if forms.is_literal(atom) else env[atom]
        for eqn in body.jaxpr.eqns:
            outs = _equation(walk, eqn, [read(x) for x in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        walk.seen[key] = [read(x) for x in body.jaxpr.outvars]
    return walk.seen[key]


def _equation(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    level = max((v.level for v in values), default=FIXED)
    if all(v.axes is None for v in values):
        return [Value(level=level)] * len(eqn.outvars)
    name = forms.name_of(eqn)
    try:
        if name in _CONTROL:
            return _CONTROL[name](walk, eqn, values)
        if name in uses.USES and (name != LOOKUP or values[1].level == DATA):
            return _use(walk, eqn, values)
        if name == LOOKUP:
            _record(walk, eqn, 0, values[0], FIXED)
        if name not in origins.REARRANGEMENTS and (body := forms.matching_body(eqn)):
            outs = _walk(walk, body, values)
            if len(outs) == len(eqn.outvars):
                return outs
        return _carried_on(walk, eqn, values)
    except UnknownForm as why:
        reason = str(why)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = forms.unknown(eqn, error)
    if reason not in walk.unknown:
        walk.unknown.append(reason)
    _lose(walk, eqn, values, f"goes into an equation that is not understood: {reason}")
    return [Value(level=level)] * len(eqn.outvars)


def _carried_on(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    """A rearrangement or an operation on each entry: the results may still be parameters."""
    if eqn.primitive.name in origins.ONE_TO_ONE and len(values) == len(eqn.outvars):
        return values
    level = max(v.level for v in values)
    if _is_opaque(eqn):
        _hide(walk, eqn, values)
        return [Value(level=level)] * len(eqn.outvars)
    values = _without_tables_beside_picked(walk, eqn, values)
    values = _without_mixed_beside_whole(values)
    why = _obstacle(eqn, values)
    if why:
        _lose(walk, eqn, values, why)
        return [Value(level=level)] * len(eqn.outvars)
    axes = origins.rearranged(eqn, values)
    if axes is None:
        axes = origins.entry_by_entry(eqn, _without_pairs(eqn, values))
        if not any(axes):
            _lose(walk, eqn, values, f"goes into {eqn.primitive.name!r}")
    like = origins.like(values, level=level)
    like = dataclasses.replace(like, is_picked=like.is_picked or _picks_by_data(eqn, values))
    return [_result(eqn, var, a, like) for var, a in zip(eqn.outvars, axes, strict=True)]


def _is_opaque(eqn: Any) -> bool:
    """Whether nobody can tell what a primitive does, and it is neither known nor entry by entry."""
    if forms.name_of(eqn) in (*origins.REARRANGEMENTS, *origins.REDUCTIONS):
        return False
    shapes = [origins.shape(x) for x in (*eqn.invars, *eqn.outvars) if hasattr(x.aval, "shape")]
    full = [shape for shape in shapes if shape]
    return len({len(shape) for shape in full}) > 1 or any(
        len({n for n in sizes if n != 1}) > 1 for sizes in zip(*full, strict=True)
    )


def _hide(walk: _Walk, eqn: Any, values: Sequence[Value]) -> None:
    _lose(walk, eqn, values, f"goes into {eqn.primitive.name!r}, which can't be looked into")
    for value in values if walk.is_final else ():
        walk.hidden.update(dict.fromkeys(origins.names(value.axes), eqn.primitive.name))


def _result(eqn: Any, var: Any, axes: Any, like: Value) -> Value:
    if axes is None:
        return Value(level=like.level)
    larger = _size(var) > max((_size(x) for x in eqn.invars), default=0)
    repeated = like.is_repeated or (eqn.primitive.name in origins.REPEATING and larger)
    return dataclasses.replace(like, axes=axes, is_repeated=repeated)


def _size(atom: Any) -> int:
    size = 1
    for n in origins.shape(atom) if hasattr(atom.aval, "shape") else ():
        size = size * n if isinstance(n, int) else size
    return size


def _without_tables_beside_picked(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    """A table that is added to picked rows (positions to words) meets the inputs there."""
    if not any(v.axes is not None and v.is_picked for v in values):
        return values
    is_table = lambda v: v.axes is not None and not v.is_picked
    _lose(walk, eqn, [v for v in values if is_table(v)], _meets(eqn))
    return [_CONSTANT if is_table(v) else v for v in values]


def _without_mixed_beside_whole(values: list[Value]) -> list[Value]:
    """What a constant matrix was multiplied with is no kernel beside a parameter that is one."""
    if all(v.is_mixed for v in values if v.axes is not None):
        return values
    return [Value(level=v.level) if v.is_mixed else v for v in values]


def _without_pairs(eqn: Any, values: list[Value]) -> list[Value]:
    """A product of two parameters is a kernel no more after a function that is not linear."""
    if eqn.primitive.name in ("add", "sub", "add_any", "neg", "mul", "div"):
        return values
    is_pair = lambda v: any(n.startswith(_PAIR) for n in origins.names(v.axes))
    return [Value(level=v.level) if is_pair(v) else v for v in values]


def _obstacle(eqn: Any, values: Sequence[Value]) -> str:
    """Why the results are no parameters any more; empty if they still are."""
    for value, atom in zip(values, eqn.invars, strict=True):
        if value.axes is not None or value.level == FIXED or not hasattr(atom.aval, "shape"):
            continue
        if atom is eqn.invars[0] and _chooses(eqn, values):
            continue
        masks = value.level == NOISE and eqn.primitive.name in origins.MULTIPLICATIVE
        if origins.shape(atom) != () and not masks:
            return _meets(eqn)
    return ""


def _chooses(eqn: Any, values: Sequence[Value]) -> bool:
    """Whether the first operand chooses among parameters, as in a ``switch`` under ``vmap``."""
    is_fixed = lambda v: v.axes is not None or v.level == FIXED
    return eqn.primitive.name == "select_n" and all(map(is_fixed, values[1:]))


def _meets(eqn: Any) -> str:
    return f"is combined by {eqn.primitive.name!r} with what depends on the inputs"


def _picks_by_data(eqn: Any, values: Sequence[Value]) -> bool:
    return eqn.primitive.name == "dynamic_slice" and any(v.level == DATA for v in values[1:])


def _lose(walk: _Walk, eqn: Any, values: Sequence[Value], why: str) -> None:
    if not walk.is_final:
        return
    where = forms.source(eqn)
    reason = f"{why} at {where}" if where else why
    for value in values:
        for name in origins.names(value.axes):
            reasons = walk.losses.setdefault(name, [])
            if reason not in reasons:
                reasons.append(reason)


# ---- Uses ----------------------------------------------------------------------------------------


def _use(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    allowed = uses.USES[eqn.primitive.name].operands
    kernels = [k for k in allowed if values[k].axes is not None]
    whole = [k for k in kernels if not values[k].is_picked and not values[k].is_mixed]
    if len(whole) == 2:
        return [_pair(walk, eqn, (values[0], values[1]))]
    # Picked rows that meet a parameter are its input, as the rows of an embedding are.
    chosen = whole or (kernels if len(kernels) == 1 else [])
    if chosen and (mixed := _mixed(eqn, values, chosen[0])):
        if not _is_table(walk, mixed):
            _record(walk, eqn, chosen[0], values[chosen[0]], FIXED)
        return [mixed]
    for k in chosen:
        others = max((v.level for n, v in enumerate(values) if n != k), default=FIXED)
        _record(walk, eqn, k, values[k], others)
    rest = [Value() if k in chosen else v for k, v in enumerate(values)]
    _lose(walk, eqn, rest, f"is the input of {eqn.primitive.name!r}")
    if eqn.primitive.name == LOOKUP:
        (axes,) = origins.rearranged(eqn, values)
        return [Value(axes=axes, level=DATA, is_picked=True)]
    return [Value(level=max(v.level for v in values))] * len(eqn.outvars)


def _mixed(eqn: Any, values: Sequence[Value], which: int) -> Value | None:
    """The product of an array with a constant matrix, if it is one: another basis of one axis."""
    if eqn.primitive.name != "dot_general" or values[1 - which].level != FIXED:
        return None
    sides, matrix = _sides(eqn, which), origins.shape(eqn.invars[1 - which])
    if len(matrix) != 2 or len(sides.inputs) != 1 or sides.batch:
        return None
    (free,) = {0, 1} - set(_sides(eqn, 1 - which).inputs)
    if matrix[free] == 1:  # a power iteration, rather
        return None
    axes, (changed,) = values[which].axes, sides.inputs
    rest = tuple(axis for k, axis in enumerate(axes) if k != changed)
    axes = (*rest, axes[changed]) if which == 0 else (axes[changed], *rest)
    return dataclasses.replace(values[which], axes=axes, is_mixed=True)


def _record(walk: _Walk, eqn: Any, operand: int, value: Value, level: int) -> None:
    if value.is_mixed and eqn.primitive.name in ("dot_general", LOOKUP):
        return  # the product with the constant was its use; a convolution's kernel is resized so
    try:
        sides = _sides(eqn, operand)
    except Unfactored as why:
        _lose(
            walk, eqn, [value], f"is used by {eqn.primitive.name!r} in a form without sides: {why}"
        )
        return
    for name, roles in _roles(value.axes, sides).items():
        use = Use(eqn.primitive.name, roles, level, value.is_picked, forms.source(eqn))
        _note(walk, name, use)


def _sides(eqn: Any, operand: int) -> uses.Sides:
    shape = origins.shape(eqn.invars[operand])
    return uses.USES[eqn.primitive.name].sides(eqn.params, operand, shape)


def _note(walk: _Walk, name: str, use: Use) -> None:
    known = walk.uses.setdefault(name, [])
    if walk.is_final and use not in known:
        known.append(use)


def _roles(axes: origins.Axes, sides: uses.Sides) -> dict[str, str]:
    """Roles of the axes of each parameter in one use.

    An axis that is no longer there was stacked: a scan or an index took one entry of it.
    """
    found: dict[str, list[set[str]]] = {}
    for k, axis in enumerate(axes):
        role = (
            lowrank.IN if k in sides.inputs else lowrank.BATCH if k in sides.batch else lowrank.OUT
        )
        for origin in axis:
            known = found.setdefault(origin.name, [set() for _ in range(origin.ndim)])
            known[origin.axis].add(role)
    # An axis that is used in two ways has no role.
    clear = {name: axes for name, axes in found.items() if all(len(roles) < 2 for roles in axes)}
    return {
        name: "".join(roles.pop() if roles else lowrank.BATCH for roles in axes)
        for name, axes in clear.items()
    }


def has_two_sides(roles: str) -> bool:
    """Whether there are inputs and outputs."""
    return lowrank.IN in roles and lowrank.OUT in roles


# ---- Products of two parameters ------------------------------------------------------------------
#
# `x @ (A @ B)` has two kernels; `latents @ W`, the queries that a model has learned, has one. The
# product is followed as if it were a parameter with two axes, one for each side. If the inputs are
# contracted with one whole side of it, both are kernels, and otherwise one of them is an input.

_PAIR = "\0pair "
_TABLE = re.compile(
    r"latents?|tokens?|probes?|pos|positions?|positional|emb|embed(ding)?s?|cls|prompts?|registers?|"
    r"quer(y|ies)|slots?|tables?|anchors?|seeds?"
)
_KERNEL = {"kernel", "weight", "weights", "w"}


def _pair(walk: _Walk, eqn: Any, values: tuple[Value, Value]) -> Value:
    name = f"{_PAIR}{next(walk.numbers)}"
    walk.pairs.append(_Pair(name, eqn, values))
    (left, right), batch = (_sides(eqn, k) for k in (0, 1)), _sides(eqn, 0).batch
    axes: list[frozenset] = [frozenset()] * len(batch)
    for side, (sides, value) in enumerate(zip((left, right), values, strict=True)):
        free = len(value.axes) - len(sides.inputs) - len(sides.batch)
        axes += [frozenset({origins.Origin(name, side, 2)})] * free
    return origins.like(values, axes=tuple(axes), level=max(v.level for v in values))


def _resolve(walk: _Walk, pair: _Pair) -> None:
    found = [u for u in walk.uses.pop(pair.name, []) if has_two_sides(u.roles)]
    walk.losses.pop(pair.name, None)
    tables = [_is_table(walk, v) for v in pair.values]
    if found and found[0].level > FIXED and tables[0] == tables[1]:
        for side in (0, 1):
            _record_side(walk, pair, side, found[0].roles[side], found[0].level)
        return
    side = _kernel_side(walk, pair)
    _record_side(walk, pair, side, lowrank.OUT, PAIRED)
    _lose(walk, pair.eqn, [pair.values[1 - side]], "is the input of a product with a parameter")


def _record_side(walk: _Walk, pair: _Pair, side: int, free: str, level: int) -> None:
    """Notes a use of one factor of the pair, whose free axes have the role ``free``."""
    swap = str.maketrans({lowrank.IN: lowrank.OUT, lowrank.OUT: lowrank.IN})
    value, sides = pair.values[side], _sides(pair.eqn, side)
    for name, roles in _roles(value.axes, sides).items():
        turned = roles.translate(swap) if free == lowrank.IN else roles
        use = Use(pair.eqn.primitive.name, turned, level, False, forms.source(pair.eqn))
        walk.uses.setdefault(name, []).append(use)


def _kernel_side(walk: _Walk, pair: _Pair) -> int:
    """Which of two parameters is the kernel, the other being its input: the likelier one."""
    is_pair = lambda v: any(n.startswith(_PAIR) for n in origins.names(v.axes))
    meets_inputs = lambda v: any(
        use.level == DATA and has_two_sides(use.roles)
        for name in origins.names(v.axes)
        for use in walk.uses.get(name, [])
    )
    tests: list[Callable[[Value], bool]] = [
        lambda v: not is_pair(v),
        lambda v: not _is_table(walk, v),
        meets_inputs,
        lambda v: all(_last(name) in _KERNEL for name in origins.names(v.axes)),
    ]
    for test in tests:
        left, right = (test(v) for v in pair.values)
        if left != right:
            return 0 if left else 1
    return 1  # `latents @ W` is written more often than `W @ latents`


def _last(name: str) -> str:
    return re.split(r"[/.]", name)[-1].lower()


def _is_table(walk: _Walk, value: Value) -> bool:
    """Whether a parameter holds vectors rather than a map of them: by its lookups, or its name."""
    names = origins.names(value.axes)
    if any(use.primitive == LOOKUP for name in names for use in walk.uses.get(name, [])):
        return True
    words = [word for name in names for word in re.split(r"[_\d]+", _last(name))]
    return any(_TABLE.fullmatch(word) for word in words)


# ---- Control flow --------------------------------------------------------------------------------


def _call(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    return _walk(walk, forms.call(eqn), values)


def _branches(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    """A result that is a parameter in each branch is one, whatever chooses the branch."""
    level = values[0].level
    outs = [_walk(walk, body, values[1:]) for body in forms.cond(eqn)]
    return [_joined(branches, level) for branches in zip(*outs, strict=True)]


def _joined(values: Sequence[Value], level: int = FIXED) -> Value:
    level = max(level, *(v.level for v in values))
    axes = [v.axes for v in values if v.axes is not None]
    lost = not axes or any(v.axes is None and v.level == DATA for v in values)
    if lost or len({len(a) for a in axes}) > 1:
        return Value(level=level)
    return origins.like(values, axes=origins.union(axes), level=max(v.level for v in values))


def _settled(
    walk: _Walk, carry: list[Value], step: Callable[[_Walk, list[Value]], list[Value]]
) -> list[Value]:
    """What is known of a loop's carry in every iteration."""
    quiet = dataclasses.replace(
        walk, is_final=False, uses={}, losses={}, hidden={}, unknown=[], pairs=[]
    )
    while True:
        after = [_kept(old, new) for old, new in zip(carry, step(quiet, carry), strict=True)]
        if after == carry:
            return carry
        carry = after


def _kept(old: Value, new: Value) -> Value:
    """A carry that leaves the loop's body as another parameter is not followed."""
    level = max(old.level, new.level)
    if old.axes is None or old.axes != new.axes:
        return Value(level=level)
    return origins.like([old, new], axes=old.axes, level=level)


def _scan(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    form = forms.scan(eqn)
    consts, carry, xs = form.split(values)
    slices = [v if v.axes is None else dataclasses.replace(v, axes=v.axes[1:]) for v in xs]
    step = lambda walk, carry: _walk(walk, form.body, [*consts, *carry, *slices])
    before = list(carry)
    carry = _settled(walk, list(carry), lambda walk, carry: step(walk, carry)[: len(carry)])
    _lose_changed(walk, eqn, before, carry)
    outs = step(walk, carry)
    stacked = [
        v if v.axes is None else dataclasses.replace(v, axes=(frozenset(), *v.axes))
        for v in outs[len(carry) :]
    ]
    return [*carry, *stacked]


def _lose_changed(walk: _Walk, eqn: Any, before: list[Value], after: list[Value]) -> None:
    lost = [b for b, a in zip(before, after, strict=True) if a.axes is None]
    _lose(walk, eqn, lost, f"is changed by the body of {eqn.primitive.name!r}")


def _while(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    form = forms.while_loop(eqn)
    test_consts, body_consts, before = form.split(values)
    step = lambda walk, carry: _walk(walk, form.body, [*body_consts, *carry])
    carry = _settled(walk, list(before), step)
    _lose_changed(walk, eqn, list(before), carry)
    _walk(walk, form.test, [*test_consts, *carry])
    step(walk, carry)
    return carry


def _linear_solve(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    """``lax.custom_linear_solve``: the matrix is a constant of functions of a vector."""
    rest = values
    for body, n_consts in forms.linear_solve(eqn):
        consts, rest = rest[:n_consts], rest[n_consts:]
        if body is not None:
            _walk(walk, body, [*consts, *[_INPUT] * (len(body.jaxpr.invars) - n_consts)])
    return [Value(level=max(v.level for v in values))] * len(eqn.outvars)


def _pallas(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    """``pallas_call``: the body reads blocks through references, and writes to others."""
    body, operands = forms.pallas(eqn)
    refs = []
    for operand, ref in zip(operands, body.jaxpr.invars, strict=False):
        value = values[operand]
        kept = [] if value.axes is None else forms.kept_axes(eqn, operand)
        fits = value.axes is None or len(kept) == len(origins.shape(ref))
        axes = tuple(value.axes[k] for k in kept) if fits and kept else None
        refs.append(dataclasses.replace(value, axes=axes))
        if not fits:
            _lose(walk, eqn, [value], "is read by 'pallas_call' in blocks of fewer axes")
    refs += [_INPUT] * (len(body.jaxpr.invars) - len(refs))
    _walk(walk, body, refs)
    return [Value(level=max(v.level for v in values))] * len(eqn.outvars)


def _read_reference(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    axes, n = values[0].axes, len(origins.shape(eqn.outvars[0]))
    if axes is None:
        return [Value(level=values[0].level)]
    # Entries of leading axes may be picked by number.
    picked = len(axes) - n
    trailing = origins.shape(eqn.invars[0])[picked:] == origins.shape(eqn.outvars[0])
    if picked < 0 or (picked and not trailing):
        raise UnknownForm(forms.unknown(eqn, "a block with other axes"))
    return [dataclasses.replace(values[0], axes=axes[picked:])]


_CONTROL: dict[str, Callable[[_Walk, Any, list[Value]], list[Value]]] = {
    "jit": _call,
    "pjit": _call,
    "closed_call": _call,
    "cond": _branches,
    "scan": _scan,
    "while": _while,
    "custom_linear_solve": _linear_solve,
    "pallas_call": _pallas,
    "get": _read_reference,
    "masked_load": _read_reference,
    "load": _read_reference,
}


def of_input(x: Any) -> Value:
    """What is known of an array that is no parameter: PRNG keys give noise, the rest is data."""
    return Value(level=NOISE if _is_key(x) else DATA)


def _is_key(x: Any) -> bool:
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return True
    return x.dtype == "uint32" and x.shape[-1:] == (2,)  # the older form
