"""Tables of texts and labels as people have them: what is read, what is told, and what is refused by line."""

import gzip
import json

import numpy as np
import pytest

from lora_jax.data import columns, labelled_rows, labels, stratification, table_sources, tables
from lora_jax.data.columns import Columns, find_columns

ROWS = [
    ("good, very good", "pos"),
    ('he said "no"', "neg"),
    ("two\nlines", "pos"),
    ("fine; but", "neg"),
]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, content, **options):
    return table_sources.read_file(write(path, content), **options)


def quoted(delimiter, end="\n", header="text{}label"):
    """ROWS as a CSV file, by the rules of RFC 4180 written out."""
    field = lambda x: '"' + x.replace('"', '""') + '"'
    lines = [header.format(delimiter), *(delimiter.join(map(field, row)) for row in ROWS)]
    return end.join(lines) + end


# --- Files


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_delimiters_ends_of_lines_and_encodings(delimiter, end, encoding, tmp_path):
    content = quoted(delimiter, end).encode(encoding)
    for name in ("a.csv", "a.tsv", "a.CSV", "a.csv.gz"):
        packed = gzip.compress(content) if name.endswith("gz") else content
        found = read(tmp_path / name, packed)
        assert found.columns == ("text", "label")
        assert list(found.rows) == ROWS
        assert list(found.lines) == [2, 3, 4, 6]  # the third row has two lines


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("excel.csv", "sep=;\ntext;label\na, b;x\n", [("a, b", "x")]),
        ("blanks.csv", 'text, label\na,  "x, y"\n', [("a", "x, y")]),
        ("more.csv", "text,label\na,x,,\n\n,\nb,y\n", [("a", "x"), ("b", "y")]),
        ("next.csv", "text,label\na\u0085b,x\n", [("a\u0085b", "x")]),
        ("long.csv", f"text,label\n{'w ' * 100_000},x\n", [("w " * 100_000, "x")]),
        ("glue.tsv", 'sentence\tlabel\n"Yes" he said\t1\nnot "so\t0\n', [('"Yes" he said', "1"), ('not "so', "0")]),
        ("alone.tsv", 'text\tlabel\nhe said "no\t1\nand "yes\t0\n', [('he said "no', "1"), ('and "yes', "0")]),
    ],
)  # fmt: skip
def test_habits_of_programs(name, content, rows, tmp_path):
    assert list(read(tmp_path / name, content).rows) == rows


def test_rows_of_several_lines_are_told(tmp_path):
    """One of them may be many, if a quote is not closed where it should be."""
    path = tmp_path / "a.csv"
    assert read(path, quoted(",")).notes == (f"fields with line breaks: in 1 row ({path}:4)",)
    swallowed = read(path, 'text,label\n"a,1\nb,0\nc",1\nd,0\n')
    assert list(swallowed.rows) == [("a,1\nb,0\nc", "1"), ("d", "0")]
    assert swallowed.notes == (f"fields with line breaks: in 1 row ({path}:2)",)


def test_json_lines_and_arrays(tmp_path):
    rows = [{"id": 1, "text": "a", "label": 0}, {"text": "b", "more": {"k": [1]}, "label": None}]
    lines = "\n\n".join(map(json.dumps, rows)) + "\n"
    found = read(tmp_path / "a.jsonl", lines)
    assert found.columns == ("id", "text", "label", "more")
    assert list(found.rows) == [(1, "a", 0, None), (None, "b", None, {"k": [1]})]
    assert list(found.lines) == [1, 3] and found.place(1) == f"{tmp_path}/a.jsonl:3"
    for name, content in (("a.json", json.dumps(rows, indent=1)), ("b.json", lines)):
        again = read(tmp_path / name, content)
        assert (again.columns, list(again.rows)) == (found.columns, list(found.rows))
    assert read(tmp_path / "a.json", json.dumps(rows)).place(1) == f"{tmp_path}/a.json, row 2"


