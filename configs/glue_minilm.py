"""Any task of GLUE with MiniLM (6 layers of width 384), small enough for a CPU.

    python -m experiments.glue --config=configs/glue_minilm.py --config.task=rte \
        --workdir=runs/rte --config.data.source=DIRECTORY_OF_RTE

The reference recipe of SST-2; its numbers for other tasks have not been measured.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(task: str = "rte") -> ConfigDict:
    """The reference recipe on MiniLM, for a task that --config.task may change."""
    c = common.glue_config(task)
    c.model.name = "sentence-transformers/all-MiniLM-L6-v2"
    return c.lock()
