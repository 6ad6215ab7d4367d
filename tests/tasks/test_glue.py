"""The tasks of GLUE: their files, their scores, runs on tiny models, and what becomes of adapters."""

import doctest
import json
import math

import numpy as np
import pytest

from configs import common, glue_minilm, roberta_base_glue
from lora_jax.data import batches, sources, tfds, tokenization
from lora_jax.data.examples import Examples, concatenate
from lora_jax.models import checkpoints
from lora_jax.sweeps import results
from lora_jax.tasks import (
    adapter_files,
    classification,
    classifier,
    glue,
    glue_config,
    glue_metrics,
)
from lora_jax.tasks.glue import TASKS
from lora_jax.training import metric_writer
from lora_jax.training.train import train
from tests.helpers import programs, tiny_encoder

# The columns of the real files, in their order; a dash stands for one that is not read.
COLUMNS = {
    "cola": "- label - sentence",
    "sst2": "sentence label",
    "mrpc": "Quality - - #1_String #2_String",
    "qqp": "- - - question1 question2 is_duplicate",
    "stsb": "- - - - - - - sentence1 sentence2 score",
    "mnli": "- - - - - - - - sentence1 sentence2 - gold_label",
    "qnli": "- question sentence label",
    "rte": "- sentence1 sentence2 label",
    "wnli": "- sentence1 sentence2 label",
}
WORDS = {
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
}


