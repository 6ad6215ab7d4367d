"""Data: strict files, an order that is a pure function, exact sums over padded batches."""

import sys
import types
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from lora_jax.data import sources, tfds, tokenization
from lora_jax.data.batches import count_bucket_lengths, eval_batches, steps_per_epoch, train_batch
from lora_jax.data.examples import Examples, read_tsv, subset
from lora_jax.data.order import permutation
from lora_jax.training import metrics
from tests.helpers import places

SST2 = places.SHARED / "sst2"

needs_sst2 = pytest.mark.skipif(not SST2.is_dir(), reason=f"needs SST-2 in {SST2}")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film", ",", "very", "##ly"]


@pytest.fixture
def tokenizer():
    vocab = {word: i + 3 for i, word in enumerate(WORDS)}  # so that [PAD] is not 0
    made = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(word, vocab[word]) for word in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=special
    )
    return made


def ragged(lengths, *, labels=None, pad_id=0):
    """Examples of the given lengths, each token different from all others."""
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    ids = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    labels = np.arange(len(lengths), dtype=np.int32) % 2 if labels is None else labels
    return tokenization.Tokenized(ids, offsets, labels, pad_id)


def rows_of(batch):
    """The token ids of the real rows, without their padding."""
    real = zip(batch["input_ids"], batch["attention_mask"], batch["weights"], strict=True)
    return [tuple(ids[mask == 1].tolist()) for ids, mask, weight in real if weight]


def examples_of(data):
    return [tuple(row.tolist()) for row in np.split(data.ids, data.offsets[1:-1])]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Files.


def test_read_tsv_values(tmp_path):
    path = write(tmp_path / "train.tsv", 'sentence\tlabel\n"an open quote \t1\ncafé\u2028x\t0\n')
    examples = read_tsv(path, require_labels=True)
    assert examples.sentences == ('"an open quote ', "café\u2028x")
    assert examples.labels.dtype == np.int32
    assert examples.labels.tolist() == [1, 0]


def test_read_tsv_takes_windows_line_ends_a_mark_and_columns_in_any_order(tmp_path):
    content = b"\xef\xbb\xbflabel\tidx\tsentence\r\n1\t0\tone\r\n0\t1\ttwo"
    examples = read_tsv(write(tmp_path / "x.tsv", content), require_labels=True)
    assert examples.sentences == ("one", "two")
    assert examples.labels.tolist() == [1, 0]


def test_read_tsv_without_labels(tmp_path):
    path = write(tmp_path / "test.tsv", "index\tsentence\n0\ta\n1\tb\n")
    assert read_tsv(path, require_labels=False)[:2] == (("a", "b"), None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"t\.tsv: empty file"),
        ("\n", r"t\.tsv: empty file"),
        ("a film\t1\n", r"t\.tsv:1: the header must have each of \['sentence', 'label'\]"),
        ("sentence\n a\n", r"t\.tsv:1: the header must have"),
        ("sentence\tlabel\tlabel\na\t1\t1\n", r"t\.tsv:1: the header must have"),
        ("sentence\tlabel\n", r"t\.tsv:1: a header and no examples"),
        ("sentence\tlabel\na\t1\n\nb\t0\n", r"t\.tsv:3: empty row"),
        ("sentence\tlabel\na\t1\nb\n", r"t\.tsv:3: 1 fields, where the header has 2"),
        ("sentence\tlabel\na\tb\t1\n", r"t\.tsv:2: 3 fields, where the header has 2"),
        ("sentence\tlabel\n  \t1\n", r"t\.tsv:2: empty sentence"),
        ("sentence\tlabel\na\t1\nb\tgood\n", r"t\.tsv:3: label 'good' is not an integer"),
        ("sentence\tlabel\na\t1_0\n", r"t\.tsv:2: label '1_0' is not an integer"),
        ("sentence\tlabel\na\t1.0\n", r"t\.tsv:2: label '1.0' is not an integer"),
        ("sentence\tlabel\na\t٣\n", r"t\.tsv:2: label '٣' is not an integer"),
        ("sentence\tlabel\na\t2\n", r"t\.tsv:2: label 2 is not in \[0, 2\)"),
        ("sentence\tlabel\na\t-1\n", r"t\.tsv:2: label -1 is not in \[0, 2\)"),
        (b"sentence\tlabel\na\t1\ncaf\xe9\t0\n", r"t\.tsv:3: not UTF-8 at byte 22 .*0xe9"),
    ],
)
def test_read_tsv_errors_name_file_and_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_tsv(write(tmp_path / "t.tsv", content), require_labels=True)


