"""The description of a model family, by which checkpoints of every family load and save."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax.models.kv_cache import Cache
from lora_jax.names import Name
from lora_jax.sharding import FSDP, TENSOR

# Heads that others train on a decoder, and that a language model leaves out: those of
# transformers' classifiers, of reward models and of reinforcement learning.
OTHER_HEADS = (
    "v_head.*", "value_head.*", "reward_head.*", "score.*", "classifier.*", "qa_outputs.*",
    "multiple_choice_head.*", "classification_head.*",
)  # fmt: skip
TOKENS = jax.ShapeDtypeStruct((1, 1), jnp.int32)
CLASSIFIER, CAUSAL_LM, SEQ2SEQ_LM, ENCODER = "classifier", "causal-lm", "seq2seq-lm", "encoder"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A model family; its file ends with ``FAMILY = Family(...)``.

    Attributes:
      model_type: values of ``model_type`` in a ``config.json``.
      config: dataclass with ``from_hf`` and ``to_hf``.
      names: function of ``(config, *, head, scan_layers=False)`` that returns the table, a list of
        :class:`lora_jax.names.Name`. A tied weight has one row, with the names of the other tensors
        in ``tied``.
      models: Linen module class of each head, which is called as ``cls(config, dtype=...,
        scan_layers=..., remat=..., attention=...)``; a classifier also takes ``num_labels=...``.
      architectures: class name in ``transformers`` of each head, for saved checkpoints.
      prefix: prefix that the tensors' names lack in the checkpoint of a bare backbone ("bert.").
      ignored: shell patterns of tensors that are left out, without the prefix: buffers, other
        heads. A pattern for a head does not count where that head is loaded.
      optional: Flax modules that a checkpoint may lack entirely; they are then freshly initialized.
      label_module: Flax module with one output for each label; it is freshly initialized if the
        checkpoint has another number of labels. "" where no head has labels.
      targets: names of the modules that PEFT adapts by default.
      trained: names of the modules that PEFT also trains in full for a classifier.
      inputs: function of the head that returns shapes of arguments to initialize the module with.
      init_cache: for a model that generates, function of ``(config, batch, length, dtype, *,
        scan_layers)`` that returns an empty cache.
      sharding: rules of :func:`lora_jax.sharding.specs` by which its kernels are split over a mesh.
    """

    model_type: tuple[str, ...]
    config: Any
    names: Callable[..., list[Name]]
    models: Mapping[str, Callable[..., nn.Module]]
    architectures: Mapping[str, str]
    prefix: str
    ignored: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    label_module: str = ""
    targets: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    # Token ids and their mask.
    inputs: Callable[[str], tuple[jax.ShapeDtypeStruct, ...]] = lambda head: (TOKENS, TOKENS)
    init_cache: Callable[..., Cache] | None = None
    sharding: tuple[tuple[str, tuple], ...] = ()

    def require_cache(self) -> Callable[..., Cache]:
        """Returns the function that makes an empty cache, of a family that generates.

        Raises:
          ValueError: it does not.
        """
        if self.init_cache is None:
            raise ValueError(f"Models of {' or '.join(self.model_type)} do not generate text.")
        return self.init_cache


def column(*modules: str) -> tuple[tuple[str, tuple], ...]:
    """Makes sharding rules of dense layers whose outputs are split over ``tensor``.

    >>> column("up")
    (('up/kernel', ('fsdp', 'tensor')),)
    """
    return tuple((f"{name}/kernel", (FSDP, TENSOR)) for name in modules)


def row(*modules: str) -> tuple[tuple[str, tuple], ...]:
    """Makes the rules of dense layers whose inputs are split, as the layer before left them.

    >>> row("down")
    (('down/kernel', ('tensor', 'fsdp')),)
    """
    return tuple((f"{name}/kernel", (TENSOR, FSDP)) for name in modules)


def embedding(*modules: str) -> tuple[tuple[str, tuple], ...]:
    """Makes the rules of embeddings, whose tokens are split over ``tensor``.

    >>> embedding("words")
    (('words/embedding', ('tensor', 'fsdp')),)
    """
    return tuple((f"{name}/embedding", (TENSOR, FSDP)) for name in modules)
