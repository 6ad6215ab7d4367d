"""Rows of several texts: how they are filled, and that no text sees another."""

import doctest

import jax
import numpy as np
import pytest

from lora_jax.data import packing
from lora_jax.data.texts import Texts
from lora_jax.models import checkpoints
from lora_jax.tasks import language_modeling
from tests.helpers import places

GOLDENS = places.GOLDENS / "llama"  # scripts/make_llama_goldens.py


def drawn(lengths, vocabulary=40, seed=0):
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    offsets = np.cumsum([0, *lengths])
    counts = rng.integers(0, 2, total)
    counts[offsets[:-1]], counts[offsets[1:] - 1] = 0, 1
    ids = rng.integers(0, vocabulary, total).astype(np.int32)
    return Texts(ids, offsets, counts.astype(np.int32), pad_id=3)


def test_doctests():
    assert doctest.testmod(packing).failed == 0


@pytest.mark.parametrize("seed", range(20))
def test_rows_hold_every_text_once_and_are_nearly_full(seed):
    rng = np.random.default_rng(seed)
    room = int(rng.integers(5, 60))
    sizes = rng.integers(1, room + 1, int(rng.integers(1, 80))).tolist()
    rows = packing.fill(sizes, room)
    assert sorted(k for row in rows for k in row) == list(range(len(sizes)))
    filled = [sum(sizes[k] for k in row) for row in rows]
    assert max(filled) <= room
    # Best fit decreasing never takes more than 11/9 of the fewest, and one (Johnson 1974).
    assert len(rows) <= 11 / 9 * -(-sum(sizes) // room) + 1 or min(filled) * 2 > room


def test_a_text_that_fits_nowhere():
    with pytest.raises(ValueError, match="9 tokens does not fit in rows of 8"):
        packing.pack(drawn([3, 9]), 8)


@pytest.mark.parametrize("case", ["llama3", "gemma3"])
def test_packed_losses_equal_unpacked_ones(case):
    loaded = checkpoints.load(GOLDENS / case, head="causal-lm")
    texts = drawn([5, 9, 3, 4, 7, 2, 6, 12])
    packed, single = packing.pack(texts, 12), packing.pack_singly(texts)
    assert len(packed.rows) < len(single.rows) == 8

    @jax.jit
    def sums(params, batch):
        return language_modeling.token_loss(
            language_modeling.apply(loaded.model, params, batch, None), batch
        )

    def both(rows):
        found = [sums(loaded.params, b) for b in packing.eval_batches(rows, batch_size=4)]
        return np.array([[float(x) for x in batch] for batch in found]).sum(0)

    ours, theirs = both(packed), both(single)
    assert ours[2] == theirs[2] == texts.counts.sum()
    # Means over tens of tokens, in float32.
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    # And one that sees its neighbours would be off by much more.
    blind = [
        {k: v for k, v in b.items() if k not in ("segment_ids", "positions")}
        for b in packing.eval_batches(packed, batch_size=4)
    ]
    assert abs(sum(float(sums(loaded.params, b)[0]) for b in blind) / ours[0] - 1) > 1e-3


def test_a_batch_is_what_it_says():
    texts = drawn([2, 3, 4])
    (batch,) = packing.eval_batches(packing.pack(texts, 6), batch_size=3)
    part = lambda k: texts.ids[texts.offsets[k] : texts.offsets[k + 1]].tolist()
    assert batch["input_ids"].tolist() == [part(2) + part(0), [*part(1), 3, 3, 3]] + [
        part(2) + part(0)
    ]
    assert batch["segment_ids"].tolist()[:2] == [[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]]
    assert batch["positions"].tolist()[:2] == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]
    assert batch["attention_mask"].tolist()[1] == [1, 1, 1, 0, 0, 0]
    assert batch["weights"].tolist() == [1, 1, 0]


def test_batches_of_an_epoch_hold_each_row_once():
    packed = packing.pack_singly(drawn([4] * 7))
    first = lambda step: packing.train_batch(packed, step, seed=1, batch_size=3)
    epochs = []
    for epoch in range(2):
        batches = [first(3 * epoch + k) for k in range(3)]
        real = [row for b in batches for row in b["input_ids"][b["weights"] > 0].tolist()]
        assert sorted(real) == sorted(packed.texts.ids.reshape(7, 4).tolist())
        epochs.append(real)
    assert epochs[0] != epochs[1]
    again = first(4)
    for name, x in first(4).items():
        np.testing.assert_array_equal(x, again[name])
