"""The embedded data set: what it promises, and that TFDS prepares and reads it."""

import itertools
import re
import subprocess
import sys

import pytest

from lora_jax.data import examples
from lora_jax.data.reviews.dataset import FOLDER
from tests.helpers.places import ROOT

SPLITS = ("train", "validation")


def split(name):
    return examples.read_tsv(FOLDER / f"{name}.tsv", require_labels=True)


def words(sentence):
    return frozenset(re.findall(r"[a-z']+", sentence.lower()))


def test_counts_and_balance():
    assert sum(len(split(name).sentences) for name in SPLITS) >= 800
    for name in SPLITS:
        labels = split(name).labels
        assert labels.sum() * 2 == len(labels)


def test_no_sentence_twice_and_none_alike_across_the_splits():
    train, validation = (split(name).sentences for name in SPLITS)
    plain = [" ".join(sorted(words(s))) + s.lower().rstrip(".") for s in (*train, *validation)]
    assert len(set(plain)) == len(plain)
    for one, other in itertools.product(map(words, train), map(words, validation)):
        assert len(one & other) < 0.5 * len(one | other), (one, other)


def test_variety():
    sentences = [s for name in SPLITS for s in split(name).sentences]
    lengths = [len(s.split()) for s in sentences]
    assert min(lengths) <= 3 and max(lengths) >= 30
    assert len(frozenset().union(*map(words, sentences))) > 1500


@pytest.mark.parametrize("label", [0, 1])
def test_negation_and_contrast_in_both_classes(label):
    sentences = [
        s for name in SPLITS for s, y in zip(split(name).sentences, split(name).labels, strict=True)
        if y == label
    ]  # fmt: skip
    with_word = lambda *some: sum(bool(words(s) & set(some)) for s in sentences)
    assert with_word("not", "never", "no", "nothing", "can't", "didn't", "without", "nobody") >= 20
    assert with_word("but", "although", "despite", "yet", "though") >= 5


def test_prepared_and_read_by_tfds_without_tensorflow(tmp_path):
    code = (
        "import sys; from lora_jax.data import sources\n"
        "found = sources.load('reviews', sys.argv[2], data_dir=sys.argv[1])\n"
        "assert 'tensorflow' not in sys.modules\n"
        "print(*(f'{s}\\t{y}' for s, y in zip(found.sentences, found.labels)), sep='\\n')\n"
    )
    for name in SPLITS:
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), name],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        read = [line for line in done.stdout.splitlines() if "\t" in line]
        want = (FOLDER / f"{name}.tsv").read_text(encoding="utf-8").splitlines()[1:]
        assert sorted(read) == sorted(want)
