"""The runs of a sweep in trackers: a group, each named by what sets it apart, in one program."""

import sqlite3

import pytest

from lora_jax.training.writers import wandb_files
from tests.helpers import programs, tiny_encoder, tiny_task

CONFIG = """
from configs import sst2_minilm
get_config = sst2_minilm.get_config
def sweep(add):
    for rank, rate in ((1, 1e-3), (3, 5e-4)):
        add(**{"lora.rank": rank, "optimizer.learning_rate": rate})
"""
NAMES = {"rank1-lr1e-3", "rank3-lr5e-4"}


@pytest.mark.slow
def test_runs_that_share_a_program_are_runs_of_their_own(tmp_path):
    pytest.importorskip("wandb", reason="pip install 'lora_jax[wandb]'")
    pytest.importorskip("trackio", reason="pip install 'lora_jax[trackio]'")
    from wandb.proto.wandb_internal_pb2 import Record

    tiny_encoder.checkpoint(tmp_path / "model")
    tiny_encoder.data(tmp_path / "data", n=40)
    (tmp_path / "ranks.py").write_text(CONFIG)
    fields = tiny_encoder.overrides(tmp_path) | {"epochs": 1, "log.to": "wandb,trackio"}
    del fields["lora.rank"]
    workdir = tmp_path / "ranks"
    flags = [f"--config.{k}={v}" for k, v in fields.items() if k != "optimizer.learning_rate"]
    programs.succeed(
        "sweep", f"--config={tmp_path / 'ranks.py'}", f"--workdir={workdir}", "--parallel=2",
        *flags, env={"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "store")},
    )  # fmt: skip
    found, rows = {}, {}
    for path in workdir.glob("wandb/offline-run-*/run-*.wandb"):
        records = [Record.FromString(x) for x in wandb_files._read_records(path.read_bytes())]
        (run,) = (x.run for x in records if x.WhichOneof("record_type") == "run")
        found[run.display_name] = run.run_group
        rows[run.display_name] = sum(x.WhichOneof("record_type") == "history" for x in records)
    assert found == dict.fromkeys(NAMES, "ranks")
    (count,) = {len(tiny_task.lines(path)) for path in (workdir / "runs").iterdir()}
    assert rows == dict.fromkeys(NAMES, count)
    with sqlite3.connect(tmp_path / "store" / "lora_jax.db") as database:
        query = "SELECT run_name, COUNT(*) FROM metrics GROUP BY run_name"
        assert dict(database.execute(query).fetchall()) == dict.fromkeys(NAMES, count)