def test_more_labels_than_two(tmp_path):
    path = write(tmp_path / "dev.tsv", "sentence\tlabel\na\t2\nb\t0\n")
    assert sources.load(str(tmp_path), "validation", num_labels=3).labels.tolist() == [2, 0]
    with pytest.raises(ValueError, match=rf"{path}:2: label 2"):
        sources.load(str(tmp_path), "validation")


def test_load_reads_the_file_of_the_split(tmp_path):
    for name, text in (("train", "t"), ("dev", "d"), ("test", "x")):
        write(tmp_path / f"{name}.tsv", f"sentence\tlabel\n{text}\t1\n")
    assert [sources.load(str(tmp_path), split).sentences for split in sources.SPLITS] == [
        ("t",),
        ("d",),
        ("x",),
    ]


def test_load_errors_say_what_exists(tmp_path):
    write(tmp_path / "train.tsv", "sentence\tlabel\na\t1\n")
    with pytest.raises(ValueError, match=r"split 'dev', where there are \['train', 'validation'"):
        sources.load(str(tmp_path), "dev")
    with pytest.raises(FileNotFoundError, match=r"dev\.tsv, which does not exist.*\['train.tsv'\]"):
        sources.load(str(tmp_path), "validation")
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; a source is 'tfds:NAME'"):
        sources.load(str(tmp_path / "nowhere"), "train")
    with pytest.raises(FileNotFoundError, match=r"train\.tsv is a file"):
        sources.load(str(tmp_path / "train.tsv"), "train")
    with pytest.raises(ValueError, match="data_dir='x' says where TFDS keeps its data"):
        sources.load(str(tmp_path), "train", data_dir="x")


@needs_sst2
def test_the_real_sst2():
    train, dev, test = (sources.load(str(SST2), split) for split in sources.SPLITS)
    assert [len(x.sentences) for x in (train, dev, test)] == [67_349, 872, 1_821]
    assert np.bincount(train.labels).tolist() == [29_780, 37_569]
    assert np.bincount(dev.labels).tolist() == [428, 444]
    assert test.labels is None
    assert dev.sentences[0] == "it 's a charming and often affecting journey . "
    assert sum('"' in sentence for sentence in train.sentences) == _quoted_lines()


def _quoted_lines():
    return sum(b'"' in line for line in (SST2 / "train.tsv").read_bytes().split(b"\n"))


# TFDS. tests/data/test_tfds_glue.py has the download; here is what needs no TensorFlow.


class Records(list):
    """The one thing a data source of TFDS has that a list has not."""

    def __getitems__(self, keys):
        return [self[key] for key in keys]


def fake_builder(rows, *, prepared=True, features=("sentence", "label", "idx"), records=True):
    def as_data_source(split):
        if not records:
            raise NotImplementedError
        return Records(rows)

    info = types.SimpleNamespace(features=dict.fromkeys(features), splits={"train": 0})
    return types.SimpleNamespace(
        info=info,
        data_path="/where",
        is_prepared=lambda: prepared,
        as_data_source=as_data_source,
        download_and_prepare=lambda **_: pytest.fail("nothing to prepare"),
    )


