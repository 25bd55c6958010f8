"""The number of CPU threads of a long run."""

from __future__ import annotations

import copy

import pytest
import torch

from experiment import threads
from experiment.threads import settle_threads
from models import build_model

CPU = torch.device("cpu")


@pytest.fixture
def two_threads(monkeypatch) -> list[int]:
    """Two threads, in name alone; what was asked for."""
    asked = [2]
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked[-1])
    return asked


@pytest.mark.parametrize(
    ("slow", "images", "chosen", "expected"),
    [
        (5.0, 10**6, None, 1),
        (1.2, 10**6, None, None),
        (5.0, 100, None, None),
        (5.0, 20_000, None, None),
        (5.0, 10**6, 2, 2),
    ],
)
@pytest.mark.parametrize("trains", [True, False])
def test_one_thread_where_two_wait_for_each_other(
    slow: float, images: int, chosen: int | None, expected: int | None, trains: bool, two_threads, monkeypatch, capsys
) -> None:
    now = [0.0]
    monkeypatch.setattr(threads.time, "perf_counter", lambda: now[0])
    model = build_model("resnet8", 10, 1).train(trains)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 0.01 * (slow if two_threads[-1] == 2 else 1)))
    found = settle_threads(lambda: copy.deepcopy(model) if trains else model, (1, 8, 8), images, CPU, chosen, trains)
    assert found == expected and two_threads[-1] == (1 if expected == 1 else 2)
    assert ("make each other wait" in capsys.readouterr().out) == (expected == 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
