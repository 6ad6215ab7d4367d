r"""Fine-tunes BERT, RoBERTa, DistilBERT or T5 (as text to text) on any task of GLUE.

    python -m experiments.glue --config=configs/glue_minilm.py --config.task=rte \
        --workdir=runs/rte --config.data.source=DIRECTORY

The tasks are cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte and wnli; DIRECTORY holds the task's
files as GLUE unpacks them (or the directories of all tasks). Without it the data come through TFDS.
Resuming, --adapter and --eval_only are as in experiments.sst2.
"""

from experiments import base_configs, cli, finetuning

if __name__ == "__main__":
    cli.run(finetuning.main, lambda: base_configs.GLUE)
