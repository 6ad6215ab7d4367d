"""Weights & Biases, online or (with ``WANDB_MODE=offline``) into files that are sent later."""

from collections.abc import Mapping

from lora_jax.training.writers.run_info import RunInfo, choose_store

_SECONDS = 60  # to reach the server in


class WandbWriter:
    """A run in W&B, which goes on under the same id whenever the run does.

    Its history has a row for each line, whose number is W&B's own step, so that no line can come
    twice. Curves are drawn against the training step.
    """

    def __init__(self, info: RunInfo) -> None:
        import wandb

        directory = choose_store(info, "WANDB_DIR", str(info.store))
        self._run = wandb.init(
            project=info.project,
            name=info.name,
            group=info.group or None,
            id=info.id,
            resume="allow",
            dir=directory,
            config=dict(info.hyperparameters),
            reinit="create_new",  # several runs of a sweep are open at a time
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=_SECONDS, allow_val_change=True
            ),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self.place = (
            str(self._run.url)
            if not self._run.offline
            else (f"{directory}/wandb, which `wandb sync` sends")
        )

    def count_lines(self) -> None:
        """Returns None: W&B's own process has what it was handed."""

    def write(self, number: int, step: int, values: Mapping[str, float]) -> None:
        """Logs a row."""
        self._run.log({"step": step, **values}, step=number)

    def close(self, is_success: bool) -> None:
        """Ends the run in W&B; an unsuccessful one counts as failed until it goes on."""
        self._run.finish(exit_code=0 if is_success else 1)