def rows(task, count, seed):
    """Sentences (or pairs) with labels: how alike the adjectives of the two are."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        a, b = (int(k) for k in rng.integers(0, 8, 2))
        first, second = (f'the film was "{tiny_encoder.WORDS[k]}"' for k in (a, b))
        alike = (a < 4) == (b < 4)
        if task == "stsb":
            label = "5.000" if alike else "1.25"
        elif task in ("cola", "sst2"):
            label = str(int(a < 4))
        elif task == "mnli":
            label = WORDS["mnli"][1 if a == b else 0 if alike else 2]
        else:
            label = WORDS.get(task, ("0", "1"))[int(alike)]
        yield first, second, label


def write(directory, task, *, train_rows=24, dev_rows=10):
    """The task's files in GLUE's layout, under the folder that GLUE unpacks them to."""
    layout = TASKS[task].layout
    folder = directory / layout.folder
    folder.mkdir(parents=True)
    columns = [c.replace("_String", " String") for c in COLUMNS[task].split()]
    names = [c if c != "-" else f"other{k}" for k, c in enumerate(columns)]
    for seed, (split, file) in enumerate(layout.files):
        if split == "test":
            continue
        lines = [] if layout.header else ["\t".join(names)]
        for first, second, label in rows(task, train_rows if split == "train" else dev_rows, seed):
            values = dict(zip(layout.columns, (first, second), strict=False)) | {
                layout.label: label
            }
            lines.append("\t".join(values.get(name, "x") for name in names))
        mark = "\ufeff" if task == "mrpc" else ""  # which the real file begins with
        (folder / file).write_text(mark + "\n".join(lines) + "\n")
    return directory


@pytest.mark.parametrize("module", [glue_metrics, glue])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


# --- Files


@pytest.mark.parametrize("task", TASKS)
def test_files_of_every_task(task, tmp_path):
    glue = TASKS[task]
    write(tmp_path, task)
    for source in (tmp_path, tmp_path / glue.layout.folder):
        for seed, split in enumerate(("train", *glue.validation)):
            found = sources.load(
                str(source), split, num_labels=len(glue.labels), layout=glue.layout
            )
            expected = list(rows(task, 24 if split == "train" else 10, seed))
            assert found.sentences == tuple(first for first, _, _ in expected)
            pairs = tuple(second for _, second, _ in expected)
            assert found.pairs == (pairs if glue.has_pairs else None)
            numbers = {word: k for k, word in enumerate(WORDS.get(task, ("0", "1")))}
            want = [numbers.get(x) if task != "stsb" else float(x) for _, _, x in expected]
            np.testing.assert_array_equal(found.labels, want)
            assert found.labels.dtype == (np.float32 if task == "stsb" else np.int32)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("rte", ("entailment", "entails"), r"train\.tsv:\d+: label '(not_)?entails' is not one of"),
        ("stsb", ("5.000", "6.0"), r"train\.tsv:\d+: label '6\.0' is no number from 0 to 5"),
        ("stsb", ("1.25", "nan"), r"train\.tsv:\d+: label 'nan' is no number"),
        ("mnli", ("sentence2\t", "hypothesis\t"), r"train\.tsv:1: the header must have.*'sentence2'"),
        ("cola", ("x\tthe", "the"), r"train\.tsv:1: 3 fields, where the header has 4"),
        ("mrpc", ("\t0", "\t0\tx"), r"train\.tsv:\d+: 6 fields"),
        ("wnli", ("\t1\n", "\t2\n"), r"train\.tsv:\d+: label 2 is not in \[0, 2\)"),
        ("qnli", ('the film was "good"', ""), r"train\.tsv:\d+: empty (question|sentence)"),
    ],
)  # fmt: skip
def test_bad_rows_are_named_by_file_and_line(task, change, message, tmp_path):
    if task == "mrpc":
        change = ("x\tx\tthe", "x\tx\tx\tthe")
    path = write(tmp_path, task) / TASKS[task].layout.folder / "train.tsv"
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(ValueError, match=message):
        sources.load(str(tmp_path), "train", layout=TASKS[task].layout)


def test_broken_rows_of_qqp_are_left_out_and_said(tmp_path):
    """The published file has some: too few fields, or an empty question."""
    path = write(tmp_path, "qqp") / "QQP" / "train.tsv"
    lines = path.read_text().splitlines()
    lines[3] = "7\t8"
    lines[6] = "x\tx\tx\tWhat is it?\t\t0"
    path.write_text("\n".join(lines) + "\n")
    found = sources.load(str(tmp_path), "train", layout=TASKS["qqp"].layout)
    assert len(found.sentences) == len(found.pairs) == len(found.labels) == 22
    assert found.notes == (f"{path}: 2 broken rows left out, lines 4, 7",)
    assert concatenate([found, found]).notes == found.notes * 2


@pytest.mark.parametrize(
    ("task", "rows", "labels", "pairs"),
    [
        ("mnli", [{"premise": b"a", "hypothesis": b"b", "label": 2, "idx": 1}, {"premise": b"c", "hypothesis": b"d", "label": 0, "idx": 0}], [0, 2], ("d", "b")),
        ("stsb", [{"sentence1": b"a", "sentence2": b"b", "label": np.float32(3.8), "idx": 0}], [np.float32(3.8)], ("b",)),
        ("cola", [{"sentence": b"a", "label": 1, "idx": 0}], [1], None),
    ],
)  # fmt: skip
def test_features_of_tfds(task, rows, labels, pairs):
    glue = TASKS[task]
    found = tfds.from_rows("tfds:x", rows, len(glue.labels), glue.layout)
    assert found.labels.tolist() == labels and found.pairs == pairs


def test_numbers_of_tfds_out_of_the_scale():
    row = {"sentence1": b"a", "sentence2": b"b", "label": np.float32(7), "idx": 0}
    with pytest.raises(ValueError, match=r"not in \[0, 5\]"):
        tfds.from_rows("tfds:x", [row], 1, TASKS["stsb"].layout)
    unknown = row | {"label": np.float32(-1)}
    assert tfds.from_rows("tfds:x", [unknown], 1, TASKS["stsb"].layout).labels is None


@pytest.mark.parametrize("task", TASKS)
def test_every_task_names_features_that_tfds_has(task):
    """By TFDS's own builder, which needs no data for that."""
    builder = tfds._make_builder(f"tfds:glue/{task}", None)
    features = builder.info.features
    layout = TASKS[task].layout
    assert set(layout.text) <= set(features) and "label" in features
    if TASKS[task].is_regression:
        assert features["label"].np_dtype == np.float32
    else:
        assert tuple(features["label"].names) == TASKS[task].labels


# --- Tokens of pairs


def test_pairs_are_cut_at_the_longer_sentence_and_typed(tmp_path):
    tiny_encoder.checkpoint(tmp_path)
    tokenizer = checkpoints.load_tokenizer(checkpoints.resolve(tmp_path))
    examples = Examples(("the film was very very good",), np.zeros(1, np.int32), ("bad",))
    found = tokenization.tokenize(examples, tokenizer, max_length=7, types=True)
    words = [tokenizer.id_to_token(k) for k in found.ids]
    assert words == ["[CLS]", "the", "film", "was", "[SEP]", "bad", "[SEP]"]
    assert found.types.tolist() == [0] * 5 + [1] * 2
    batch = next(batches.eval_batches(found, batch_size=2, buckets=(9,)))
    assert batch["token_type_ids"].tolist() == [[0] * 5 + [1, 1, 0, 0]] * 2
    untyped = tokenization.tokenize(examples, tokenizer, max_length=7)
    assert "token_type_ids" not in next(batches.eval_batches(untyped, batch_size=2, buckets=(9,)))
    with pytest.raises(ValueError, match="3 special tokens and a word of each sentence"):
        tokenization.tokenize(examples, tokenizer, max_length=4)


