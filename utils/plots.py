"""Figures of a run, as PNG: learning curves and accuracy per class."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from torch import Tensor

from utils.console import plain as control_free
from utils.metrics import GROUPS, ClassRow, Report, percent
from utils.types import Record

#: Colour-blind safe (Okabe and Ito, 2008).
COLOURS = {
    "train": "#999999",
    "test": "#000000",
    "all": "#000000",
    "many": "#0072B2",
    "medium": "#009E73",
    "few": "#D55E00",
}
#: What the panels of :func:`class_profiles` show.
PROFILE_HEADINGS = ("top-1 accuracy (%)", "Logits Magnitude, relative to its mean", "weight norm, relative to its mean")

#: A value of an option, and mean and deviation of {all, many, medium, few} at it; None for an empty group.
Point = tuple[float, dict[str, tuple[float, float] | None]]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, since it is slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(text: str) -> str:
    """A text that Matplotlib draws as it stands: between two dollar signs it would see a formula.

    Bytes of a file name that are no UTF-8 become question marks.
    """
    return control_free(text.encode(errors="replace").decode()).replace("$", r"\$")


def learning_curves(epochs: Sequence[Record], title: str, path: Path) -> None:
    """Loss on the left, accuracy of train, test and the three groups on the right, against the epoch.

    Args:
        epochs: the records of metrics.jsonl; measures that are missing or None are left out.
        title: heading of the figure.
        path: PNG to write.
    """
    figure = _figure(9, 3.6)
    loss_axes, axes = figure.subplots(1, 2)
    dot = "o" if len(epochs) < 30 else None  # of a single epoch no line would be seen
    losses = [r["train_loss"] for r in epochs]
    loss_axes.plot([r["epoch"] for r in epochs], losses, color=COLOURS["train"], marker=dot, markersize=3)
    loss_axes.set(xlabel="epoch", ylabel="training loss (nats)")
    curves = {"train": "train_top1", "test": "test_top1", **{group: f"test_{group}" for group in GROUPS}}
    for name, key in curves.items():
        points = [(r["epoch"], 100 * value) for r in epochs if (value := r.get(key)) is not None]
        if points:
            marker = "o" if len(points) < 30 else None
            label = name if name in ("train", "test") else f"test, {name}"
            axes.plot(*zip(*points), label=label, color=COLOURS[name], marker=marker, markersize=3)
    axes.set(xlabel="epoch", ylabel="top-1 accuracy (%)", ylim=(0, 102))
    axes.legend(fontsize="small", ncols=2)
    for each in (loss_axes, axes):
        each.grid(alpha=0.3)
        each.xaxis.get_major_locator().set_params(integer=True)
        if len(epochs) == 1:
            each.set_xticks([epochs[0]["epoch"]])
    figure.suptitle(plain(title))
    figure.savefig(path, format="png")


def per_class_accuracy(rep: Report, rows: Sequence[ClassRow], title: str, path: Path) -> None:
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
        names = [textwrap.shorten(plain(row["name"]), 24, placeholder="…") for row in ordered]
        is_tight = sum(map(len, names)) > 60
        axes.set_xticks(places, names, rotation=45 if is_tight else 0, ha="right" if is_tight else "center")
    counts = axes.twinx()
    counts.plot(places, [row["train_images"] for row in ordered], color="black", lw=1, label="training images")
    counts.set(yscale="log", ylabel="training images")
    axes.set_title(plain(title))
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, format="png")


def option_curves(curves: Mapping[str, Sequence[Point]], option: str, title: str, path: Path) -> None:
    """Test accuracy of all classes and the three groups against an option's values, one panel per method.

    Args:
        curves: per method (value, measures) in rising order; measures maps all, many, medium, few to mean and
            standard deviation over seeds as fractions, or None for an empty group.
        option: its name.
        title: heading of the figure.
        path: PNG to write.
    """
    figure = _figure(max(5.0, 3.6 * len(curves)), 4)
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (method, points) in zip(panels, curves.items()):
        places = range(len(points))
        for name in ("all", *GROUPS):
            found = [(place, pair) for place, (_, measures) in zip(places, points) if (pair := measures[name])]
            if found:
                heights, bars = ([100 * pair[k] for _, pair in found] for k in (0, 1))
                axes.errorbar(
                    [place for place, _ in found],
                    heights,
                    bars,
                    label=name,
                    color=COLOURS[name],
                    marker="o",
                    ms=3,
                    capsize=2,
                )
        axes.set(title=plain(method), xlabel=f"{option} (evenly spaced)")
        axes.set_xticks(places, [f"{value:.4g}" for value, _ in points], rotation=60 if len(points) > 6 else 0)
        axes.grid(alpha=0.3)
    low, high = panels[0].get_ylim()  # error bars may reach beyond what an accuracy can be
    panels[0].set(ylabel="test top-1 accuracy (%)", ylim=(max(low, -2), min(high, 102)))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.suptitle(plain(title))
    figure.savefig(path, format="png")


def class_profiles(
    profiles: Mapping[str, Mapping[str, Sequence[float | None]]], class_counts: Sequence[int], title: str, path: Path
) -> None:
    """Accuracy, Logits Magnitude and weight norm of every class against its training images, a colour per method.

    Args:
        profiles: per method per_class, logits_magnitude and weight_norm, (C,) each. Magnitude and norm are drawn
            relative to their mean over classes, since their scale differs between kinds of classifier.
        class_counts: (C,) training images.
        title: heading of the figure.
        path: PNG to write.
    """
    from matplotlib import colormaps

    figure = _figure(12, 4.2)
    panels = figure.subplots(1, 3)
    order = sorted(range(len(class_counts)), key=lambda i: class_counts[i])
    window = max(1, len(order) // 10)  # lines are running means over a tenth of the classes
    for place, (method, measures) in enumerate(profiles.items()):
        for axes, name in zip(panels, ("per_class", "logits_magnitude", "weight_norm")):
            found = [(class_counts[i], value) for i in order if (value := measures[name][i]) is not None]
            values = [value for _, value in found]
            mean = sum(values) / len(values)
            if name != "per_class" and not (0 < mean < math.inf):
                continue  # nothing to be relative to
            scale = 100 if name == "per_class" else 1 / mean
            colour = f"C{place}" if len(profiles) <= 10 else colormaps["turbo"](place / (len(profiles) - 1))
            axes.plot([x for x, _ in found], [scale * y for y in values], ".", ms=3, alpha=0.4, color=colour)
            ends = range(window, len(found) + 1)
            xs = [math.exp(sum(math.log(x) for x, _ in found[e - window : e]) / window) for e in ends]
            ys = [scale * sum(values[e - window : e]) / window for e in ends]
            axes.plot(xs, ys, color=colour, label=plain(method))
    for axes, heading in zip(panels, PROFILE_HEADINGS):
        axes.set(xscale="log", xlabel="training images of the class", ylabel=heading)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(profiles), 6), fontsize="small")
    figure.suptitle(plain(title))
    figure.savefig(path, format="png")


class Pictured(NamedTuple):
    """An image (c, H, W) uint8 of a contact sheet with its words; ``is_right`` gives them a colour."""

    image: Tensor
    words: str
    is_right: bool | None = None


def contact_sheet(images: Sequence[Pictured], path: Path, title: str = "") -> None:
    """Images in rows, each below its words: green where they are right, red where not, black where that is not known.

    Args:
        images: what to draw and to write.
        path: PNG to write.
        title: above all of them.
    """
    columns = min(8, max(1, math.ceil(math.sqrt(len(images)))))
    rows = max(1, -(-len(images) // columns))
    wrapped = [[line for words in each.words.split("\n") for line in textwrap.wrap(words, 24)] for each in images]
    lines = max(map(len, wrapped), default=1)
    figure = _figure(1.7 * columns, (1.6 + 0.14 * lines) * rows)
    colours = {True: COLOURS["medium"], False: COLOURS["few"], None: "black"}
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, each, text in zip(figure.axes, images, wrapped):
        axes.imshow(each.image.permute(1, 2, 0).expand(-1, -1, 3).numpy())
        axes.set_title(plain("\n".join(text)), fontsize=7, color=colours[each.is_right])
    if title:
        figure.suptitle(plain(title), fontsize=8)
    figure.savefig(path, format="png")
