"""Other methods than plain LoRA in the programs: trained, used, exported, gone on from, swept."""

import json

import pytest

from tests.helpers import programs, tiny_encoder

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cli")]
SENTENCES = ("the film was great", "the film was awful")
SWEEP = """
import ast
from pathlib import Path
from configs import sst2_minilm
from tests.helpers import tiny_encoder

def get_config():
    c = sst2_minilm.get_config().unlock()
    for field, value in tiny_encoder.overrides(Path({root!r})).items():
        tupled = isinstance(value, str) and value.startswith("(")
        c.update_from_flattened_dict({{field: ast.literal_eval(value) if tupled else value}})
    c.epochs = 1
    return c.lock()

def sweep(add):
    for method in ("lora", "dora"):
        for rank in (1, 2):
            add(**{{"lora.method": method, "lora.rank": rank}})
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    tiny_encoder.checkpoint(root / "model")
    tiny_encoder.data(root / "data")
    return root


def flags(inputs, **fields):
    fields = tiny_encoder.overrides(inputs) | {k.replace("__", "."): v for k, v in fields.items()}
    return [f"--config.{k}={v}" for k, v in fields.items() if v is not None]


def predict(adapter, *arguments):
    return programs.succeed("predict", f"--adapter={adapter}", *arguments, *SENTENCES).splitlines()


def test_dora_from_training_to_export(inputs, tmp_path):
    config, run = "--config=configs/sst2_minilm.py", tmp_path / "run"
    said = programs.succeed("sst2", config, f"--workdir={run}", *flags(inputs, lora__method="dora"))
    assert "best validation accuracy 1.0000" in said
    want = predict(run / "adapter")
    assert [line.split()[0] for line in want] == ["positive", "negative"]
    export = ["export", f"--adapter={run}/adapter"]
    programs.succeed(*export, f"--out={tmp_path}/peft", "--peft")
    words = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert words["use_dora"] is True
    assert predict(tmp_path / "peft") == want
    programs.succeed(*export, f"--out={tmp_path}/merged", "--merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    # An adapter of PEFT's format is gone on from, with the method that it has.
    fields = {"adapter": tmp_path / "peft", "lora__rank": None, "lora__train": None, "epochs": 1}
    programs.succeed("sst2", config, f"--workdir={tmp_path}/more", *flags(inputs, **fields))
    (about,) = (tmp_path / "more" / "adapter").glob("adapter.json")
    kinds = {x["kind"] for x in json.loads(about.read_text())["nodes"].values()}
    assert kinds == {"dora", "full"}


def test_an_unknown_method_is_told(inputs, tmp_path):
    done = programs.run(
        "sst2", "--config=configs/sst2_minilm.py", f"--workdir={tmp_path}/run",
        *flags(inputs, lora__method="drora"),
    )  # fmt: skip
    assert done.returncode == 2 and "method must be one of lora, dora" in done.stderr


def test_methods_are_an_axis_of_a_sweep(inputs, tmp_path):
    """Each method is a group of its own, whose ranks share a program."""
    path = tmp_path / "sweep_config.py"
    path.write_text(SWEEP.format(root=str(inputs)))
    sweep = ["sweep", f"--config={path}", f"--workdir={tmp_path}/sweep"]
    said = programs.succeed(*sweep)
    assert "group 2 of 2: 2 runs" in said and "compiled: evaluate 2, train 2" in said
    report = programs.succeed("report", f"{tmp_path}/sweep")
    assert report.count("| dora |") == 2 and report.count("| lora |") == 2
