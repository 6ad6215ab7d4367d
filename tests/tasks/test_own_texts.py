"""One's own texts: what a config becomes, what is held out, and what is told of the rows."""

import json
import subprocess

import numpy as np
import pytest

from configs import classify
from experiments import next_commands, recipes
from lora_jax import serialize
from lora_jax.data.examples import Examples
from lora_jax.tasks import classifier, own_rows, own_texts
from lora_jax.training import workdirs
from tests.helpers import tiny_encoder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_encoder.checkpoint(tmp_path_factory.mktemp("model")))


ROWS = [
    (f"the film number {k} was {'good' if k % 2 else 'bad'}", ("no", "yes")[k % 2])
    for k in range(40)
]


def csv(rows=ROWS, header="text,label"):
    return "\n".join([header, *(f'"{text}",{label}' for text, label in rows)]) + "\n"


@pytest.fixture
def resolve(tmp_path, model):
    """Writes a table, and resolves a config that names it; a key has __ for a dot."""

    def make(content, name="a.csv", **fields):
        path = tmp_path / name
        path.write_text(content)
        config = classify.get_config().unlock()
        config.model.name, config.data.source = model, str(path)
        for field, value in fields.items():
            section, _, field_name = field.rpartition("__")
            (config[section] if section else config)[field_name] = value
        config = own_texts.resolve(config.lock())
        own_texts.check(config)
        return config

    return make


def test_nothing_is_left_open(resolve):
    config = resolve(csv())
    assert config.model.labels == ("no", "yes") and config.model.num_labels == 2
    assert config.data.holdout == "10%" and config.data.digest.startswith("sha256:")
    assert config.lora.train == ("classifier",)
    again = own_texts.resolve(config)
    assert workdirs.to_json_types(again) == workdirs.to_json_types(config)
    json.dumps(workdirs.to_json_types(config))


def test_examples_of_a_config(resolve):
    texts = own_texts.load(resolve(csv()))
    (held_out,) = texts.evaluations
    both = [*texts.training.sentences, *held_out.sentences]
    assert sorted(both) == sorted(text for text, _ in ROWS)
    assert len(held_out.sentences) == 4 and np.bincount(held_out.labels).tolist() == [2, 2]
    right = dict(ROWS)
    for part in (texts.training, held_out):
        for text, label in zip(part.sentences, part.labels, strict=True):
            assert ("no", "yes")[label] == right[text]
    assert texts.metadata == {"pairs": False, "classify": {"text": ["text"], "label": "label"}}
    assert texts.notes == (
        "columns: texts in 'text', labels in 'label' (fields separated by commas)",
        "labels: 2 classes, by rows: no 20, yes 20",
        "held out: 4 of 40 rows, in proportion to the labels, by data.seed 0",
    )
    assert texts.task.score == "accuracy" and texts.task.scores == ("macro_f1",)


def test_the_order_of_the_rows_does_not_change_the_classes(resolve):
    assert resolve(csv(ROWS[::-1])).model.labels == ("no", "yes")


@pytest.mark.parametrize(
    ("holdout", "count"), [("", 4), ("25%", 10), (0.25, 10), (7, 7), ("7", 7), ("1%", 1)]
)
def test_parts_that_are_held_out(holdout, count, resolve):
    texts = own_texts.load(resolve(csv(), data__holdout=holdout))
    assert len(texts.evaluations[0].sentences) == count
    assert len(texts.training.sentences) == 40 - count


@pytest.mark.parametrize(
    ("holdout", "message"),
    [
        ("lots", "data.holdout must be a number of examples, or a part"),
        (1.5, "got 1.5"),
        ("100%", "got '100%'"),
        (-1, "got -1"),
        (True, "got True"),
    ],
)
def test_parts_that_are_none(holdout, message, resolve):
    with pytest.raises(ValueError, match=message):
        resolve(csv(), data__holdout=holdout)


def test_all_or_nothing_can_not_be_held_out(resolve):
    for holdout in (0, 40, 41):
        with pytest.raises(ValueError, match=rf"data\.holdout {holdout} of 40 different texts"):
            own_texts.load(resolve(csv(), data__holdout=holdout))


