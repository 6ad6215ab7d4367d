"""What a model family says of itself, so that checkpoints of every family load and save alike."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from lora_jax.sharding import FSDP, TENSOR

CLASSIFIER, CAUSAL_LM, SEQ2SEQ_LM, ENCODER = "classifier", "causal-lm", "seq2seq-lm", "encoder"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One model family; its file ends with ``FAMILY = Family(...)``.

    Attributes:
      model_type: values of ``model_type`` in a ``config.json``.
      config: dataclass with ``from_hf`` and ``to_hf``.
      names: ``(config, *, head, scan_layers=False)`` -> the table, a list of
        :class:`lora_jax.names.Name`. A weight that is tied has one row, with the other tensors'
        names in ``tied``.
      models: head -> Linen module class, made as ``cls(config, dtype=..., scan_layers=...,
        remat=...)``, a classifier with ``num_labels=...`` as well.
      architectures: head -> the class of ``transformers`` that a saved checkpoint is of.
      prefix: what the tensors' names lack in a bare backbone's checkpoint ("bert.").
      ignored: shell patterns of tensors, prefix apart, that are left out: buffers, other heads. A
        pattern for a head does not count where that head is loaded.
      optional: Flax modules that a checkpoint may lack entirely; they are then made afresh.
      labelled: Flax module with one output for each label; it is made afresh if the checkpoint's
        has another number of them. "" where no head has labels.
      targets: what PEFT adapts by default, as names of modules here.
      trained: what PEFT trains in full beside them for a classifier.
      inputs: head -> shapes of arguments that the module can be initialised with.
      init_cache: of a model that generates, ``(config, batch, length, dtype, *, scan_layers)`` ->
        an empty cache.
      sharding: how its kernels are split over a mesh, rules of :func:`lora_jax.sharding.specs`.
    """

    model_type: tuple[str, ...]
    config: type
    names: Callable
    models: Mapping[str, Callable]
    architectures: Mapping[str, str]
    prefix: str
    ignored: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    labelled: str = ""
    targets: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    inputs: Callable = lambda head: (TOKENS, TOKENS)  # token ids and their mask
    init_cache: Callable | None = None
    sharding: tuple[tuple[str, tuple], ...] = ()


TOKENS = jax.ShapeDtypeStruct((1, 1), jnp.int32)


def column(*modules: str) -> tuple[tuple[str, tuple], ...]:
    """Sharding rules of dense layers whose outputs are split over ``tensor``.

    >>> column("up")
    (('up/kernel', ('fsdp', 'tensor')),)
    """
    return tuple((f"{name}/kernel", (FSDP, TENSOR)) for name in modules)


def row(*modules: str) -> tuple[tuple[str, tuple], ...]:
    """The same of those whose inputs are split over ``tensor``, as the layer before left them.

    >>> row("down")
    (('down/kernel', ('tensor', 'fsdp')),)
    """
    return tuple((f"{name}/kernel", (TENSOR, FSDP)) for name in modules)


def embedding(*modules: str) -> tuple[tuple[str, tuple], ...]:
    """The same of tables of embeddings, whose words are split over ``tensor``.

    >>> embedding("words")
    (('words/embedding', ('tensor', 'fsdp')),)
    """
    return tuple((f"{name}/embedding", (TENSOR, FSDP)) for name in modules)
