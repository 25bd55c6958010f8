"""Accuracy of a long-tailed classifier: top-1, top-5, class mean, many/medium/few, per class. Fractions throughout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

GROUPS = ("many", "medium", "few")
#: Training images per class: many above the first, few below the second (Liu et al., OLTR, CVPR 2019).
MANY_ABOVE, FEW_BELOW = 100, 20

#: {"top1", "top5", "class_mean": float; "groups": {group: {"accuracy", "classes", "train_images"}};
#: "per_class": (C,) float or None; "test_images": (C,) int}
Report = dict[str, Any]


def group_of(class_count: int) -> str:
    """many, medium or few, by the number of training images of a class."""
    return "many" if class_count > MANY_ABOVE else "few" if class_count < FEW_BELOW else "medium"


def report(logits: Tensor, labels: Tensor, class_counts: Sequence[int]) -> Report:
    """All accuracies of a set of predictions.

    Group accuracies and ``class_mean`` are means over classes, of which those without an image are left out; on the
    balanced test sets ``class_mean`` equals ``top1``. An empty group's accuracy is None. With fewer than five classes
    top-5 is 1.

    logits (N, C) float, labels (N,) int64, class_counts (C,) training images -> Report.
    """
    num_classes = len(class_counts)
    top = logits.topk(min(5, num_classes), dim=1).indices
    hits = top == labels[:, None]
    images = torch.bincount(labels, minlength=num_classes)
    correct = torch.bincount(labels[hits[:, 0]], minlength=num_classes)
    per_class = [c / n if n else None for c, n in zip(correct.tolist(), images.tolist())]
    groups = {}
    for group in GROUPS:
        members = [i for i, count in enumerate(class_counts) if group_of(count) == group]
        groups[group] = {
            "accuracy": _mean([per_class[i] for i in members]),
            "classes": len(members),
            "train_images": sum(class_counts[i] for i in members),
        }
    return {
        "top1": int(hits[:, 0].sum()) / len(labels),
        "top5": int(hits.sum()) / len(labels),
        "class_mean": _mean(per_class),
        "groups": groups,
        "per_class": per_class,
        "test_images": images.tolist(),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def percent(value: float | None, digits: int = 2) -> str:
    """A fraction as a person reads it: "53.92", or "-" for None."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def scores(rep: Report) -> dict[str, float | None]:
    """A report's five headline figures: top1, top5, many, medium, few."""
    return {"top1": rep["top1"], "top5": rep["top5"], **{g: rep["groups"][g]["accuracy"] for g in GROUPS}}


def table(rep: Report) -> str:
    """A report as the table that evaluate.py prints, in percent."""
    total = {"classes": len(rep["per_class"]), "train_images": sum(g["train_images"] for g in rep["groups"].values())}
    rows = [("all", rep["top1"], total)]
    rows += [(name, group["accuracy"], group) for name, group in rep["groups"].items()]
    limits = {"many": f">{MANY_ABOVE}", "medium": f"{FEW_BELOW}-{MANY_ABOVE}", "few": f"<{FEW_BELOW}"}
    lines = [f"{'classes with':<18}{'classes':>8}{'images':>9}{'top-1 %':>10}"]
    for name, accuracy, size in rows:
        label = f"{name} {limits[name]}" if name in limits else name
        lines.append(f"{label:<18}{size['classes']:>8}{size['train_images']:>9,}{percent(accuracy):>10}")
    lines.append(f"{'all, top-5':<35}{percent(rep['top5']):>10}")
    return "\n".join(lines)


def per_class_rows(rep: Report, class_names: Sequence[str], class_counts: Sequence[int]) -> list[Mapping[str, Any]]:
    """One row per class in label order: class, name, group, train_images, test_images, accuracy."""
    return [
        {
            "class": i,
            "name": name,
            "group": group_of(count),
            "train_images": count,
            "test_images": tested,
            "accuracy": accuracy,
        }
        for i, (name, count, tested, accuracy) in enumerate(
            zip(class_names, class_counts, rep["test_images"], rep["per_class"], strict=True)
        )
    ]


def per_class_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of :func:`per_class_rows` as CSV text."""
    return str(pd.DataFrame(rows).to_csv(index=False))
