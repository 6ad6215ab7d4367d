"""Loads and saves Hugging Face checkpoints of every family, by its table of names."""

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from lora_jax import names as tables
from lora_jax import paths, sharding
from lora_jax.files import safetensors_pieces, write_atomically
from lora_jax.models import hub, registry
from lora_jax.models.attention import AUTO, check_attention
from lora_jax.models.families import CLASSIFIER, Family
from lora_jax.models.gguf import is_gguf
from lora_jax.models.hub import Checkpoint, base_id, resolve
from lora_jax.models.layers import check_remat
from lora_jax.models.load_weights import join_problems, load_params, open_tensors
from lora_jax.models.tokenizer import load_tokenizer, tokenizer_files
from lora_jax.names import Name
from lora_jax.quantized import as_array, is_quantized
from lora_jax.schemes import find_scheme

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
      checkpoint: the checkpoint that they are from.
      base_id: content hash of the weights, "sha256:...".
      fresh: paths of the leaves that the checkpoint lacks, which are freshly initialized.
      family: the model's family.
      head: "classifier", "causal-lm", "seq2seq-lm" or "encoder".
    """

    model: nn.Module
    params: PyTree
    checkpoint: Checkpoint
    base_id: str
    fresh: tuple[str, ...]
    family: Family
    head: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The options of :func:`load`.

    Attributes:
      num_labels: number of outputs of a classifier. A head in the checkpoint is used if it has the
        same number.
      key: PRNG key for leaves that the checkpoint lacks (usually a classifier): kernels are drawn
        from ``N(0, initializer_range²)``, biases are zero. ``jax.random.key(0)`` if None.
      dtype: dtype of the activations.
      scan_layers: whether the layers are stacked, and one is compiled for all.
      param_dtype: dtype of the parameters, float32 or bfloat16; those that are drawn are float32.
      mesh: mesh of devices that the parameters are split over; None for JAX's default device.
      rules: rules by which they are split, as for :func:`lora_jax.sharding.specs`; None for those
        of the family.
      remat: what training computes again to save memory: "none", "full", or the name of a policy
        in ``jax.checkpoint_policies``; see :func:`lora_jax.models.layers.remat_layer`.
      attention: how attention is computed: "auto", "xla", "cudnn" or "blockwise"; see
        :func:`lora_jax.models.attention.choose`.
      quantize: scheme of :func:`lora_jax.quantize` for kernels that are plain in the checkpoint,
        but heads and embeddings; "" to leave them so. What the checkpoint holds quantized stays so.
    """

    num_labels: int = 2
    key: jax.Array | None = None
    dtype: DTypeLike = jnp.float32
    scan_layers: bool = False
    param_dtype: DTypeLike = jnp.float32
    mesh: Mesh | None = None
    rules: sharding.Rules | None = None
    remat: str = "none"
    attention: str = AUTO
    quantize: str = ""


def load(name: str | Path, *, head: str, **options: Any) -> Loaded:
    """Loads a model of the family that the checkpoint's config names.

    It reads, casts and places one tensor after the other, so that host memory holds little more
    than what stays on this host's devices.

    Args:
      name: a directory or a model name; see :func:`lora_jax.models.hub.resolve`.
      head: "classifier", "causal-lm", "seq2seq-lm" or "encoder" (the backbone alone).
      **options: the fields of :class:`LoadOptions`.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      TypeError: an option does not exist.
      ValueError: the checkpoint can't be read, or does not fit; all mismatches are in one message.
        Or the rules do not fit the mesh.
    """
    opts = LoadOptions(**options)
    if not isinstance(opts.num_labels, int) or opts.num_labels < 1:
        raise ValueError(
            f"num_labels must be a whole number of at least 1, got {opts.num_labels!r}."
        )
    checkpoint = resolve(name)
    family, config = _read_config(checkpoint)
    check_remat(opts.remat)
    check_attention(opts.attention)
    if opts.quantize:
        find_scheme(opts.quantize)
    model_class = _find_model(family, head, checkpoint)
    _check_layers(config, checkpoint)
    fields = {name: getattr(opts, name) for name in ("dtype", "scan_layers", "remat", "attention")}
    if head == CLASSIFIER:
        fields["num_labels"] = opts.num_labels
    model = model_class(config, **fields)
    table = family.names(config, head=head, scan_layers=opts.scan_layers)
    shapes = _cast_shapes(_eval_shapes(model, family.inputs(head)), opts.param_dtype)
    rules = family.sharding if opts.rules is None else opts.rules
    shardings = _make_shardings(shapes, opts.mesh, rules)
    leaves, fresh = load_params(
        checkpoint, shapes, table, family, shardings=shardings, scheme=opts.quantize
    )
    key = jax.random.key(0) if opts.key is None else opts.key
    leaves = _init_fresh(leaves, fresh, key=key, stddev=_get_stddev(config), shardings=shardings)
    return Loaded(
        model=model,
        params={"params": paths.nest(leaves)},
        checkpoint=checkpoint,
        base_id=base_id(checkpoint),
        fresh=fresh,
        family=family,
        head=head,
    )


