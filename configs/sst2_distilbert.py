"""SST-2 with DistilBERT: the reference recipe, with this family's names.

    python -m experiments.sst2 --config=configs/sst2_distilbert.py --workdir=runs/sst2_distilbert

Needs the Hub once for distilbert-base-uncased (or --config.model.name=DIRECTORY), and SST-2 through
TFDS or --config.data.source=DIRECTORY. The accuracy has not been measured by this project.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The reference recipe on DistilBERT."""
    c = common.sst2_config()
    c.model.name = "distilbert-base-uncased"
    c.lora.targets = ("q_lin", "v_lin")
    c.lora.train = ("pre_classifier", "classifier")  # two layers of the head, both made afresh
    return c.lock()
