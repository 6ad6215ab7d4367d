"""A sweep of some minutes on a CPU: MiniLM and the embedded review sentences, twelve runs.

    python -m experiments.sweep --config=configs/quickstart_sweep.py --workdir=runs/quickstart_sweep

Rank 1, 2, 4, 8, alpha 8 and three seeds, two epochs each. All batches have one length, so that one
compilation of the step serves all runs.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import common, quickstart


def get_config() -> ConfigDict:
    """The quickstart, shorter."""
    c = quickstart.get_config().unlock()
    c.data.max_length = 32
    c.data.buckets = (32,)
    c.epochs = 2
    return c.lock()


def sweep(add: Callable) -> None:
    """Adds the runs."""
    for point in common.product({"lora.rank": (1, 2, 4, 8), "seed": range(3)}):
        add(**point, **{"lora.alpha": 8.0})
