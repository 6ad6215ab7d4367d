"""SST-2 with RoBERTa-base: the reference recipe.

    python -m experiments.sst2 --config=configs/sst2_roberta_base.py --workdir=runs/sst2_roberta

Needs the Hub once for roberta-base (or --config.model.name=DIRECTORY), and SST-2 through TFDS or
--config.data.source=DIRECTORY. The accuracy has not been measured by this project; the LoRA paper's
own recipe is in configs/roberta_base_glue.py.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The reference recipe on RoBERTa-base."""
    c = common.sst2_config()
    c.model.name = "roberta-base"
    return c.lock()