def names(loaded: Loaded) -> list[Name]:
    """Makes the table between the leaves of a loaded model and Hugging Face's names."""
    model = loaded.model
    return loaded.family.names(model.config, head=loaded.head, scan_layers=model.scan_layers)


def redraw(loaded: Loaded, key: jax.Array) -> PyTree:
    """Draws the leaves that the checkpoint lacks from another key; other arrays are shared."""
    leaves = paths.named_leaves(loaded.params["params"])
    stddev = _get_stddev(loaded.model.config)
    found = {n: getattr(x, "sharding", None) for n, x in leaves.items()}  # no quantized leaf's
    shardings = {n: place for n, place in found.items() if isinstance(place, NamedSharding)}
    leaves = _init_fresh(leaves, loaded.fresh, key=key, stddev=stddev, shardings=shardings)
    return {"params": paths.nest(leaves)}


def _read_config(checkpoint: Checkpoint) -> tuple[Family, Any]:
    """Finds the checkpoint's family, and reads its config."""
    try:
        family = registry.find(checkpoint.config)
        return family, family.config.from_hf(checkpoint.config)
    except (ValueError, TypeError, OverflowError) as error:  # the last two: values of odd types
        raise ValueError(f"{_config_file(checkpoint)}: {error}") from error


def _config_file(checkpoint: Checkpoint) -> Path:
    whole = is_gguf(checkpoint.directory)
    return checkpoint.directory if whole else checkpoint.directory / "config.json"


def _find_model(family: Family, head: str, checkpoint: Checkpoint) -> Callable[..., nn.Module]:
    if head not in family.models:
        raise ValueError(
            f"The checkpoint {checkpoint.name!r} is of type {checkpoint.config['model_type']!r}, "
            f"which has no head {head!r} here; it has {', '.join(map(repr, family.models))}."
        )
    return family.models[head]


def _check_layers(config: Any, checkpoint: Checkpoint) -> None:
    """Checks that the files can hold the layers, before anything is made for each of them."""
    tensors = len(open_tensors(checkpoint))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "layer" in field.name and type(value) is int and value > tensors:
            raise ValueError(
                f"{_config_file(checkpoint)} has {field.name} {value}, and the files beside it "
                f"hold {tensors} tensors: they do not belong together."
            )


def _eval_shapes(
    model: nn.Module, inputs: Sequence[jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
    return paths.named_leaves(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])


def _cast_shapes(
    shapes: Mapping[str, jax.ShapeDtypeStruct], dtype: DTypeLike
) -> dict[str, jax.ShapeDtypeStruct]:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"param_dtype must be a floating-point type, got {dtype!r}.")
    return {name: jax.ShapeDtypeStruct(x.shape, dtype) for name, x in shapes.items()}


def _make_shardings(
    shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh | None, rules: sharding.Rules
) -> dict[str, NamedSharding]:
    if mesh is None:
        return {}
    # A family's rules name leaves that not every member has: an untied head, a gate.
    specs = sharding.specs(paths.nest(shapes), rules, mesh, strict=False)
    return paths.named_leaves(sharding.shardings(specs, mesh))


def _get_stddev(config: Any) -> float:
    return getattr(config, "initializer_range", 0.02)