def test_a_file_to_evaluate_on(resolve, tmp_path):
    other = tmp_path / "test.jsonl"
    lines = [{"sentence": f"number {k}", "class": "yes"} for k in range(5)]
    lines[0]["sentence"] = ROWS[0][0]
    other.write_text("\n".join(map(json.dumps, lines)))
    config = resolve(csv(), data__validation=str(other))
    texts = own_texts.load(config)
    assert config.data.holdout == 0 and own_texts.resolve(config) == config
    assert len(texts.training.sentences) == 40 and texts.evaluations[0].labels.tolist() == [1] * 5
    assert (
        "repeated: 1 of the 5 texts to evaluate on are among those to train on" in texts.notes[-1]
    )
    with pytest.raises(ValueError, match=r"data\.validation .* and data\.holdout '20%'.*set one"):
        resolve(csv(), data__validation=str(other), data__holdout="20%")
    other.write_text('{"text": "x", "label": "maybe"}\n{"text": "y", "label": "yes"}\n')
    with pytest.raises(ValueError, match=r"test\.jsonl:1: the label 'maybe' is none of the 2"):
        resolve(csv(), data__validation=str(other))
    other.write_text('{"text": "x", "label": 1}\n')
    with pytest.raises(ValueError, match=r"test\.jsonl:1: the label '1' is none of the 2"):
        resolve(csv(), data__validation=str(other))
    other.write_text('{"premise": "x", "hypothesis": "y", "label": "yes"}\n')
    with pytest.raises(ValueError, match="both must be pairs, or neither"):
        resolve(csv(), data__validation=str(other))


def test_splits_of_a_folder(model, tmp_path):
    for name, rows in (("train", ROWS[:30]), ("dev", ROWS[30:36]), ("test", ROWS[36:])):
        (tmp_path / f"{name}.csv").write_text(csv(rows))
    config = classify.get_config().unlock()
    config.model.name, config.data.source = model, str(tmp_path)
    texts = own_texts.load(own_texts.resolve(config))
    assert [len(x.sentences) for x in (texts.training, *texts.evaluations)] == [30, 6]
    assert f"not used: the split test of {tmp_path}" in texts.notes
    config.data.holdout = 10
    texts = own_texts.load(own_texts.resolve(config))
    assert f"not used: the split validation and test of {tmp_path}" in texts.notes
    assert [len(x.sentences) for x in (texts.training, *texts.evaluations)] == [20, 10]


def test_rows_that_say_the_same_stay_together(resolve):
    texts = own_texts.load(resolve(csv([*ROWS, *ROWS, (ROWS[0][0], "yes")])))
    assert not set(texts.training.sentences) & set(texts.evaluations[0].sentences)
    assert any("41 rows of" in x and "1 of them with another label" in x for x in texts.notes)


def test_what_is_left_out_is_told(resolve):
    content = csv() + "no label,\n ,yes\n,\n"
    notes = own_texts.load(resolve(content)).notes
    assert any(x.startswith("left out: 1 row of") and x.endswith("nothing in it") for x in notes)
    assert any("1 row without a text" in x and "a.csv:43)" in x for x in notes)
    assert any("1 row without a label" in x and "a.csv:42)" in x for x in notes)
    texts = own_texts.load(resolve(csv(), data__train_examples=10))
    assert "training on 10 of 36 rows (data.train_examples)" in texts.notes


def test_a_label_that_occurs_once(resolve):
    texts = own_texts.load(resolve(csv([*ROWS, ("odd", "maybe")]), data__holdout="40%"))
    assert texts.task.labels == ("maybe", "no", "yes") and "odd" in texts.training.sentences
    assert "labels of one row each, of which little can be learned: 'maybe'" in texts.notes
    assert "labels with no row among those held out: maybe" in texts.notes


