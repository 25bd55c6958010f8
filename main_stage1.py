"""Stage 1: trains a backbone and its linear classifier on a long-tailed data set, with a tuned weight decay.

    python main_stage1.py --imb_ratio 100 --cur_stage stage1

is Label Over-Smooth's published command (CIFAR-100-LT, ResNet-34, 200 epochs of SGD, lr 0.01, weight decay 5e-3). To
expect, from others: 47.6 % (Zhao et al., NeurIPS 2025, same recipe, selection not stated); 46.76 % on the last epoch
without flip averaging (log of Weight Balancing's code, 320 epochs). On a CPU, a few seconds:

    python main_stage1.py --dataset digits
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from engine import train_epoch
from losses import LOSSES
from models import build_model
from stages import (
    HUGE,
    Evaluator,
    TrainOptions,
    begin,
    fill_options,
    finish,
    load_data,
    open_checkpoint,
    restore,
    stage_option,
    train_batches,
)
from utils.metrics import Report
from utils.options import Number, Text, UsageError, command, option, parse_typed
from utils.system import pick_device


@dataclass(frozen=True)
class Options(TrainOptions):
    """Stage 1's own options; those of every command are in stages.py."""

    cur_stage: str = stage_option("stage1")
    epochs: int = option(200, Number(int, 1), "epochs")
    lr: float = option(
        0.01, Number(float, 0, HUGE, above=True), "learning rate, cosine to 0", aliases=("learning_rate",)
    )
    wd: float = option(5e-3, Number(float, 0, HUGE), "weight decay of all parameters; the method is to tune it")
    label_smooth: float = option(0.0, Number(float, 0, 1), "label smoothing d: true class 1 - d + d/C, others d/C")
    val_split: float = option(0.0, Number(float, 0, 0.5), "share of every class held out, never seen by the backbone")
    pretrained_pth: str | None = option(None, Text(), "start from this checkpoint's weights, not from random ones")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select == "best_val" and self.val_split == 0:
            raise UsageError("--select best_val without held-out images", "--val_split F beside it, 0.1 for instance")
        if self.val_split > 0 and self.pretrained_pth is not None:
            raise UsageError("--val_split with --pretrained_pth, whose weights may know the images", "one of the two")


@command
def main(argv: Sequence[str]) -> Report:
    """Runs the command; returns the selected epoch's report on the test set."""
    typed = parse_typed(Options, argv, "main_stage1.py", __doc__)
    start = None
    if "pretrained_pth" in typed:  # its network and weights are taken, not its data
        start = replace(open_checkpoint(typed, "stage1", Options), data={})
    resolved = fill_options(Options, typed, "stage1", file=start)
    options: Any = resolved.options

    device = pick_device(options.device, options.gpu)
    data = load_data(options, val_fraction=options.val_split, val_seed=options.seed)
    started = restore(start, data) if start else None
    with begin(resolved, "stage1", data, device) as run:
        model = (started or build_model(options.network, data.num_classes, data.channels)).to(device)
        batches = train_batches(data, options.batch_size, options.seed, 1, device)
        criterion = LOSSES["ce"](options.label_smooth)
        optimizer = SGD(
            model.parameters(), options.lr, options.momentum, weight_decay=options.wd, nesterov=options.nesterov
        )
        scheduler = CosineAnnealingLR(optimizer, options.epochs)
        evaluator = Evaluator(run, data, device, options, options.epochs)

        for epoch in range(options.epochs):
            began, lr = time.perf_counter(), float(scheduler.get_last_lr()[0])
            model.train()
            steps = run.bar(batches.epoch(epoch), len(batches), f"epoch {epoch + 1}/{options.epochs}")
            train = train_epoch(model, steps, criterion, optimizer)
            scheduler.step()
            evaluator.after(epoch, model, train, lr, time.perf_counter() - began)

        return finish(run, "stage1", options, data, evaluator.selection, argv, device, parent=start)


if __name__ == "__main__":
    main(sys.argv[1:])
