"""A run that is cut off and resumed ends in the bits of one that was not: weights, records, what was selected."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
import torch

import compare
import main_stage1
import main_stage2
from utils import signals
from utils.resume import TrainState, state_files

DIGITS = ["--dataset", "digits", "--seed", "0"]
STAGE1, STAGE2 = (Path(f"checkpoints/digits_exp100_resnet8_{stage}.pt") for stage in ("stage1", "stage2"))
MAINS = {"main_stage1.py": main_stage1.main, "main_stage2.py": main_stage2.main, "compare.py": compare.main}


def equal(one, other) -> bool:
    """The same tensors, to the bit, and the same values, whatever holds them; times apart."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        names = [name for name in one if name != "seconds"]
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in names)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other or (one != one and other != other)


def outcome(script: str, folder: Path) -> list:
    """Everything that a finished run leaves, but provenance and options."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".pt":
            file = torch.load(path, weights_only=True)
            parent = {key: value for key, value in (file["parent"] or {}).items() if key in ("sha256", "seed")}
            found.append((name, file["model"], file["metrics"], file["data"], parent, file["head"], file["stem"]))
        if path.name == "metrics.jsonl":
            found.append((name, [json.loads(line) for line in path.read_text().splitlines()]))
        if path.name == "finished.json":
            found.append((name, json.loads(path.read_text())["result"]))
    assert found
    return found


class Interruptions:
    """Sends the process a signal after given numbers of steps and epochs, counted over all of its life."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at, self.number = 0, frozenset[int](), signal.SIGTERM
        for name in ("advance", "next_epoch"):
            monkeypatch.setattr(TrainState, name, self.counted(getattr(TrainState, name)))
        monkeypatch.setattr("utils.distributed.signals.check", self.counted(signals.check))

    def counted(self, call):
        def counting(*arguments, **options):
            self.count += 1
            if self.count in self.at:
                signal.raise_signal(self.number)
            return call(*arguments, **options)

        return counting


@pytest.fixture
def interruptions(monkeypatch) -> Interruptions:
    return Interruptions(monkeypatch)


def run_folder(out: str) -> Path:
    """The folder of the only run under --out."""
    (options,) = Path(out).glob("*/*/options.json")
    return options.parent


def cut_off_and_resumed(script: str, arguments: list[str], interruptions: Interruptions, at: list[int]) -> None:
    """Compares a run that is cut off at some moments, each time resumed, with one that is not."""
    main = MAINS[script]
    result = main([*arguments, "--out", "whole"])
    total, interruptions.count = interruptions.count, 0
    interruptions.at = frozenset(1 + place * total // 100 for place in at)
    status = []
    while True:
        try:
            resumed = main([*arguments, "--out", "cut", "--resume", "auto"])
            break
        except SystemExit as stop:
            status.append(stop.code)
            assert len(status) <= len(at)
            assert state_files(run_folder("cut")) or any(map(state_files, run_folder("cut").glob("*/")))
    assert status == [143] * len(interruptions.at)
    assert equal(resumed, result)
    assert equal(outcome(script, run_folder("cut")), outcome(script, run_folder("whole")))
    assert not list(Path("cut").rglob("state-*")) and not list(Path().rglob("*.tmp"))


RECIPES = {
    "plain": "",
    "policies": "--aug autoaugment+cutout --batch_size 3",
    "mixed": "--mixup 0.2 --cutmix 1 --aug randaugment",
    "ema": "--ema 0.9 --momentum 0.5 --nesterov",
    "drw": "--loss ldam --head cosine --drw_epoch 1",
    "class": "--sampler class --loss lade",
    "sqrt": "--sampler sqrt --constraint l2 --warmup_epochs 1",
    "progressive": "--sampler progressive --accum 2 --constraint maxnorm",
    "val": "--val_split 0.2 --select best_val --eval_every 1",
    "published": "--protocol published",
    "frozen": "--pretrained_pth start.pt --train_scope last_block",
    "sweep": "--wd 0 0.1 --seed 0 1",
    "losses": "--loss ce focal --val_split 0.2",
}


@pytest.mark.parametrize("name", RECIPES)
def test_stage1_ends_in_the_same_bits(workdir, interruptions, name: str) -> None:
    if name == "frozen":
        main_stage1.main([*DIGITS, "--epochs", "1"])
        STAGE1.rename("start.pt")
        interruptions.count = 0
    arguments = [*DIGITS, "--epochs", "3", *RECIPES[name].split()]
    cut_off_and_resumed("main_stage1.py", arguments, interruptions, [7, 29, 50, 51, 93])
