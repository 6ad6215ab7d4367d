"""Methods of adaptation on SST-2 with MiniLM, each with learning rates of its own.

    python -m experiments.sweep --config=configs/sst2_methods_sweep.py \
        --workdir=runs/methods_sweep --config.data.source=DIRECTORY_OF_SST2

A thousand training examples, query and value, three seeds, and for each method four learning rates,
each three or so times the last: what is best for one is not for another. About a minute a run
on one core. A part of it: ``--only=lora.method=dora``, or ``--only=seed=0``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from configs import common, sst2_minilm

_HEAD = ("classifier",)
_RATES = (2e-4, 6e-4, 2e-3, 6e-3)
_LOW_RATES = (2e-5, 6e-5, 2e-4, 6e-4)
_HIGH_RATES = (2e-3, 6e-3, 2e-2, 6e-2)

# Fields that differ from plain LoRA's, and learning rates.
_METHODS: tuple[tuple[Mapping[str, Any], Sequence[float]], ...] = (
    ({}, _RATES),
    ({"lora.rank_stabilized": True}, _RATES),
    ({"lora.method": "dora"}, _RATES),
    ({"lora.init": "pissa"}, _RATES),
    ({"lora.init": "olora"}, _RATES),
    ({"lora.init": "lora_ga"}, _RATES),
    ({"lora.init": "eva"}, _RATES),
    ({"optimizer.b_rate": 16.0}, (6e-5, 2e-4, 6e-4, 2e-3)),
    ({"lora.train_a": False}, (*_RATES, 2e-2)),
    ({"lora.method": "vera", "lora.rank": 256}, _HIGH_RATES),
    (
        {"lora.method": "adalora", "lora.rank": 12, "optimizer.budget.target_rank": 8},
        (*_RATES, 2e-2),
    ),
    ({"lora.targets": (), "lora.train": ("re:.*bias", *_HEAD)}, _RATES),  # BitFit
    ({"lora.targets": (), "lora.train": ("re:.*",)}, _LOW_RATES),  # full fine-tuning
)


def get_config() -> ConfigDict:
    """The reference recipe on a thousand examples, with a warm-up for the high rates."""
    c = sst2_minilm.get_config().unlock()
    c.data.train_examples = 1000
    c.data.max_length = 64  # SST-2's training sentences have 66 tokens at most
    c.data.buckets = (16, 32, 48, 64)
    c.model.dtype = "bfloat16"  # products of bfloat16 with float32 sums, on most CPUs the fastest
    c.optimizer.warmup = 0.06
    return c.lock()


def sweep(add: Callable) -> None:
    """Adds the runs."""
    for fields, rates in _METHODS:
        for point in common.product({"optimizer.learning_rate": rates, "seed": range(3)}):
            add(**fields, **point)
