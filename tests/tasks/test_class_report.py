"""Scores of classes, beside counts by hand."""

import csv
import io

import numpy as np
import pytest

from lora_jax.tasks import class_report

LABELS = ("a", "b, c", "never", "d\ne")


@pytest.fixture
def report():
    rng = np.random.default_rng(0)
    truth, predictions = (np.array([0, 1, 3])[rng.integers(0, 3, 200)] for _ in range(2))
    return class_report.make_report(LABELS, truth, predictions), truth, predictions


def test_scores_are_those_counted_by_hand(report):
    made, truth, predictions = report
    for k, scores in enumerate(class_report.compute_scores(made)):
        hits = sum(t == k == p for t, p in zip(truth, predictions, strict=True))
        precision = hits / sum(predictions == k) if any(predictions == k) else 0.0
        recall = hits / sum(truth == k) if any(truth == k) else 0.0
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        np.testing.assert_allclose(scores, (precision, recall, f1, sum(truth == k)), rtol=1e-12)
    means = class_report.average(made)
    present = [x for k, x in enumerate(class_report.compute_scores(made)) if k != 2]
    assert means["accuracy"] == np.mean(truth == predictions)
    np.testing.assert_allclose(means["macro_f1"], np.mean([x.f1 for x in present]), rtol=1e-12)
    assert class_report.macro_f1(predictions, truth) == means["macro_f1"]


def test_files(report):
    made, truth, predictions = report
    rows = list(csv.reader(io.StringIO(class_report.to_csv(made))))
    assert rows[0] == ["label", *LABELS] and [row[0] for row in rows[1:]] == list(LABELS)
    counted = np.int64([row[1:] for row in rows[1:]])
    assert counted[1, 3] == np.sum((truth == 1) & (predictions == 3)) and counted.sum() == 200
    about = class_report.to_json(made)
    assert about["confusion"] == counted.tolist() and about["examples"] == 200
    assert about["classes"]["b, c"]["support"] == np.sum(truth == 1)


def test_a_report_for_people(report):
    lines = class_report.describe(report[0])
    assert lines[0].split() == ["class", "precision", "recall", "f1", "examples"]
    assert lines[4].startswith("(1 more classes") and lines[3].startswith("d e  ")
    assert len(lines) == 1 + 3 + 1 + 1 + 1 + 4  # classes, hidden, mean, and the matrix


def test_of_many_classes_the_worst_are_shown():
    names = tuple(f"class {k}" for k in range(150))
    truth = np.repeat(np.arange(150), 4)
    predictions = truth.copy()
    predictions[truth == 7] = 9
    lines = class_report.describe(class_report.make_report(names, truth, predictions))
    assert len(lines) == 24 and lines[1].startswith("class 7 ") and lines[2].startswith("class 9 ")
    assert "(130 more classes" in lines[21]
    assert lines[-1] == "most often confused: class 7 taken for class 9: 4"