def test_parquet_with_the_names_of_classes(tmp_path):
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    about = {"info": {"features": {"label": {"names": ["ham", "spam"], "_type": "ClassLabel"}}}}
    made = pyarrow.table({"text": ["a", "b", "c"], "label": [1, 0, -1]})
    made = made.replace_schema_metadata({"huggingface": json.dumps(about)})
    parquet.write_table(made, tmp_path / "a.parquet")
    found = table_sources.read_file(tmp_path / "a.parquet")
    assert found.class_names == {"label": ("ham", "spam")}
    rows = labelled_rows.take(found, find_columns(found))
    assert (rows.names, rows.rows) == (["spam", "ham"], [0, 1])
    assert rows.notes == (f"left out: 1 row without a label ({tmp_path}/a.parquet, row 3)",)
    with pytest.raises(ValueError, match=r"broken\.parquet: no whole Parquet file"):
        read(tmp_path / "broken.parquet", b"PAR1")


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"a\.parquet needs pyarrow: pip install 'lora_jax\[data\]'"
    ):
        read(tmp_path / "a.parquet", b"PAR1")
    with pytest.raises(ValueError, match=r"'datasets:imdb' needs datasets: pip install"):
        table_sources.read_tables("datasets:imdb")


DAMAGED = {
    "an open quote": ("a.csv", 'text,label\nx,1\n"y,0\nz,1\n', r"a\.csv:3: the row that begins here can't be read"),
    "a quote inside": ("a.csv", 'text,label\nx,1\n"y "z"",0\n', r"a\.csv:3: .*doubled"),
    "too many fields": ("a.csv", "text,label\nx, y,1\nx,1\nx,0\n", r"a\.csv:2: 3 fields, where there are 2 columns"),
    "too few fields": ("a.csv", "text,label\nx,1\nx\n", r"a\.csv:3: 1 fields"),
    "another encoding": ("a.csv", "text,label\nx,1\ncafé,0\n".encode("latin-1"), r"a\.csv:3: not UTF-8.*iconv"),
    "a zero byte": ("a.csv", "text,label\nx\0,1\n", r"a\.csv:2: a zero byte"),
    "nothing": ("a.csv", " \n", r"a\.csv: empty file"),
    "a header alone": ("a.csv", "text,label\n", r"a\.csv:1: a line of column names and no rows"),
    "no gzip": ("a.csv.gz", "text,label\n", r"a\.csv\.gz: damaged gzip"),
    "cut JSON": ("a.jsonl", '{"text": "x"}\n{"text":\n', r"a\.jsonl:2: no JSON object"),
    "a key twice": ("a.jsonl", '{"text": "x", "text": "y"}\n', r"a\.jsonl:1: .*'text' occurs twice"),
    "no object": ("a.jsonl", '{"text": "x"}\n[1]\n', r"a\.jsonl:2: a JSON list"),
    "deep JSON": ("a.jsonl", "[" * 100_000, r"a\.jsonl.*no JSON"),
    "columns as lists": ("a.json", '{"text": ["x"], "label": [1]}', r"a\.json: one object of .*orient='records'"),
    "an object over lines": ("a.json", '{\n "text": "x"\n}', r"a\.json:1: an object over several lines"),
    "a row that is none": ("a.json", '[{"text": "x"}, 3]', r"a\.json, row 2: a JSON int"),
    "Excel": ("a.xlsx", "PK", r"'\.xlsx' aren't read: save the sheet as CSV"),
    "plain text": ("a.txt", "x", r"'\.txt' aren't read: it has no columns"),
    "an archive": ("a.zip", "PK", "unpack it"),
    "no ending": ("a", "x", r"end in 'nothing' aren't read: a source is a file \(\.csv"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named_by_file_and_line(case, tmp_path):
    name, content, message = DAMAGED[case]
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name, content)


def test_a_file_without_a_header(tmp_path):
    path = write(tmp_path / "a.csv", "good film,pos\nbad film,neg\n")
    with pytest.raises(
        ValueError, match=r"a\.csv:1: no column with texts.*data\.columns=text,label"
    ):
        find_columns(table_sources.read_file(path))
    found = table_sources.read_file(path, columns=["text", "label"])
    assert (found.columns, list(found.lines)) == (("text", "label"), [1, 2])
    with pytest.raises(ValueError, match=r"b\.csv:1: the first line names the columns"):
        read(tmp_path / "b.csv", "Text,Label\nx,1\n", columns=["text", "label"])
    with pytest.raises(ValueError, match="for CSV and TSV files"):
        read(tmp_path / "a.jsonl", "{}", columns=["text"])


def test_folders(tmp_path):
    write(tmp_path / "a" / "train.csv", "text,label\nx,1\n")
    write(tmp_path / "a" / "dev.jsonl", '{"text": "y", "label": 1}\n')
    write(tmp_path / "a" / "README.md", "Nothing.")
    found = table_sources.read_tables(str(tmp_path / "a"))
    assert {split: list(x.rows) for split, x in found.items()} == {
        "train": [("x", "1")], "validation": [("y", 1)],
    }  # fmt: skip
    for name in ("train-00000-of-00002.csv", "train-00001-of-00002.csv"):
        write(tmp_path / "b" / "data" / name, f"text,label\n{name},1\n")
    joined = table_sources.read_tables(str(tmp_path / "b"))["train"]
    assert len(joined.rows) == 2 and joined.place(1).endswith("and 1 more, row 2")
    write(tmp_path / "a" / "train.tsv", "text\tlabel\nx\t1\n")
    with pytest.raises(ValueError, match=r"train\.csv.*train\.tsv.*could each be the split train"):
        table_sources.read_tables(str(tmp_path / "a"))
    with pytest.raises(FileNotFoundError, match=r"no train\.csv.*there is \['data'\]"):
        table_sources.read_tables(str(write(tmp_path / "c" / "data" / "x.csv", "").parents[1]))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "data.source is empty: .*--config.data.source=news.csv"),
        ("no/such", "does not exist; for a data set of that name write datasets:no/such"),
        ("no_such.csv", "no_such.csv does not exist"),
        ("tfds:glue/sst2", "for experiments.glue"),
    ],
)
def test_sources_that_do_not_exist(source, message):
    with pytest.raises(FileNotFoundError, match=message):
        table_sources.read_tables(source)


