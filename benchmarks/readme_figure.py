"""Draws the README's figure: what 21 ways to re-train a classifier do to classes with many, medium and few images.

    python -m benchmarks.readme_figure

reads benchmarks/results/cifar100_resnet20_compare.csv, which compare.py wrote, and writes docs/images/methods.png.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from utils.files import atomic
from utils.metrics import GROUPS
from utils.plots import COLOURS
from utils.system import ROOT

SOURCE = ROOT / "benchmarks" / "results" / "cifar100_resnet20_compare.csv"
TARGET = ROOT / "docs" / "images" / "methods.png"
#: Stage 1's classifier as it is: what the dashed lines show.
BASELINE = "joint"
WORDS = {"many": "many (> 100 images)", "medium": "medium (20 to 100)", "few": "few (< 20)", "all": "all classes"}


def draw(table: pd.DataFrame) -> Figure:
    """A row for each method, the best over all classes at the top; a dot for each group of classes."""
    table = table.sort_values("all").reset_index(drop=True)
    figure = Figure(figsize=(8.4, 6.2), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    FigureCanvasAgg(figure)
    axes, rows = figure.subplots(), range(len(table))
    stage1 = table[table["method"] == BASELINE].iloc[0]
    for name in (*GROUPS, "all"):
        marker, size = ("D", 18) if name == "all" else ("o", 62)
        axes.axvline(100 * float(stage1[name]), color=COLOURS[name], lw=0.9, ls=(0, (4, 3)), alpha=0.6, zorder=1)
        dots = axes.scatter(100 * table[name], rows, size, COLOURS[name], marker=marker, zorder=3)
        dots.set_label(WORDS[name])
    labels = [f"{name} (stage 1)" if name == BASELINE else str(name) for name in table["method"]]
    axes.set_yticks(rows, labels)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith(BASELINE) else "normal")
    axes.plot([], [], color="black", lw=0.9, ls=(0, (4, 3)), label="stage 1")
    axes.set(xlim=(0, 70), ylim=(-0.7, len(table) - 0.3), xlabel="top-1 accuracy on the test set (%)")
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.set_title("CIFAR-100-LT, ratio 100, ResNet-20: 21 classifiers on one backbone, default values", fontsize=11)
    figure.legend(loc="outside lower center", ncols=5, fontsize=9.5, frameon=False)
    return figure


def main() -> None:
    """Reads the table and writes the figure."""
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    figure = draw(pd.read_csv(SOURCE))
    with atomic(TARGET) as path:
        figure.savefig(path, format="png")


if __name__ == "__main__":
    main()
