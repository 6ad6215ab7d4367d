"""SST-2 with MiniLM: the recipe of the speedrun."""

from ml_collections import ConfigDict

from configs import sst2_minilm


def get_config() -> ConfigDict:
    """One pass over a part of the training set, evaluated often."""
    c = sst2_minilm.get_config().unlock()
    c.model.dtype = "auto"
    c.lora.rank = 16
    c.lora.alpha = 32.0
    c.lora.targets = ("all-linear",)
    c.lora.dropout = 0.0
    c.data.train_examples = 16000
    c.data.buckets = (16, 32, 48, 64, 128)
    c.data.alike = 50
    c.batch_size = 32
    c.eval_batch_size = 64
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup = 0.06
    c.epochs = 1
    c.eval_every = "10%"
    c.eval_at_start = False
    return c.lock()
