r"""Fine-tunes a language model on conversations, such as Llama on instructions and answers.

    python -m experiments.instruct --config=configs/instruct_llama.py --workdir=runs/instruct \
        --config.model.name=DIRECTORY_OF_A_MODEL --config.data.train=conversations.jsonl

A line of the file is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant",
"content": "..."}]}; the model's own chat template makes a text of it, of which only what the
assistant says is learned. Several conversations share a row of a batch, without seeing each other.
Resuming, --adapter and --eval_only are as in experiments.sst2; experiments.chat talks to what comes
out.
"""

from experiments import cli, finetuning, recipes
from lora_jax.training import workdirs


def main(argv: list[str]) -> None:
    """Trains, and says what to do next."""
    config, workdir, devices = finetuning.prepare(argv, recipes.INSTRUCT)
    best = finetuning.fit(config, workdir, recipes.INSTRUCT, devices)
    if best is None:
        return
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
