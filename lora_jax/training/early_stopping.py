"""When a run ends before its last step, since its score has stopped getting better."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from lora_jax.training.task import Score


def update(progress: Any, score: Score, value: float, config: ConfigDict) -> Any:
    """The progress after an evaluation with this score; ``ended`` is set if it is to be the last.

    An evaluation counts as an improvement if its score is better by more than ``min_delta`` than
    that of the last one that did: many steps too small to count do not add up unseen.

    Args:
      progress: with the fields ``reference``, ``waited`` and ``ended``.
      score: which way is better.
      value: of this evaluation.
      config: the section ``early_stopping``; patience 0 for never.
    """
    if not config.patience:
        return progress
    gain = None
    if progress.reference is not None:
        gain = (value - progress.reference) * (1 if score.higher_is_better else -1)
    if gain is None or gain > config.min_delta:
        return dataclasses.replace(progress, reference=value, waited=0)
    progress = dataclasses.replace(progress, waited=progress.waited + 1)
    if progress.waited < config.patience:
        return progress
    margin = f" by more than {config.min_delta:g}" if config.min_delta else ""
    return dataclasses.replace(
        progress,
        ended=f"{score.name} has not been better than {progress.reference:.4f}{margin} in "
        f"{progress.waited} evaluation{'s' * (progress.waited > 1)} (early_stopping)",
    )
