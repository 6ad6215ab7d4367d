"""Early stopping: a run ends before its last step if its score no longer gets better."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from lora_jax.training.task import Score


def update(progress: Any, score: Score, value: float, config: ConfigDict) -> Any:
    """Returns the progress after an evaluation; sets its ``ended`` if the run is to end there.

    An evaluation improves the score if it is better by more than ``min_delta`` than the last
    evaluation that improved it. So many small gains still add up.

    Args:
      progress: dataclass with the fields ``reference``, ``waited`` and ``ended``, such as
        :class:`lora_jax.training.loop.Progress`.
      score: says which way is better.
      value: score of this evaluation.
      config: section ``early_stopping`` of a config; with patience 0 a run never ends early.
    """
    if not config.patience:
        return progress
    reference = progress.reference
    if reference is None or score.merit(value) - score.merit(reference) > config.min_delta:
        return dataclasses.replace(progress, reference=value, waited=0)
    progress = dataclasses.replace(progress, waited=progress.waited + 1)
    if progress.waited < config.patience:
        return progress
    margin = f" by more than {config.min_delta:g}" if config.min_delta else ""
    count = "1 evaluation" if progress.waited == 1 else f"{progress.waited} evaluations"
    return dataclasses.replace(
        progress,
        ended=f"{score.name} has not been better than {reference:.4f}{margin} in {count} "
        "(early_stopping)",
    )
