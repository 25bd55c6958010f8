"""Figures of a run, as PNG: learning curves and accuracy per class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from utils.metrics import GROUPS, Report, percent

#: Colour-blind safe (Okabe and Ito, 2008).
COLOURS = {"train": "#999999", "test": "#000000", "many": "#0072B2", "medium": "#009E73", "few": "#D55E00"}


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def learning_curves(epochs: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Loss on the left, accuracy of train, test and the three groups on the right, against the epoch.

    Args:
        epochs: the records of metrics.jsonl; measures that are missing or None are left out.
        title: heading of the figure.
        path: PNG to write.
    """
    figure = _figure(9, 3.6)
    loss_axes, axes = figure.subplots(1, 2)
    loss_axes.plot([r["epoch"] for r in epochs], [r["train_loss"] for r in epochs], color=COLOURS["train"])
    loss_axes.set(xlabel="epoch", ylabel="training loss (nats)")
    curves = {"train": "train_top1", "test": "test_top1", **{group: f"test_{group}" for group in GROUPS}}
    for name, key in curves.items():
        points = [(r["epoch"], 100 * r[key]) for r in epochs if r.get(key) is not None]
        if points:
            marker = "o" if len(points) < 30 and name != "train" else None
            label = name if name in ("train", "test") else f"test, {name}"
            axes.plot(*zip(*points), label=label, color=COLOURS[name], marker=marker, markersize=3)
    axes.set(xlabel="epoch", ylabel="top-1 accuracy (%)", ylim=(0, 102))
    axes.legend(fontsize="small", ncols=2)
    for each in (loss_axes, axes):
        each.grid(alpha=0.3)
        each.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title)
    figure.savefig(path)


def per_class_accuracy(rep: Report, rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """A bar per class, the most frequent first, with many/medium/few shaded and the training images as a line.

    Args:
        rep: the report that the rows are of; its group accuracies stand in the legend.
        rows: see :func:`utils.metrics.per_class_rows`.
        title: heading of the figure.
        path: PNG to write.
    """
    ordered = sorted(rows, key=lambda row: -row["train_images"])
    places = range(len(ordered))
    figure = _figure(min(max(6.0, 0.12 * len(ordered)), 14.0), 4)
    axes = figure.subplots()
    for group in GROUPS:
        members = [i for i in places if ordered[i]["group"] == group]
        if members:
            label = f"{group}: {percent(rep['groups'][group]['accuracy'], 1)} %"
            heights = [100 * (ordered[i]["accuracy"] or 0) for i in members]
            axes.bar(members, heights, color=COLOURS[group], width=0.9, label=label)
            axes.axvspan(members[0] - 0.5, members[-1] + 0.5, color=COLOURS[group], alpha=0.1, lw=0)
    axes.set(xlim=(-0.5, len(ordered) - 0.5), ylim=(0, 102), ylabel="top-1 accuracy (%)")
    axes.set_xlabel("classes, most training images first")
    if len(ordered) <= 20:
        axes.set_xticks(places, [row["name"] for row in ordered])
    counts = axes.twinx()
    counts.plot(places, [row["train_images"] for row in ordered], color="black", lw=1, label="training images")
    counts.set(yscale="log", ylabel="training images")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path)
