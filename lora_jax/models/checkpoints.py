"""Loads and saves Hugging Face checkpoints of every family, by its table of names."""

import dataclasses
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lora_jax import names as tables
from lora_jax import paths, sharding
from lora_jax.files import safetensors_pieces, write_atomically
from lora_jax.models import hub, registry
from lora_jax.models.families import CLASSIFIER, Family
from lora_jax.models.gguf import is_gguf
from lora_jax.models.hub import Checkpoint, base_id, resolve
from lora_jax.models.layers import check_remat
from lora_jax.models.load_weights import load_params, open_tensors, shown
from lora_jax.models.tokenizer import load_tokenizer, tokenizer_files
from lora_jax.names import Name

__all__ = [
    "Checkpoint",
    "LoadOptions",
    "Loaded",
    "base_id",
    "load",
    "load_tokenizer",
    "names",
    "redraw",
    "resolve",
    "save_hf",
]

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with pretrained parameters.

    Attributes:
      model: the Linen module.
      params: its variables, ``{"params": ...}``, float32 unless another dtype was asked for.
      checkpoint: where they came from.
      base_id: content hash of the weights, "sha256:...".
      fresh: paths of the leaves that the checkpoint lacks, freshly initialised.
      family: of the model.
      head: "classifier", "causal-lm", "seq2seq-lm" or "encoder".
    """

    model: Any
    params: PyTree
    checkpoint: Checkpoint
    base_id: str
    fresh: tuple[str, ...]
    family: Family
    head: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What :func:`load` takes besides the name of a model and its head.

    Attributes:
      num_labels: outputs of a classifier. A head in the checkpoint is used if it has as many.
      key: PRNG key of what the checkpoint lacks (usually a classifier): kernels are drawn from
        ``N(0, initializer_range²)``, biases are zero. ``jax.random.key(0)`` if None.
      dtype: of the activations.
      scan_layers: whether the layers are stacked, and one is compiled for all.
      param_dtype: of the parameters, float32 or bfloat16; what is drawn here is float32.
      mesh: of the devices that the parameters are split over; None for JAX's default device.
      rules: how they are split, as for :func:`lora_jax.sharding.specs`; None for the family's own.
      remat: what training computes again to save memory: "none", "full", or the name of a policy
        in ``jax.checkpoint_policies``; see :func:`lora_jax.models.layers.rematted`.
    """

    num_labels: int = 2
    key: jax.Array | None = None
    dtype: Any = jnp.float32
    scan_layers: bool = False
    param_dtype: Any = jnp.float32
    mesh: Mesh | None = None
    rules: sharding.Rules | None = None
    remat: str = "none"


def load(name: str | Path, *, head: str, **options: Any) -> Loaded:
    """Loads a model of the family that the checkpoint's config names.

    One tensor after the other is read, cast and put where it belongs, so that host memory holds
    little more than what stays on this host's devices.

    Args:
      name: a directory or a model name; see :func:`lora_jax.models.hub.resolve`.
      head: "classifier", "causal-lm", "seq2seq-lm" or "encoder" (the backbone alone).
      **options: the fields of :class:`LoadOptions`.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      TypeError: an option that does not exist.
      ValueError: it can't be read, or does not fit; all mismatches are in one message. Or the rules
        do not fit the mesh.
    """
    given = LoadOptions(**options)
    if not isinstance(given.num_labels, int) or given.num_labels < 1:
        raise ValueError(
            f"num_labels must be a whole number of at least 1, got {given.num_labels!r}."
        )
    checkpoint = resolve(name)
    family, config = _family(checkpoint)
    check_remat(given.remat)
    labels = {"num_labels": given.num_labels} if head == CLASSIFIER else {}
    kind = _model(family, head, checkpoint)
    _check_layers(config, checkpoint)
    built = {"scan_layers": given.scan_layers, "remat": given.remat}
    model = kind(config, dtype=given.dtype, **built, **labels)
    table = family.names(config, head=head, scan_layers=given.scan_layers)
    shapes = _typed(_shapes(model, family.inputs(head)), given.param_dtype)
    places = _places(shapes, given.mesh, family.sharding if given.rules is None else given.rules)
    params, fresh = load_params(checkpoint, shapes, table, family, places=places)
    key = jax.random.key(0) if given.key is None else given.key
    params = _fill(params, fresh, key=key, stddev=_stddev(config), places=places)
    tree = {"params": paths.nest(params)}
    return Loaded(
        model=model,
        params=tree,
        checkpoint=checkpoint,
        base_id=base_id(checkpoint),
        fresh=fresh,
        family=family,
        head=head,
    )


