r"""Fine-tunes BERT, RoBERTa, DistilBERT or T5 (as text to text) for sentence classification.

    python -m experiments.sst2 --config=configs/quickstart.py --workdir=runs/quickstart \
        --config.lora.rank=4

Run again with the same config, it goes on where it stopped. With --adapter it starts from a trained
adapter, of this library or in PEFT's format, whose rank, targets and so on then hold. With
--eval_only it trains nothing: it scores the run's best adapter, or that of --adapter.
"""

from experiments import base_configs, cli, finetuning

if __name__ == "__main__":
    cli.run(finetuning.main, lambda: base_configs.GLUE)