def test_a_file_is_read_again_when_it_has_changed(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\nx,1\n")
    first = table_sources.read_tables(str(path))["train"]
    assert table_sources.read_tables(str(path))["train"] is first
    write(path, "text,label\nother,1\n")
    assert list(table_sources.read_tables(str(path))["train"].rows) == [("other", "1")]


# --- Columns


def table(names, *rows):
    return tables.Table(
        path="a.csv", columns=names, rows=rows, lines=range(2, 2 + len(rows)), form="fields"
    )


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("label", "text"), Columns((1,), 0)),
        (("id", "Review Text", "Category "), Columns((1,), 2)),
        (("CONTENT", "Class"), Columns((0,), 1)),
        (("date", "tweet", "airline_sentiment"), Columns((1,), 2)),
        (("text", "label", "label_text"), Columns((0,), 1)),
        (("title", "text", "topic"), Columns((1,), 2)),
        (("idx", "sentence1", "sentence2", "label"), Columns((1, 2), 3)),
        (("premise", "hypothesis", "gold_label"), Columns((0, 1), 2)),
        (("question", "sentence", "label"), Columns((0, 1), 2)),
        (("question1", "question2", "is_duplicate"), Columns((0, 1), 2)),
        (("id", "text", "Ergebnis"), Columns((1,), 2)),
        (("id", "id", "text", "label"), Columns((2,), 3)),
        (("label", "Kommentar"), Columns((1,), 0)),
    ],
)  # fmt: skip
def test_usual_names(names, found):
    row = tuple("some words" for _ in names)
    assert find_columns(table(names, row)) == found


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("a", "b"), {}, r"a\.csv:1: no column with texts was found among \['a', 'b'\]: .*data\.text=NAME"),
        (("text",), {}, "no column with labels.*unusual character"),
        (("text", "a", "b"), {}, r"no column with labels was found among \['text', 'a', 'b'\]"),
        (("text", "content", "label"), {}, r"\['text', 'content'\] could each be meant"),
        (("text", "label", "class"), {}, r"\['label', 'class'\] could each be meant"),
        (("text", "label", "label"), {}, "the column 'label' occurs more than once"),
        (("Text", "text ", "label"), {}, "could each be meant"),
        (("premise", "hypothesis", "text", "label"), {}, "could be the pairs .* or the column 'text'"),
        (("text", "label"), {"text": "txet"}, r"no column 'txet' \(data\.text\) \(did you mean 'text'\?\)"),
        (("text", "label"), {"label": "lable"}, "did you mean 'label'"),
        (("text", "label"), {"text": "text", "label": "text"}, "can't be both the text and the label"),
        (("a", "b", "c", "label"), {"text": "a,b,c"}, "one column, or two for pairs"),
        (("a", "a", "label"), {"text": "a"}, "the column 'a' occurs more than once"),
    ],
)  # fmt: skip
def test_columns_that_are_missing_or_not_clear(names, options, message):
    with pytest.raises(ValueError, match=message):
        find_columns(table(names, tuple("x" for _ in names)), **options)


