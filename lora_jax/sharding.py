"""How a base and its adapter are laid out over the devices of a mesh.

A short table of path patterns says how a model's kernels are split; what an adapter's factors and
an optimizer's moments need follows from it. Everything here makes or takes plain JAX: trees of
``PartitionSpec``, so that any other way to make specs serves as well. GSPMD does the rest.

The axes of a mesh may have any names. Those that this library's own models use are ``data`` (rows
of a batch), ``fsdp`` (rows of a batch, and each parameter in pieces) and ``tensor`` (the inner axis
of a pair of layers: Shoeybi et al. 2019, section 3).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lora_jax import fields, paths
from lora_jax.adapter import nodes
from lora_jax.nodes import is_adapted, is_node
from lora_jax.quantized import is_quantized
from lora_jax.quantized_sharding import part_specs, with_gathering

PyTree = Any
Rules = Sequence[tuple[str, Sequence[Any]]]
Entry = tuple[str, ...]  # the mesh axes that one axis of an array is split over

AXES = DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
BATCH = PartitionSpec((DATA, FSDP))  # the spec of arrays whose first axis is the rows of a batch


def specs(
    params: PyTree,
    rules: Rules,
    mesh: Mesh | AbstractMesh,
    *,
    fill: str = FSDP,
    strict: bool = True,
) -> PyTree:
    """Makes a ``PartitionSpec`` for each parameter from a short table.

    The first rule whose pattern matches a leaf gives the spec of its *last* axes; the axes before
    them, such as the layers that a scan has stacked, stay whole. A mesh axis that does not divide
    an axis of the array is left out there. If that is the mesh axis ``fill``, it moves to the
    largest other axis of the rule that it divides. In a leaf that no rule matches, ``fill`` goes to
    the largest axis that it divides, to the first one only if no other can be divided. A leaf that
    remains whole is no error: :func:`replicated` lists it.

    Args:
      params: parameters: arrays, or anything with a shape, in any containers.
      rules: pairs of a pattern, as in ``LoRAConfig.targets``, and a spec.
      mesh: mesh whose axes the rules may name.
      fill: name of the mesh axis that is to split every leaf, if the mesh has it.
      strict: whether a pattern that matches nothing is an error.

    Returns:
      The tree of ``params`` with a ``PartitionSpec``, as long as the array's shape, for each array.

    Raises:
      ValueError: a rule names a mesh axis that does not exist, or one twice, has more entries than
        an array has axes, or (``strict``) matches nothing; all in one message.

    >>> params = {"up": {"kernel": np.zeros((3, 16, 64)), "bias": np.zeros((3, 64))}}
    >>> mesh = AbstractMesh((4, 2), ("fsdp", "tensor"))
    >>> made = specs(params, [("up/kernel", ("fsdp", "tensor"))], mesh)
    >>> tuple(made["up"]["kernel"]), tuple(made["up"]["bias"])
    ((None, 'fsdp', 'tensor'), (None, 'fsdp'))
    """
    leaves = paths.named_leaves(params)
    parsed_rules = [(pattern, [_entry(x) for x in spec]) for pattern, spec in rules]
    find_rule = lambda name: next((r for r in parsed_rules if paths.matches(r[0], name)), None)
    rule_of = {name: find_rule(name) for name in leaves}
    problems = _rule_problems(parsed_rules, mesh)
    problems += [
        f"{name!r} has {np.ndim(x)} axes, fewer than the spec of {rule[0]!r}, {_format(rule[1])}"
        for name, x in leaves.items()
        if (rule := rule_of[name]) and len(rule[1]) > np.ndim(x)
    ]
    unused = [p for p, _ in parsed_rules if not any(paths.matches(p, name) for name in leaves)]
    if strict and unused:
        problems.append(paths.describe_misses(unused, leaves, what="rules"))
    if problems:
        raise ValueError(f"These sharding rules can't be used: {'; '.join(problems)}.")
    sizes = dict(mesh.shape)
    choose = lambda name, x: _choose_spec(np.shape(x), rule_of[name], sizes, fill)
    chosen = [choose(n, x) for n, x in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_quantized), chosen)


def _entry(x: str | Sequence[str] | None) -> Entry:
    if x is None:
        return ()
    return (x,) if isinstance(x, str) else tuple(x)


def _format(entries: Iterable[Entry]) -> str:
    return str(_make_spec(entries)).replace("PartitionSpec", "P")


def _make_spec(entries: Iterable[Entry]) -> PartitionSpec:
    plain = lambda entry: entry if len(entry) > 1 else next(iter(entry), None)
    return PartitionSpec(*map(plain, entries))


def _rule_problems(
    table: Sequence[tuple[str, list[Entry]]], mesh: Mesh | AbstractMesh
) -> list[str]:
    problems = []
    for pattern, entries in table:
        used = [axis for entry in entries for axis in entry]
        where = f"the spec of {pattern!r}, {_format(entries)},"
        if unknown := sorted(set(used) - set(mesh.shape)):
            has = ", ".join(map(repr, mesh.shape))
            problems.append(f"{where} names {unknown}, and the mesh has the axes {has}")
        if twice := sorted({axis for axis in used if used.count(axis) > 1}):
            problems.append(f"{where} names {twice} twice")
    return problems


def _choose_spec(
    shape: Sequence[int], rule: tuple | None, sizes: Mapping[str, int], fill: str
) -> PartitionSpec:
    wanted = rule[1] if rule else []
    first = len(shape) - len(wanted)
    entries: list[Entry] = [()] * first
    entries += [
        _drop_indivisible(n, entry, sizes) for n, entry in zip(shape[first:], wanted, strict=True)
    ]
    is_filled = not rule or any(fill in entry for entry in wanted)
    if is_filled and fill in sizes and not any(fill in entry for entry in entries):
        _fill(entries, shape, range(first, len(shape)) if rule else range(len(shape)), sizes, fill)
    return _make_spec(entries)


def _drop_indivisible(size: int, entry: Entry, sizes: Mapping[str, int]) -> Entry:
    """Drops the mesh axes of an entry that would make pieces of different sizes."""
    divisible: Entry = ()
    for axis in entry:
        if size % (_count_pieces(divisible, sizes) * sizes[axis]) == 0:
            divisible = (*divisible, axis)
    return divisible


def _count_pieces(entry: Entry, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis in entry)


def _fill(
    entries: list[Entry],
    shape: Sequence[int],
    among: Iterable[int],
    sizes: Mapping[str, int],
    fill: str,
) -> None:
    """Puts the mesh axis ``fill`` where it divides best, if anywhere."""
    # The first axis may be that of a scan's layers, each of which would then have to be fetched.
    for k in sorted(among, key=lambda k: (k == 0, -shape[k], -k)):
        entry = (*entries[k], fill)
        if shape[k] % _count_pieces(entry, sizes) == 0:
            entries[k] = entry
            return


def adapter_specs(param_specs: PyTree, adapter: PyTree) -> PyTree:
    """Derives the specs of an adapter from those of the parameters that it is for.

    An axis of a factor is split as the axis of the kernel that it belongs to, by ``node.axes``. Its
    own axes, such as the rank, stay whole, and a scale that is an array is on every device. A leaf
    that is replaced in full is split as it is in the base.

    Args:
      param_specs: tree of the parameters with ``PartitionSpec`` or ``NamedSharding``, from any
        source.
      adapter: adapter of arrays, or of shapes.

    Returns:
      The adapter's tree with a ``PartitionSpec`` for each array.

    Raises:
      ValueError: the adapter has a path that the specs lack, or a kernel has fewer axes than its
        spec has entries.

    >>> from lora_jax.lowrank import LowRank
    >>> node = LowRank(np.zeros((16, 2)), np.zeros((2, 64)), 2.0)
    >>> kernels = {"up": PartitionSpec("fsdp", "tensor")}
    >>> made = adapter_specs(kernels, {"up": node})["up"]
    >>> tuple(made.a), tuple(made.b)
    (('fsdp', None), (None, 'tensor'))
    """
    known = {name: _as_spec(x) for name, x in paths.named_leaves(param_specs).items()}
    entries = nodes(adapter)
    if unknown := [name for name in entries if name not in known]:
        raise ValueError(
            f"The adapter has {paths.listing(unknown)}, for which there is no spec; specs here: "
            f"{paths.listing(known)}."
        )
    entry_specs = [_node_specs(name, known[name], node) for name, node in entries.items()]
    return jax.tree.unflatten(jax.tree.structure(adapter, is_leaf=is_node), entry_specs)


def _as_spec(x: Any) -> PartitionSpec:
    spec = getattr(x, "spec", x)
    if not isinstance(spec, PartitionSpec):
        raise ValueError(f"A PartitionSpec or a NamedSharding is needed for each leaf, got {x!r}.")
    return spec


def _node_specs(name: str, spec: PartitionSpec, node: Any) -> Any:
    if is_adapted(node) and len(spec) > len(node.axes):
        raise ValueError(f"{name} has {len(node.axes)} axes, fewer than its spec {spec}.")
    return fields.specs(node, spec)


def state_specs(state: PyTree, adapter: PyTree, specs: PyTree) -> PyTree:
    """Derives the specs of a state that holds trees like the adapter, such as an optimizer's.

    An array with the shape of an array of the adapter, and a path that ends in that array's path,
    is split like it: moments, averages, accumulated gradients. All else is on every device.

    Args:
      state: state of arrays, or of shapes, in any containers.
      adapter: adapter of arrays, or of shapes.
      specs: specs of the adapter, from :func:`adapter_specs`.

    >>> adapter, split = {"up": np.zeros((4, 2))}, {"up": PartitionSpec("fsdp")}
    >>> state = {"count": np.zeros(()), "mu": {"up": np.zeros((4, 2))}}
    >>> made = state_specs(state, adapter, split)
    >>> tuple(made["mu"]["up"]), tuple(made["count"])
    (('fsdp',), ())
    """
    arrays, _ = jax.tree_util.tree_flatten_with_path(adapter)
    by_path = {
        path: (np.shape(x), spec)
        for (path, x), spec in zip(arrays, jax.tree.leaves(specs), strict=True)
    }

    def spec(path: tuple, x: Any) -> PartitionSpec:
        ends = (by_path.get(path[k:]) for k in range(len(path)))
        shape, spec_of_array = next((end for end in ends if end), (None, PartitionSpec()))
        return spec_of_array if shape == np.shape(x) else PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, state)


def shardings(specs: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """Makes ``NamedSharding`` of the specs on a mesh, for ``jax.jit`` and ``jax.device_put``."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def place(tree: PyTree, specs: PyTree, mesh: Mesh) -> PyTree:
    """Puts each array of a tree where its spec says; see :func:`put`."""
    return jax.tree.map(put, tree, shardings(specs, mesh), is_leaf=is_quantized)


