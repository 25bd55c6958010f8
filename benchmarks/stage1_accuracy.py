r"""Does the fast path change the result? The published loop, restated, against main_stage1.py, three seeds each.

    python -m benchmarks.stage1_accuracy --dataset digits
    python -m benchmarks.stage1_accuracy --dataset cifar100 --network resnet20 --epochs 5 --lr 0.1 --batch_size 128 \\
        --wd 5e-4

Both sides have the same data, network, initial weights, schedule and last epoch, without mirror averaging; order and
augmentation are drawn by each in its own way. ``--variant`` adds runs of main_stage1.py with further flags. Appends one
JSON line per run to --json, skips what stands there already, and prints a table.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from torch import nn

import datasets
import main_stage1
from benchmarks import append_line, published, read_lines
from benchmarks.published import make_loader
from models import build_model
from utils.metrics import Report, report, scores
from utils.system import pick_device, provenance
from utils.types import Json

FLAGS = ("network", "epochs", "lr", "batch_size", "wd")


def run_published(one: Json, seed: int, data_dir: str, device: torch.device) -> Report:
    """The published loop; its last epoch's scores."""
    data = datasets.load(one["dataset"], data_dir, imb_ratio=100)
    torch.manual_seed(seed)
    model = build_model(one["network"], data.num_classes, data.channels).to(device)
    optimizer = torch.optim.SGD(model.parameters(), one["lr"], momentum=0.9, weight_decay=one["wd"])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, one["epochs"])
    criterion = nn.CrossEntropyLoss()
    workers = 16 if device.type == "cuda" else 0
    train = make_loader(data.train, data.spec, one["batch_size"], train=True, workers=workers)
    for _ in range(one["epochs"]):
        published.train_epoch(model, train, criterion, optimizer)
        scheduler.step()
    test = make_loader(data.test, data.spec, 100, train=False)
    return report(published.validate(model, test, criterion, flip=False), data.test.labels, data.class_counts)


def run_here(one: Json, seed: int, data_dir: str, variant: str) -> Report:
    """main_stage1.py, silent but for its errors."""
    flags = [f"--{name} {one[name]}" for name in ("dataset", *FLAGS)]
    with contextlib.redirect_stdout(io.StringIO()):
        return main_stage1.main(shlex.split(f"{' '.join(flags)} --data_dir {data_dir} --seed {seed} {variant}"))


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", choices=("digits", "cifar100"))
    parser.add_argument("--network", default="resnet8")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--wd", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variant", nargs="*", default=[], help='more flags of main_stage1.py, as in "--amp bf16"')
    parser.add_argument("--data_dir", default="data/")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/stage1_accuracy.jsonl"))
    arguments = parser.parse_args()
    one = {name: getattr(arguments, name) for name in ("dataset", *FLAGS)}
    device = pick_device()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)

    for seed in arguments.seed:
        for path in ("published loop", "main_stage1.py", *(f"main_stage1.py {v}" for v in arguments.variant)):
            wanted = one | {"path": path, "seed": seed, "device": device.type}
            if any(wanted.items() <= line.items() for line in read_lines(arguments.json)):
                continue
            began = time.perf_counter()
            if path == "published loop":
                found = run_published(one, seed, arguments.data_dir, device)
            else:
                found = run_here(one, seed, arguments.data_dir, path.removeprefix("main_stage1.py"))
            about = provenance("-m benchmarks.stage1_accuracy", sys.argv[1:], device, time.perf_counter() - began)
            append_line(arguments.json, wanted | scores(found) | {"provenance": about})
    mine = [line for line in read_lines(arguments.json) if (one | {"device": device.type}).items() <= line.items()]
    frame = pd.DataFrame(mine).dropna(axis=1, how="all")
    columns = [name for name in ("top1", "many", "medium", "few") if name in frame]
    print(frame.groupby("path")[columns].agg(["mean", "std"]).mul(100).round(2).to_string())


if __name__ == "__main__":
    main()
