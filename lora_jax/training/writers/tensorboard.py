"""TensorBoard's event files, without TensorFlow or torch.

TensorBoard's usual writer is a thread of its own, in which an error of the disk is lost. Here each
event is written at once.
"""

import contextlib
import time
from collections.abc import Mapping

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from lora_jax.training.workdirs import EVENTS
from lora_jax.training.writers.run_info import RunInfo


class TensorBoardWriter:
    """Events of a run, in the folder ``tensorboard`` of its directory.

    Args:
      info: the run; its hyperparameters are written where the HParams tab finds them.
      step: step that the run goes on from. Events of later steps in older files are hidden.
      score: name of the metric that selects the best adapter.
    """

    def __init__(self, info: RunInfo, step: int, score: str = "") -> None:
        folder = info.workdir / EVENTS
        folder.mkdir(exist_ok=True)
        self.place = str(folder)
        self._events = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))
        if info.hyperparameters:
            metrics = dict.fromkeys(filter(None, ("eval_loss", score)), 0.0)
            # The third summary says that the session has ended well, which is not known yet.
            for part in summary.hparams(dict(info.hyperparameters), metrics)[:2]:
                self._add(step, part)

    def write(self, number: int, step: int, values: Mapping[str, float]) -> None:
        """Writes a scalar for each value, and flushes.

        Raises:
          OSError: there is no space, for example.
        """
        for name, value in values.items():
            self._add(step, summary.scalar(name, value))
        self._events.flush()

    def close(self, is_success: bool) -> None:
        """Closes the file.

        Raises:
          OSError: what is left can't be written.
        """
        try:
            self._events.close()
        except OSError:
            # The file is open still, and tensorboardX has no other way to it.
            with contextlib.suppress(OSError):
                self._events._py_recordio_writer.close()
            raise

    def _add(self, step: int, part: Summary) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=part))