def load_fake(monkeypatch, builder, source="tfds:any", split="train"):
    monkeypatch.setattr(tfds, "_make_builder", lambda source, data_dir: builder)
    return sources.load(source, split)


def test_tfds_rows_come_back_in_the_order_of_the_file(monkeypatch):
    rows = [
        {"sentence": s.encode(), "label": y, "idx": i} for s, y, i in [("é", 1, 2), ("b", 0, 0)]
    ]
    examples = load_fake(monkeypatch, fake_builder(rows))
    assert examples.sentences == ("b", "é")
    assert examples.labels.dtype == np.int32
    assert examples.labels.tolist() == [0, 1]


def test_tfds_labels_that_are_not_published(monkeypatch):
    rows = [{"sentence": b"a", "label": -1}, {"sentence": b"b", "label": -1}]
    assert load_fake(monkeypatch, fake_builder(rows))[:2] == (("a", "b"), None)


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, -1], r"labels \[-1\], not in \[0, 2\)"), ([0.5, 1.0], "labels of dtype float64")],
)
def test_tfds_labels_are_checked(monkeypatch, labels, message):
    rows = [{"sentence": b"a", "label": label} for label in labels]
    with pytest.raises(ValueError, match=message):
        load_fake(monkeypatch, fake_builder(rows))


def test_tfds_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"features \['text'\], without \['label', 'sentence'\]"):
        load_fake(monkeypatch, fake_builder([], features=["text"]))
    with pytest.raises(ValueError, match=r"splits \['train'\], not 'test'"):
        load_fake(monkeypatch, fake_builder([]), split="test")
    with pytest.raises(ValueError, match="no examples in this split"):
        load_fake(monkeypatch, fake_builder([]))
    with pytest.raises(ValueError, match="/where are not array_record files"):
        load_fake(monkeypatch, fake_builder([], records=False))


def test_unprepared_without_tensorflow(monkeypatch):
    monkeypatch.setattr(tfds.importlib.util, "find_spec", lambda name: None)
    message = r"looked in /where.*pip install 'lora_jax\[tfds-prepare\]' and run this again"
    with pytest.raises(FileNotFoundError, match=message):
        load_fake(monkeypatch, fake_builder([], prepared=False))


def test_failure_to_prepare_says_what_else_serves(monkeypatch):
    def fail(**_):
        raise OSError("no network")

    monkeypatch.setattr(tfds.importlib.util, "find_spec", lambda name: object())
    builder = fake_builder([], prepared=False)
    builder.download_and_prepare = fail
    with pytest.raises(OSError, match="no network") as caught:
        load_fake(monkeypatch, builder)
    assert "or a directory with train.tsv" in caught.value.__notes__[0]


def test_another_process_prepared_the_data_meanwhile(monkeypatch):
    def lose(**_):
        builder.is_prepared = lambda: True
        raise OSError("Directory not empty")

    monkeypatch.setattr(tfds.importlib.util, "find_spec", lambda name: object())
    builder = fake_builder([{"sentence": b"a", "label": 1}], prepared=False)
    builder.download_and_prepare = lose
    assert load_fake(monkeypatch, builder).sentences == ("a",)


@pytest.mark.parametrize("source", ["reviews", "tfds:lora_reviews"])
def test_reviews_come_from_their_own_builder_and_need_no_tensorflow(monkeypatch, source):
    asked = []
    rows = [{"sentence": b"a", "label": 1, "idx": 0}]
    unprepared = fake_builder(rows, prepared=False)
    unprepared.download_and_prepare = lambda file_format: asked.append(file_format)
    reviews = types.SimpleNamespace(builder=lambda data_dir: unprepared)
    monkeypatch.setitem(sys.modules, "lora_jax.data.reviews", reviews)
    monkeypatch.setattr(tfds.importlib.util, "find_spec", lambda name: None)
    assert sources.load(source, "train").sentences == ("a",)
    assert asked == ["array_record"]


