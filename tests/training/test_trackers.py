"""Where metrics go: each line once to each tracker, whatever happens to run and tracker."""

import json
import struct
import sys

import pytest
from tensorboardX.proto import event_pb2, plugin_hparams_pb2

from configs import common
from lora_jax.training import metric_writer, run_names, trackers, training_config
from lora_jax.training.task import Score
from lora_jax.training.writers import wandb_files
from lora_jax.training.writers.run_info import RunInfo, choose_store
from tests.helpers import tiny_task, tracked_runs

LINES = [{"step": k, "loss": 1.0 / k} for k in (3, 6, 9)]


class Recorder:
    """A tracker in memory: what it was handed, by run, as a tracker keeps it over restarts."""

    kept: dict[str, list] = {}
    closed: list[bool] = []
    breaks_at = None

    def __init__(self, info):
        self.place, self.info = "memory", info
        self.lines = self.kept.setdefault(info.id, [])

    def count_lines(self):
        return None

    def write(self, number, step, values):
        if number == self.breaks_at:
            raise ConnectionError("no route to\nhost")
        self.lines.append((number, step, values["loss"]))

    def close(self, is_success):
        self.closed.append(is_success)


@pytest.fixture
def recorder(monkeypatch):
    """A tracker called "recorder", which a program could name."""
    kind = trackers.Kind("json", __name__, "Recorder")
    monkeypatch.setitem(trackers.KINDS, "recorder", kind)
    for name, value in (("kept", {}), ("closed", []), ("breaks_at", None)):
        monkeypatch.setattr(Recorder, name, value)
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    return Recorder


def open_log(workdir, step=0, said=None, evaluated=None):
    outlets = trackers.Outlets(names=["recorder"], say=(said if said is not None else []).append)
    info = RunInfo(workdir=workdir, store=workdir, name="a run", project="p")
    settings = trackers.Settings(info=info, outlets=outlets)
    return metric_writer.MetricWriter(workdir, step, evaluated, settings)


def test_each_line_is_handed_over_once(tmp_path, recorder):
    """The run goes on from step 6, and writes the line of step 9 again, which the tracker has."""
    with open_log(tmp_path) as log:
        for line in LINES:
            log.write(**line)
    with open_log(tmp_path, step=6) as log:
        log.write(**LINES[2])
        log.write(step=12, loss=0.1)
    (lines,) = recorder.kept.values()
    assert lines == [(1, 3, 1 / 3), (2, 6, 1 / 6), (3, 9, 1 / 9), (4, 12, 0.1)]
    assert recorder.closed == [True, True]


def test_a_tracker_that_is_named_later_gets_the_lines_before(tmp_path, recorder):
    with metric_writer.MetricWriter(tmp_path, 0) as log:
        log.write(**LINES[0])
    with open_log(tmp_path, step=3) as log:
        log.write(**LINES[1])
    (lines,) = recorder.kept.values()
    assert [number for number, *_ in lines] == [1, 2]


def test_a_tracker_that_fails_is_told_once_and_catches_up(tmp_path, recorder):
    recorder.breaks_at, said = 2, []
    with open_log(tmp_path, said=said) as log:
        for line in LINES:
            log.write(**line)
    (text,) = said
    assert "recorder does not take the metrics (ConnectionError: no route to host)" in text
    assert [x["step"] for x in metric_writer.read(tmp_path / "metrics.jsonl")] == [3, 6, 9]
    recorder.breaks_at = None
    with open_log(tmp_path, step=9):
        pass
    (lines,) = recorder.kept.values()
    assert [number for number, *_ in lines] == [1, 2, 3]


@pytest.mark.parametrize("damage", ["", "[]", '{"id": 1}', '{"id": "x", "name": "y", "lines": 3}'])
def test_a_damaged_file_of_trackers_counts_as_none(tmp_path, recorder, damage):
    (tmp_path / "trackers.json").write_text(damage)
    with open_log(tmp_path) as log:
        log.write(**LINES[0])
    (name,) = recorder.kept
    assert name != "x" and len(recorder.kept[name]) == 1


