"""The fields that every text-classification config has, with the reference recipe's values."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict


def product(axes: Mapping[str, Iterable[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of the values of some fields, for a sweep; the last one varies fastest.

    >>> list(product({"lora.rank": (1, 2), "seed": range(2)}))[:3]
    [{'lora.rank': 1, 'seed': 0}, {'lora.rank': 1, 'seed': 1}, {'lora.rank': 2, 'seed': 0}]
    """
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def duration(value: float | str) -> config_dict.FieldReference:
    """A field that takes a number, or a text such as "100 steps", "1.5 epochs" or "6%"."""
    return config_dict.FieldReference(value, field_type=object)


def base_config() -> ConfigDict:
    """A config with all fields set; a config file changes what it needs and locks it."""
    c = ConfigDict()
    c.task = "sst2"  # name of the task of GLUE
    c.seed = 0  # seed of the initial draw of factors and head, and of all dropout

    c.adapter = ""  # directory of an adapter to start from, in either format; its settings hold
    c.model = ConfigDict()  # the pretrained model that is adapted
    c.model.name = "bert-base-uncased"  # a directory, or a name to look up in cache and Hub
    c.model.num_labels = 2  # number of classes; 0 for that of the data
    c.model.labels = ("negative", "positive")  # names of the classes; () for the task's own
    # Dtype of the activations: "float32", "bfloat16", or "auto" for the faster one of them.
    c.model.dtype = "float32"
    c.model.param_dtype = "float32"  # dtype of the frozen base; what is trained is float32
    # Scheme that kernels are quantized by: "nf4_double", "int8", ...; "" for plain ones, or for the
    # codes that the checkpoint has; "none" to decode these.
    c.model.quantize = ""
    # Activations that the backward pass computes again, layer by layer, in place of keeping them:
    # "none", "full" (all), or the name of a policy in jax.checkpoint_policies.
    c.model.remat = "none"
    # Whether the layers are one array a parameter: one layer is then compiled for all.
    c.model.scan_layers = False
    # How attention is computed: "auto", or "xla" (writes its scores to memory), "blockwise" (memory
    # linear in the length) or "cudnn" (fused, on NVIDIA GPUs); docs/scaling.md says what is chosen.
    c.model.attention = "auto"

    c.lora = ConfigDict()  # the fields of lora_jax.LoRAConfig
    c.lora.rank = 8  # columns of a and rows of b, the two factors of a kernel
    c.lora.alpha = 16.0  # the product of the factors is multiplied by alpha / rank
    # Modules whose kernels get factors: endings of their names, "all-linear", "default" for those
    # of the model's family, or regular expressions after "re:".
    c.lora.targets = ("query", "value")
    c.lora.train = ("classifier",)  # modules that are trained in full
    c.lora.method = "lora"  # "lora", "dora", "vera" or "adalora"; docs/methods.md
    # First values of the factors: "uniform", "gaussian", "orthogonal"; "pissa", "pissa_niter_4",
    # "pissa_niter_16", "olora" or "milora", from the base; "lora_ga", from gradients; "eva", from
    # activations; "loftq", from what model.quantize takes away.
    c.lora.init = "uniform"
    c.lora.train_a = True  # False freezes the factor a (LoRA-FA)
    c.lora.projection_seed = 0  # seed of what all kernels of VeRA share
    c.lora.dropout = 0.1  # rate of dropout before the factors
    c.lora.rank_stabilized = False  # True divides alpha by the root of the rank
    c.lora.rank_pattern = ConfigDict()  # ranks of single modules, as query=4
    c.lora.alpha_pattern = ConfigDict()  # alphas of single modules, as query=32.0
    c.lora.adapt_bias = False  # a trained term for the biases of adapted kernels, too
    c.lora.train_tokens = ConfigDict()  # rows of an embedding to train, as embed_tokens=(2, 17)

    c.data = ConfigDict()  # what is learned from, and how it is batched
    # "tfds:NAME", "reviews", or a directory in the GLUE layout; empty for the task's own in TFDS
    c.data.source = "tfds:glue/sst2"
    c.data.data_dir = ""  # where TFDS keeps data; empty for its default
    c.data.seed = 0  # seed of which examples are taken, and of their order
    c.data.train_examples = 0  # number of examples of the shuffled training set; 0 for all
    c.data.holdout = 0  # number of other training examples to evaluate on; 0: the validation set
    c.data.max_length = 128  # largest number of tokens of a text; longer ones are cut
    c.data.buckets = (32, 64, 128)  # batches are padded to the first of these that is long enough
    c.data.alike = 0  # number of batches at a time that are filled by length, to pad less; 0: none

    c.mesh = ConfigDict()  # devices; docs/scaling.md says which axis is for what
    c.mesh.data = 1  # rows of a batch are split over data x fsdp; -1 for all devices that are left
    c.mesh.fsdp = 1  # each parameter is split over it
    c.mesh.tensor = 1  # the width of the layers is split over it
    c.pmap = False  # rows split by jax.pmap, over mesh.data devices, or all if that is 1

    c.batch_size = 16  # rows of a step, whatever accumulate is
    c.init_batches = 8  # number of training batches that lora.init="lora_ga" or "eva" sees
    c.accumulate = 1  # micro-batches that a batch is split into; one is in memory at a time
    c.eval_batch_size = 64  # rows of a batch of the evaluation
    c.epochs = 3  # passes through the training set
    c.steps = duration(0)  # length of the run; 0 for the number of epochs
    c.log_every = 20  # steps between lines of metrics.jsonl
    # Steps between evaluations, "1 epoch" or "10%"; there is always one at the end.
    c.eval_every = duration("1 epoch")
    c.eval_at_start = True  # whether there is an evaluation before the first step, too
    c.checkpoint_every = duration(0)  # steps between checkpoints, besides one with each evaluation
    c.checkpoint_keep = 2  # number of checkpoints to keep; an older one helps if one is damaged

    c.log = ConfigDict()  # where metrics go beside metrics.jsonl; docs/logging.md
    c.log.to = ("tensorboard",)  # or wandb, mlflow, trackio; () for the file alone
    c.log.project = "lora_jax"  # project of the tracker; MLflow calls it an experiment
    c.log.group = ""  # name that runs share; empty for that of the sweep
    c.log.name = ""  # name of the run; empty for one such as mini-rank8-lr5e-4-seed0
    c.log.dir = ""  # where trackers keep files; empty for their variables, or workdir

    c.early_stopping = ConfigDict()  # ends a run that no longer improves
    c.early_stopping.patience = 0  # evaluations without improvement that end the run; 0: never
    c.early_stopping.min_delta = 0.0  # improvement of the score that is needed to count

    c.guard = ConfigDict()  # against a loss or gradient that is NaN or infinite
    c.guard.action = "stop"  # "stop", or "skip" to go on without that step
    c.guard.patience = 10  # consecutive steps without an update that stop the run all the same
    c.guard.spike = 0.0  # multiple of its running mean above which a loss counts as NaN; 0: never

    c.optimizer = ConfigDict()  # AdamW, and its learning rate
    c.optimizer.learning_rate = 5e-4  # its largest value, after the warm-up
    c.optimizer.b_rate = 1.0  # multiplies the learning rate of the factors b (LoRA+)
    c.optimizer.embedding_rate = 1.0  # the same for leaves called "embedding"
    # The linear rise before the decay, a fraction of all steps (0.06), or "6%", "100 steps", ...
    c.optimizer.warmup = duration(0.0)
    # How the learning rate falls to zero at the end: "linear", "cosine", or "none".
    c.optimizer.decay = "linear"
    c.optimizer.weight_decay = 0.01  # that of AdamW, times the learning rate
    c.optimizer.clip_norm = 1.0  # largest global norm of the gradient; 0 for any
    c.optimizer.orthogonality = 0.5  # weight of AdaLoRA's penalty; no other method has one
    c.optimizer.budget = ConfigDict()  # of AdaLoRA's ranks, which begin at lora.rank
    c.optimizer.budget.target_rank = 0  # mean rank of a kernel at the end; 0 to keep all
    c.optimizer.budget.begin = duration(0.1)  # steps before ranks fall: a part of all, or "9 steps"
    c.optimizer.budget.end = duration(0.3)  # steps at the end with the ranks that are left
    c.optimizer.budget.every = 1  # steps from one choice to the next
    c.optimizer.budget.beta1 = 0.85  # decay of the mean of the sensitivity
    c.optimizer.budget.beta2 = 0.85  # decay of the mean of its uncertainty
    return c


