r"""Fine-tunes a language model on conversations, such as Llama on instructions and answers.

    python -m experiments.instruct --config=configs/instruct_llama.py --workdir=runs/instruct \
        --config.model.name=DIRECTORY_OF_A_MODEL --config.data.train=conversations.jsonl

A line of the file is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant",
"content": "..."}]}; the model's own chat template makes a text of it, of which only what the
assistant says is learned. Several conversations share a row of a batch, without seeing each other.
Resuming, --adapter and --eval_only are as in experiments.sst2; experiments.chat talks to what comes
out.
"""

import logging

from experiments import cli, evaluating, finetuning
from lora_jax.tasks import from_config, instruction_tuning
from lora_jax.training import train, workdirs


def main(argv: list[str]) -> None:
    """Trains, and says what to do next."""
    config, workdir = finetuning.command_line(argv, lambda c: c.copy_and_resolve_references())
    logging.getLogger("lora_jax").setLevel(logging.ERROR)  # the report says what is fresh
    instruction_tuning.check(config)
    if not config.adapter:  # whose settings are not known yet
        workdirs.check(workdir, config)
    task, lora_config = instruction_tuning.make_task(config)
    if finetuning.eval_only():
        return evaluating.report(task, config, workdir)
    if config.adapter:
        with config.unlocked():
            config.lora = from_config.to_config(lora_config)
    best = train.train(task, config, lora_config, workdir)
    adapter = workdir / workdirs.ADAPTER
    print(
        f"best validation loss {best.best_loss:.4f} nats a token at step {best.best_step}; "
        f"{best.seconds / 60:.1f} minutes; curves in {workdir / workdirs.CURVES}\n"
        "Next:\n"
        f'  python -m experiments.chat --adapter={adapter} "Who are you?"\n'
        f"  python -m experiments.export --adapter={adapter} --out={workdir / 'merged'} --merged"
    )


if __name__ == "__main__":
    cli.run(main)