def test_unknown_tfds_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="TFDS knows no dataset 'no_such_thing'"):
        sources.load("tfds:no_such_thing", "train", data_dir=str(tmp_path))


# Subsets and order.


def test_subset_is_the_start_of_one_shuffle():
    examples = Examples(tuple("abcdefgh"), np.arange(8, dtype=np.int32))
    small, large = (subset(examples, count, seed=3) for count in (3, 8))
    assert small.sentences == large.sentences[:3]
    assert sorted(large.sentences) == list("abcdefgh")
    assert large.sentences != examples.sentences
    assert ["abcdefgh"[label] for label in small.labels] == list(small.sentences)
    assert subset(examples, 8, seed=4).sentences != large.sentences


def test_subset_of_all_and_errors():
    examples = Examples(("a", "b"), None)
    assert subset(examples, 0, seed=1) is subset(examples, None, seed=1) is examples
    assert subset(examples, 1, seed=1).labels is None
    for count in (3, -1):
        with pytest.raises(ValueError, match=f"{count} examples, where there are 2"):
            subset(examples, count, seed=1)


def test_permutation_golden():
    """Made by this function on numpy 2.4; a change here breaks the resuming of every run."""
    assert permutation(8, 0, stream=0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(8, 1, stream=2).tolist() == [4, 2, 0, 6, 1, 5, 7, 3]
    assert permutation(6, 2**64 - 1, stream=2**64 - 1).tolist() == [4, 5, 0, 1, 3, 2]


def test_permutation_is_uniform():
    """All 24 orders of 4: chi-square with 23 degrees of freedom is below 60 but once in 3e4."""
    seen = Counter(tuple(permutation(4, 5, stream=stream).tolist()) for stream in range(4800))
    assert sum((seen[order] - 200) ** 2 / 200 for order in seen) + 200 * (24 - len(seen)) < 60


@pytest.mark.parametrize(("seed", "stream"), [(-1, 0), (2**64, 0), (0, -1)])
def test_permutation_range(seed, stream):
    with pytest.raises(ValueError, match=r"is not in \[0, 2\*\*64\)"):
        permutation(3, seed, stream=stream)


lengths_strategy = st.lists(st.integers(1, 12), min_size=1, max_size=23)
seeds = st.integers(0, 2**64 - 1)
windows = st.sampled_from([0, 1, 2, 5, 1000])


@settings(deadline=None, max_examples=60)
@given(lengths_strategy, st.integers(1, 7), seeds, st.integers(0, 5), windows)
def test_every_example_once_per_epoch(lengths, batch_size, seed, epoch, alike):
    data = ragged(lengths)
    steps = steps_per_epoch(len(lengths), batch_size)
    options = {"seed": seed, "batch_size": batch_size, "buckets": (4, 12), "alike": alike}
    batches = [train_batch(data, epoch * steps + step, **options) for step in range(steps)]
    seen = [row for batch in batches for row in rows_of(batch)]
    assert sorted(seen) == sorted(examples_of(data))
    weights = [batch["weights"].sum() for batch in batches]
    assert weights[:-1] == [batch_size] * (steps - 1)
    assert sum(weights) == len(lengths)


@settings(deadline=None, max_examples=40)
@given(
    lengths_strategy, st.integers(1, 7), seeds, st.lists(st.integers(0, 60), min_size=1), windows
)
def test_a_batch_depends_on_seed_and_step_alone(lengths, batch_size, seed, steps, alike):
    """In any order of the steps, and with other runs between them, the batches are the same."""
    data = ragged(lengths)
    options = {"batch_size": batch_size, "buckets": (12,), "alike": alike}
    first = {step: train_batch(data, step, seed=seed, **options) for step in sorted(set(steps))}
    for step in steps:
        train_batch(data, step + 1, seed=seed ^ 1, **options)
        again = train_batch(data, step, seed=seed, **options)
        jax.tree.map(np.testing.assert_array_equal, first[step], again)


@settings(deadline=None, max_examples=40)
@given(lengths_strategy, st.integers(1, 7))
def test_shapes_dtypes_and_padding(lengths, batch_size):
    data = ragged(lengths, pad_id=99_999)
    buckets = (3, 7, 12)
    for batch in eval_batches(data, batch_size=batch_size, buckets=buckets):
        longest = max(map(len, rows_of(batch)))
        length = min(bucket for bucket in buckets if bucket >= longest)
        shapes = {name: (value.shape, str(value.dtype)) for name, value in batch.items()}
        assert shapes == {
            "input_ids": ((batch_size, length), "int32"),
            "attention_mask": ((batch_size, length), "int32"),
            "labels": ((batch_size,), "int32"),
            "weights": ((batch_size,), "float32"),
            "index": ((batch_size,), "int32"),
        }
        assert np.array_equal(batch["input_ids"] == 99_999, batch["attention_mask"] == 0)
        assert batch["attention_mask"].sum(1).min() >= 1


def test_batches_of_like_length_pad_less_and_come_in_random_order():
    data = ragged(np.random.default_rng(0).integers(1, 41, 400).tolist())
    options = {"seed": 1, "batch_size": 8, "buckets": range(1, 41)}
    plain, alike = (
        [train_batch(data, step, **options, alike=n)["input_ids"].shape[1] for step in range(50)]
        for n in (0, 10)
    )
    assert sum(alike) < 0.7 * sum(plain)
    assert sum(alike) * 8 < 1.2 * data.offsets[-1]
    # Not from short to long: neighbours differ as those of a random order do.
    assert np.abs(np.diff(alike)).mean() > 0.5 * np.abs(np.subtract.outer(alike, alike)).mean()


def test_epochs_and_seeds_differ():
    data = ragged([2] * 64)
    options = {"batch_size": 64, "buckets": (2,)}
    runs = [(0, 0), (0, 1), (1, 0), (1, 1)]
    orders = {tuple(train_batch(data, s, seed=k, **options)["input_ids"][:, 0]) for k, s in runs}
    assert len(orders) == 4


def test_train_batch_values():
    data = ragged([2, 1, 3], labels=np.array([0, 1, 0], np.int32), pad_id=7)
    order = permutation(3, 5, stream=0)
    batch = train_batch(data, 1, seed=5, batch_size=2, buckets=(4, 8))
    row = order[2]
    ids = [[1, 2, 7, 7], [3, 7, 7, 7], [4, 5, 6, 7]][row]
    assert batch["input_ids"].tolist() == [ids, ids]
    assert batch["labels"].tolist() == [int(row == 1)] * 2
    assert batch["weights"].tolist() == [1.0, 0.0]


def test_the_batch_cannot_change_the_data_or_the_order():
    data = ragged([2, 3, 1])
    options = {"seed": 1, "batch_size": 3, "buckets": (3,)}
    batch = train_batch(data, 0, **options)
    expected = jax.tree.map(np.copy, batch)
    for value in batch.values():
        value[:] = 0
    jax.tree.map(np.testing.assert_array_equal, train_batch(data, 0, **options), expected)


@settings(deadline=None, max_examples=40)
@given(lengths_strategy, st.integers(1, 7))
def test_eval_batches_hold_everything_once_and_find_their_place(lengths, batch_size):
    data = ragged(lengths)
    found = np.zeros(len(lengths), np.int32)
    rows = []
    for batch in eval_batches(data, batch_size=batch_size, buckets=(4, 12)):
        found[batch["index"]] = batch["input_ids"][:, 0]
        rows += rows_of(batch)
    assert sorted(rows) == sorted(examples_of(data))
    assert found.tolist() == [row[0] for row in examples_of(data)]
    assert list(map(len, rows)) == sorted(lengths)


def test_eval_without_labels_and_training_without_them():
    data = ragged([1, 2])._replace(labels=None)
    (batch,) = eval_batches(data, batch_size=2, buckets=(2,))
    assert "labels" not in batch
    with pytest.raises(ValueError, match="training needs labels"):
        train_batch(data, 0, seed=0, batch_size=2, buckets=(2,))


@settings(deadline=None, max_examples=30)
@given(lengths_strategy, st.integers(1, 7), st.integers(0, 40), windows)
def test_bucket_lengths_used_counts_the_batches(lengths, batch_size, steps, alike):
    data = ragged(lengths)
    options = {"seed": 9, "batch_size": batch_size, "buckets": (2, 5, 12), "alike": alike}
    batches = [train_batch(data, step, **options) for step in range(steps)]
    seen = Counter(batch["input_ids"].shape[1] for batch in batches)
    used = count_bucket_lengths(data, steps, **options)
    assert used == seen
    assert list(used) == sorted(used)


@pytest.mark.parametrize("buckets", [(), (0, 4), (4, 4), (8, 4), (-1,)])
def test_buckets_must_ascend(buckets):
    with pytest.raises(ValueError, match="are not positive lengths that ascend"):
        train_batch(ragged([1]), 0, seed=0, batch_size=1, buckets=buckets)


def test_buckets_must_hold_every_row():
    """Also a row that is not in this batch: found at the first step, not in the middle of a run."""
    data = ragged([1, 9])
    for call in (
        lambda: train_batch(data, 0, seed=0, batch_size=1, buckets=(4, 8)),
        lambda: eval_batches(data, batch_size=1, buckets=(4, 8)),
        lambda: count_bucket_lengths(data, 1, seed=0, batch_size=1, buckets=(4, 8)),
    ):
        with pytest.raises(ValueError, match="longest row, of 9 tokens: .* max_length=8"):
            call()


def test_numbers_out_of_range():
    assert steps_per_epoch(5, 2) == 3
    assert steps_per_epoch(4, 2) == 2
    for n, batch_size in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="both must be 1 or more"):
            steps_per_epoch(n, batch_size)
    with pytest.raises(ValueError, match="step -1 is negative"):
        train_batch(ragged([1]), -1, seed=0, batch_size=1, buckets=(2,))