def put(x: Any, sharding: NamedSharding, dtype: Any = None) -> Any:
    """Puts one array onto the devices of a mesh, each device receiving its own piece alone.

    With several processes each process gives the whole array with the same values, or an array that
    already lies on the mesh. As with ``jax.device_put``, the result may share memory with ``x``: do
    not use ``x`` after the result has been donated.

    A quantized kernel is split with all its parts, along blocks; where it is split over ``fsdp``,
    its codes are gathered for a product, and not its numbers.

    Args:
      x: array to put.
      sharding: sharding of the result.
      dtype: dtype of the result where ``x`` is a numpy array of another one.
    """
    if is_quantized(x):
        specs = part_specs(x, sharding.spec, dict(sharding.mesh.shape))
        placed = jax.tree.map(put, x, shardings(specs, sharding.mesh))
        return with_gathering(placed, specs, FSDP)
    if isinstance(x, jax.Array) and (not x.is_fully_addressable or jax.process_count() == 1):
        return jax.device_put(x, sharding)
    x = np.asarray(x)
    # Pieces are copied: on a CPU a view would keep the whole array alive.
    return jax.make_array_from_callback(x.shape, sharding, lambda index: np.array(x[index], dtype))


def put_layers(
    shape: Sequence[int], dtype: Any, layers: Iterable[np.ndarray], sharding: NamedSharding
) -> jax.Array:
    """Stacks arrays along a new first axis, which stays whole, onto the devices of a mesh.

    Host memory holds the pieces of this process' devices, and one layer.

    Args:
      shape: shape of the stack.
      dtype: dtype of the result.
      layers: arrays to stack, as many as the first axis is long.
      sharding: sharding of the result.
    """
    index_of = sharding.addressable_devices_indices_map(tuple(shape))
    pieces: dict[tuple, np.ndarray] = {}  # devices that hold the same piece share it
    whole = tuple(slice(None) for _ in shape)
    keys = {device: _bounds(index or whole, shape) for device, index in index_of.items()}
    for key in keys.values():
        pieces.setdefault(key, np.empty([high - low for low, high in key], dtype))
    for k, layer in enumerate(layers):
        for (_, *rest), piece in pieces.items():
            piece[k] = layer[tuple(slice(*bounds) for bounds in rest)]
    arrays = [jax.device_put(pieces[key], device) for device, key in keys.items()]
    return jax.make_array_from_single_device_arrays(tuple(shape), sharding, arrays)


