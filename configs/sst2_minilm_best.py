"""SST-2 with MiniLM: the best recipe found here on the same 5,000 examples.

    python -m experiments.sst2 --config=configs/sst2_minilm_best.py --workdir=runs/sst2_best \
        --config.data.source=DIRECTORY_OF_SST2

Rank 16 on every linear layer, 5 epochs. Of three recipes it was the best at its last epoch on 2,500
training sentences that are new to it (scripts/score_new_sentences.py; earlier runs, with other
masks of dropout): 0.8500; 8 epochs with data.alike=50 had 0.8488; learning rate 1e-3, batch 32 and
data.alike=50 had 0.8440. This rule was made when validation figures of those runs were known.
expected: validation accuracy 0.8635, 0.8601, 0.8658 for seeds 0, 1, 2 (mean 0.8631, standard
deviation 0.0029), each at the last epoch; two CPU cores, 5 to 8 minutes a run, 2026-11-24
"""

from ml_collections import ConfigDict

from configs import sst2_minilm


def get_config() -> ConfigDict:
    """The reference recipe with more adapters, more epochs and a warm-up."""
    c = sst2_minilm.get_config().unlock()
    c.lora.rank = 16
    c.lora.alpha = 32.0
    c.lora.targets = ("all-linear",)
    c.optimizer.warmup = 0.06
    c.epochs = 5
    c.data.buckets = (32, 40, 48, 64, 128)  # a fifth fewer padded tokens than with (32, 64, 128)
    return c.lock()
