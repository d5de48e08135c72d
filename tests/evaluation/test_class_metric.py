"""Top-1, top-5, accuracy by class and the confusion picture, by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused

from hgkd.evaluation import ClassificationMetric, ClassSample
from hgkd.evaluation.classification import class_accuracy
from hgkd.pictures.confusion import write_class_report


def sample(index, label, *best, classes=6):
    scores = torch.zeros(classes)
    for place, c in enumerate(best):
        scores[c] = 10.0 - place
    return ClassSample(scores, label, index)


def evaluate(samples):
    metric = ClassificationMetric()
    metric.process(None, samples)
    return metric, metric.evaluate(len(samples))


def test_by_hand():
    samples = [
        sample(0, 0, 0),
        sample(1, 0, 1, 0),
        sample(2, 1, 1),
        sample(3, 2, 3, 4, 5, 0, 1, 2),  # right only at the sixth place
    ]
    metric, found = evaluate(samples)
    assert found["accuracy/top1"] == 50.0
    assert found["accuracy/top5"] == 75.0
    assert found["accuracy/mean_class"] == pytest.approx((50 + 100 + 0) / 3)
    assert found["accuracy/ci95_low"] <= 50.0 <= found["accuracy/ci95_high"]
    expected = np.zeros((6, 6), int)
    expected[0, 0] = expected[0, 1] = expected[1, 1] = expected[2, 3] = 1
    np.testing.assert_array_equal(metric.confusion, expected)
    np.testing.assert_array_equal(class_accuracy(metric.confusion)[:3], [50.0, 100.0, 0.0])
    assert np.isnan(class_accuracy(metric.confusion)[3:]).all()


def test_an_image_in_place_of_an_unreadable_one_counts_once():
    _, found = evaluate([sample(0, 0, 0), sample(0, 0, 0), sample(1, 0, 1)])
    assert found["accuracy/top1"] == 50.0


def test_fewer_than_five_classes():
    _, found = evaluate([sample(0, 1, 0, classes=2)])
    assert (found["accuracy/top1"], found["accuracy/top5"]) == (0.0, 100.0)


@pytest.mark.parametrize("classes", [3, 50])
def test_the_report_is_a_table_and_a_picture(classes, tmp_path):
    confusion = np.eye(classes, dtype=int) * 2
    confusion[0] = 0
    write_class_report(tmp_path, confusion, [f"class {i}" for i in range(classes)])
    table = json.loads((tmp_path / "per_class.json").read_text())
    assert table["class 0"] == {"accuracy": None, "images": 0}
    assert table["class 1"] == {"accuracy": 100.0, "images": 2}
    with Image.open(tmp_path / "confusion.png") as picture:
        assert min(picture.size) > 100


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_no_answer(broken):
    """The largest of NaN is NaN: the image would count as its class."""
    metric = ClassificationMetric()
    with refused(ValueError, "scores-not-finite", "7"):
        metric.process(None, [ClassSample(torch.tensor([0.1, broken, 0.2]), 1, 7)])
