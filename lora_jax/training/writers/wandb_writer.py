"""Weights & Biases, online or (with ``WANDB_MODE=offline``) into files that are sent later."""

from collections.abc import Mapping
from pathlib import Path

from lora_jax.training.writers import wandb_files
from lora_jax.training.writers.run_info import RunInfo, choose_store

_SECONDS = 60  # to reach the server in


class WandbWriter:
    """A run in W&B, which goes on under the same id whenever the run does.

    Its history has a row for each line, whose number is W&B's own step, so that no line can come
    twice. Curves are drawn against the training step.
    """

    def __init__(self, info: RunInfo) -> None:
        import wandb

        self._directory = Path(choose_store(info, "WANDB_DIR", str(info.store)))
        self._run = wandb.init(
            project=info.project,
            name=info.name,
            group=info.group or None,
            id=info.id,
            resume="allow",
            dir=str(self._directory),
            config=dict(info.hyperparameters),
            reinit="create_new",  # several runs of a sweep are open at a time
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=_SECONDS, allow_val_change=True
            ),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self.place = f"{self._directory}/wandb, which `wandb sync` sends"
        if not self._run.offline:
            self.place = str(self._run.url)

    def count_lines(self) -> int:
        """Returns the number of the last line that W&B's server has, or its files offline."""
        if self._run.offline:
            return wandb_files.find_last_number(self._directory, self._run.id)
        return max(self._run.starting_step - 1, 0)

    def write(self, number: int, step: int, values: Mapping[str, float]) -> None:
        """Logs a row."""
        self._run.log({"step": step, **values}, step=number)

    def close(self, is_success: bool) -> None:
        """Ends the run in W&B; an unsuccessful one counts as failed until it goes on."""
        self._run.finish(exit_code=0 if is_success else 1)