# Tokens.


def test_tokenize_values(tokenizer):
    examples = Examples(("a good film", "very , very bad", "badly"), np.array([1, 0, 0], np.int32))
    data = tokenization.tokenize(examples, tokenizer, max_length=5)
    assert [[WORDS[i - 3] for i in row] for row in examples_of(data)] == [
        ["[CLS]", "a", "good", "film", "[SEP]"],
        ["[CLS]", "very", ",", "very", "[SEP]"],
        ["[CLS]", "bad", "##ly", "[SEP]"],
    ]
    assert data.pad_id == 3
    assert data.labels is examples.labels
    assert (data.ids.dtype, data.offsets.dtype) == (np.int32, np.int64)


def test_tokenize_neither_uses_nor_changes_the_settings_of_the_tokenizer(tokenizer):
    examples = Examples(("a good film", "bad"), None)
    plain = tokenization.tokenize(examples, tokenizer, max_length=8)
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(3)
    before = tokenizer.to_str()
    again = tokenization.tokenize(examples, tokenizer, max_length=8)
    assert tokenizer.to_str() == before
    assert examples_of(again) == examples_of(plain)
    assert list(map(len, examples_of(plain))) == [5, 3]


@pytest.mark.parametrize(("word", "pad_id"), [("[PAD]", 1), ("<pad>", 1), ("other", 0)])
def test_pad_id(word, pad_id):
    made = tokenizers.Tokenizer(models.WordLevel({"a": 0, word: 1}, unk_token="a"))
    assert tokenization.tokenize(Examples(("a",), None), made, max_length=4).pad_id == pad_id