def test_columns_by_their_names():
    made = table(("a, b", "c", "d"))
    assert find_columns(made, text="a, b", label="d") == Columns((0,), 2)
    assert find_columns(table(("A", "B", "D")), text="a,b", label="d") == Columns((0, 1), 2)
    assert (
        find_columns(table(("text", "rating", "label")), is_regression=True, label="label").label
        == 2
    )
    assert find_columns(table(("text", "Score")), is_regression=True) == Columns((0,), 1)


def test_columns_of_a_table_to_predict():
    again = columns.find_texts_again
    made = table(("Body", "sentence"), ("a b", "c d"))
    assert again(made, ("body",), count=1) == (0,) and again(made, ("other",), count=1) == (1,)
    assert again(table(("sentence1", "sentence2")), (), count=2) == (0, 1)
    with pytest.raises(ValueError, match=r"the adapter needs the columns \['x', 'y'\].*--text"):
        again(made, ("x", "y"), count=2)


# --- Rows and labels


def test_rows_that_are_left_out_are_counted():
    rows = [
        ("a", "x"),
        ("", "x"),
        (None, "y"),
        ("b", " "),
        ("c", float("nan")),
        (" d ", 3),
        ("e", False),
    ]
    found = labelled_rows.take(table(("text", "label"), *rows), Columns((0,), 1))
    assert found.texts == [("a",), ("d",), ("e",)] and found.names == ["x", "3", "false"]
    assert found.notes == (
        "left out: 2 rows without a text (a.csv:3, 4)",
        "left out: 2 rows without a label (a.csv:5, 6)",
    )
    with pytest.raises(ValueError, match="no row has a text and a label; left out: 1 row"):
        labelled_rows.take(table(("text", "label"), ("a", "")), Columns((0,), 1))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((["a"], "x"), r"a\.csv:2: the text is \"\['a'\]\", a list"),
        ((True, "x"), r"a\.csv:2: the text is 'True', a bool"),
        (("\ud800", "x"), r"a\.csv:2: the text has half of a character \('\\ud800'"),
        (("a", ["x", "y"]), r"a\.csv:2: the label \['x', 'y'\] is a list, and a row has one"),
        (("a", {"x": 1}), r"a\.csv:2: the label .* is a dict"),
    ],
)  # fmt: skip
def test_texts_and_labels_of_a_wrong_kind(row, message):
    with pytest.raises(ValueError, match=message):
        labelled_rows.take(table(("text", "label"), row), Columns((0,), 1))


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["b", "a", "b", "a"], ("a", "b")),
        (["10", "9", "-1", "9", "10", "-1"], ("-1", "9", "10")),
        (["1.0", "0.0", "1", "0"], ("0", "1")),
        (["1", "x", "1.0", "x", "1", "1.0"], ("1", "1.0", "x")),
        (["Not good", "not good"] * 2, ("Not good", "not good")),
        (["01", "1", "02", "01", "1", "02"], ("01", "02", "1")),  # codes, as those of areas
    ],
)
def test_classes(names, classes):
    assert labels.find_classes(names, "label") == classes
    made = table(("text", "label"), *((str(k), name) for k, name in enumerate(names)))
    found = labels.encode_classes(made, range(len(names)), names, classes, may_be_numbers=False)
    whole = {name: name.removesuffix(".0") if name not in classes else name for name in names}
    assert [classes[k] for k in found] == [whole[name] for name in names]
    assert found.dtype == np.int32


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x"] * 5, "all 5 rows have the label 'x'"),
        (["1.5", "2", "1.5", "2"], r"real numbers \('1\.5'\): set --config\.data\.regression=True"),
        ([str(k) for k in range(9)], "9 different labels in 9 rows"),
        ([f"id{k}" for k in range(90)], "90 different labels in 90 rows.*it seems to hold no classes"),
    ],
)  # fmt: skip
def test_labels_that_are_no_classes(names, message):
    with pytest.raises(ValueError, match=message):
        labels.find_classes(names, "label")


