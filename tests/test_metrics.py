import json

import numpy as np
import pytest
import sklearn.metrics
import torch

from utils import metrics
from utils.metrics import (
    accuracies,
    calibration_error,
    fit_temperature,
    logit_statistics,
    per_class_csv,
    per_class_rows,
    percent,
    predicted_classes,
    report,
    spread,
    table,
)


def test_report_by_hand() -> None:
    logits = torch.tensor(
        [[9, 1, 2, 3, 4, 5, 0.0], [0, 9, 2, 3, 4, 5, 6], [9, 0, 8, 7, 6, 5, 1], [1, 2, 9, 3, 4, 5, 6.0]]
    )
    labels = torch.tensor([0, 0, 2, 2])  # right; not in the top five; second; right
    rep = report(logits, labels, [200, 101, 100, 20, 50, 30, 20])
    assert rep["top1"] == 0.5 and rep["top5"] == 0.75 and rep["class_mean"] == 0.5
    assert rep["per_class"] == [0.5, None, 0.5, None, None, None, None]
    assert rep["test_images"] == [2, 0, 2, 0, 0, 0, 0]
    assert rep["groups"]["many"] == {"accuracy": 0.5, "classes": 2, "train_images": 301}
    assert rep["groups"]["medium"] == {"accuracy": 0.5, "classes": 5, "train_images": 220}
    assert rep["groups"]["few"] == {"accuracy": None, "classes": 0, "train_images": 0}
    assert "NaN" not in json.dumps(rep) and "null" in json.dumps(rep)


def test_class_mean_differs_from_micro_on_an_unbalanced_set() -> None:
    logits = torch.eye(2)[torch.tensor([0, 0, 0, 0])]
    rep = report(logits, torch.tensor([0, 0, 0, 1]), [300, 5])
    assert rep["top1"] == 0.75 and rep["class_mean"] == 0.5
    assert rep["groups"]["few"]["accuracy"] == 0 and rep["groups"]["many"]["accuracy"] == 1


def test_table_prints_a_dash_for_an_empty_group() -> None:
    text = table(report(torch.eye(2), torch.tensor([0, 1]), [300, 50]))
    few = next(line for line in text.splitlines() if line.startswith("few"))
    assert few.split()[-3:] == ["0", "0", "-"] and "nan" not in text.lower()
    assert next(line for line in text.splitlines() if line.startswith("all ")).split()[-1] == "100.00"


def test_per_class_rows_and_csv() -> None:
    rows = per_class_rows(report(torch.eye(2), torch.tensor([0, 0]), [300, 5]), ["apple", "worm, earth"], [300, 5])
    assert rows[1] == {
        "class": 1, "name": "worm, earth", "group": "few", "train_images": 5, "test_images": 0, "accuracy": None
    }  # fmt: skip
    assert per_class_csv(rows).splitlines()[2] == '1,"worm, earth",few,5,0,'


def test_percent() -> None:
    assert percent(0.53925) == "53.92" and percent(None) == "-" and percent(1.0, 0) == "100"


def test_top5_with_few_classes() -> None:
    assert report(torch.eye(3), torch.tensor([2, 1, 0]), [9, 9, 9])["top5"] == pytest.approx(1)


def test_class_measures_against_scikit_learn() -> None:
    torch.manual_seed(0)
    labels, logits = torch.randint(6, (80,)), torch.randn(80, 6)
    logits[torch.arange(80), labels] += 1
    rep = report(logits, labels, [9] * 6)
    predicted = logits.argmax(dim=1)
    assert rep["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(labels, predicted, average="macro"))
    recalls = sklearn.metrics.recall_score(labels, predicted, average=None)
    assert rep["worst_class"] == pytest.approx(recalls.min())
    assert rep["harmonic_mean"] == pytest.approx(6 / (1 / recalls).sum())
    assert rep["class_mean"] == pytest.approx(recalls.mean())


def test_macro_f1_longhand() -> None:
    predicted, labels = torch.tensor([0, 0, 1, 2, 3, 0]), torch.tensor([0, 0, 0, 1, 1, 1])
    found = accuracies(predicted, labels, [9] * 4)["macro_f1"]  # class 0: TP 2, FP 1, FN 1; class 1: TP 0; others none
    assert found == pytest.approx((4 / (4 + 1 + 1) + 0) / 2)
    theirs = sklearn.metrics.f1_score(labels, predicted, average="macro", labels=[0, 1], zero_division=0)
    assert found == pytest.approx(theirs)


def test_harmonic_mean_is_zero_where_a_class_is() -> None:
    assert report(torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([0, 1]), [9, 9])["harmonic_mean"] == 0


def test_calibration_error_by_hand() -> None:
    p = torch.tensor([[0.7, 0.3], [0.7, 0.3], [0.9, 0.1], [0.45, 0.55]])
    labels = torch.tensor([0, 1, 0, 0])  # bin (2/3, 11/15]: accuracy 0.5 of 0.7; 0.9: right; 0.55: wrong
    expected = 2 / 4 * abs(0.5 - 0.7) + 1 / 4 * 0.1 + 1 / 4 * 0.55
    assert calibration_error(p.log(), labels) == pytest.approx(expected)
    assert calibration_error((p.log() * 3), labels, temperature=3) == pytest.approx(expected)


def test_temperature_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert fit_temperature(logits * 4, labels) == pytest.approx(4, rel=0.05)
    assert fit_temperature(logits / 50, labels) == pytest.approx(1 / 50, rel=0.05)


def test_logit_statistics_by_hand() -> None:
    z = np.array([[3.0, 1, 0], [5, 0, 1], [1, 4, 1], [0, 2, 3]])
    y = np.array([0, 0, 1, 1])
    found = logit_statistics(torch.from_numpy(z), torch.from_numpy(y))
    for i in (0, 1):
        magnitude = z[y == i, i].mean() - z[y != i, i].mean()
        assert found["logits_magnitude"][i] == pytest.approx(magnitude)
        assert found["rsd"][i] == pytest.approx(z[:, i].std() / magnitude)
        gaps = [row[i] - np.delete(row, i).mean() for row in z[y == i]]
        assert found["logits_magnitude_row"][i] == pytest.approx(np.mean(gaps))
        assert found["rsd_row"][i] == pytest.approx(np.std(gaps) / np.mean(gaps))
    assert all(values[2] is None for values in found.values())
    assert spread(found["rsd"]) == pytest.approx((np.mean(found["rsd"][:2]), np.std(found["rsd"][:2])))
    assert spread([None]) is None


def test_blocks_are_measured_as_the_whole(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(300, 7, generator=generator)
    labels = torch.randint(6, (300,), generator=generator)  # class 6 has no image
    counts = [200, 150, 90, 40, 30, 10, 5]
    whole, blocks = report(logits, labels, counts), logits.split([200, 89, 11])
    assert report(blocks, labels, counts) == whole
    assert calibration_error(blocks, labels, 2.0) == calibration_error(logits, labels, 2.0)
    assert fit_temperature(blocks, labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-6)
    found, expected = logit_statistics(blocks, labels), logit_statistics(logits, labels)
    for name, values in expected.items():
        assert found[name][:6] == pytest.approx(values[:6], rel=1e-9) and found[name][6] is values[6] is None
    assert torch.equal(predicted_classes(blocks), logits.argmax(dim=1))
    assert predicted_classes([logits, logits / 0]) is None
    monkeypatch.setattr(metrics, "LOGIT_BYTES", 4 * 7 * 50)
    assert [len(block) for block in metrics.in_blocks(logits)] == [50] * 6
    assert report(logits, labels, counts) == whole
