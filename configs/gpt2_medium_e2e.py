r"""E2E with GPT-2 medium: the settings of the LoRA paper (Hu et al. 2021, table 11, appendix D.3).

    python -m experiments.e2e_nlg --config=configs/gpt2_medium_e2e.py --workdir=runs/e2e_medium \
        --config.data.source=DIRECTORY_OF_E2E

The directory holds train.txt, valid.txt and test.txt in the layout of the paper's code. Needs the
Hub once for gpt2-medium, or --config.model.name=DIRECTORY.

expected (the paper's table 3, mean and spread of three seeds, by the challenge's own script):
    LoRA, 0.35 million trained:             BLEU 70.4 ± 0.1, NIST 8.85 ± 0.02, METEOR 46.8 ± 0.2,
                                            ROUGE-L 71.8 ± 0.1, CIDEr 2.53 ± 0.02
    full fine-tuning, 354.92 million:       BLEU 68.2, NIST 8.62, METEOR 46.2, ROUGE-L 71.0,
                                            CIDEr 2.47
This project has not run it. Two things differ from the paper. Query, key and value are one kernel
here, as in PEFT, with rank 4 for all three; the paper's code adapts the query's and the value's
part with rank 4 each, which is as many numbers (393,216). And BLEU is that of sacrebleu.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The paper's settings."""
    c = common.e2e_config()
    c.model.name = "openai-community/gpt2-medium"
    c.model.scan_layers = True
    c.lora.rank = 4
    c.lora.alpha = 32.0
    c.lora.dropout = 0.1
    c.data.buckets = (64, 96, 128, 256)
    c.batch_size = 8
    c.epochs = 5
    c.label_smoothing = 0.1
    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup = 500 / 26_290  # 500 steps, of 5 epochs of 42,061 lines
    c.optimizer.weight_decay = 0.01
    c.optimizer.clip_norm = 0.0
    c.decode.beams = 10
    c.decode.length_penalty = 0.9  # table 11; the command in the paper's code has 0.8
    c.decode.no_repeat_ngram = 4
    return c.lock()