def test_numbers_of_classes_that_have_names():
    made = table(("text", "label"), ("a", "0"), ("b", "1.0"), ("c", "2"))
    encode = lambda names, **options: labels.encode_classes(made, range(len(names)), names, ("no", "yes"), **options).tolist()  # fmt: skip
    assert encode(["0", "1.0"], may_be_numbers=True) == [0, 1]
    assert encode(["no", "yes"], may_be_numbers=True) == [0, 1]
    with pytest.raises(
        ValueError, match=r"a\.csv:4: the label '2' is none of the 2 classes 'no', 'yes'"
    ):
        encode(["0", "1", "2"], may_be_numbers=True)
    for names, flag in ((["0", "1"], False), (["0", "yes"], True)):
        with pytest.raises(ValueError, match="the label '0' is none"):
            encode(names, may_be_numbers=flag)
    with pytest.raises(ValueError, match="the label '0' is none"):
        labels.encode_classes(made, [0], ["0"], ("1", "2"), may_be_numbers=True)


def test_numbers_to_learn():
    made = table(("text", "score"), *(("a", "") for _ in range(5)))
    found = labels.parse_numbers(made, range(4), ["1", "-2.5", ".5", "1e-3"])
    np.testing.assert_array_equal(found, np.float32([1, -2.5, 0.5, 1e-3]))
    for bad in ("nan", "inf", "3,5", "1e99", "x", "1_0", "٣"):
        with pytest.raises(ValueError, match=rf"a\.csv:3: the label '{bad}' is no number"):
            labels.parse_numbers(made, range(2), ["1", bad])


def test_what_is_told_of_labels():
    lines = labels.describe_classes(("NA", "pos", "Pos"), np.array([1] * 1200 + [2, 2, 0]))
    assert lines == [
        "labels: 3 classes, by rows: pos 1,200, Pos 2, NA 1",
        "labels of one row each, of which little can be learned: 'NA'",
        "labels that differ in case alone are classes of their own: 'pos', 'Pos'",
        "labels that may stand for no value are classes here: 'NA'",
    ]


# --- The part that is held out


@pytest.mark.parametrize("seed", range(5))
def test_classes_are_held_out_in_proportion(seed):
    """Each count differs by less than one from its share; equal texts stay together."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(np.repeat(np.arange(4), [200, 57, 9, 1]))
    groups = np.arange(len(classes))
    held = stratification.choose_holdout(groups, classes, 40, seed)
    counts = np.bincount(classes[held], minlength=4)
    assert held.sum() == 40 and counts[3] == 0
    assert np.all(np.abs(counts - 40 * np.bincount(classes) / len(classes)) < 1)
    np.testing.assert_array_equal(held, stratification.choose_holdout(groups, classes, 40, seed))
    assert np.any(held != stratification.choose_holdout(groups, classes, 40, seed + 1))
    twice = np.concatenate([groups, groups[::-1]])
    both = stratification.choose_holdout(twice, np.concatenate([classes, classes[::-1]]), 40, seed)
    np.testing.assert_array_equal(both, np.concatenate([held, held[::-1]]))


def test_no_class_loses_its_last_row():
    held = stratification.choose_holdout(np.arange(6), np.repeat([0, 1, 2], 2), 5, seed=0)
    assert np.bincount(np.repeat([0, 1, 2], 2)[~held]).tolist() == [1, 1, 1]
    assert stratification.choose_holdout(np.arange(50), None, 5, seed=0).sum() == 5