def _bounds(index: tuple, shape: Sequence[int]) -> tuple:
    return tuple(x.indices(n)[:2] for x, n in zip(index, shape, strict=True))


def replicated(params: PyTree, specs: PyTree) -> list[str]:
    """Lists the leaves that every device holds whole.

    >>> params = {"odd": np.zeros(3), "even": np.zeros(4)}
    >>> replicated(params, specs(params, (), AbstractMesh((2,), ("fsdp",))))
    ['odd']
    """
    named_specs = paths.named_leaves(specs)
    is_split = lambda name: any(map(_entry, _as_spec(named_specs[name])))
    return [name for name in paths.named_leaves(params) if not is_split(name)]


def bytes_per_device(params: PyTree, specs: PyTree, mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of bytes of the parameters that one device of the mesh holds.

    >>> mesh = AbstractMesh((8,), ("fsdp",))
    >>> bytes_per_device({"w": np.zeros((64, 2), np.float32)}, {"w": PartitionSpec("fsdp")}, mesh)
    64
    """
    sizes = dict(mesh.shape)

    def size(x: Any, spec: Any) -> int:
        if is_quantized(x):
            specs_of_parts = part_specs(x, _as_spec(spec), sizes)
            return sum(jax.tree.leaves(jax.tree.map(size, x, specs_of_parts)))
        entries = [_entry(e) for e in _as_spec(spec)]
        return (
            math.prod(x.shape)
            * x.dtype.itemsize
            // math.prod(_count_pieces(e, sizes) for e in entries)
        )

    return sum(jax.tree.leaves(jax.tree.map(size, params, specs, is_leaf=is_quantized)))


def split_rows(x: jax.Array) -> jax.Array:
    """Keeps the first axis of an activation, the rows of a batch, split over ``data`` and ``fsdp``.

    It is for a model's residual stream, where the compiler might otherwise split an activation as
    the kernels are, and gather the rows of the whole batch on each device. It acts in functions
    that are compiled under ``jax.set_mesh(mesh)``; elsewhere, or if the rows can't be divided, it
    does nothing.
    """
    return _constrain(x, (DATA, FSDP))


def split_lookup(x: jax.Array) -> jax.Array:
    """Does as :func:`split_rows`, for rows of a table whose columns are split over ``fsdp``.

    Each device looks up its columns for the rows of its neighbours along ``fsdp``, and then they
    exchange them; the compiler alone would look up all rows on every device.
    """
    columns = _select_axes(jax.sharding.get_abstract_mesh(), (FSDP,), x.shape[-1])
    return split_rows(_constrain(x, (DATA,), last=columns) if columns else x)


def _constrain(x: jax.Array, rows: Entry, last: Entry = ()) -> jax.Array:
    axes = _select_axes(jax.sharding.get_abstract_mesh(), rows, x.shape[0])
    if not axes and not last:
        return x
    return jax.lax.with_sharding_constraint(x, _make_spec([axes, *[()] * (x.ndim - 2), last]))


def count_parts(size: int, axes: Entry) -> int:
    """Returns the number of parts that an activation's axis has under ``jax.set_mesh(mesh)``.

    It is 1 without a mesh, or if the axes of the mesh do not divide the size.

    Args:
      size: size of the axis.
      axes: names of the mesh axes that it is split over; those that the mesh lacks do not count.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return _count_pieces(_select_axes(mesh, axes, size), dict(mesh.shape))


def _select_axes(mesh: AbstractMesh, axes: Entry, size: int) -> Entry:
    """Returns those of the axes that the mesh has, if they divide the size; else none."""
    sizes = dict(mesh.shape)
    axes = tuple(name for name in axes if sizes.get(name, 1) > 1)
    return () if size % _count_pieces(axes, sizes) else axes
