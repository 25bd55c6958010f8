"""Accuracy of a classifier: top-1, top-5, class mean, macro-F1, many/medium/few, per class. Fractions throughout."""

from __future__ import annotations

import csv
import io
import math
import statistics
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypedDict

import torch
from torch import Tensor

from utils.types import Json

GROUPS = ("many", "medium", "few")
#: Training images per class: many above the first, few below the second (Liu et al., OLTR, CVPR 2019).
MANY_ABOVE, FEW_BELOW = 100, 20
#: A figure of a report that something is chosen by on held-out images.
Figure = Literal["class_mean", "top1", "macro_f1"]
#: Those figures in words.
FIGURES: dict[Figure, str] = {"class_mean": "class mean", "top1": "top-1", "macro_f1": "macro-F1"}


class GroupScore(TypedDict):
    """Of many, medium or few: the mean over its classes' accuracies, None where it has none."""

    accuracy: float | None
    classes: int
    train_images: int


class Report(TypedDict, total=False):
    """What was measured on a set of predictions, as fractions.

    :func:`accuracies` gives top1, class_mean, macro_f1, groups and per_class (C,), :func:`report` all but
    ``temperature``, which is that of held-out images, see :func:`fit_temperature`. ``test_images`` is (C,).
    """

    top1: float
    top5: float
    class_mean: float
    worst_class: float
    harmonic_mean: float
    macro_f1: float
    ece: float
    groups: dict[str, GroupScore]
    per_class: list[float | None]
    test_images: list[int]
    temperature: float


#: What is known of one class.
ClassRow = TypedDict(
    "ClassRow",
    {"class": int, "name": str, "group": str, "train_images": int, "test_images": int, "accuracy": float | None},
)

#: Logits of N images (N, C), whole or in blocks (n, C) that follow each other; blocks may be iterated over repeatedly.
Logits = Tensor | Iterable[Tensor]
#: Bytes of float32 logits that are looked at at a time.
LOGIT_BYTES = 2**26