def test_pairs(resolve):
    rows = "".join(f"{text},{text} too,{label}\n" for text, label in ROWS)
    for header, fields in (("premise,hypothesis,label", {}), ("a,b,label", {"data__text": "a,b"})):
        texts = own_texts.load(resolve(f"{header}\n{rows}", **fields))
        assert texts.task.has_pairs and texts.metadata["pairs"]
        first = texts.training.sentences[0], texts.training.pairs[0]
        assert first[1] == f"{first[0]} too"


def test_numbers(resolve):
    rows = [(text, k / 4) for k, (text, _) in enumerate(ROWS)]
    with pytest.raises(ValueError, match=r"a\.csv: the labels in 'rating' are real numbers"):
        resolve(csv(rows, "text,rating"))
    config = resolve(csv(rows, "text,rating"), data__regression=True)
    assert config.model.labels == ("rating",)
    texts = own_texts.load(config)
    assert texts.training.labels.dtype == np.float32 and texts.task.score == "pearson"
    assert "labels: numbers from 0 to 9.75, 4.875 on average" in texts.notes
    with pytest.raises(ValueError, match="there is one number to name"):
        resolve(csv(rows, "text,rating"), data__regression=True, model__labels=("a", "b"))
    rows = [(text, 1000 * k) for k, (text, _) in enumerate(ROWS)]
    texts = own_texts.load(resolve(csv(rows, "text,price"), data__regression=True))
    assert any("slow to learn: divide them" in note for note in texts.notes)


def test_names_for_numbers(resolve):
    rows = [(text, int(label == "yes")) for text, label in ROWS]
    assert resolve(csv(rows)).model.labels == ("0", "1")
    config = resolve(csv(rows), model__labels=("bad", "good"))
    texts = own_texts.load(config)
    assert config.model.labels == ("bad", "good")
    assert all(("good" in s) == (k == 1) for s, k in zip(texts.training.sentences, texts.training.labels, strict=True))  # fmt: skip
    with pytest.raises(ValueError, match="the label '1' is none of the 2 classes 'x', '0'"):
        own_texts.load(resolve(csv(rows), model__labels=("x", "0")))
    with pytest.raises(ValueError, match=r"one name, each another"):
        resolve(csv(rows), model__labels=("x", "x"))


def test_a_run_does_not_go_on_with_other_rows(resolve, tmp_path):
    config = resolve(csv())
    workdirs.claim(tmp_path / "run", config)
    workdirs.check(tmp_path / "run", resolve(csv()))
    changed = resolve(csv([*ROWS[:-1], (ROWS[-1][0], "no")]))
    with pytest.raises(ValueError, match=r"another config: data\.digest is 'sha256:"):
        workdirs.check(tmp_path / "run", changed)
    with pytest.raises(ValueError, match=r"are not those of data\.digest .*they have changed"):
        own_texts.resolve(config)  # as from the run's config.json


def test_an_adapter_of_other_labels_is_refused(resolve, tmp_path, monkeypatch):
    config = resolve(csv()).unlock()
    config.adapter = "somewhere"
    monkeypatch.setattr(own_texts.peft, "is_peft", lambda directory: False)
    for labels in (["no", "yes"], ["a", "b", "c"]):  # the latter gets a fresh head
        monkeypatch.setattr(
            serialize, "read_metadata", lambda _, x=labels: {"model": {"labels": x}}
        )
        own_texts.load(config)
    monkeypatch.setattr(serialize, "read_metadata", lambda _: {"model": {"labels": ["yes", "no"]}})
    with pytest.raises(
        ValueError, match=r"has the labels \('yes', 'no'\), and the data have \('no'"
    ):
        own_texts.load(config)


def test_damaged_metadata():
    good = {
        "task": "text-classification", "model": {"name": "x", "labels": ["a"], "dtype": "float32"},
        "max_length": 1, "buckets": [1], "seed": 0, "pairs": False, "classify": {"text": ["a"]},
    }  # fmt: skip
    classifier._check_metadata("x", good)
    for bad in (None, [], {}, {"text": "a"}, {"text": []}, {"text": ["a", "b"]}, {"text": [1]}):
        with pytest.raises(ValueError, match="lacks classify"):
            classifier._check_metadata("x", good | {"classify": bad})