def names(loaded: Loaded) -> list[Name]:
    """The table between the leaves of a loaded model and Hugging Face's names."""
    model = loaded.model
    return loaded.family.names(model.config, head=loaded.head, scan_layers=model.scan_layers)


def redraw(loaded: Loaded, key: jax.Array) -> PyTree:
    """The parameters with what the checkpoint lacks drawn from another key; all else is shared."""
    leaves = paths.named_leaves(loaded.params["params"])
    stddev = _stddev(loaded.model.config)
    places = {n: x.sharding for n, x in leaves.items() if isinstance(x.sharding, NamedSharding)}
    filled = _fill(leaves, loaded.fresh, key=key, stddev=stddev, places=places)
    return {"params": paths.nest(filled)}


def _family(checkpoint: Checkpoint) -> tuple[Family, Any]:
    """The checkpoint's family, and its config."""
    try:
        family = registry.find(checkpoint.config)
        return family, family.config.from_hf(checkpoint.config)
    except (ValueError, TypeError, OverflowError) as error:  # the last two: values of odd types
        raise ValueError(f"{_config_file(checkpoint)}: {error}") from error


def _config_file(checkpoint: Checkpoint) -> Path:
    whole = is_gguf(checkpoint.directory)
    return checkpoint.directory if whole else checkpoint.directory / "config.json"


def _model(family: Family, head: str, checkpoint: Checkpoint) -> Any:
    if head not in family.models:
        raise ValueError(
            f"The checkpoint {checkpoint.name!r} is of type {checkpoint.config['model_type']!r}, "
            f"which has no head {head!r} here; it has {', '.join(map(repr, family.models))}."
        )
    return family.models[head]


def _check_layers(config: Any, checkpoint: Checkpoint) -> None:
    """Sees that the files can hold so many layers, before anything is made for each of them."""
    tensors = len(open_tensors(checkpoint))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "layer" in field.name and type(value) is int and value > tensors:
            raise ValueError(
                f"{_config_file(checkpoint)} has {field.name} {value}, and the files beside it "
                f"hold {tensors} tensors: they do not belong together."
            )


def _shapes(model: Any, inputs: Sequence[Any]) -> dict[str, jax.ShapeDtypeStruct]:
    return paths.named_leaves(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])


def _typed(shapes: Mapping[str, jax.ShapeDtypeStruct], dtype: Any) -> dict[str, Any]:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"param_dtype must be a floating-point type, got {dtype!r}.")
    return {name: jax.ShapeDtypeStruct(x.shape, dtype) for name, x in shapes.items()}


def _places(
    shapes: Mapping[str, Any], mesh: Mesh | None, rules: sharding.Rules
) -> dict[str, NamedSharding]:
    if mesh is None:
        return {}
    # A family's table names what not every member has: a head of its own, a gate.
    specs = sharding.specs(paths.nest(shapes), rules, mesh, strict=False)
    return paths.named_leaves(sharding.shardings(specs, mesh))


def _stddev(config: Any) -> float:
    return getattr(config, "initializer_range", 0.02)


def _fill(
    params: Mapping[str, Any],
    fresh: Sequence[str],
    *,
    key: jax.Array,
    stddev: float,
    places: Mapping[str, NamedSharding],
) -> dict[str, Any]:
    """Initialises the fresh leaves: kernels from a normal distribution, biases with zero."""

    def values(name: str, shape: tuple[int, ...]) -> jax.Array:
        if name.endswith("/bias"):
            return jnp.zeros(shape, jnp.float32)
        # By name, so that one leaf's draw does not depend on which others are fresh.
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return stddev * jax.random.normal(own, shape, jnp.float32)

    def draw(name: str, like: Any) -> jax.Array:
        drawn = values(name, like.shape)
        return sharding.put(drawn, places[name]) if name in places else drawn

    return {name: draw(name, x) if name in fresh else x for name, x in params.items()}


