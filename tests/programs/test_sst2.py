"""The programs as a user runs them: training to the end, going on, using the result, and mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.helpers import hub_server, programs, tiny_encoder
from tests.helpers.places import ROOT


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    tiny_encoder.checkpoint(root / "model")
    tiny_encoder.data(root / "data")
    return root


def command(module, *arguments):
    return [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)]


run = programs.run


def training(inputs, workdir, **changes):
    """Arguments of a training run; a key of `changes` has __ for a dot."""
    fields = tiny_encoder.overrides(inputs) | {k.replace("__", "."): v for k, v in changes.items()}
    flags = [f"--config.{k}={v}" for k, v in fields.items()]
    return ["sst2", "--config=configs/sst2_minilm.py", f"--workdir={workdir}", *flags]


@pytest.fixture(scope="session")
def finished(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    done = programs.start(*training(inputs, workdir))
    assert done.returncode == 0, done.stderr
    return workdir, done


def weights(workdir):
    (path,) = (workdir / "adapter").glob("*.safetensors")
    return path.name, path.read_bytes()


pytestmark = pytest.mark.xdist_group("cli")


def test_training_learns_and_reports(finished):
    workdir, done = finished
    assert "trainable params:" in done.stdout and "fresh: classifier" in done.stdout
    assert f"python -m experiments.predict --adapter={workdir}/adapter" in done.stdout
    assert f"python -m experiments.export --adapter={workdir}/adapter" in done.stdout
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval_accuracy" in line]
    assert [line["step"] for line in evaluations] == [25, 50, 75]  # 200 examples, 8 a batch
    assert max(line["eval_accuracy"] for line in evaluations) >= 0.9
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").iterdir())
    config = json.loads((workdir / "config.json").read_text())
    assert config["lora"]["rank"] == 2 and config["epochs"] == 3


def test_running_a_finished_run_again_changes_nothing(inputs, finished):
    workdir, first = finished
    before = weights(workdir), (workdir / "metrics.jsonl").read_text()
    again = run(*training(inputs, workdir))
    assert again.returncode == 0 and "Going on from the checkpoint of step 75" in again.stdout
    assert (weights(workdir), (workdir / "metrics.jsonl").read_text()) == before
    best = lambda done: [x for x in done.stdout.splitlines() if x.startswith("best")][0].split(";")[
        0
    ]
    assert best(again) == best(first)


def test_evaluation_alone(inputs, finished, tmp_path):
    """The best line of the log again, and nothing is touched; without a run there is an error."""
    workdir, _ = finished
    traces = lambda: {
        str(p): (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in workdir.rglob("*")
    }
    before = traces()
    done = run(*training(inputs, workdir), "--eval_only")
    assert done.returncode == 0, done.stderr
    assert traces() == before
    found = json.loads(done.stdout.splitlines()[-1])
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    best = next(x for x in lines if x["step"] == found["step"] and "eval_loss" in x)
    assert (found["accuracy"], found["loss"]) == (best["eval_accuracy"], best["eval_loss"])
    assert found["accuracy"] == max(x["eval_accuracy"] for x in lines if "eval_accuracy" in x)
    none = run(*training(inputs, tmp_path / "none"), "--eval_only")
    assert none.returncode == 2 and "There is no adapter to evaluate" in none.stderr
    assert not (tmp_path / "none").exists()


def test_predict(finished, tmp_path):
    adapter = f"--adapter={finished[0]}/adapter"
    one = programs.start("predict", adapter, "the film was great", "the film was awful")
    assert [x.split()[0] for x in one.stdout.splitlines()] == ["positive", "negative"], one.stderr
    file = tmp_path / "sentences.txt"
    file.write_text("the meal was lovely\n\nthe book was dull\n")
    for arguments, stdin in (([f"--file={file}"], ""), ([], file.read_text())):
        done = run("predict", adapter, "--json", *arguments, stdin=stdin)
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert [row["label"] for row in rows] == ["positive", "negative"]
        assert all(0.5 <= row["probability"] <= 1 for row in rows)
    long = run("predict", adapter, "the film was great", "the film was great " * 9)
    assert "note: 1 of 2 texts cut to 16 tokens" in long.stderr and not one.stderr
    empty = run("predict", adapter)
    assert empty.returncode == 2 and "No sentences" in empty.stderr


def test_export_is_the_merged_model(finished, tmp_path):
    """The directory, loaded as a base without any adapter, predicts as base and adapter do."""
    import jax.numpy as jnp

    from lora_jax.models import checkpoints
    from lora_jax.tasks import classifier

    workdir, _ = finished
    out = tmp_path / "merged"
    done = programs.start("export", f"--adapter={workdir}/adapter", f"--out={out}", "--merged")
    assert done.returncode == 0, done.stderr
    loaded = checkpoints.load(out, head="classifier", num_labels=2)
    assert not loaded.fresh
    tokenizer = checkpoints.load_tokenizer(loaded.checkpoint)
    ids = jnp.array([tokenizer.encode("the film was great").ids])
    logits = np.asarray(loaded.model.apply(loaded.params, ids, jnp.ones_like(ids)), np.float64)
    model = classifier.load(workdir / "adapter")
    want = classifier.predict(model, ["the film was great"])
    np.testing.assert_allclose(np.exp(logits) / np.exp(logits).sum(), want, atol=1e-5)
    again = run("export", f"--adapter={workdir}/adapter", f"--out={out}", "--merged")
    assert again.returncode == 2 and "not an empty directory" in again.stderr


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(inputs, finished, tmp_path):
    """Stopped by Ctrl-C, then killed, the run ends with the adapter and metrics of one left alone.

    With a cache of its own, so that each start after the first runs what those before have compiled.
    """
    workdir, cache = tmp_path / "run", tmp_path / "cache"
    of_run = [*training(inputs, workdir), f"--compilation_cache={cache}"]
    arguments = command(*of_run)
    for lines, kill, status in ((3, signal.SIGINT, 130), (20, signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(
            arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        metrics = workdir / "metrics.jsonl"
        deadline = time.time() + 200
        while process.poll() is None and time.time() < deadline:
            if metrics.exists() and len(metrics.read_text().splitlines()) >= lines:
                break
            time.sleep(0.01)
        process.send_signal(kill)
        _, err = process.communicate()
        if process.returncode == 0:  # on a busy machine it may end before this process wakes up
            continue
        assert process.returncode == status, err
        assert "Traceback" not in err and ("error: interrupted" in err) == (status == 130), err
    done = run(*of_run)
    assert done.returncode == 0, done.stderr
    assert list((cache / "starts").glob("*.program"))
    assert weights(workdir) == weights(finished[0])
    assert lines_without_speed(workdir) == lines_without_speed(finished[0])


@pytest.mark.slow
def test_sigterm_ends_a_run_at_a_checkpoint(inputs, finished, tmp_path):
    """With status 0 and the command that goes on, to the same bits; a second one does no harm."""
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        command(*training(inputs, workdir)), cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics, deadline = workdir / "metrics.jsonl", time.time() + 200
    while time.time() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.01)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "Stopped after step" in out and "best validation" not in out, out
    again = out.strip().splitlines()[-1].strip()
    assert again.startswith(sys.executable) and f"--workdir={workdir}" in again
    done = subprocess.run(again, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Going on from the checkpoint" in done.stdout, done.stderr
    assert weights(workdir) == weights(finished[0])
    assert lines_without_speed(workdir) == lines_without_speed(finished[0])


def lines_without_speed(workdir):
    return [
        {k: v for k, v in json.loads(line).items() if k != "examples_per_second"}
        for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]


def refused(done, *parts, status=2):
    """One clear error on stderr, no traceback, and the right exit status."""
    assert done.returncode == status, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr


CONFIG_MISTAKES = {
    "target that matches nothing": (
        dict(lora__targets="('qurey',)"),
        "'qurey' matches no parameter",
        "'query'",
    ),
    "rank zero": (dict(lora__rank=0), "rank must be a whole number of at least 1, got 0"),
    "rank too large": (dict(lora__rank=17), "rank 17 is larger than the kernel", "(16, 16)"),
    "alpha": (dict(lora__alpha=-1.0), "alpha must be positive, got -1"),
    "dropout": (dict(lora__dropout=1.0), "dropout must be in [0, 1), got 1"),
    "overlap": (dict(lora__targets="('query','classifier')"), "targets and train overlap"),
    "unknown field": (dict(lora__rnk=4), "rnk", "rank"),
    "dtype": (dict(model__dtype="float12"), "model.dtype must be one of", "float12"),
    "no checkpoint": (dict(model__name="./nowhere"), "No checkpoint './nowhere' was found. Tried"),
    "no data": (dict(data__source="/nowhere/at/all"), "/nowhere/at/all"),
}


@pytest.mark.parametrize("name", CONFIG_MISTAKES)
def test_mistakes_in_the_config(inputs, tmp_path, name):
    changes, *says = CONFIG_MISTAKES[name]
    refused(run(*training(inputs, tmp_path / "run", **changes)), *says)
    assert not (tmp_path / "run" / "adapter").exists()


def test_malformed_data(inputs, tmp_path):
    data = tiny_encoder.data(tmp_path / "data")
    for line, says in (
        ("only a sentence", "train.tsv:3"),
        ("x\t7", "label"),
        ("\t1", "train.tsv:3"),
    ):
        lines = (data / "train.tsv").read_text().splitlines()
        (data / "train.tsv").write_text("\n".join([*lines[:2], line, *lines[3:]]) + "\n")
        refused(run(*training(inputs, tmp_path / "run", data__source=data)), says, "train.tsv:3")


def test_damaged_checkpoints(tmp_path, inputs):
    model = tiny_encoder.checkpoint(tmp_path / "model")
    path = model / "model.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    refused(run(*training(inputs, tmp_path / "run", model__name=model)), "model.safetensors")
    path.write_bytes(good)
    about = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(about | {"intermediate_size": 25}))
    refused(
        run(*training(inputs, tmp_path / "run", model__name=model)), "intermediate.dense.weight"
    )


def test_adapter_of_another_base(finished, tmp_path):
    workdir, _ = finished
    other = tiny_encoder.checkpoint(tmp_path / "other", seed=5)
    done = run("predict", f"--adapter={workdir}/adapter", f"--model={other}", "x")
    refused(done, "made for base 'sha256:")
    refused(run("predict", f"--adapter={tmp_path}/none", "x"), "No adapter in", "does not exist")


def test_workdir_of_another_run(inputs, finished):
    workdir, _ = finished
    before = weights(workdir)
    done = run(*training(inputs, workdir, lora__rank=3, epochs=9))
    refused(done, "lora.rank is 2 there and 3 here", "epochs is 3 there and 9 here")
    assert weights(workdir) == before


def test_a_workdir_inside_a_file(inputs):
    refused(run(*training(inputs, "/dev/null/run")), "/dev/null")


def test_no_permission(inputs, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    without = []
    if os.geteuid() == 0:  # root may write anywhere, unless it gives that right up
        if not shutil.which("setpriv"):
            pytest.skip("runs as root, and setpriv (util-linux) is not there")
        without = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]
    done = subprocess.run(
        [*without, *command(*training(inputs, locked / "run"))],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    refused(done, "Permission denied", str(locked))
    assert not list(locked.iterdir())


@pytest.mark.slow
def test_nan_loss(inputs, tmp_path):
    """Steps so large that the loss overflows; tests/training/test_train.py has what is kept then."""
    done = run(*training(inputs, tmp_path / "run", optimizer__learning_rate=1e30))
    refused(done, "at step", "Lower optimizer.learning_rate", status=1)
    assert "nan" in done.stderr or "inf" in done.stderr


def test_full_disk(inputs, finished, tmp_path):
    """Saving over a limit on file sizes is an error, and the adapter that was there survives."""
    code = (
        "import resource, signal, sys\n"
        "import jax, lora_jax as lora\n"
        "from lora_jax.tasks import classifier\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "model = classifier.load(sys.argv[1])\n"
        "config = lora.LoRAConfig(rank=2, targets=('query', 'value'), train=('classifier',))\n"
        "adapter = jax.tree.map(lambda x: x + 1, model.adapter)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
        "try:\n    lora.save(sys.argv[1], adapter, config)\n"
        "except OSError as error:\n    sys.exit(f'error: {error}')\n"
    )
    workdir, _ = finished
    before = weights(workdir)
    done = subprocess.run(
        [sys.executable, "-c", code, str(workdir / "adapter")], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    refused(done, "Could not write", status=1)
    assert weights(workdir) == before


# PEFT's directories.


@pytest.fixture(scope="session")
def exported(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "peft"
    done = run("export", f"--adapter={finished[0]}/adapter", f"--out={out}", "--peft")
    assert done.returncode == 0 and "PeftModel.from_pretrained" in done.stdout, done.stderr
    return out


def test_export_in_the_format_of_peft(inputs, finished, exported, tmp_path):
    assert sorted(p.name for p in exported.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "lora_jax.json",
    ]
    words = json.loads((exported / "adapter_config.json").read_text())
    said = {
        "r": 2, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["query", "value"],
        "modules_to_save": ["pooler", "word_embeddings", "classifier", "score"],
        "task_type": "SEQ_CLS", "base_model_name_or_path": str(inputs / "model"),
    }  # fmt: skip
    assert {k: words[k] for k in said} == said
    again = run("export", f"--adapter={exported}", f"--out={tmp_path}/again", "--peft")
    assert again.returncode == 0, again.stderr
    for path in exported.iterdir():
        same = (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
        assert same or path.name == "README.md"  # of which an adapter of PEFT has no scores


def test_an_export_is_pushed_to_the_hub(finished, exported, tmp_path):
    out = tmp_path / "pushed"
    arguments = ["export", f"--adapter={finished[0]}/adapter", f"--out={out}", "--peft"]
    push = ["--push=someone/sst2", "--private", "--revision=v1", "--license=apache-2.0"]
    with hub_server.serve() as (hub, address):
        client = {
            "HF_ENDPOINT": address,
            "HF_TOKEN": "hf_writer",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        done = programs.start(*arguments, *push, env=client)
        assert (
            done.returncode == 0 and f"Pushed to {address}/someone/sst2/commit/" in done.stdout
        ), done.stderr
    assert hub.repositories["someone/sst2"]["private"] and hub.files("someone/sst2") == {}
    files = hub.files("someone/sst2", "v1")
    assert files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert (
        files["adapter_model.safetensors"] == (exported / "adapter_model.safetensors").read_bytes()
    )
    card = files["README.md"].decode()
    assert (
        "license: apache-2.0\n" in card
        and "PeftModel.from_pretrained(base, 'someone/sst2')" in card
    )
    assert (
        "python -m experiments.sst2 --config=config.json" in card
        and str(finished[0].parent) not in card
    )
    assert "names the base by its path here" in done.stderr and "\r" not in done.stderr


@pytest.mark.parametrize("flags, says", [
    (["--push=sst2"], "sst2 is no repository of the Hub: give USER/NAME."),
    (["--private"], "--private and --revision are for --push"),
    (["--license=MIT License"], "give the Hub's name of a license"),
])  # fmt: skip
def test_mistakes_of_a_push_cost_no_export(finished, tmp_path, flags, says):
    arguments = [
        "export",
        f"--adapter={finished[0]}/adapter",
        f"--out={tmp_path / 'out'}",
        "--peft",
    ]
    done = run(*arguments, *flags)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_could_not_be_pushed_is_kept(finished, tmp_path):
    out = tmp_path / "kept"
    arguments = ["export", f"--adapter={finished[0]}/adapter", f"--out={out}", "--merged"]
    client = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_writer", "HF_HUB_OFFLINE": "0"}
    done = programs.start(*arguments, "--push=someone/sst2", env=client)
    (error,) = done.stderr.splitlines()
    assert done.returncode == 2 and "http://127.0.0.1:9 can't be reached (" in error
    assert f"is in {out}: hf upload someone/sst2 {out} ." in error and (out / "README.md").is_file()


@pytest.mark.slow
def test_predict_and_merge_from_peft(inputs, finished, exported, tmp_path):
    sentences = ["the film was great", "the film was awful"]
    rows = {}
    for name, adapter in (("ours", f"{finished[0]}/adapter"), ("peft", exported)):
        done = run("predict", f"--adapter={adapter}", "--json", *sentences)
        rows[name] = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(rows[name]) == 2, done.stderr
    assert "assumed: at most 16 tokens, as in training" in done.stderr
    assert rows["peft"] == rows["ours"]
    # without the file that holds labels and lengths, as PEFT writes such directories
    bare = shutil.copytree(exported, tmp_path / "bare")
    (bare / "lora_jax.json").unlink()
    done = run("predict", f"--adapter={bare}", "--json", *sentences)
    assert "assumed: labels LABEL_0, LABEL_1 (the base has none for them)" in done.stderr
    assert "assumed: at most 20 tokens" in done.stderr
    assert [json.loads(x)["label"] for x in done.stdout.splitlines()] == ["LABEL_1", "LABEL_0"]

    merged = {}
    for name, adapter in (("ours", f"{finished[0]}/adapter"), ("peft", exported)):
        done = run("export", f"--adapter={adapter}", f"--out={tmp_path}/{name}", "--merged")
        assert done.returncode == 0, done.stderr
        merged[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert merged["ours"] == merged["peft"]
    # labels of a base that has them
    about = json.loads((inputs / "model" / "config.json").read_text())
    named = tiny_encoder.checkpoint(tmp_path / "named")
    (named / "config.json").write_text(json.dumps(about | {"id2label": {"0": "no", "1": "yes"}}))
    done = run("predict", f"--adapter={bare}", f"--model={named}", "--json", *sentences)
    assert [json.loads(x)["label"] for x in done.stdout.splitlines()] == ["yes", "no"], done.stderr


@pytest.mark.parametrize("kind", ["ours", "peft"])
@pytest.mark.slow
def test_training_goes_on_from_an_adapter(inputs, finished, exported, tmp_path, kind):
    adapter = exported if kind == "peft" else finished[0] / "adapter"
    arguments = training(inputs, tmp_path / "run", epochs=1, optimizer__learning_rate=1e-5)
    arguments = [a for a in arguments if not a.startswith("--config.lora")]
    done = run(*arguments, f"--adapter={adapter}")
    assert done.returncode == 0, done.stderr
    assert f"going on from: {adapter}" in done.stdout
    # so small a rate changes nothing to speak of: it starts where the other run ended
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["accuracy"] >= 0.9
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["adapter"] == str(adapter) and config["lora"]["rank"] == 2
    assert config["lora"]["train"][0].startswith("classifier") or kind == "peft"
    again = run(*arguments, f"--adapter={adapter}")
    assert again.returncode == 0 and "This run is finished" in again.stdout, again.stderr
    out = tmp_path / "out"
    done = run("export", f"--adapter={tmp_path}/run/adapter", f"--out={out}", "--peft")
    assert done.returncode == 0, done.stderr
    words = [json.loads((d / "adapter_config.json").read_text()) for d in (out, exported)]
    assert words[0] == words[1]


def test_mistakes_with_peft_directories(inputs, exported, tmp_path):
    refused(
        run(*training(inputs, tmp_path / "run"), f"--adapter={exported}"),
        "lora.rank, lora.train can't be set together with an adapter",
    )
    export = ["export", f"--adapter={exported}", f"--out={tmp_path}/x"]
    refused(run(*export), "either --merged")
    refused(run(*export, "--peft", "--merged"), "either --merged")
    path = exported / "adapter_config.json"
    text = path.read_text()
    try:
        path.write_text(text.replace('"use_qalora": false', '"use_qalora": true'))
        refused(run("predict", f"--adapter={exported}", "x"), "use_qalora is True")
        path.write_text(json.dumps(json.loads(text) | {"base_model_name_or_path": None}))
        refused(run("predict", f"--adapter={exported}", "x"), "does not name its base", "--model")
    finally:
        path.write_text(text)
    weights = exported / "adapter_model.safetensors"
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-5])
        refused(run("predict", f"--adapter={exported}", "x"), "adapter_model.safetensors")
    finally:
        weights.write_bytes(whole)


@pytest.mark.slow
def test_stacked_layers(inputs, finished, tmp_path):
    """What is trained on stacked layers is used as it was trained, and opens where layers are not."""
    fields = {"model__scan_layers": True, "epochs": 1}
    done = run(*training(inputs, tmp_path / "run", **fields))
    assert done.returncode == 0 and "params/bert/encoder/layer/attention" in done.stdout, (
        done.stderr
    )
    logged = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    adapter = tmp_path / "run" / "adapter"
    again = run("sst2", f"--workdir={tmp_path}/run", "--eval_only")
    assert f"accuracy {logged['eval_accuracy']:.4f}" in again.stdout, again.stderr
    out = tmp_path / "peft"
    done = run("export", f"--adapter={adapter}", f"--out={out}", "--peft")
    assert done.returncode == 0, done.stderr
    sentences = ["the film was great", "the film was awful"]
    ours, theirs = (
        [json.loads(line)["probability"] for line in run("predict", f"--adapter={x}", "--json", *sentences).stdout.splitlines()]
        for x in (adapter, out)
    )  # fmt: skip
    assert len(ours) == 2
    np.testing.assert_allclose(theirs, ours, rtol=1e-5)
    fields |= {"lora__rank": 2}
    arguments = [a for a in training(inputs, tmp_path / "on", **fields) if "config.lora" not in a]
    assert run(*arguments, f"--adapter={adapter}").returncode == 0
