"""Alpha and learning rate on SST-2 with MiniLM: how far the one can stand in for the other.

    python -m experiments.sweep --config=configs/sst2_alpha_lr_sweep.py \
        --workdir=runs/alpha_lr_sweep --config.data.source=DIRECTORY_OF_SST2

Rank 8; with Adam, scaling alpha is roughly scaling the learning rate (Hu et al. 2021, section 4.1).
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import common, sst2_rank_sweep


def get_config() -> ConfigDict:
    """As the rank sweep, with a warm-up, since some of the rates are high."""
    c = sst2_rank_sweep.get_config().unlock()
    c.optimizer.warmup = 0.06
    return c.lock()


def sweep(add: Callable) -> None:
    """Adds the runs."""
    axes = {
        "lora.alpha": (4.0, 8.0, 16.0, 32.0, 64.0),
        "optimizer.learning_rate": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3),
        "seed": range(3),
    }
    for point in common.product(axes):
        add(**point)
