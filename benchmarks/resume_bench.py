"""What resume costs: time and size of a state, and that a long run's memory and open files stay where they are.

    python -m benchmarks.resume_bench --out benchmarks/results/resume_bench.jsonl

ResNet-34 with its momentum and selected weights, saved five times, beside the time of a training step and of an epoch
of CIFAR-100-LT (ratio 100, 170 steps of 64 images). Then 500 epochs on digits, saved after every one; resident memory
and open files are read as it goes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import main_stage1
from benchmarks import append_line, timed
from engine import Selection, TrainStep, make_sgd
from models import build_model
from utils.command import command
from utils.metrics import Report
from utils.resume import TrainState
from utils.run import Run
from utils.system import pick_device, provenance
from utils.types import Json

STEPS = 170  # of 64 in 10,847 images


def state_cost(device: torch.device, folder: Path) -> Json:
    """Seconds and bytes of a save of ResNet-34, against an epoch; medians of five."""
    torch.manual_seed(0)
    model = build_model("resnet34", 100, 3).to(device).to(memory_format=torch.channels_last).train()
    step = TrainStep(model, nn.CrossEntropyLoss(), make_sgd(model.parameters(), 0.01, 0.9, 5e-3, False))
    images, labels = torch.rand(64, 3, 32, 32, device=device), torch.randint(100, (64,), device=device)
    steps = [timed(lambda: step(images, labels), device) for _ in range(4)][1:]
    selection = Selection("last")
    report: Report = {"top1": 0.0}
    selection.offer(1, model, report, None)
    with Run(folder) as run:
        state = TrainState(run, device, None, 1, {})
        with state.training("", step=step, selection=selection):
            saves = [timed(state.save, device) for _ in range(5)]
    (file,) = folder.glob("state-*.pt")
    seconds, epoch = statistics.median(saves), statistics.median(steps) * STEPS
    return {
        "state_mb": round(file.stat().st_size / 1e6, 1),
        "save_seconds": round(seconds, 2),
        "epoch_seconds": round(epoch, 1),
        "share_of_an_epoch": round(seconds / epoch, 4),
        "share_of_ten_minutes": round(seconds / 600, 5),
    }


def resources() -> dict[str, float]:
    """Resident memory in MB and the number of open files of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"rss_mb": pages * os.sysconf("SC_PAGE_SIZE") / 1e6, "files": len(os.listdir("/proc/self/fd"))}


def long_run(epochs: int) -> list[dict[str, float]]:
    """What :func:`resources` says every 50 epochs of a run on digits, and after it."""
    seen: list[dict[str, float]] = []
    next_epoch = TrainState.next_epoch

    def looking(self: TrainState) -> None:
        next_epoch(self)
        if self.epoch % 50 == 0:
            seen.append({"epoch": self.epoch, **resources()})

    TrainState.next_epoch = looking  # type: ignore[method-assign]
    try:
        main_stage1.main(f"--dataset digits --epochs {epochs} --seed 0 --save_every 1 --threads 1".split())
    finally:
        TrainState.next_epoch = next_epoch  # type: ignore[method-assign]
    return [*seen, {"epoch": epochs + 1, **resources()}]


@command
def main(argv: list[str]) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines to add to")
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    device, out = pick_device("cpu", threads=options.threads), options.out and options.out.resolve()
    about = provenance("-m benchmarks.resume_bench", argv, device, 0)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        Path("state").mkdir()
        lines = [{"part": "state", **state_cost(device, Path("state"))}]
        lines += [{"part": "long run", **line} for line in long_run(options.epochs)]
        os.chdir("/")
    for line in lines:
        print(json.dumps(line))
        append_line(out, line | {"provenance": about})
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
