"""S heads at once equal S separate torch.optim.SGD runs, whatever their losses and settings."""

import pytest
import torch
from torch import nn

from losses import softmax
from losses.softmax import SoftmaxLoss
from retraining.solver import LinearHeads

COUNTS = [60, 20, 9, 4, 2]
LOSSES = [
    SoftmaxLoss(5),
    SoftmaxLoss(5, smooth=0.83),
    softmax.balanced_softmax(COUNTS),
    softmax.class_balanced(COUNTS),
    softmax.ldam(COUNTS, scale=4),
    softmax.label_aware_smoothing(COUNTS),
    softmax.generalised_reweighting(COUNTS),
]
LR = [0.1, 0.02, 0.05, 0.1, 0.01, 0.1, 0.03]
WD = [0.0, 1e-3, 0.0, 1e-2, 5e-2, 0.0, 1e-4]


def stream(epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(epoch)
    features = torch.randn(70, 12, generator=generator).relu()
    labels = torch.randint(5, (70,), generator=generator)
    return list(zip(features.split(16), labels.split(16)))  # the last batch has six


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_heads_equal_separate_runs(chunk: int | None, nesterov: bool) -> None:
    torch.manual_seed(0)
    start = nn.Linear(12, 5)
    heads = LinearHeads(start.weight, start.bias, LOSSES, LR, WD, 0.9, nesterov, chunk)
    for epoch in range(3):
        heads.train_epoch(stream(epoch), rate=1 - epoch / 3)
    for loss, lr, wd, (weight, bias) in zip(LOSSES, LR, WD, heads.weights()):
        alone = nn.Linear(12, 5)
        alone.load_state_dict(start.state_dict())
        optimizer = torch.optim.SGD(alone.parameters(), lr, momentum=0.9, weight_decay=wd, nesterov=nesterov)
        for epoch in range(3):
            optimizer.param_groups[0]["lr"] = lr * (1 - epoch / 3)
            for features, labels in stream(epoch):
                optimizer.zero_grad()
                loss(alone(features), labels).backward()
                optimizer.step()
        assert (alone.weight - start.weight).abs().max() > 1e-3
        assert (weight - alone.weight).abs().max() < 1e-6 and (bias - alone.bias).abs().max() < 1e-6


def test_logits_are_each_heads() -> None:
    start = nn.Linear(12, 5)
    heads = LinearHeads(start.weight, start.bias, LOSSES, LR, WD, chunk=3)
    heads.train_epoch(stream(0))
    features = torch.randn(7, 12)
    for logits, (weight, bias) in zip(heads.logits(features), heads.weights(), strict=True):
        assert torch.allclose(logits, features @ weight.T + bias, atol=1e-6)
