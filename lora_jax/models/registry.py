"""The model families that are built here."""

from collections.abc import Mapping
from typing import Any

from lora_jax.models import bert, distilbert, gpt2, llama, roberta, t5
from lora_jax.models.families import Family

FAMILIES: tuple[Family, ...] = (
    bert.FAMILY,
    distilbert.FAMILY,
    gpt2.FAMILY,
    *llama.FAMILIES,
    roberta.FAMILY,
    roberta.XLM,
    t5.FAMILY,
)


def find(config: Mapping[str, Any]) -> Family:
    """The family of a parsed ``config.json``.

    Raises:
      ValueError: its ``model_type`` is of none; the message lists those that are.

    >>> find({"model_type": "bert"}).config.__name__
    'BertConfig'
    """
    kind = config.get("model_type")
    built = {name: family for family in FAMILIES for name in family.model_type}
    if not isinstance(kind, str) or kind not in built:
        raise ValueError(
            f"model_type is {kind!r} in this config; built here are {', '.join(sorted(built))}."
        )
    return built[kind]