def sst2_config() -> ConfigDict:
    """The reference recipe for SST-2: 5,000 of its training examples."""
    c = base_config()
    c.data.train_examples = 5000
    return c


def glue_config(task: str) -> ConfigDict:
    """A config for a task of GLUE on all its training examples.

    Labels are the task's own; targets and trained modules are those of PEFT for the model's family.
    """
    c = base_config()
    c.task = task
    c.model.labels, c.model.num_labels = (), 0
    c.lora.targets = c.lora.train = ("default",)
    c.data.source = ""
    return c


def classify_config() -> ConfigDict:
    """A config for one's own texts and labels, in a table.

    Every linear layer is adapted, and what is trained in full is PEFT's choice for the family.
    """
    c = base_config()
    del c.task, c.data.data_dir, c.data.holdout
    c.model.labels, c.model.num_labels = (), 0  # () for those of the data, in sorted order
    c.lora.targets, c.lora.train = ("all-linear",), ("default",)
    # A file (.csv, .tsv, .jsonl, .json, .parquet), a folder with a file for each split, "reviews",
    # or "datasets:NAME" for a data set of Hugging Face
    c.data.source = ""
    c.data.text = ""  # column of the texts, or two with a comma between for pairs; empty to find it
    c.data.label = ""  # column of the labels; empty to find it
    c.data.regression = False  # whether labels are real numbers to predict
    c.data.validation = ""  # another source to evaluate on; empty for that of the folder, or a part
    # Part held out to evaluate on: "20%", or a number of rows; "" for 10%, unless there is a
    # validation split
    c.data.holdout = duration("")
    c.data.columns = ""  # names of all columns, with commas, if the file's first line is a row
    c.data.delimiter = ""  # character between the fields of CSV files; empty to find it
    c.data.digest = ""  # hash of the rows, which a run fills in; it does not go on with others
    c.data.train_examples = 0
    return c