def in_blocks(logits: Logits) -> Iterable[Tensor]:
    """The blocks; those of a whole tensor are views of at most :data:`LOGIT_BYTES`."""
    return logits.split(max(1, LOGIT_BYTES // (4 * logits.shape[1]))) if isinstance(logits, Tensor) else logits


def labelled(logits: Logits, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The blocks (n, C), each with its labels (n,)."""
    start = 0
    for block in in_blocks(logits):
        yield block, labels[start : start + len(block)]
        start += len(block)


def predicted_classes(logits: Logits) -> Tensor | None:
    """The class of the greatest logit (N,); None where a logit is not finite."""
    found = []
    for block in in_blocks(logits):
        if not bool(block.isfinite().all()):
            return None
        found.append(block.argmax(dim=1))
    return torch.cat(found)


def group_of(class_count: int) -> str:
    """many, medium or few, by the number of training images of a class."""
    return "many" if class_count > MANY_ABOVE else "few" if class_count < FEW_BELOW else "medium"


def report(logits: Logits, labels: Tensor, class_counts: Sequence[int]) -> Report:
    """All measures of a set of predictions: those of :func:`accuracies`, and others.

    ``top5``, 1 with fewer than five classes; ``harmonic_mean`` and ``worst_class`` over the per-class accuracies;
    ``ece``, see :func:`calibration_error`.

    logits (N, C) float, labels (N,) int64, class_counts (C,) training images -> Report.
    """
    num_classes = len(class_counts)
    found = [(block.topk(min(5, num_classes), dim=1).indices, *confidences(block)) for block in in_blocks(logits)]
    top, confidence, surest = map(torch.cat, zip(*found))
    scored = accuracies(top[:, 0], labels, class_counts)
    present = [accuracy for accuracy in scored["per_class"] if accuracy is not None]
    return {
        "top1": scored["top1"],
        "top5": int((top == labels[:, None]).sum()) / len(labels),
        "class_mean": scored["class_mean"],
        "worst_class": min(present),
        "harmonic_mean": statistics.harmonic_mean(present),
        "macro_f1": scored["macro_f1"],
        "ece": binned_gap(confidence, surest == labels),
        "groups": scored["groups"],
        "per_class": scored["per_class"],
        "test_images": torch.bincount(labels, minlength=num_classes).tolist(),
    }


def accuracies(predicted: Tensor, labels: Tensor, class_counts: Sequence[int]) -> Report:
    """top1, class_mean, macro_f1, groups and per_class of predicted classes.

    Group accuracies, ``class_mean`` and ``macro_f1``, the mean of 2 TP / (2 TP + FP + FN), are means over classes, of
    which those without an image are left out; on the balanced test sets ``class_mean`` equals ``top1``. An empty
    group's accuracy is None.

    predicted (N,) int64, labels (N,) int64, class_counts (C,) training images -> Report.
    """
    num_classes = len(class_counts)
    counted = (labels, predicted, labels[predicted == labels])
    images, guesses, correct = (torch.bincount(classes, minlength=num_classes).tolist() for classes in counted)
    per_class = [c / n if n else None for c, n in zip(correct, images)]
    class_mean = _mean(per_class)
    macro_f1 = _mean([2 * c / (n + g) if n else None for c, n, g in zip(correct, images, guesses)])
    assert class_mean is not None and macro_f1 is not None  # there are images
    groups: dict[str, GroupScore] = {}
    for group in GROUPS:
        members = [i for i, count in enumerate(class_counts) if group_of(count) == group]
        groups[group] = {
            "accuracy": _mean([per_class[i] for i in members]),
            "classes": len(members),
            "train_images": sum(class_counts[i] for i in members),
        }
    return {
        "top1": sum(correct) / len(labels),
        "class_mean": class_mean,
        "macro_f1": macro_f1,
        "groups": groups,
        "per_class": per_class,
    }


def shifted(per_class: Sequence[float | None], prior: Tensor, class_counts: Sequence[int]) -> dict[str, float | None]:
    """top1, many, medium and few on a test set in which classes have other shares: {name: accuracy}.

    Each is the mean of the classes' accuracies, weighted by their shares, which is what such a test set is expected to
    give; nothing is drawn. Classes without images are left out, and None is the accuracy of none.

    per_class (C,), prior (C,), class_counts (C,) training images.
    """
    members: dict[str, list[int]] = {"top1": list(range(len(class_counts)))}
    members |= {group: [i for i, count in enumerate(class_counts) if group_of(count) == group] for group in GROUPS}
    pairs = [(accuracy, float(share)) for accuracy, share in zip(per_class, prior)]
    found: dict[str, float | None] = {}
    for name, classes in members.items():
        seen = [(accuracy, share) for accuracy, share in map(pairs.__getitem__, classes) if accuracy is not None]
        total = sum(share for _, share in seen)
        found[name] = sum(accuracy * share for accuracy, share in seen) / total if total else None
    return found


def calibration_error(logits: Logits, labels: Tensor, temperature: float = 1.0) -> float:
    """Expected calibration error of softmax(z / temperature) (Guo et al., ICML 2017); see :func:`binned_gap`.

    logits (N, C) float, labels (N,) int64 -> fraction.
    """
    confidence, predicted = map(torch.cat, zip(*(confidences(block, temperature) for block in in_blocks(logits))))
    return binned_gap(confidence, predicted == labels)


def confidences(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Greatest probability of softmax(z / temperature) and its class: logits (n, C) -> (n,) float64, (n,) int64."""
    confidence, predicted = (logits.double() / temperature).softmax(dim=1).max(dim=1)
    return confidence, predicted


def binned_gap(confidence: Tensor, is_right: Tensor, bins: int = 15) -> float:
    """The mean over images of |accuracy - confidence| of an image's confidence bin, ``bins`` of equal width.

    confidence (N,) float64, is_right (N,) bool -> fraction.
    """
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bins are open on the left, as published
    gap = is_right.double() - confidence
    return float(torch.zeros(bins, dtype=torch.float64).index_add_(0, place, gap).abs().sum() / len(gap))


def fit_temperature(logits: Logits, labels: Tensor) -> float:
    """The temperature T in [0.01, 100] of least mean -log softmax(z / T)_y on held-out images (Guo et al., ICML 2017).

    logits (N, C) float, labels (N,) int64.
    """
    from scipy.optimize import minimize_scalar  # here, since it is slow to import and rarely needed

    def loss(log_temperature: float) -> float:
        parts = (
            len(own) / len(labels) * torch.nn.functional.cross_entropy(block.double() / math.exp(log_temperature), own)
            for block, own in labelled(logits, labels)
        )
        return float(sum(parts))

    limits = (math.log(0.01), math.log(100))
    return math.exp(minimize_scalar(loss, bounds=limits, method="bounded").x)


def logit_statistics(logits: Logits, labels: Tensor) -> dict[str, list[float | None]]:
    """Logits Magnitude and Regularized Standard Deviation per class (Label Over-Smooth, ICLR 2025), in two readings.

    The published code has neither, and the text can be read two ways, so both are here. By column, class i's logit
    over all images: ``logits_magnitude`` = mean of z_i over the images of class i minus its mean over all others,
    ``rsd`` = standard deviation of z_i over all images / logits_magnitude. By row, over the images of class i:
    ``logits_magnitude_row`` = mean of z_i - mean_{j != i} z_j, ``rsd_row`` = standard deviation of that gap /
    logits_magnitude_row. None for a class without images (RSD also where the magnitude is 0).

    logits (N, C) float, labels (N,) int64 -> {name: (C,)}.
    """
    by_column, by_row = [], []
    for block, own in labelled(logits, labels):
        z = block.double()
        share = torch.full(z.shape[1:], len(z) / len(labels), dtype=torch.float64)
        by_column.append(torch.stack([share, z.sum(dim=0), z.mean(dim=0), z.var(dim=0, correction=0)]))
        by_row.append(torch.stack([z.gather(1, own[:, None])[:, 0], z.sum(dim=1)]))
    shares, sums, means, variances = torch.stack(by_column, dim=1)  # (blocks, C) each
    deviation = (shares * (variances + (means - (shares * means).sum(dim=0)).square())).sum(dim=0).sqrt()
    true, rows = torch.cat(by_row, dim=1)  # the true classes' logits and the sums of the rows, (N,) each

    num_classes = sums.shape[1]
    images = torch.bincount(labels, minlength=num_classes)

    def per_class(values: Tensor) -> Tensor:
        return torch.zeros(num_classes, dtype=torch.float64).index_add_(0, labels, values)

    own = per_class(true)
    column = own / images - (sums.sum(dim=0) - own) / (len(labels) - images)
    gaps = true - (rows - true) / (num_classes - 1)
    row = per_class(gaps) / images
    row_deviation = (per_class((gaps - row[labels]).square()) / images).sqrt()
    has_both = (images > 0) & (images < len(labels))  # images of the class, and others

    def listed(values: Tensor, is_known: Tensor) -> list[float | None]:
        return [value if known else None for value, known in zip(values.tolist(), is_known.tolist())]

    return {
        "logits_magnitude": listed(column, has_both),
        "rsd": listed(deviation / column, has_both & (column != 0)),
        "logits_magnitude_row": listed(row, has_both),
        "rsd_row": listed(row_deviation / row, has_both & (row != 0)),
    }


def spread(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and deviation over classes, those that are None left out; None where all are, or one is not finite."""
    present = [value for value in values if value is not None]
    if not present or not all(map(math.isfinite, present)):
        return None
    return statistics.fmean(present), statistics.pstdev(present)


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def percent(value: float | None, digits: int = 2) -> str:
    """A fraction as a person reads it: "53.92", or "-" for None."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def scores(rep: Report | Json) -> dict[str, float | None]:
    """A report's five headline figures: top1, top5, many, medium, few."""
    return {"top1": rep["top1"], "top5": rep["top5"], **{g: rep["groups"][g]["accuracy"] for g in GROUPS}}


def table(rep: Report) -> str:
    """A report as the table that evaluate.py prints, in percent."""
    images = sum(group["train_images"] for group in rep["groups"].values())
    total: GroupScore = {"accuracy": rep["top1"], "classes": len(rep["per_class"]), "train_images": images}
    rows = [("all", total), *rep["groups"].items()]
    limits = {"many": f">{MANY_ABOVE}", "medium": f"{FEW_BELOW}-{MANY_ABOVE}", "few": f"<{FEW_BELOW}"}
    lines = [f"{'images per class':<18}{'classes':>8}{'training images':>17}{'top-1 %':>10}"]
    for name, score in rows:
        label = f"{name} {limits[name]}" if name in limits else name
        lines.append(f"{label:<18}{score['classes']:>8}{score['train_images']:>17,}{percent(score['accuracy']):>10}")
    lines.append(f"{'all, top-5':<43}{percent(rep['top5']):>10}")
    return "\n".join(lines)


def group_accuracies(hits: Tensor, groups: Tensor) -> Tensor:
    """The accuracy in each group: hits (N,) bool, groups (N,) from 0 -> (G,) float64."""
    images = torch.bincount(groups)
    return torch.bincount(groups, weights=hits.double()) / images.clamp(min=1)


def bootstrap_interval(hits: Tensor, groups: Tensor, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """A 95 % interval of the accuracy where whole groups are drawn with replacement, as often as there are groups.

    The cluster bootstrap (Field and Welsh, JRSS B 2007): images of one camera or patient are not independent. hits (N,)
    bool, groups (N,) from 0.
    """
    right, images = torch.bincount(groups, weights=hits.double()), torch.bincount(groups).double()
    right, images = right[images > 0], images[images > 0]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(images), (draws, len(images)), generator=generator)
    found = right[drawn].sum(dim=1) / images[drawn].sum(dim=1)
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def shifted_table(rows: Sequence[Json]) -> str:
    """Rows of distribution, ratio and the accuracies of :func:`shifted` as a table, in percent."""
    names = ("top1", *GROUPS)
    lines = [f"{'test set, its ratio':<20}" + "".join(f"{name:>9}" for name in ("top-1 %", *GROUPS))]
    for row in rows:
        label = row["distribution"] + ("" if row["ratio"] == 1 else f" {row['ratio']:g}")
        lines.append(f"{label:<20}" + "".join(f"{percent(row[name]):>9}" for name in names))
    return "\n".join(lines)


def per_class_rows(rep: Report, class_names: Sequence[str], class_counts: Sequence[int]) -> list[ClassRow]:
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


def per_class_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """The rows of :func:`per_class_rows` as CSV text."""
    return csv_text(rows)


def csv_text(rows: Sequence[Mapping[str, object]], columns: list[str] | None = None) -> str:
    """Rows as CSV. Text that a spreadsheet would take for a formula is preceded by an apostrophe."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, columns or list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows({key: f"'{value}" if is_formula(value) else value for key, value in row.items()} for row in rows)
    return text.getvalue()


def is_formula(value: object) -> bool:
    """Whether a cell is text that a spreadsheet would compute."""
    first = unicodedata.normalize("NFKC", value).lstrip()[:1] if isinstance(value, str) else ""
    return isinstance(value, str) and (value[:1] in ("\t", "\r") or first in ("=", "+", "-", "@"))
