"""Rank and alpha on SST-2 with MiniLM: which rank is enough, and how its scale should grow.

    python -m experiments.sweep --config=configs/sst2_rank_sweep.py --workdir=runs/rank_sweep \
        --config.data.source=DIRECTORY_OF_SST2

Rank 1 to 64, alpha equal to the rank, to twice the rank, and 16; three seeds. The same, smaller:

    ... --config.data.train_examples=1000 --only=lora.rank=1,4,16 --only=lora.alpha=2,8,16,32 \
        --only=seed=0,1
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import common, sst2_minilm


def get_config() -> ConfigDict:
    """The reference recipe, with one length of batch fewer to compile for."""
    c = sst2_minilm.get_config().unlock()
    c.data.max_length = 64  # SST-2's training sentences have 66 tokens at most
    c.data.buckets = (32, 64)
    return c.lock()


def sweep(add: Callable) -> None:
    """Adds the runs; where two rules give one alpha, it is one run."""
    for point in common.product({"lora.rank": (1, 2, 4, 8, 16, 64), "seed": range(3)}):
        for alpha in (point["lora.rank"], 2 * point["lora.rank"], 16):
            add(**point, **{"lora.alpha": float(alpha)})
