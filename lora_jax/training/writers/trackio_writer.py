"""trackio, on this machine: ``trackio show`` is its dashboard, ``trackio sync`` shares it."""

import contextlib
import io
import os
import sys
from collections.abc import Mapping

from lora_jax.training.writers.run_info import RunInfo


class TrackioWriter:
    """A run in trackio, which goes on under the same id whenever the run does.

    trackio writes in the background, and reports no error. So its rows are counted, when a run
    goes on and when it ends.
    """

    def __init__(self, info: RunInfo) -> None:
        if info.is_store_chosen and "trackio" not in sys.modules:
            os.environ["TRACKIO_DIR"] = str(info.store / "trackio")  # read at its import
        import trackio
        from trackio import utils

        if info.is_store_chosen and info.store / "trackio" != utils.TRACKIO_DIR:
            raise ValueError(
                f"trackio is at work in {utils.TRACKIO_DIR} already, and has one place in each "
                f"process: leave log.dir empty, or set TRACKIO_DIR={info.store / 'trackio'}"
            )
        self._project, self._id = info.project, info.id
        # By `trackio.init` a run would end when that of another run of a sweep begins.
        self._run = trackio.Run(
            url=None, client=None, project=info.project, name=info.name, run_id=info.id,
            group=info.group or None, config=dict(info.hyperparameters),
        )  # fmt: skip
        self._written = self.count_lines()
        self.place = f"{utils.TRACKIO_DIR}, project {info.project}, run {info.name}"

    def count_lines(self) -> int:
        """Counts the lines that the store has; one that was written just before a kill is lost."""
        from trackio.sqlite_storage import SQLiteStorage

        return SQLiteStorage.get_log_count(self._project, run_id=self._id)

    def write(self, number: int, step: int, values: Mapping[str, float]) -> None:
        """Logs a line."""
        self._run.log(dict(values), step=step)
        self._written += 1

    def close(self, is_success: bool) -> None:
        """Waits until all lines are in the store.

        Raises:
          OSError: some are not.
        """
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()
        if (count := self.count_lines()) < self._written:
            raise OSError(f"{count} lines of {self._written} are in its store")
