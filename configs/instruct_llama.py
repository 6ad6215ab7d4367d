r"""Instructions for a model of the Llama family: LoRA on all kernels of a layer.

    python -m experiments.instruct --config=configs/instruct_llama.py --workdir=runs/instruct \
        --config.model.name=DIRECTORY_OF_A_MODEL --config.data.train=conversations.jsonl

The settings are customary ones (rank 16, a learning rate of 2e-4 with 3% warm-up),
in bfloat16. expected: not measured by this project; models that can chat take a GPU.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """All fields set; model.name and data.train are left to the command line."""
    c = common.base_config()
    del c.task, c.model.num_labels, c.model.labels
    c.model.name = ""  # a directory, a GGUF file, or a name to look up in cache and Hub
    # Half the memory for the base: --config.model.param_dtype=bfloat16; an eighth for its kernels:
    # --config.model.quantize=nf4_double; the least for the activations: --config.model.remat=full.
    # Attention's scores are not in memory where they would be large: --config.model.attention.

    c.model.dtype = "bfloat16"
    c.model.scan_layers = True  # one layer is compiled for all

    c.lora.rank = 16
    c.lora.alpha = 32.0
    # Every kernel of a layer; "all-linear" would be the head as well, where it is not tied.

    c.lora.targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    c.lora.train = ()
    c.lora.dropout = 0.05

    del c.data.source, c.data.data_dir, c.data.train_examples, c.data.buckets, c.data.alike
    # A file (JSON lines, a JSON array, CSV, Parquet), "datasets:NAME" for a data set of Hugging
    # Face, or "tutor:train", which comes along; docs/conversations.md says what may stand in it.
    c.data.train = ""
    c.data.validation = ""  # another such file to evaluate on; "" for a part of data.train
    # The part of data.train that is kept to evaluate on: a number of conversations, or "10%"; ""
    # for 5%.
    c.data.holdout = common.duration("")
    c.data.format = "auto"  # "messages", "sharegpt", "alpaca", ...; "auto" finds out
    c.data.ignore = ()  # keys of rows that are left out; others that nothing reads are errors
    # Texts that become one token each, such as ("<tool>", "</tool>"): the embedding gets rows for
    # them, which are trained, and saved with the adapter.
    c.data.add_tokens = ()
    c.data.chat_template = ""  # file with a template of one's own; "" for the model's
    c.data.max_length = 1024  # tokens of a row; longer conversations are cut
    c.data.packing = True  # several conversations share a row, without seeing each other
    c.data.date = "2024-07-26"  # date for chat templates that write one

    c.replies = ConfigDict()  # replies to the conversations of the evaluation, when all is trained
    c.replies.pattern = ""  # regular expression of which matches are counted; "" for no replies
    c.replies.max_new_tokens = 128  # largest number of tokens of a reply
    c.replies.batch_size = 16  # conversations at a time

    c.batch_size = 8
    c.eval_batch_size = 8
    c.epochs = 1
    c.log_every = 5
    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup = 0.03
    c.optimizer.weight_decay = 0.0
    return c.lock()