# --- Scores


def test_scores_against_their_definitions():
    rng = np.random.default_rng(0)
    found, labels = rng.integers(0, 2, 50), rng.integers(0, 2, 50)
    tp, tn = np.sum(found & labels), np.sum((1 - found) & (1 - labels))
    fp, fn = np.sum(found & (1 - labels)), np.sum((1 - found) & labels)
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    harmonic = 2 / (1 / precision + 1 / recall)
    assert math.isclose(glue_metrics.f1(found, labels), harmonic, rel_tol=1e-12)
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert math.isclose(
        glue_metrics.matthews(found, labels), (tp * tn - fp * fn) / root, rel_tol=1e-9
    )
    x, y = rng.normal(size=50), rng.integers(0, 5, 50)  # with ties
    covariance = np.mean(x * y) - np.mean(x) * np.mean(y)
    assert math.isclose(
        glue_metrics.pearson(x, y), covariance / np.std(x) / np.std(y), rel_tol=1e-9
    )
    rank = lambda v: np.array([np.sum(v < e) + (np.sum(v == e) + 1) / 2 for e in v])
    assert math.isclose(
        glue_metrics.spearman(x, y), glue_metrics.pearson(rank(x), rank(y)), rel_tol=1e-9
    )


@pytest.mark.parametrize("score", glue_metrics.SCORES.values())
def test_undefined_scores_are_zero(score):
    constant, mixed = np.zeros(4, np.float32), np.array([0, 1, 0, 1])
    assert score(constant, mixed) == 0.0
    assert score(mixed, constant) == 0.0


# --- Runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    for kind in tiny_encoder.CONFIGS:
        tiny_encoder.checkpoint(root / kind, kind=kind)
    for task in TASKS:
        write(root / "glue", task, train_rows=160 if task == "cola" else 24)
    return root


FIELDS = {
    "data.max_length": 16, "data.buckets": (16,), "batch_size": 8, "eval_batch_size": 8,
    "epochs": 2, "log_every": 2, "lora.rank": 2, "optimizer.learning_rate": 0.01,
}  # fmt: skip
TARGETS = {
    "bert": {"lora.train": ("default", "pooler")},
    "roberta": {},
    "distilbert": {},
}  # fmt: skip


def config_of(inputs, task, kind, **changes):
    config = common.glue_config(task)
    fields = FIELDS | TARGETS[kind] | {k.replace("__", "."): v for k, v in changes.items()}
    fields |= {"model.name": str(inputs / kind), "data.source": str(inputs / "glue")}
    config.update_from_flattened_dict(fields)
    config = glue_config.resolve(config.lock())
    glue_config.check(config)
    return config


def trained(config, workdir):
    task, lora_config = classification.make_task(config)
    return task, train(task, config, lora_config, workdir)


REPORTED = {
    "cola": ("bert", {"loss", "accuracy", "matthews"}, "matthews"),
    "stsb": ("roberta", {"loss", "pearson", "spearman"}, "pearson"),
    "mnli": ("distilbert", {"loss", "accuracy", "accuracy_matched", "accuracy_mismatched"}, "accuracy"),
    "mrpc": ("bert", {"loss", "accuracy", "f1"}, "accuracy"),
}  # fmt: skip


EPOCHS = 4