def test_tokenize_errors(tokenizer):
    with pytest.raises(ValueError, match="max_length 2, but 2 special tokens and a word"):
        tokenization.tokenize(Examples(("a",), None), tokenizer, max_length=2)
    silent = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    silent.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("a")
    with pytest.raises(ValueError, match="example 1 has no tokens: 'aa'"):
        tokenization.tokenize(Examples(("b", "aa"), None), silent, max_length=4)


def test_tokenize_nothing(tokenizer):
    data = tokenization.tokenize(Examples((), None), tokenizer, max_length=4)
    assert (data.ids.tolist(), data.offsets.tolist()) == ([], [0])


# Metrics.


def toy_logits(ids, mask, xp):
    """A model that respects the mask; whole numbers / 16, at most 3, so that they are exact."""
    tokens = xp.where(mask == 1, ids, 0)
    sums = xp.stack([(tokens % 5).sum(-1), (tokens % 3).sum(-1)], -1)
    return (sums / 16).astype(xp.float32)


@jax.jit
def toy_sums(batch):
    logits = toy_logits(batch["input_ids"], batch["attention_mask"], jnp)
    return metrics.cross_entropy(logits, batch["labels"], batch["weights"])


def reference(data):
    """Loss and accuracy of each example by itself, unpadded, in float64 and without JAX."""
    losses, correct = [], []
    for row, label in zip(examples_of(data), data.labels, strict=True):
        ids = np.array([row])
        logits = toy_logits(ids, np.ones_like(ids), np)[0].astype(np.float64)
        losses.append(np.logaddexp(*logits) - logits[label])
        correct.append(float(np.argmax(logits) == label))
    return np.mean(losses), np.mean(correct)


