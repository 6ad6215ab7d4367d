"""SST-2 with BERT-base: the reference recipe.

    python -m experiments.sst2 --config=configs/sst2_bert_base.py --workdir=runs/sst2_bert_base

Rank 8 on query and value, classifier trained, 5,000 examples, 3 epochs. Needs the Hub once for
bert-base-uncased (or --config.model.name=DIRECTORY), and SST-2 through TFDS or
--config.data.source=DIRECTORY. The accuracy has not been measured by this project.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The reference recipe."""
    return common.sst2_config().lock()
