"""Configs of the tasks of GLUE: what a task says of itself, and mistakes found early."""

from ml_collections import ConfigDict

from experiments import classification, glue_tasks, optimisers

_LEAST = {
    "batch_size": 1,
    "eval_batch_size": 1,
    "epochs": 1,
    "log_every": 1,
    "checkpoint_every": 0,
    "data.train_examples": 0,
    "data.holdout": 0,
    "data.max_length": 1,
    "data.seed": 0,
    "data.alike": 0,
}


def resolved(config: ConfigDict) -> ConfigDict:
    """The config with what it leaves to the task: its labels, and its data in TFDS.

    Raises:
      ValueError: no such task.
    """
    task = glue_tasks.find(config.task)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        if not config.model.labels:
            config.model.labels, config.model.num_labels = task.labels, len(task.labels)
        config.data.source = config.data.source or f"tfds:glue/{config.task}"
    return config


def check(config: ConfigDict) -> None:
    """Finds mistakes in a config before anything is loaded or written.

    Raises:
      ValueError: the first that it finds.
    """
    classification.lora_config(config)
    classification.dtype(config.model.dtype)
    optimisers.check(config.optimizer)
    values = config.to_dict() | {f"data.{name}": value for name, value in config.data.items()}
    for field, low in _LEAST.items():
        if values[field] < low:
            raise ValueError(f"{field} must be at least {low}, got {values[field]}.")
    _check_buckets(config)
    _check_labels(config)


def _check_labels(config: ConfigDict) -> None:
    task, labels = glue_tasks.find(config.task), tuple(config.model.labels)
    least = 1 if task.regression else 2
    if len(labels) != config.model.num_labels or len(set(labels)) < max(len(labels), least):
        raise ValueError(
            f"model.labels names {len(labels)} classes {labels}, and model.num_labels is "
            f"{config.model.num_labels}: there must be one name, each another, for each of at "
            f"least {'one value' if task.regression else 'two classes'}."
        )
    # Sentences of one's own may have any classes; they come in the layout of SST-2.
    if config.task != "sst2" and len(labels) != len(task.labels):
        raise ValueError(
            f"model.labels names {len(labels)} classes {labels}, and the task {config.task!r} has "
            f"{len(task.labels)}: {task.labels}. Leave model.labels empty for these."
        )


def _check_buckets(config: ConfigDict) -> None:
    buckets = tuple(config.data.buckets)
    if not buckets or any(low >= high for low, high in zip((0, *buckets), buckets, strict=False)):
        raise ValueError(f"data.buckets must be positive lengths that ascend, got {buckets}.")
    if buckets[-1] < config.data.max_length:
        raise ValueError(
            f"data.buckets {buckets} end below data.max_length {config.data.max_length}: lower the "
            "one, or add the other to the buckets."
        )
