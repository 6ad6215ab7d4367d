"""Configs of the tasks of GLUE: what they leave to task and model, and mistakes found early."""

import functools

from ml_collections import ConfigDict

from lora_jax.models import checkpoints, registry
from lora_jax.models.families import Family
from lora_jax.tasks import from_config, glue

DEFAULT = "default"  # among lora.targets and lora.train: what PEFT has for the model's family
_LEAST = {"data.train_examples": 0, "data.max_length": 1, "data.alike": 0}


def resolved(config: ConfigDict) -> ConfigDict:
    """The config with what it leaves to the task (labels, data in TFDS) and to the model's family.

    Raises:
      FileNotFoundError: "default" stands among targets or trained modules, and there is no model.
      ValueError: no such task; or the model is of no family here.
    """
    task = glue.find(config.task)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        if not config.model.labels:
            config.model.labels, config.model.num_labels = task.labels, len(task.labels)
        config.data.source = config.data.source or f"tfds:glue/{config.task}"
        for field in [n for n in ("targets", "train") if DEFAULT in tuple(config.lora[n])]:
            family = _family(str(config.model.name))
            own = {"targets": family.targets, "train": family.trained}[field]
            entries = [own if entry == DEFAULT else (entry,) for entry in config.lora[field]]
            config.lora[field] = tuple(name for names in entries for name in names)
    return config


@functools.lru_cache(maxsize=8)  # a sweep asks for each of its runs
def _family(model: str) -> Family:
    return registry.find(checkpoints.resolve(model).config)


def check(config: ConfigDict) -> None:
    """Finds mistakes in a config before anything is loaded or written.

    Raises:
      ValueError: the first that it finds.
    """
    from_config.check(config, _LEAST)
    _check_buckets(config)
    _check_labels(config)


def _check_labels(config: ConfigDict) -> None:
    task, labels = glue.find(config.task), tuple(config.model.labels)
    least = 1 if task.is_regression else 2
    if len(labels) != config.model.num_labels or len(set(labels)) < max(len(labels), least):
        raise ValueError(
            f"model.labels names {len(labels)} classes {labels}, and model.num_labels is "
            f"{config.model.num_labels}: there must be one name, each another, for each of at "
            f"least {'one value' if task.is_regression else 'two classes'}."
        )
    # Sentences of one's own may have any classes; they come in the layout of SST-2.
    if config.task != "sst2" and len(labels) != len(task.labels):
        raise ValueError(
            f"model.labels names {len(labels)} classes {labels}, and the task {config.task!r} has "
            f"{len(task.labels)}: {task.labels}. Leave model.labels empty for these."
        )


def _check_buckets(config: ConfigDict) -> None:
    buckets = tuple(config.data.buckets)
    if buckets[-1] < config.data.max_length:
        raise ValueError(
            f"data.buckets {buckets} end below data.max_length {config.data.max_length}: lower the "
            "one, or add the other to the buckets."
        )
