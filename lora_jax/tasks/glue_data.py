"""The examples of a task of GLUE, from a config."""

import functools

from ml_collections import ConfigDict

from lora_jax.data import sources
from lora_jax.data.examples import Examples, subset, take
from lora_jax.tasks import glue
from lora_jax.tasks.glue import GlueTask
from lora_jax.tasks.text_task import LabelledTexts


def load(config: ConfigDict) -> LabelledTexts:
    """Loads the examples of a run.

    Raises:
      FileNotFoundError, ValueError: as :func:`sources.load` and :func:`load_examples`.
    """
    task = glue.find(config.task)
    training, evaluations = load_examples(config, task)
    return LabelledTexts(
        task=task,
        training=training,
        evaluations=evaluations,
        metadata={"glue": task.name, "pairs": task.has_pairs},
    )


def load_examples(config: ConfigDict, task: GlueTask) -> tuple[Examples, list[Examples]]:
    """Loads the training examples, and those of each evaluation set.

    With ``data.holdout`` the evaluation examples come from the training split, after those to train
    on. So hyperparameters can be chosen without a look at the validation set.
    """
    c = config.data
    load = functools.partial(
        sources.load,
        c.source,
        data_dir=c.data_dir or None,
        num_labels=config.model.num_labels,
        layout=task.layout,
    )
    train_split = load("train")
    if not c.holdout:
        evaluations = [load(split) for split in task.validation]
        return subset(train_split, c.train_examples, c.seed), evaluations
    total = len(train_split.labels)
    count = c.train_examples or total - c.holdout
    if count < 1 or count + c.holdout > total:
        raise ValueError(
            f"data.train_examples {c.train_examples} and data.holdout {c.holdout} do not fit into "
            f"the {total} training examples of {c.source}."
        )
    both = subset(train_split, count + c.holdout, c.seed)
    return take(both, range(count)), [take(both, range(count, count + c.holdout))]
