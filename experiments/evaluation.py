"""Scores a trained adapter on the evaluation set; nothing is trained or written."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from lora_jax import peft, serialize
from lora_jax.training import mesh, partitioning, workdirs
from lora_jax.training.evaluation import evaluate, make_eval_step
from lora_jax.training.task import Task


def find_adapter(workdir: Path) -> Path:
    """Finds the directory of the best adapter of a run, finished or under way.

    Raises:
      FileNotFoundError: there is none.
    """
    directory = workdir / workdirs.ADAPTER
    if not directory.is_dir():
        why = "no evaluation has been made there yet" if workdir.is_dir() else "no such directory"
        raise FileNotFoundError(
            f"There is no adapter to evaluate in {directory} ({why}): give the --workdir of a run "
            "that has had an evaluation, or --adapter=DIRECTORY."
        )
    return directory


def report(
    task: Task, config: ConfigDict, workdir: Path, *, devices: mesh.Devices | None = None
) -> None:
    """Prints the scores of ``config.adapter``, which the task starts from: for people, then JSON.

    Args:
      task: gives the evaluation examples, and the adapter.
      config: config of the run.
      workdir: directory of the run.
      devices: devices of the run; by default those that the config describes.

    Raises:
      ValueError: the adapter's head is not the task's.
      FloatingPointError: a score is NaN or infinite.
    """
    if task.fresh_head:
        raise ValueError(f"{task.fresh_head}, so that its scores would be those of a random one.")
    devices = mesh.find(config) if devices is None else devices
    directory = Path(config.adapter)
    task = partitioning.place_task(devices, task, config)
    adapter = partitioning.place_adapter(devices, task.adapter, task.base)
    step = make_eval_step(task, devices)
    values = evaluate(step, adapter, partitioning.copy_base(devices, task))
    about: dict[str, object] = {"adapter": str(directory)}
    if not peft.is_peft(directory):
        about |= {"step": serialize.read_metadata(directory).get("step")}
    print("\n".join([*task.notes, *_changes(config, workdir, directory)]))
    scores = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
    at = f", of step {about['step']}" if about.get("step") is not None else ""
    print(f"validation of the adapter in {directory}{at}: {scores}", flush=True)
    try:
        print(json.dumps(about | values, allow_nan=False), flush=True)
    except ValueError as error:
        raise FloatingPointError(f"Not all scores are numbers: {scores}") from error


def _changes(config: ConfigDict, workdir: Path, directory: Path) -> list[str]:
    """Returns the differences between the config and that of the adapter's run, as a line."""
    path = workdir / workdirs.CONFIG
    if directory != workdir / workdirs.ADAPTER or not path.exists():
        return []
    stored = json.loads(path.read_text(encoding="utf-8"))
    current = workdirs.to_json_types(config) | {"adapter": stored.get("adapter")}
    changes = list(workdirs.differences(stored, current))
    return [f"not as the run was: {'; '.join(changes)}"] if changes else []
