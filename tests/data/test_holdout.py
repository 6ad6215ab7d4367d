"""The part of a training set that is kept for evaluation."""

import pytest

from lora_jax.data import holdout


@pytest.mark.parametrize("value, total, expected", [
    (0, 9, 0), (7, 120, 7), ("7", 120, 7), ("5%", 120, 6), (" 5 % ", 120, 6), ("2.5%", 120, 3), ("5%", 2, 1),
    ("50%", 3, 2), ("99%", 100, 99), ("0%", 9, 0), (".5%", 1000, 5), (0.05, 120, 6), ("0.5", 4, 2),
])  # fmt: skip
def test_counts(value, total, expected):
    assert holdout.count(value, total) == expected
    training, kept = holdout.split(total, expected, seed=3)
    assert len(kept) == expected and sorted(training + kept) == list(range(total))


@pytest.mark.parametrize(
    "value", [-1, 1.5, "100%", "-5%", "five", "", "5%%", True, None, "1.5", "nan%"]
)
def test_values_that_are_refused(value):
    with pytest.raises(ValueError, match='a number of examples, or a part such as "5%", got'):
        holdout.parse(value)


@pytest.mark.parametrize("value, total", [(6, 6), ("5%", 1), (9, 6), ("95%", 2)])
def test_something_must_be_left(value, total):
    with pytest.raises(
        ValueError, match=f"data.holdout {value} leaves nothing of the {total} examples to"
    ):
        holdout.count(value, total)
