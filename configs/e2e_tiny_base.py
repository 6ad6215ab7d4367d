r"""A small GPT-2 from nothing, on the lines of the E2E data: the base of configs/e2e_tiny.py.

    python -m experiments.pretrain --config=configs/e2e_tiny_base.py --workdir=runs/e2e_base \
        --config.data.source=DIRECTORY_OF_E2E

0.95 million parameters, 1,000 tokens; the training texts are those of valid.txt, less 40 meanings.

expected: validation loss 1.6003 (nats a token); 2.1 minutes on one CPU core
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """Four layers of width 128, all parameters trained."""
    c = common.language_config()
    del c.model.name, c.model.dtype, c.model.param_dtype, c.model.scan_layers, c.model.tokenizer
    # Fields of lora_jax.models.gpt2.GPT2Config.

    c.model.vocab_size = 1000  # largest size of the tokenizer that is made
    c.model.n_positions = 192  # largest number of tokens of a text
    c.model.n_embd = 128  # width of the model
    c.model.n_layer = 4  # number of layers
    c.model.n_head = 4  # number of heads of attention in a layer
    # Rates of dropout: of the residual branches, of the embedding, of the weights of attention.
    c.model.resid_pdrop = c.model.embd_pdrop = c.model.attn_pdrop = 0.0
    c.lora.targets = ()
    c.lora.train = ("re:.*",)
    c.lora.dropout = 0.0
    c.data.train = "valid.txt"  # file of the texts in data.source
    c.data.holdout = 40  # number of meanings that are kept to evaluate on
    c.data.length = 128  # number of tokens in a row
    c.data.buckets = (128,)
    c.batch_size = 8
    c.eval_batch_size = 8
    c.epochs = 8
    c.optimizer.learning_rate = 2e-3
    c.optimizer.warmup = 0.05
    return c.lock()
