r"""SST-2 with T5-small as text to text: "sst2 sentence: ..." -> "positive" or "negative".

    python -m experiments.sst2 --config=configs/sst2_t5.py --workdir=runs/sst2_t5 \
        --config.data.source=DIRECTORY_OF_SST2

Rank 8 on q and v, 5,000 examples, 3 epochs. Needs the Hub once for t5-small (or
--config.model.name=DIRECTORY of any T5 or Flan-T5). The accuracy has not been measured by this
project; T5's own pretraining mixture held SST-2 in this form, so that it is high from the start.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The reference recipe on T5-small, without a head to train."""
    c = common.sst2_config()
    c.model.name = "t5-small"
    c.lora.targets = ("q", "v")
    c.lora.train = ()
    return c.lock()