def save_hf(
    directory: str | Path,
    params: PyTree,
    checkpoint: Checkpoint,
    *,
    head: str,
    labels: Sequence[str] = (),
) -> None:
    """Writes a model as a directory that ``transformers`` opens.

    Args:
      directory: made if need be.
      params: plain variables of the model (merge an adapter first), with the layers stacked or not;
        saved in float32.
      checkpoint: the base, for its config and tokeniser.
      head: as in :func:`load`.
      labels: for a classifier, the name of each class, in the order of the logits.

    Raises:
      ValueError: parameters that are not this model's, or not finite; labels that do not fit.
      OSError: a file can't be written; each file that was there is intact.
    """
    directory, labels = Path(directory), list(labels)
    if len(set(labels)) < len(labels) or bool(labels) != (head == CLASSIFIER):
        raise ValueError(
            "labels must be one different name for each class of a classifier, and none for "
            f"another head; got {labels} for the head {head!r}."
        )
    family, config = _family(checkpoint)
    kind = _model(family, head, checkpoint)
    model = kind(config, **({"num_labels": len(labels)} if labels else {}))
    leaves = paths.named_leaves(params.get("params", params))
    table = _table(family, config, head, leaves)
    architecture = family.architectures[head]
    tensors = _checked(leaves, table, model, family.inputs(head), what=architecture)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files(checkpoint).items():
        write_atomically(directory / name, content)
    shapes = {weight.hf: tables.tensor_shape(weight) for weight in tensors}
    pieces = safetensors_pieces(shapes, _values(leaves, tensors), {"format": "pt"})
    write_atomically(directory / hub.WEIGHTS, pieces)
    # Last, so that a directory with a config is complete.
    about = _config_json(checkpoint.config, architecture, labels)
    write_atomically(directory / "config.json", (json.dumps(about, indent=2) + "\n").encode())


def _config_json(base: Mapping[str, Any], architecture: str, labels: list[str]) -> dict[str, Any]:
    config = {**base, "architectures": [architecture], "torch_dtype": "float32"}
    config.pop("dtype", None)  # the newer word for torch_dtype, which would win
    if labels:
        config["id2label"] = {str(k): label for k, label in enumerate(labels)}
        config["label2id"] = {label: k for k, label in enumerate(labels)}
        config.pop("problem_type", None)  # of the base's own head
        config.pop("num_labels", None)  # said by id2label
    return config


def _table(family: Family, config: Any, head: str, leaves: Mapping[str, Any]) -> list[Name]:
    """The table for these leaves: of stacked layers or of layers one by one, whichever fits."""
    both = [family.names(config, head=head, scan_layers=scan) for scan in (False, True)]
    return max(both, key=lambda table: sum(row.flax in leaves for row in table))


def _checked(
    leaves: Mapping[str, Any], table: list[Name], model: Any, inputs: Sequence[Any], *, what: str
) -> list[tables.Weight]:
    """The tensors that the leaves stand for, after a look at every one."""
    scanned = any(tables.STACK in row.hf for row in table)
    wanted = _shapes(model.clone(scan_layers=scanned), inputs)
    known = {row.flax for row in table}
    problems = [f"{name} is missing" for name in sorted(known & set(wanted) - set(leaves))]
    problems += [f"{name} is unexpected" for name in leaves if name not in known]
    for name in [n for n in leaves if n in wanted and n in known]:
        if np.shape(leaves[name]) != wanted[name].shape:
            shapes = f"{np.shape(leaves[name])} instead of {wanted[name].shape}"
            problems.append(f"{name} has shape {shapes}")
        elif not np.isfinite(np.asarray(leaves[name])).all():
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        raise ValueError(
            f"Nothing is saved, since the parameters are not those of {what} with this config and "
            f"these labels: {shown(problems)}. Merge an adapter into them first, and give one "
            "label for each output of a classifier."
        )
    # A tied weight is stored once, under its first name.
    plain = [row._replace(tied=()) for row in table]
    return tables.weights(plain, leaves)


def _values(leaves: Mapping[str, Any], tensors: Sequence[tables.Weight]) -> Iterator[np.ndarray]:
    for weight in tensors:
        value = leaves[weight.leaf] if weight.layer is None else leaves[weight.leaf][weight.layer]
        yield tables.to_tensor(weight, np.asarray(value, np.float32))
