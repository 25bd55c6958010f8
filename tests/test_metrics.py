import json

import pytest
import torch

from utils.metrics import per_class_csv, per_class_rows, percent, report, table


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
