"""How long stage 2 still takes: all of a command's classifiers, not those that are being trained."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import datasets
from engine import is_due
from experiment.data import EVAL_BATCH
from models import build_model
from retraining import forecast as forecast_module
from retraining.features import FEATURES, Stream, unseen
from retraining.forecast import Forecast
from retraining.methods import CE, CRT
from utils.pace import Pace

STREAMS = [Stream(0, "instance", 64, 8), Stream(0, "class", 64, 6), Stream(1, "instance", 32, 8)]

RUN: Any = {"seed": 0, "batch_size": 64}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("kind", ["views", "replay"])
def test_images_that_the_backbone_will_look_at_are_those_it_looks_at(kind: str, flip: bool, tmp_path: Path) -> None:
    data = datasets.load("digits", "", val_fraction=0.2)
    torch.manual_seed(0)
    model = build_model("resnet8", 10, 1)
    source = FEATURES[kind](model, data, torch.device("cpu"), str(tmp_path), "x", flip, unseen, EVAL_BATCH["cpu"], 5)
    expected, every = source.images_left(STREAMS, 3), 3
    for stream in STREAMS:
        for epoch in range(stream.epochs):
            for _ in source.epoch(stream, epoch):
                pass
            if is_due(epoch, stream.epochs, every):
                for part in ("test", "val"):
                    source.evaluated(part, stream, epoch)
    assert source.images == expected > 0
    assert source.images_left(STREAMS, every) == 0


@dataclass
class Clock:
    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now


@dataclass
class Source:
    seconds: float = 0.0
    images: int = 0
    lacking: dict[Stream, int] = field(default_factory=dict)

    def images_left(self, streams: list[Stream], every: int) -> int:
        return sum(self.lacking.get(stream, 0) for stream in streams)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(forecast_module, "time", clock)
    return clock


def test_what_is_left_is_all_classifiers(clock: Clock) -> None:
    heads = [CE(**RUN, finetune_epoch=10), replace(CE(**RUN, finetune_epoch=10), finetune_lr=0.5)]
    later, network = CRT(**RUN, finetune_epoch=5), CRT(**RUN, finetune_epoch=4, finetune_scope="all")
    source = Source(lacking={heads[0].stream: 300, later.stream: 700})
    frozen: Any = SimpleNamespace(source=source, data=SimpleNamespace(train=range(100)))
    forecast = Forecast([*heads, later, network], frozen, every=1)
    forecast.begin(heads, 10)
    assert forecast.left() is None
    # the first epoch: 6 s, of which 2 s for 200 images of the backbone and 2 s for each head
    clock.now, source.seconds, source.images = 6.0, 2.0, 200
    source.lacking[heads[0].stream] = 100
    forecast.end(heads, 9)
    of_backbone, of_heads, of_network = 0.01 * (100 + 700), 2.0 * (2 * 9 + 5), 4 * 3 * 100 * 0.01
    assert forecast.left() == pytest.approx(of_backbone + of_heads + of_network)

    forecast.end(heads, 0)
    forecast.end([later], 0)
    source.lacking.clear()
    assert forecast.left() == pytest.approx(of_network)
    forecast.begin([network], 4)
    clock.now += 50
    forecast.end([network], 3)  # measured now: no longer three passes
    assert forecast.left() == pytest.approx(3 * 50)
    forecast.begin([network], 0)
    assert forecast.left() == 0


def test_the_backbone_is_timed_where_all_features_were_in_the_cache(clock: Clock, monkeypatch) -> None:
    monkeypatch.setattr(forecast_module, "image_seconds", lambda frozen: 0.5)
    network = CRT(**RUN, finetune_epoch=4, finetune_scope="all")
    frozen: Any = SimpleNamespace(source=Source(), data=SimpleNamespace(train=range(100)))
    assert Forecast([network], frozen, every=1).left() == pytest.approx(4 * 3 * 100 * 0.5)


def test_a_command_says_once_what_all_of_it_takes(monkeypatch) -> None:
    clock, said = Clock(), list[str]()
    monkeypatch.setattr("utils.pace.time", clock)
    pace = Pace(20, 0, said.append, lambda: 7200.0)
    clock.now = 10
    pace.next_epoch()
    pace.next_epoch()
    assert said == ["about 2 h 0 min left in all"], said
    Pace(20, 0, said.append, lambda: 7200.0, is_announced=pace.is_announced).next_epoch()
    assert len(said) == 1