def _init_fresh(
    leaves: Mapping[str, jax.Array | jax.ShapeDtypeStruct],
    fresh: Sequence[str],
    *,
    key: jax.Array,
    stddev: float,
    shardings: Mapping[str, NamedSharding],
) -> dict[str, jax.Array]:
    """Initializes the fresh leaves: kernels from a normal distribution, biases with zero."""

    def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
        if name.endswith("/bias"):
            return jnp.zeros(shape, jnp.float32)
        # By name, so that the values of a leaf do not depend on which others are fresh.
        leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return stddev * jax.random.normal(leaf_key, shape, jnp.float32)

    def init(name: str, shape: tuple[int, ...]) -> jax.Array:
        value = draw(name, shape)
        return sharding.put(value, shardings[name]) if name in shardings else value

    return {name: init(name, x.shape) if name in fresh else x for name, x in leaves.items()}


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
      directory: directory of the files; it is made if it does not exist.
      params: plain variables of the model (merge an adapter first), with the layers stacked or not;
        they are saved in float32.
      checkpoint: the base, which has the config and the tokenizer.
      head: as in :func:`load`.
      labels: name of each class of a classifier, in the order of the logits.

    Raises:
      ValueError: the parameters are not this model's, or not finite, or the labels do not fit.
      OSError: a file can't be written; each file that existed before is intact.
    """
    directory, labels = Path(directory), list(labels)
    if len(set(labels)) < len(labels) or bool(labels) != (head == CLASSIFIER):
        raise ValueError(
            "labels must be one different name for each class of a classifier, and none for "
            f"another head; got {labels} for the head {head!r}."
        )
    family, config = _read_config(checkpoint)
    model_class = _find_model(family, head, checkpoint)
    model = model_class(config, num_labels=len(labels)) if labels else model_class(config)
    plain = jax.tree.map(as_array, params.get("params", params), is_leaf=is_quantized)
    leaves = paths.named_leaves(plain)
    table = _find_table(family, config, head, leaves)
    architecture = family.architectures[head]
    _check_leaves(leaves, table, model, family.inputs(head), architecture=architecture)
    # A tied weight is stored once, under its first name.
    tensors = tables.weights([row._replace(tied=()) for row in table], leaves)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files(checkpoint).items():
        write_atomically(directory / name, content)
    shapes = {weight.hf: tables.tensor_shape(weight) for weight in tensors}
    pieces = safetensors_pieces(shapes, _make_tensors(leaves, tensors), {"format": "pt"})
    write_atomically(directory / hub.WEIGHTS, pieces)
    # The config is written last, so that a directory that has one is complete.
    config_json = _make_config_json(checkpoint.config, architecture, labels)
    text = json.dumps(config_json, indent=2) + "\n"
    write_atomically(directory / "config.json", text.encode())


def _make_config_json(
    base: Mapping[str, Any], architecture: str, labels: list[str]
) -> dict[str, Any]:
    config = {**base, "architectures": [architecture], "torch_dtype": "float32"}
    config.pop("dtype", None)  # the newer key for torch_dtype, which would win
    config.pop("quantization_config", None)  # of the base; what is written is plain
    if labels:
        config["id2label"] = {str(k): label for k, label in enumerate(labels)}
        config["label2id"] = {label: k for k, label in enumerate(labels)}
        config.pop("problem_type", None)  # belongs to the head of the base
        config.pop("num_labels", None)  # follows from id2label
    return config


def _find_table(
    family: Family, config: Any, head: str, leaves: Mapping[str, jax.Array]
) -> list[Name]:
    """Finds the table that fits the leaves, with stacked layers or without."""
    both = [family.names(config, head=head, scan_layers=scan) for scan in (False, True)]
    return max(both, key=lambda table: sum(row.flax in leaves for row in table))


def _check_leaves(
    leaves: Mapping[str, jax.Array],
    table: list[Name],
    model: nn.Module,
    inputs: Sequence[jax.ShapeDtypeStruct],
    *,
    architecture: str,
) -> None:
    """Raises ValueError unless the leaves are all of the model's, with its shapes, and finite."""
    scan_layers = any(tables.STACK in row.hf for row in table)
    expected = _eval_shapes(model.clone(scan_layers=scan_layers), inputs)
    known = {row.flax for row in table}
    problems = [f"{name} is missing" for name in sorted(known & set(expected) - set(leaves))]
    problems += [f"{name} is unexpected" for name in leaves if name not in known]
    for name in [n for n in leaves if n in expected and n in known]:
        if np.shape(leaves[name]) != expected[name].shape:
            shapes = f"{np.shape(leaves[name])} instead of {expected[name].shape}"
            problems.append(f"{name} has shape {shapes}")
        elif not np.isfinite(np.asarray(leaves[name])).all():
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        raise ValueError(
            f"Nothing is saved, since the parameters are not those of {architecture} with this "
            f"config and these labels: {join_problems(problems)}. Merge an adapter into them "
            "first, and give one label for each output of a classifier."
        )


def _make_tensors(
    leaves: Mapping[str, jax.Array], tensors: Sequence[tables.Weight]
) -> Iterator[np.ndarray]:
    for weight in tensors:
        value = leaves[weight.leaf] if weight.layer is None else leaves[weight.leaf][weight.layer]
        yield tables.to_tensor(weight, np.asarray(value, np.float32))
