"""Configs of the tasks of GLUE: values that they leave to task and model, and checks."""

import functools

from ml_collections import ConfigDict

from lora_jax.models import checkpoints, registry
from lora_jax.models.families import Family
from lora_jax.tasks import from_config, glue

# An entry of lora.targets or lora.train that stands for PEFT's choice for the model's family.
DEFAULT = "default"
LEAST = {"data.train_examples": 0, "data.max_length": 1, "data.alike": 0}


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns a copy of the config, in which nothing is left to the task and the model's family.

    The task gives labels and data in TFDS, the family targets and trained modules.

    Raises:
      FileNotFoundError: "default" is among targets or trained modules, and there is no model.
      ValueError: there is no such task; or the model is of no family here.
    """
    task = glue.find(config.task)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        if not config.model.labels:
            config.model.labels, config.model.num_labels = task.labels, len(task.labels)
        config.data.source = config.data.source or f"tfds:glue/{config.task}"
    return resolve_modules(config)


def resolve_modules(config: ConfigDict) -> ConfigDict:
    """Puts the family's targets and trained modules in place of "default", in the config itself.

    Raises:
      FileNotFoundError: "default" is among targets or trained modules, and there is no model.
      ValueError: the model is of no family here.
    """
    with config.unlocked():
        for field in [n for n in ("targets", "train") if DEFAULT in tuple(config.lora[n])]:
            family = _family(str(config.model.name))
            defaults = {"targets": family.targets, "train": family.trained}[field]
            names: list[str] = []
            for entry in config.lora[field]:
                names += defaults if entry == DEFAULT else (entry,)
            config.lora[field] = tuple(names)
    return config


@functools.lru_cache(maxsize=8)  # a sweep asks for each of its runs
def _family(model: str) -> Family:
    return registry.find(checkpoints.resolve(model).config)


def check(config: ConfigDict) -> None:
    """Checks a config before anything is loaded or written.

    Raises:
      ValueError: names fields that are wrong.
    """
    from_config.check(config, LEAST)
    check_buckets(config)
    _check_labels(config)


def _check_labels(config: ConfigDict) -> None:
    task, labels = glue.find(config.task), tuple(config.model.labels)
    check_label_names(config, is_regression=task.is_regression)
    # A user's own sentences may have any classes; they come in the layout of SST-2.
    if config.task != "sst2" and len(labels) != len(task.labels):
        raise ValueError(
            f"model.labels names {len(labels)} classes {labels}, and the task {config.task!r} has "
            f"{len(task.labels)}: {task.labels}. Leave model.labels empty for these."
        )


def check_label_names(config: ConfigDict, *, is_regression: bool) -> None:
    """Checks that there is a name for each class, or one for the number of a regression.

    Raises:
      ValueError: names and number of the labels do not fit together.
    """
    labels = tuple(config.model.labels)
    least, kind = (1, "one value") if is_regression else (2, "two classes")
    if len(labels) != config.model.num_labels or len(set(labels)) < max(len(labels), least):
        raise ValueError(
            f"model.labels names {len(labels)} classes {labels}, and model.num_labels is "
            f"{config.model.num_labels}: there must be one name, each another, for each of at "
            f"least {kind}."
        )


def check_buckets(config: ConfigDict) -> None:
    """Checks that the lengths of batches hold the longest text.

    Raises:
      ValueError: they do not.
    """
    buckets = tuple(config.data.buckets)
    if buckets[-1] < config.data.max_length:
        raise ValueError(
            f"data.buckets {buckets} end below data.max_length {config.data.max_length}: lower the "
            "latter, or add it to the buckets."
        )
