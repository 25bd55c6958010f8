"""Stage 2: freezes stage 1's backbone and re-trains its linear classifier with over-smoothed labels.

    python main_stage2.py --imb_ratio 100 --cur_stage stage2 --label_smooth 0.98

is Label Over-Smooth's published command (20 epochs of SGD on ``fc``, lr 5e-4, no weight decay). It continues from the
file that main_stage1.py left for the same data. To expect, from others: 53.92 % on CIFAR-100-LT at ratio 100 (Zhao et
al., NeurIPS 2025, selection not stated).
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
from losses import LOSSES, auto_label_smooth
from stages import (
    HUGE,
    Evaluator,
    TrainOptions,
    begin,
    fill_options,
    finish,
    flags_of,
    load_data,
    open_checkpoint,
    restore,
    stage_option,
    train_batches,
)
from utils.checkpoints import IDENTITY
from utils.metrics import Report
from utils.options import Choice, Number, Text, UsageError, command, option, parse_typed
from utils.system import pick_device


@dataclass(frozen=True)
class Options(TrainOptions):
    """Stage 2's own options; those of every command are in stages.py."""

    cur_stage: str = stage_option("stage2")
    finetune_epoch: int = option(20, Number(int, 1), "epochs")
    finetune_lr: float = option(5e-4, Number(float, 0, HUGE, above=True), "learning rate, cosine to 0")
    finetune_wd: float = option(0.0, Number(float, 0, HUGE), "weight decay of the classifier")
    label_smooth: float | str = option(
        "auto",
        Number(float, 0, 1, words=("auto",)),
        "label smoothing d: true class 1 - d + d/C, others d/C; auto is C/(C+2.04), which is 0.98 at C = 100",
        published=0.98,
    )
    features: str = option(
        "views",
        Choice(("views", "replay")),
        "the frozen backbone's BatchNorm: views, in eval mode; replay, in train mode, so that its statistics drift",
        published="replay",
    )
    pretrained_pth: str | None = option(None, Text(), "stage 1's checkpoint; without it, the one it left by default")


@command
def main(argv: Sequence[str]) -> Report:
    """Runs the command; returns the selected epoch's report on the test set."""
    typed = parse_typed(Options, argv, "main_stage2.py", __doc__)
    parent = open_checkpoint(typed, "stage1", Options)
    if parent.stage == "stage2":
        raise UsageError(f"--pretrained_pth {parent.path} is a stage-2 file", "a stage-1 file")
    resolved = fill_options(Options, typed, "stage2", file=parent)
    options: Any = resolved.options
    val_indices = parent.data.get("val_indices", [])
    if options.select == "best_val" and not val_indices:
        raise UsageError(
            f"--select best_val: {parent.path} was trained without held-out images",
            f"last, best_test, or first: python main_stage1.py{flags_of(options, *IDENTITY)} --val_split 0.1",
        )

    device = pick_device(options.device, options.gpu)
    data = load_data(options, val_indices=val_indices)
    model = restore(parent, data)
    if options.label_smooth == "auto":
        options = replace(options, label_smooth=auto_label_smooth(data.num_classes))
    with begin(replace(resolved, options=options), "stage2", data, device) as run:
        run.say(f"from {parent.path}; label_smooth {options.label_smooth:.5g} at {data.num_classes} classes")
        model = model.to(device).requires_grad_(False)
        model.fc.requires_grad_(True)
        batches = train_batches(data, options.batch_size, options.seed, 2, device)
        criterion = LOSSES["ce"](options.label_smooth)
        optimizer = SGD(
            model.fc.parameters(),
            options.finetune_lr,
            options.momentum,
            weight_decay=options.finetune_wd,
            nesterov=options.nesterov,
        )
        scheduler = CosineAnnealingLR(optimizer, options.finetune_epoch)
        evaluator = Evaluator(run, data, device, options, options.finetune_epoch)

        for epoch in range(options.finetune_epoch):
            began, lr = time.perf_counter(), float(scheduler.get_last_lr()[0])
            model.train(options.features == "replay")
            steps = run.bar(batches.epoch(epoch), len(batches), f"epoch {epoch + 1}/{options.finetune_epoch}")
            train = train_epoch(model, steps, criterion, optimizer)
            scheduler.step()
            evaluator.after(epoch, model, train, lr, time.perf_counter() - began)

        return finish(run, "stage2", options, data, evaluator.selection, argv, device, parent=parent)


if __name__ == "__main__":
    main(sys.argv[1:])