def test_a_recipe_for_sweeps():
    assert recipes.RECIPES["classify"] is recipes.CLASSIFY


# --- The example to try next


@pytest.mark.parametrize(
    ("texts", "example"),
    [
        (("word " * 50, "fine\nwords"), "fine words"),
        (("- a list", "fine"), "fine"),
        (("- a list",), "- a list"),
        (("x" * 200, "y" * 150), "y" * 150),
    ],
)
def test_an_example_is_short_and_of_one_line(texts, example):
    assert own_texts.find_example(Examples(texts, None)) == example
    pairs = Examples(texts, None, tuple(f"{x} too" for x in texts))
    assert own_texts.find_example(pairs).count("\t") == 1


TEXTS = (
    "Great!", "It's 5 o'clock", 'He said "no"', "$HOME `ls` \\n", "über 你好 🎉", "!wow! yes", "- a list",
    "A man's \\ hat.\tSomebody\teats 'it'.", "--flag", "'", '"',
)  # fmt: skip


def test_a_shell_reads_what_was_quoted():
    words = " ".join(map(next_commands.quote_text, TEXTS))
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True, check=True
    )
    assert done.stdout.decode().split("\0")[:-1] == list(TEXTS)


def test_commands():
    assert next_commands.predict("a b/adapter", "-x") == (
        "python -m experiments.predict --adapter='a b/adapter' -- \"-x\""
    )
    assert next_commands.export("a", "a b").endswith("--adapter=a --out='a b' --merged")


# --- Mutations

VALUES = (
    None, True, 0, -1, 1.5, 1e400, 10**400, "", " ", "\ud800", "\x00", "\ufeff", "a\nb", "label", [], ["x"], {}, {"x": 1},
    "日本", "1", "NaN", "x" * 200_000,
)  # fmt: skip


def mutate_rows(rng):
    """JSON lines of which some rows have other values, keys, nesting or bytes."""
    rows = [{"text": text, "label": label} for text, label in ROWS]
    for _ in range(rng.integers(1, 4)):
        row = rows[rng.integers(len(rows))]
        row[str(rng.choice(["text", "label", "other", ""]))] = VALUES[rng.integers(len(VALUES))]
    for _ in range(rng.integers(0, 2)):
        rows[rng.integers(len(rows))] = VALUES[rng.integers(len(VALUES))]
    lines = [json.dumps(row, ensure_ascii=bool(rng.integers(2))) for row in rows]
    return mutate_text("\n".join(lines) + "\n", rng) if rng.integers(2) else "\n".join(lines)


def mutate_text(text, rng):
    """A text in which some characters are others, are gone, or stand twice."""
    for _ in range(rng.integers(1, 4)):
        k = rng.integers(len(text))
        new = str(
            rng.choice(['"', ",", ";", "\t", "\n", "\r", "", "{", "]", "\\", "\x00", text[k] * 2])
        )
        text = text[:k] + new + text[k + 1 :]
    return text


def check_mutations(directory, count, seed):
    rng = np.random.default_rng(seed)
    config, refused = classify.get_config().unlock(), 0
    for k in range(count):
        name = ("a.jsonl", "a.csv", "a.tsv", "a.json")[k % 4]
        if name.endswith("sv"):
            content = mutate_text(csv().replace(",", "\t") if name == "a.tsv" else csv(), rng)
        else:
            content = mutate_rows(rng)
        path = directory / f"{k}_{name}"
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        config.data.source = str(path)
        try:
            data = own_rows.read(config)
            config.model.labels = ()
            config.model.labels = own_rows.find_labels(config, data)
            examples = own_rows.to_examples(config, data.training)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error), (content, error)
        else:
            assert 0 < len(examples.sentences) <= 42, content
            assert len(examples.labels) == len(examples.sentences)
        path.unlink()
    assert 0 < refused < count


def test_mutated_tables_are_refused_by_name_or_read(tmp_path):
    check_mutations(tmp_path, 200, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_mutated_tables(seed, tmp_path):
    check_mutations(tmp_path, 1000, seed)
