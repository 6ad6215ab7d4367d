"""`lora.init` on the command line: training, what is written of it, and a sweep over it."""

import json

import pytest
import safetensors.numpy

from tests.helpers import programs, tiny_encoder

pytestmark = [pytest.mark.xdist_group("cli"), pytest.mark.slow]
SENTENCES = ("the film was great", "the film was awful")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    tiny_encoder.checkpoint(root / "model")
    tiny_encoder.data(root / "data")
    return root


def train(inputs, workdir, **changes):
    fields = tiny_encoder.overrides(inputs) | {k.replace("__", "."): v for k, v in changes.items()}
    flags = [f"--config.{k}={v}" for k, v in fields.items()]
    return programs.run("sst2", "--config=configs/sst2_minilm.py", f"--workdir={workdir}", *flags)


def predict(adapter):
    done = programs.run("predict", f"--adapter={adapter}", "--json", *SENTENCES)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return [(row["label"], row["probability"]) for row in rows], done.stderr


@pytest.mark.parametrize("init", ["pissa", "lora_ga", "eva"])
def test_trained_and_written_for_peft(inputs, init, tmp_path):
    batches = {} if init == "pissa" else {"init_batches": 2}  # the base alone says what PiSSA is
    done = train(inputs, tmp_path / "run", lora__init=init, **batches)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["lora"]["init"] == init
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(x["eval_accuracy"] for x in lines if "eval_accuracy" in x) >= 0.9
    adapter = f"--adapter={tmp_path}/run/adapter"
    ours, _ = predict(tmp_path / "run" / "adapter")
    done = programs.run("export", adapter, f"--out={tmp_path}/plain", "--peft")
    assert done.returncode == 0, done.stderr
    words = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert words["r"] == (2 if init == "eva" else 4) and words["init_lora_weights"] is True
    assert_near(predict(tmp_path / "plain")[0], ours)
    done = programs.run("export", adapter, f"--out={tmp_path}/word", "--peft", "--init=pissa")
    if init != "pissa":
        assert done.returncode and "did not start from what init='pissa'" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    words = json.loads((tmp_path / "word" / "adapter_config.json").read_text())
    assert words["r"] == 2 and words["init_lora_weights"] == "pissa"
    found, said = predict(tmp_path / "word")
    assert_near(found, ours)
    assert "must be the original one" in said


def assert_near(got, want):
    for (label, value), (label_wanted, wanted) in zip(got, want, strict=True):
        assert label == label_wanted and value == pytest.approx(wanted, abs=2e-4)


def test_the_option_is_for_peft_alone(inputs, tmp_path):
    done = programs.run("export", f"--adapter={tmp_path}", f"--out={tmp_path}/x", "--merged", "--init=pissa")  # fmt: skip
    assert done.returncode and "--init is for --peft" in done.stderr


def test_going_on_from_a_file_of_peft_keeps_its_offset(inputs, tmp_path):
    done = train(inputs, tmp_path / "run", lora__init="olora", epochs=1)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "word"
    adapter = f"--adapter={tmp_path}/run/adapter"
    done = programs.run("export", adapter, f"--out={out}", "--peft", "--init=olora")
    assert done.returncode == 0, done.stderr
    fields = {n: x for n, x in tiny_encoder.overrides(inputs).items() if not n.startswith("lora.")}
    flags = [f"--config.{n}={x}" for n, x in fields.items()]
    workdir = tmp_path / "more"
    done = programs.run("sst2", "--config=configs/sst2_minilm.py", f"--workdir={workdir}", f"--adapter={out}", *flags)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "more" / "adapter").glob("*.safetensors")
    names = list(safetensors.numpy.load_file(path))
    assert any(n.endswith("/a0") for n in names)


def test_a_mistake_is_told_before_anything_is_loaded(inputs, tmp_path):
    done = train(inputs, tmp_path / "run", lora__init="pisa")
    assert done.returncode and "init must be one of uniform" in done.stderr
    done = train(inputs, tmp_path / "run", lora__init="lora_ga", init_batches=0)
    assert done.returncode and "init_batches must be at least 1" in done.stderr


def test_what_quantization_took_away(inputs, tmp_path):
    done = train(inputs, tmp_path / "none", lora__init="loftq")
    assert done.returncode and "model.quantize takes away, and that is ''" in done.stderr
    changes = {"lora__init": "loftq", "model__quantize": "int8", "model__scan_layers": True}
    done = train(inputs, tmp_path / "run", **changes)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(x["eval_accuracy"] for x in lines if "eval_accuracy" in x) >= 0.9
    adapter = f"--adapter={tmp_path}/run/adapter"
    done = programs.run("export", adapter, f"--out={tmp_path}/plain", "--peft")
    assert done.returncode == 0, done.stderr
    words = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert words["r"] == 2 and words["init_lora_weights"] is True