@pytest.mark.parametrize("task", REPORTED)
@pytest.mark.slow
def test_a_run_reports_the_scores_of_its_task(task, inputs, tmp_path):
    kind, names, selects = REPORTED[task]
    learnt = (*TARGETS[kind].get("lora.train", ("default",)), "word_embeddings")
    config = config_of(inputs, task, kind, epochs=EPOCHS, lora__train=learnt)
    _, best = trained(config, tmp_path)
    lines = [x for x in metric_writer.read(tmp_path / "metrics.jsonl") if "eval_loss" in x]
    assert len(lines) == 1 + EPOCHS  # the first is before training
    assert {k.removeprefix("eval_") for k in lines[0]} - {"step", "epoch"} == names
    assert best.best_score == max(line[f"eval_{selects}"] for line in lines)
    # What was saved gives, through the merged weights, the score that was logged.
    model = classifier.load(tmp_path / "adapter")
    _, evaluations = classification.load_examples(config, TASKS[config.task])
    both = concatenate(evaluations)
    texts = both.sentences
    if both.pairs is not None:
        texts = [f"{a}\t{b}" for a, b in zip(texts, both.pairs, strict=True)]
    found = classifier.predict(model, list(texts))
    assert (model.pairs, len(model.labels)) == (both.pairs is not None, found.shape[1])
    line = next(x for x in lines if x["step"] == best.best_step)
    if task == "stsb":
        expected = np.corrcoef(found[:, 0], both.labels)[0, 1]
    elif task == "cola":
        guesses = found.argmax(-1)
        mixed = len(set(guesses.tolist())) > 1
        expected = np.corrcoef(guesses, both.labels)[0, 1] if mixed else 0.0
    else:
        expected = np.mean(found.argmax(-1) == both.labels)
    np.testing.assert_allclose(line[f"eval_{selects}"], expected, atol=1e-5)
    if task == "mnli":
        half = [np.mean(x == y) for x, y in zip(np.split(found.argmax(-1), 2), np.split(both.labels, 2), strict=True)]  # fmt: skip
        assert [line["eval_accuracy_matched"], line["eval_accuracy_mismatched"]] == half
    training = next(x for x in metric_writer.read(tmp_path / "metrics.jsonl") if "loss" in x)
    assert ("accuracy" in training) == (task != "stsb")


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
@pytest.mark.slow
def test_sst2_learns_with_every_family(kind, inputs, tmp_path):
    tiny_encoder.data(inputs / "glue" / "sentences", n=160)
    config = config_of(inputs, "sst2", kind, epochs=10)
    with config.unlocked():
        config.data.source = str(inputs / "glue" / "sentences")
        config.lora.train = (*config.lora.train, "word_embeddings")
    _, best = trained(config, tmp_path)
    assert best.best_score >= 0.9


