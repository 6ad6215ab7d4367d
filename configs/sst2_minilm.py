"""SST-2 with MiniLM (6 layers of width 384): the reference recipe, small enough for a CPU.

    python -m experiments.sst2 --config=configs/sst2_minilm.py --workdir=runs/sst2_minilm \
        --config.data.source=DIRECTORY_OF_SST2

expected: validation accuracy 0.8234, 0.8360, 0.8349 for seeds 0, 1, 2 (mean 0.8314, standard
deviation 0.0070), each at the last epoch; two CPU cores, 4 to 6 minutes a run, 2026-11-24; 0.8222,
0.8406, 0.8314 (the same mean) on 2026-11-27
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The reference recipe on MiniLM."""
    c = common.sst2_config()
    c.model.name = "sentence-transformers/all-MiniLM-L6-v2"
    return c.lock()