@settings(deadline=None, max_examples=40)
@given(lengths_strategy, st.sampled_from([1, 3, 7]))
def test_padded_buckets_give_the_loss_and_accuracy_of_the_examples(lengths, batch_size):
    data = ragged(lengths, pad_id=4)
    batches = eval_batches(data, batch_size=batch_size, buckets=(4, 12))
    result = metrics.combine(toy_sums(batch) for batch in batches)
    loss, accuracy = reference(data)
    assert result["examples"] == len(lengths)
    assert result["accuracy"] == accuracy
    # float32: half a unit in the last place of a logit of 3 is 1.2e-7; a loss takes two of them.
    np.testing.assert_allclose(result["loss"], loss, rtol=0, atol=1e-6)


def test_cross_entropy_values_dtype_and_bfloat16():
    logits = jnp.array([[2.0, 0.0], [0.0, 1.0]], jnp.bfloat16)
    sums = metrics.cross_entropy(logits, jnp.array([0, 0]), jnp.array([1.0, 1.0]))
    expected = np.log1p(np.exp(-2.0)) + np.log1p(np.exp(1.0))
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-6)
    assert (float(sums.correct), float(sums.weight)) == (1.0, 2.0)
    assert [str(x.dtype) for x in sums] == ["float32"] * 3


def test_a_row_of_weight_0_counts_for_nothing_even_if_it_is_nan():
    labels, weights = jnp.array([1, 0]), jnp.array([1.0, 0.0])
    logits = jnp.array([[0.0, 1.0], [jnp.nan, jnp.inf]])
    loss = lambda x: metrics.cross_entropy(x, labels, weights).loss
    value, gradient = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, np.log1p(np.exp(-1.0)), rtol=1e-6)
    probability = 1 / (1 + np.exp(1.0))
    np.testing.assert_allclose(gradient, [[probability, -probability], [0, 0]], rtol=1e-6)


def test_combine_of_nothing():
    zero = metrics.Sums(jnp.float32(0), jnp.float32(0), jnp.float32(0))
    for batches in ([], [zero]):
        with pytest.raises(ValueError, match="no examples to take a mean of"):
            metrics.combine(batches)
