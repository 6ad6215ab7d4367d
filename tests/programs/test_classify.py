"""``experiments.classify`` as a user runs it: a table in, an adapter, its scores and the next command out."""

import csv
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import programs, tiny_encoder
from tests.helpers.places import ROOT

pytestmark = pytest.mark.xdist_group("cli")

LABELS = ("about food", "art, or film", "books")
NOUNS = {"meal": 0, "film": 1, "book": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    tiny_encoder.checkpoint(root / "model")
    rng = np.random.default_rng(0)
    with (root / "news.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["No", "Text", "Category"])
        for k in range(300):
            noun, word, other = rng.choice([*NOUNS]), *rng.choice(tiny_encoder.WORDS[:8], 2)
            text = f'the "{noun}" was {word};\n{other}' if k % 3 else f"{word} {noun} {other}!"
            writer.writerow([k, text, LABELS[NOUNS[noun]]])
        writer.writerow([300, "the meal was fine", ""])
    return root


def arguments(inputs, workdir, source="news.csv", **changes):
    fields = tiny_encoder.overrides(inputs) | {k.replace("__", "."): v for k, v in changes.items()}
    fields |= {
        "data.source": inputs / source,
        "data.buckets": "(16,)",
        "lora.targets": "('query','value')",
        "lora.dropout": 0.0,
    }
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["classify", "--config=configs/classify.py", f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "a run"
    return workdir, programs.succeed(*arguments(inputs, workdir, epochs=5))


@pytest.mark.slow
def test_a_run_learns_and_reports_its_classes(inputs, finished):
    workdir, out = finished
    assert (
        "columns: texts in 'Text', labels in 'Category' (fields separated by semicolons); not used: 'No'"
        in out
    )
    assert "left out: 1 row without a label" in out and "3 classes" in out
    about = json.loads((workdir / "classes.json").read_text())
    rows = list(csv.reader(io.StringIO((workdir / "confusion.csv").read_text())))
    assert rows[0] == ["label", *LABELS] and [*about["classes"]] == list(LABELS)
    assert np.int64([row[1:] for row in rows[1:]]).tolist() == about["confusion"]
    assert about["examples"] == sum(x["support"] for x in about["classes"].values())
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda x: x.get("eval_accuracy", -1))
    assert best["eval_accuracy"] == pytest.approx(about["accuracy"]) and about["accuracy"] > 0.9
    assert best["eval_macro_f1"] == pytest.approx(about["macro_f1"])
    again = programs.succeed(*arguments(inputs, workdir, epochs=5), "--eval_only")
    assert json.loads(again.splitlines()[-1])["confusion"] == about["confusion"]


@pytest.mark.slow
def test_the_commands_that_it_prints_work(finished):
    workdir, out = finished
    predict, export = (x.strip() for x in out.splitlines() if x.startswith("  python -m"))
    run = lambda command: subprocess.run(
        ["bash", "-c", command.replace("python", sys.executable, 1)], cwd=ROOT, text=True,
        capture_output=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    done = run(predict)
    assert done.returncode == 0, done.stderr
    label, _, text = done.stdout.rstrip("\n").partition("\t")
    noun = next(noun for noun in NOUNS if noun in text)
    assert label.startswith(f"{LABELS[NOUNS[noun]]} (")
    done = run(export)
    assert done.returncode == 0, done.stderr
    config = json.loads((workdir / "merged" / "config.json").read_text())
    assert config["id2label"] == {str(k): label for k, label in enumerate(LABELS)}


@pytest.mark.slow
def test_predictions_for_a_table(finished, tmp_path):
    adapter = f"--adapter={finished[0]}/adapter"
    path = tmp_path / "new.csv"
    path.write_text("id,TEXT\n1,the film was good\n2,\n3,the meal was bad\n")
    done = programs.run("predict", adapter, f"--file={path}", "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["label"] for row in rows] == [LABELS[1], LABELS[0]], done.stderr
    assert f"left out: 1 row without a text ({path}:3)" in done.stderr
    path.write_text("id\tbody\n1\tthe film was good\n")
    done = programs.run("predict", adapter, f"--file={path}")
    assert done.stdout.startswith(f"{LABELS[1]} (") and done.stdout.count("\n") == 1
    path.write_text("id,a,b\n1,x,y\n")
    done = programs.run("predict", adapter, f"--file={path}")
    assert done.returncode == 2 and "the adapter needs the columns ['Text']" in done.stderr
    done = programs.run("predict", adapter, f"--file={path}", "--text=a")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_pairs_and_numbers(inputs, tmp_path):
    rows = [(a, b, 5.0 * (a == b)) for a in NOUNS for b in NOUNS for _ in range(8)]
    lines = ["sentence1\tsentence2\tscore"]
    lines += [f"the {a} {k}\tthe {b}\t{x}" for k, (a, b, x) in enumerate(rows)]
    (inputs / "pairs.tsv").write_text("\n".join(lines) + "\n")
    changes = dict(source="pairs.tsv", data__regression=True, epochs=1)
    out = programs.succeed(*arguments(inputs, tmp_path / "run", **changes))
    assert "best validation pearson" in out and "sentence pairs" in out
    assert not (tmp_path / "run" / "classes.json").exists()
    (predict,) = (x.strip() for x in out.splitlines() if "experiments.predict" in x)
    assert "$'the " in predict and "\\tthe " in predict
    adapter = f"--adapter={tmp_path}/run/adapter"
    done = programs.run("predict", adapter, "--json", "the film\tthe film")
    assert "score" in json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_a_sweep(inputs, tmp_path):
    (tmp_path / "ranks.py").write_text(
        "from configs import classify\nget_config = classify.get_config\n"
        "def sweep(add):\n    for rank in (1, 2):\n        add(**{'lora.rank': rank})\n"
    )
    flags = [x for x in arguments(inputs, tmp_path / "sweep", epochs=1)[2:] if "rank" not in x]
    out = programs.succeed(
        "sweep", f"--config={tmp_path / 'ranks.py'}", "--program=classify", *flags
    )
    assert "best validation accuracy" in out
    assert len(list((tmp_path / "sweep").glob("runs/*/result.json"))) == 2
    (predict,) = (x for x in out.splitlines() if "experiments.predict" in x)
    assert any(noun in predict for noun in NOUNS)


def test_t5_is_asked_in_its_own_words():
    from lora_jax.data.examples import Examples
    from lora_jax.tasks import own_texts, text_to_text

    one, two = (own_texts.make_task(LABELS, texts=n, is_regression=False) for n in (1, 2))
    ask = lambda task, *texts: (
        text_to_text.to_prompts(Examples(("A.",), None, *texts), task=task).sentences
    )
    assert ask(one) == ("classify text: A.",)
    assert ask(two, ("B.",)) == ("classify text1: A. text2: B.",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,x\nb,y,z\n", "news.csv:3: 3 fields, where there are 2 columns"),
        ("a,b\nc,d\n", "news.csv:1: no column with texts was found among ['a', 'b']"),
        (None, "data.source is empty"),
    ],
)
def test_a_mistake_is_one_line(content, message, inputs, tmp_path):
    flags = arguments(inputs, tmp_path / "run")
    flags = [x for x in flags if "data.source" not in x]
    if content:
        (tmp_path / "news.csv").write_text(content)
        flags.append(f"--config.data.source={tmp_path / 'news.csv'}")
    done = programs.run(*flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_argument_that_is_no_text_is_told():
    done = programs.run("predict", "--adapter=nowhere", "what \udcff is")
    assert done.returncode == 2 and "error: the text has half of a character" in done.stderr