def language_config() -> ConfigDict:
    """A config for a causal language model."""
    c = base_config()
    del c.task, c.model.num_labels, c.model.labels
    c.model.name = "gpt2"
    c.model.tokenizer = ""  # directory of the tokenizer; empty for that of the model
    c.lora.targets = ("c_attn",)
    c.lora.train = ()
    del c.data.data_dir, c.data.train_examples, c.data.max_length
    c.data.source = ""  # directory of the files
    c.data.buckets = (64, 96, 128, 192)  # they must hold the longest text
    c.label_smoothing = 0.0  # part of the probability that is spread over all tokens
    return c


def e2e_config() -> ConfigDict:
    """The fields that every config of the E2E NLG challenge has."""
    c = language_config()
    c.data.train = "train.txt"  # file of the training texts in data.source
    c.data.validation = "valid.txt"  # file of the texts to evaluate on
    c.data.test = "test.txt"  # file of the meanings to write texts for
    c.data.test_meanings = 0  # number of meanings of the test file to write for; 0 for all
    c.decode = ConfigDict()  # the fields of lora_jax.models.decoding.Decoding
    c.decode.max_new_tokens = 64  # largest number of tokens of a text
    c.decode.beams = 10  # width of beam search; 1 for greedy decoding
    c.decode.length_penalty = 0.9  # power of the length that scores are divided by
    c.decode.early_stopping = False  # whether beam search ends with as many ended texts as beams
    c.decode.no_repeat_ngram = 4  # length of the sequences that may not occur twice; 0 for none
    c.decode.sample = False  # True draws tokens by their probabilities
    c.decode.temperature = 1.0  # temperature of sampling
    c.decode.top_k = 0  # number of the likeliest tokens to sample from; 0 for all
    c.decode.top_p = 1.0  # sample from the likeliest tokens that together have this probability
    c.decode.seed = 0  # of sampling
    c.decode.batch_size = 16  # meanings at a time
    c.decode.buckets = ()  # lengths that meanings are padded to, besides the longest one's
    c.decode.unadapted = True  # whether the model without the adapter is scored, too
    return c