def test_how_a_run_ended_is_told(tmp_path, recorder):
    with pytest.raises(InterruptedError), open_log(tmp_path) as log:
        log.write(**LINES[0])
        raise InterruptedError
    with open_log(tmp_path, step=3) as log:
        log.write(**LINES[1])
        log.mark_failed()
    assert recorder.closed == [False, False]


def test_unknown_and_missing_trackers_are_refused(monkeypatch):
    config = common.base_config()
    config.log.to = ("wandb", "neptune")
    monkeypatch.setattr(trackers, "_is_installed", lambda module: False)
    with pytest.raises(ValueError) as error:
        training_config.check(config)
    assert "log.to names neptune; there are jsonl, tensorboard, wandb, mlflow, trackio" in str(
        error.value
    )
    assert "needs wandb: pip install 'lora_jax[wandb]'" in str(error.value)


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    """W&B makes a folder of its own name in the current directory."""
    (tmp_path / "no_such_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not trackers._is_installed("no_such_tracker") and trackers._is_installed("json")


def test_where_a_store_is(tmp_path, monkeypatch):
    config = common.base_config()
    info = trackers.make_info(config, tmp_path / "run")
    assert info.store == tmp_path / "run" and info.name == "bert-base-uncased-rank8-lr5e-4-seed0"
    monkeypatch.setenv("PLACE", "http://elsewhere")
    assert choose_store(info, "PLACE", "here") == "http://elsewhere"
    config.log.dir, config.log.name = str(tmp_path / "all"), "mine"
    info = trackers.make_info(config, tmp_path / "run", name="rank4", group="sweep")
    assert (info.name, info.group, info.store) == ("mine-rank4", "sweep", tmp_path / "all")
    assert choose_store(info, "PLACE", "here") == "here"


def test_names_and_hyperparameters_are_flat():
    config = common.base_config()
    config.lora.targets, config.data.seed = ("query", "re:.*/key"), 3
    fields = ["lora.rank", "lora.targets", "data.seed", "lora.method", "optimizer.warmup"]
    assert run_names.name_values(config, fields) == (
        "rank8-targets-query+re_._key-data-seed3-lora-warmup0"
    )
    flat = run_names.flatten(config)
    assert flat["lora.targets"] == "query,re:.*/key" and flat["lora.rank_pattern"] == ""
    assert not [name for name in flat if name.startswith("log.")]
    assert all(isinstance(x, bool | int | float | str) for x in flat.values())


def test_tensorboard_has_the_hyperparameters(tmp_path):
    config = tiny_task.config()
    for name in ("run", "none"):
        (tmp_path / name).mkdir()
        info, outlets = trackers.make_info(config, tmp_path / name), trackers.Outlets()
        settings = trackers.make_settings(config, info, outlets, Score())
        with metric_writer.MetricWriter(tmp_path / name, 0, None, settings) as log:
            log.write(3, loss=0.5)
        config = tiny_task.config(log__to=())
    (path,) = (tmp_path / "run" / "tensorboard").iterdir()
    tags, plugins = {}, {}
    for event in _events(path.read_bytes()):
        for value in event.summary.value:
            tags.setdefault(value.tag, []).append((event.step, value.simple_value))
            plugins[value.tag] = value.metadata.plugin_data.content
    assert tags["loss"] == [(3, 0.5)]
    start = plugin_hparams_pb2.HParamsPluginData.FromString(plugins["_hparams_/session_start_info"])
    assert start.session_start_info.hparams["optimizer.learning_rate"].number_value == 0.05
    assert start.session_start_info.hparams["lora.targets"].string_value == "dense"
    experiment = plugin_hparams_pb2.HParamsPluginData.FromString(plugins["_hparams_/experiment"])
    assert [x.name.tag for x in experiment.experiment.metric_infos] == [
        "eval_loss",
        "eval_accuracy",
    ]
    assert "torch" not in sys.modules
    assert not (tmp_path / "none" / "tensorboard").exists()


def _events(data):
    """The events of a file of records, each with its length and two checksums."""
    place = 0
    while place < len(data):
        (size,) = struct.unpack_from("<Q", data, place)
        yield event_pb2.Event.FromString(data[place + 12 : place + 12 + size])
        place += 16 + size


def test_records_of_a_file_that_was_cut_short():
    part = lambda kind, content: struct.pack("<IHB", 0, len(content), kind) + content
    first = part(1, b"whole") + part(2, b"in ") + part(3, b"three ") + part(4, b"parts")
    filler = part(1, b"x" * (32768 - 7 - len(first) - 7 - 3))  # leaves three bytes of the block
    data = b"h" * 7 + first + filler + b"\0" * 3 + part(1, b"next block") + part(1, b"cut")[:-1]
    whole, parts, _, last = wandb_files._read_records(data)
    assert (whole, parts, last) == (b"whole", b"in three parts", b"next block")


def wanted_lines(workdir):
    return [
        (line["step"], line.get("eval_loss", line.get("loss"))) for line in tiny_task.lines(workdir)
    ]


def killed_twice(workdir, name, **env):
    """A run that is killed without warning at two steps between its checkpoints, and ends."""
    for kill_at in (14, 22):
        assert tracked_runs.start(workdir, name, kill_at, **env).returncode == -9
    done = tracked_runs.start(workdir, name, **env)
    assert done.returncode == 0, done.stderr
    assert f"metrics to {name}: " in done.stdout
    return wanted_lines(workdir)


@pytest.mark.slow
def test_wandb_has_each_line_once_after_kills(tmp_path):
    pytest.importorskip("wandb", reason="pip install 'lora_jax[wandb]'")
    from wandb.proto.wandb_internal_pb2 import Record

    wanted = killed_twice(tmp_path / "run", "wandb", WANDB_MODE="offline")
    rows, names, configs = [], set(), []
    for path in sorted((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")):
        for content in wandb_files._read_records(path.read_bytes()):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "run":
                names.add((record.run.run_id, record.run.display_name, record.run.project))
                configs.append({x.key: json.loads(x.value_json) for x in record.run.config.update})
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({x.key or x.nested_key[0]: json.loads(x.value_json) for x in items})
    assert [(row["step"], row.get("eval_loss", row.get("loss"))) for row in rows] == wanted
    assert len(names) == 1 and {x[1:] for x in names} == {
        ("bert-base-uncased-rank8-lr0.05-seed0", "lora_jax")
    }
    assert configs[0]["optimizer.learning_rate"] == 0.05


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MLflow's own, of what SQLAlchemy is to remove
def test_mlflow_has_each_line_once_after_kills(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="pip install 'lora_jax[mlflow]'")
    wanted = killed_twice(tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/run/mlflow.db")
    experiment = client.get_experiment_by_name("lora_jax").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.run_name == "bert-base-uncased-rank8-lr0.05-seed0"
    assert run.info.status == "FINISHED" and run.data.params["lora.rank"] == "8"
    found = [
        (metric.step, metric.value)
        for name in ("loss", "eval_loss")
        for metric in client.get_metric_history(run.info.run_id, name)
    ]
    assert sorted(found) == sorted(wanted)


@pytest.mark.slow
def test_trackio_has_each_line_once_after_kills(tmp_path):
    pytest.importorskip("trackio", reason="pip install 'lora_jax[trackio]'")
    import sqlite3

    wanted = killed_twice(tmp_path / "run", "trackio", TRACKIO_DIR=str(tmp_path / "store"))
    with sqlite3.connect(tmp_path / "store" / "lora_jax.db") as database:
        rows = database.execute(
            "SELECT run_name, step, metrics FROM metrics ORDER BY id"
        ).fetchall()
    assert {name for name, *_ in rows} == {"bert-base-uncased-rank8-lr0.05-seed0"}
    values = [(step, json.loads(text)) for _, step, text in rows]
    assert [(step, x.get("eval_loss", x.get("loss"))) for step, x in values] == wanted
