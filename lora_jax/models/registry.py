"""Lists the model families that are built here, and finds one by its config."""

from collections.abc import Mapping
from typing import Any

from lora_jax.models import bert, distilbert, gpt2, llama, mixtral, roberta, t5
from lora_jax.models.families import Family

FAMILIES: tuple[Family, ...] = (
    bert.FAMILY,
    distilbert.FAMILY,
    gpt2.FAMILY,
    *llama.FAMILIES,
    mixtral.FAMILY,
    roberta.FAMILY,
    roberta.XLM,
    t5.FAMILY,
)


def find(config: Mapping[str, Any]) -> Family:
    """Finds the family of a parsed ``config.json``.

    Raises:
      ValueError: no family has its ``model_type``; the message lists those that are built.

    >>> find({"model_type": "bert"}).config.__name__
    'BertConfig'
    """
    model_type = config.get("model_type")
    families = {name: family for family in FAMILIES for name in family.model_type}
    if not isinstance(model_type, str) or model_type not in families:
        raise ValueError(
            f"model_type is {model_type!r} in this config; built here are "
            f"{', '.join(sorted(families))}."
        )
    return families[model_type]
