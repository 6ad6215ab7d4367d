"""Loads and saves Hugging Face checkpoints of every family, by its table of names."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from lora_jax import paths, sharding
from lora_jax.models.architectures import config_file, eval_shapes, find_model, read_config
from lora_jax.models.attention import AUTO, check_attention
from lora_jax.models.families import CLASSIFIER, Family
from lora_jax.models.hub import Checkpoint, base_id, resolve
from lora_jax.models.layers import check_remat
from lora_jax.models.load_weights import load_params, open_tensors
from lora_jax.models.quantized_tensors import read_settings
from lora_jax.models.read_leaves import DECODED
from lora_jax.models.save_checkpoint import SaveOptions, save_hf, stated_dtype
from lora_jax.models.token_ids import Table
from lora_jax.models.tokenizer import load_tokenizer, tokenizer_files
from lora_jax.names import Name
from lora_jax.schemes import find_scheme

__all__ = [
    "Checkpoint",
    "LoadOptions",
    "Loaded",
    "SaveOptions",
    "base_id",
    "find_table",
    "load",
    "load_tokenizer",
    "names",
    "redraw",
    "resolve",
    "save_hf",
    "stated_dtype",
    "tokenizer_files",
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
      is_resized: whether it has rows for more tokens than the checkpoint.
    """

    model: nn.Module
    params: PyTree
    checkpoint: Checkpoint
    base_id: str
    fresh: tuple[str, ...]
    family: Family
    head: str
    is_resized: bool = False


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
        but heads and embeddings. What the checkpoint holds quantized stays so; the kernels of a
        GGUF file are decoded, and quantized with the scheme. "" for no scheme: those of a GGUF file
        stay in their own codes, too. "none" to decode all.
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
    family, config = read_config(checkpoint)
    check_remat(opts.remat)
    check_attention(opts.attention)
    if opts.quantize not in ("", DECODED):
        find_scheme(opts.quantize)
    model_class = find_model(family, head, checkpoint)
    read_settings(checkpoint.config, checkpoint.name)  # first, since files may have odd dtypes then
    _check_layers(config, checkpoint)
    fields = {name: getattr(opts, name) for name in ("dtype", "scan_layers", "remat", "attention")}
    if head == CLASSIFIER:
        fields["num_labels"] = opts.num_labels
    model = model_class(config, **fields)
    table = family.names(config, head=head, scan_layers=opts.scan_layers)
    shapes = _cast_shapes(eval_shapes(model, family.inputs(head)), opts.param_dtype)
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


def find_table(loaded: Loaded) -> Table:
    """Returns name and size of the embedding that tokens must be rows of."""
    return Table(loaded.checkpoint.name, loaded.model.config.vocab_size)


def redraw(loaded: Loaded, key: jax.Array) -> PyTree:
    """Draws the leaves that the checkpoint lacks from another key; other arrays are shared."""
    leaves = paths.named_leaves(loaded.params["params"])
    stddev = _get_stddev(loaded.model.config)
    found = {n: getattr(x, "sharding", None) for n, x in leaves.items()}  # no quantized leaf's
    shardings = {n: place for n, place in found.items() if isinstance(place, NamedSharding)}
    leaves = _init_fresh(leaves, loaded.fresh, key=key, stddev=stddev, shardings=shardings)
    return {"params": paths.nest(leaves)}


def _check_layers(config: Any, checkpoint: Checkpoint) -> None:
    """Checks that the files can hold the layers, before anything is made for each of them."""
    tensors = len(open_tensors(checkpoint))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "layer" in field.name and type(value) is int and value > tensors:
            raise ValueError(
                f"{config_file(checkpoint)} has {field.name} {value}, and the files beside it "
                f"hold {tensors} tensors: they do not belong together."
            )


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

    filled: dict[str, Any] = dict(leaves)
    return filled | {name: init(name, leaves[name].shape) for name in leaves if name in fresh}