@pytest.mark.slow
def test_an_adapter_for_other_labels_goes_on_with_a_fresh_head(inputs, tmp_path):
    mnli = config_of(inputs, "mnli", "roberta", epochs=1)
    trained(mnli, tmp_path / "mnli")
    config = config_of(inputs, "rte", "roberta", adapter=str(tmp_path / "mnli" / "adapter"))
    loaded = checkpoints.load(inputs / "roberta", head="classifier", num_labels=2)
    initial = adapter_files.read_initial(config.adapter, loaded)
    start = initial.adapter
    assert "that of the adapter has 3 labels" in initial.fresh_head and initial.config.rank == 2
    head = start["params"]["classifier"]["out_proj"]["kernel"]
    np.testing.assert_array_equal(head, loaded.params["params"]["classifier"]["out_proj"]["kernel"])
    three = checkpoints.load(inputs / "roberta", head="classifier", num_labels=3)
    theirs, _ = adapter_files.load(config.adapter, three)
    query = lambda x: x["params"]["roberta"]["encoder"]["layer_1"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(query(start).b, query(theirs).b)
    assert np.abs(query(start).b).max() > 0
    task, _ = classification.make_task(config)
    assert any("3 labels" in line for line in task.notes)


def test_a_lone_sentence_is_no_pair(inputs):
    loaded = checkpoints.load(inputs / "bert", head="classifier")
    model = classifier.Classifier(
        loaded=loaded,
        adapter=None,
        config=None,
        tokenizer=None,
        labels=("a", "b"),
        max_length=16,
        buckets=(16,),
        pairs=True,
    )
    with pytest.raises(ValueError, match="separated by one tab; 'good' is none"):
        classifier.predict(model, ["good\tbad", "good"])


# --- Programs


run = programs.run


def flags_of(inputs, kind, **changes):
    fields = FIELDS | TARGETS[kind] | {k.replace("__", "."): v for k, v in changes.items()}
    fields |= {"model.name": inputs / kind, "data.source": inputs / "glue"}
    return [f"--config.{name}={value}" for name, value in fields.items()]


@pytest.mark.xdist_group("cli")
@pytest.mark.slow
def test_programs_on_pairs(inputs, tmp_path):
    workdir = tmp_path / "run"
    done = run(
        "glue", "--config=configs/glue_minilm.py", "--config.task=stsb", f"--workdir={workdir}",
        *flags_of(inputs, "distilbert"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "24 training and 10 evaluation sentence pairs" in done.stdout
    assert "best validation pearson" in done.stdout
    adapter = f"--adapter={workdir}/adapter"
    one = run("predict", adapter, "--json", "the film was good\tthe film was bad")
    row = json.loads(one.stdout)
    assert math.isfinite(row["similarity"]), one.stderr
    for flag, file in (("--peft", "adapter_config.json"), ("--merged", "model.safetensors")):
        out = tmp_path / flag.strip("-")
        assert run("export", adapter, f"--out={out}", flag).returncode == 0
        assert (out / file).exists()
    again = run("predict", f"--adapter={tmp_path / 'peft'}", "--json", "the film was good\tthe film was bad")  # fmt: skip
    np.testing.assert_allclose(json.loads(again.stdout)["similarity"], row["similarity"], atol=1e-4)


@pytest.mark.xdist_group("cli")
def test_an_unknown_task_is_one_line(inputs, tmp_path):
    done = run("glue", "--config=configs/glue_minilm.py", "--config.task=mlni", f"--workdir={tmp_path}")  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "task 'mlni' is none of GLUE's (did you mean 'mnli'?)" in done.stderr


# --- Configs


def test_the_papers_recipes():
    for task in roberta_base_glue.RECIPES:
        config = glue_config.resolve(roberta_base_glue.get_config(task))
        glue_config.check(config)
        assert config.data.source == f"tfds:glue/{task}"
        assert config.model.labels == TASKS[task].labels
        assert config.lora.alpha == config.lora.rank == 8
    assert roberta_base_glue.get_config("rte").epochs == 80
    with pytest.raises(ValueError, match="no recipe for 'wnli'"):
        roberta_base_glue.get_config("wnli")


def test_labels_must_be_the_tasks(inputs):
    config = common.glue_config("mnli")
    config.model.name = str(inputs / "bert")
    config.update_from_flattened_dict({"model.labels": ("a", "b"), "model.num_labels": 2})
    with pytest.raises(ValueError, match="'mnli' has 3"):
        glue_config.check(glue_config.resolve(config))
    config = glue_config.resolve(glue_minilm.get_config("stsb").unlock())
    assert config.model.labels == ("similarity",) and config.model.num_labels == 1


@pytest.mark.parametrize(
    ("kind", "targets", "train"),
    [
        ("bert", ("query", "value"), ("classifier",)),
        ("roberta", ("query", "value"), ("classifier",)),
        ("distilbert", ("q_lin", "v_lin"), ("pre_classifier", "classifier")),
    ],
)
def test_what_is_adapted_by_default_is_the_familys(kind, targets, train, inputs):
    config = common.glue_config("rte")
    config.model.name = str(inputs / kind)
    found = glue_config.resolve(config)
    assert (found.lora.targets, found.lora.train) == (targets, train)
    config.lora.targets = ("default", "word_embeddings")
    assert glue_config.resolve(config).lora.targets == (*targets, "word_embeddings")
    assert config.lora.train == ("default",)  # the config itself is unchanged


SWEEP = """
from configs import common

def get_config():
    c = common.glue_config("stsb")
    return c.lock()

def sweep(add):
    for rank in (1, 3):
        add(**{"lora.rank": rank})
"""


@pytest.mark.xdist_group("cli")
@pytest.mark.slow
def test_a_sweep_goes_by_the_score_of_its_task(inputs, tmp_path):
    (tmp_path / "ranks.py").write_text(SWEEP)
    workdir = tmp_path / "sweep"
    fields = {k: v for k, v in FIELDS.items() if k != "lora.rank"}
    fields |= {"model.name": inputs / "distilbert", "data.source": inputs / "glue"}
    done = run(
        "sweep", f"--config={tmp_path / 'ranks.py'}", f"--workdir={workdir}", "--parallel=2",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(p.read_text()) for p in workdir.glob("runs/*/result.json")]
    assert len(found) == 2
    for result, folder in zip(found, workdir.glob("runs/*"), strict=True):
        lines = metric_writer.read(folder / "metrics.jsonl")
        best = max(line["eval_pearson"] for line in lines if "eval_pearson" in line)
        assert result["score"] == "pearson" and result["best_pearson"] == best
    best = max(result["best_pearson"] for result in found)
    assert f"best validation pearson {best:.4f}" in done.stdout
    page = results.to_csv(results.load(workdir))
    assert "best_pearson" in page.splitlines()[0]
