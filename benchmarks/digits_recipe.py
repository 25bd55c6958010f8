"""Chooses the digits recipe's classifier settings without its test set.

    python -m benchmarks.digits_recipe

Thirty images of every class are taken from the end of the training pool as a balanced development set; what is left is
made long-tailed (94 to 1 images) and goes through both stages for five seeds. Prints the mean development accuracy of
every setting; writes benchmarks/results/digits_recipe.csv. About two minutes on two CPU cores.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pandas as pd
import torch

from datasets import DATASETS, Batches, ImageOptions
from datasets.longtail import choose_subset, class_sizes
from engine import TrainStep, cosine, evaluate, make_sgd, set_lr, train_epoch
from losses import SoftmaxLoss, auto_label_smooth
from models import Network, build_model
from training.options import Options
from utils.options import resolve

SPEC = DATASETS["digits"]
RECIPE = resolve(Options, {"dataset": "digits"}, SPEC.recipes).options
LABEL_SMOOTH = (auto_label_smooth(10), 0.9)
FINETUNE_LR = (0.005, 0.01, 0.02, 0.05)
FINETUNE_EPOCH = (20, 40, 60)


def train(model: Network, batches: Batches, smooth: float, lr: float, wd: float, epochs: int, frozen: bool) -> None:
    """Both stages' loop, without logging: the whole model, or ``fc`` alone in eval mode where ``frozen``."""
    model.requires_grad_(not frozen).fc.requires_grad_(True)
    optimizer = make_sgd([p for p in model.parameters() if p.requires_grad], lr, 0.9, wd, nesterov=False)
    step = TrainStep(model, SoftmaxLoss(10, smooth=smooth), optimizer)
    for epoch in range(epochs):
        model.train(not frozen)
        set_lr(optimizer, lr * cosine(epoch, epochs))
        train_epoch(step, batches.epoch(epoch), epoch, lr)


def main() -> None:
    """Runs the grid."""
    pool, _, names, *_ = SPEC.read("", ImageOptions())
    dev_positions = torch.cat([torch.nonzero(pool.labels == i).flatten()[-30:] for i in range(len(names))])
    rest = torch.ones(len(pool), dtype=torch.bool)
    rest[dev_positions] = False
    source, dev = pool.take(torch.nonzero(rest).flatten()), pool.take(dev_positions)
    counts = class_sizes(int(torch.bincount(source.labels).min()), len(names), 100)
    lt = source.take(choose_subset(source.labels, counts))
    device = torch.device("cpu")
    dev_batches = Batches(dev.images, dev.labels, 250, SPEC.mean, SPEC.std, device)
    rows = []
    for seed in range(5):
        torch.manual_seed(seed)
        model = build_model("resnet8", len(names), 1)
        batches = Batches(lt.images, lt.labels, 64, SPEC.mean, SPEC.std, device, SPEC.augment, (seed,))
        train(model, batches, 0, RECIPE.lr, 5e-3, RECIPE.epochs, frozen=False)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        runs: list[tuple[float, float, int]] = [(0.0, 0.0, 0)]
        runs += itertools.product(LABEL_SMOOTH, FINETUNE_LR, FINETUNE_EPOCH)
        for smooth, lr, epochs in runs:
            model.load_state_dict(state)
            if epochs:
                train(model, batches, smooth, lr, 0, epochs, frozen=True)
            report = evaluate(model, dev_batches, counts)
            few = report["groups"]["few"]["accuracy"]
            rows.append((seed, round(smooth, 3), lr, epochs, report["top1"], few))
    table = pd.DataFrame(rows, columns=["seed", "label_smooth", "finetune_lr", "finetune_epoch", "all", "few"])
    table.to_csv(Path(__file__).parent / "results" / "digits_recipe.csv", index=False)
    settings = ["label_smooth", "finetune_lr", "finetune_epoch"]
    print(table.groupby(settings)[["all", "few"]].mean().sort_values("all").mul(100).round(1).to_string())


if __name__ == "__main__":
    main()
