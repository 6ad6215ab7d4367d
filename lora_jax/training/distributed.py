"""Agreement among several processes that are one run."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def check_same_step(step: int) -> None:
    """Checks that every process goes on from the same step.

    Raises:
      ValueError: they do not, since they have not found the same checkpoints.
    """
    if jax.process_count() == 1:
        return
    steps = np.unique(multihost_utils.process_allgather(np.array(step)))
    if len(steps) > 1:
        raise ValueError(
            f"The processes have found checkpoints of different steps, {steps.tolist()}: the "
            "workdir must be on a file system that all of them share."
        )


def is_first() -> bool:
    """Returns whether this process is the one that writes: the only one, or the first."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process of the run has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
