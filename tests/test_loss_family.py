"""Every loss against its equation written out."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from losses import softmax, weighted
from losses.softmax import SoftmaxLoss

COUNTS = [500, 120, 60, 20, 7, 5]
N = np.array(COUNTS, dtype=float)
PI = N / N.sum()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(9, 6, dtype=torch.float64) * 2, torch.tensor([0, 0, 1, 2, 3, 4, 5, 5, 0])


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def test_logit_adjustment_and_balanced_softmax(batch) -> None:
    logits, labels = batch
    rows = np.arange(9)
    for tau in (1.0, 2.5):
        log_p = log_softmax(logits.numpy() + tau * np.log(PI))
        expected = -log_p[rows, labels].mean()
        assert softmax.logit_adjustment(COUNTS, tau)(logits, labels).item() == pytest.approx(expected, rel=1e-6)
    log_p = log_softmax(logits.numpy() + np.log(N))
    assert softmax.balanced_softmax(COUNTS)(logits, labels).item() == pytest.approx(
        -log_p[rows, labels].mean(), rel=1e-6
    )


@pytest.mark.parametrize("gamma, tau", [(0.3, 1.2), (0.0, 1.7), (0.7, 0.0), (1.3, -0.5)])
def test_vector_scaling_and_class_temperatures(batch, gamma: float, tau: float) -> None:
    logits, labels = batch
    log_p = log_softmax(logits.numpy() / (N.max() / N) ** gamma + tau * np.log(PI))
    expected = -log_p[np.arange(9), labels].mean()
    assert softmax.vector_scaling(COUNTS, gamma, tau)(logits, labels).item() == pytest.approx(expected, rel=1e-6)
    if tau == 0:
        assert softmax.class_temperatures(COUNTS, gamma)(logits, labels).item() == pytest.approx(expected, rel=1e-6)


def test_the_gradient_of_the_family(batch) -> None:
    """All five numbers at once; a batch's weights are no part of a row's own gradient."""
    logits, labels = batch[0].requires_grad_(), batch[1]
    s, a, m, e, w = torch.rand(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.2
    e = e / 2
    loss = SoftmaxLoss(6, scale=s, offset=a, margin=m, smooth=e, weight=w)
    found = torch.autograd.grad(loss(logits, labels), logits)[0]
    for row, y, of_row in zip(logits.detach(), labels.tolist(), found):
        target = torch.full((6,), float(e[y]) / 6, dtype=torch.float64)
        target[y] += 1 - e[y]
        shifted = s * row + a
        shifted[y] -= m[y]
        expected = s * w[y] * (shifted.softmax(dim=0) - target) / w[labels].sum()
        assert of_row.numpy() == pytest.approx(expected.numpy(), abs=1e-7)


def test_ldam(batch) -> None:
    logits, labels = batch
    margins = N**-0.25
    margins *= 0.5 / margins.max()
    z = logits.numpy().copy()
    z[np.arange(9), labels] -= margins[labels]
    expected = -log_softmax(30 * z)[np.arange(9), labels].mean()
    assert softmax.ldam(COUNTS)(30 * logits, labels).item() == pytest.approx(expected, rel=1e-5)


def test_class_balanced_weights_and_loss(batch) -> None:
    logits, labels = batch
    effective = (1 - 0.9999**N) / (1 - 0.9999)
    weights = 1 / effective / (1 / effective).sum() * 6
    assert softmax.class_balanced_weights(COUNTS).numpy() == pytest.approx(weights)
    losses = -log_softmax(logits.numpy())[np.arange(9), labels] * weights[labels]
    expected = losses.sum() / weights[labels].sum()
    assert softmax.class_balanced(COUNTS)(logits, labels).item() == pytest.approx(expected, rel=1e-6)
    theirs = F.cross_entropy(logits, labels, weight=torch.from_numpy(weights))
    assert softmax.class_balanced(COUNTS)(logits, labels).item() == pytest.approx(theirs.item(), rel=1e-6)


def test_class_balanced_bce_of_weight_balancing(batch) -> None:
    logits, labels = batch
    effective = (1 - 0.9999**N) / (1 - 0.9999)
    weights = 1 / effective / (1 / effective).sum() * 6
    p = np.exp(log_softmax(logits.numpy()))
    total = 0.0
    for i, y in enumerate(labels.tolist()):
        for j in range(6):
            total -= weights[y] * (math.log(p[i, j]) if j == y else math.log(1 - p[i, j]))
    assert weighted.ClassBalancedBCE(COUNTS)(logits, labels).item() == pytest.approx(total / (9 * 6), rel=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999])
def test_class_balanced_sigmoid(batch, beta: float) -> None:
    logits, labels = batch
    weights = (1 - beta) / (1 - beta**N)
    weights = weights / weights.sum() * 6
    p, total = 1 / (1 + np.exp(-logits.numpy())), 0.0
    for i, y in enumerate(labels.tolist()):
        for j in range(6):
            total -= weights[y] * (math.log(p[i, j]) if j == y else math.log(1 - p[i, j]))
    assert weighted.ClassBalancedSigmoid(COUNTS, beta)(logits, labels).item() == pytest.approx(total / 9, rel=1e-6)


def test_generalised_reweighting(batch) -> None:
    logits, labels = batch
    weights = PI**-1.2
    losses = -log_softmax(logits.numpy())[np.arange(9), labels] * weights[labels]
    expected = losses.sum() / weights[labels].sum()
    assert softmax.generalised_reweighting(COUNTS)(logits, labels).item() == pytest.approx(expected, rel=1e-6)


def test_label_aware_smoothing(batch) -> None:
    logits, labels = batch
    e = 0.1 + 0.3 * np.sin(np.pi * (N - 5) / (2 * (500 - 5)))
    loss = softmax.label_aware_smoothing(COUNTS)
    assert loss.smooth.numpy() == pytest.approx(e) and loss.smooth[0].item() == pytest.approx(0.4)
    log_p = log_softmax(logits.numpy())
    expected = np.mean([-(1 - e[y]) * log_p[i, y] - e[y] * log_p[i].mean() for i, y in enumerate(labels.tolist())])
    assert loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_focal(batch, gamma: float) -> None:
    logits, labels = batch
    log_p = log_softmax(logits.numpy())[np.arange(9), labels]
    expected = -((1 - np.exp(log_p)) ** gamma * log_p).mean()
    assert weighted.Focal(gamma)(logits, labels).item() == pytest.approx(expected, rel=1e-6)


def test_lade(batch) -> None:
    logits, labels = batch
    z, y = logits.numpy(), labels.numpy()
    value = -log_softmax(z + np.log(PI))[np.arange(9), y].mean()
    for j in range(6):
        mine = z[y == j, j]
        first = mine.mean() if len(mine) else 0.0
        second = math.log(np.mean(np.exp(z[:, j] - math.log(PI[j]) - math.log(6))))
        value -= 0.1 * PI[j] * (first - second - 0.01 * second**2)
    assert weighted.LADE(COUNTS)(logits, labels).item() == pytest.approx(value, rel=1e-5)


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="no prior"):
        softmax.balanced_softmax([5, 0])
    with pytest.raises(ValueError, match="not in"):
        SoftmaxLoss(3, smooth=1.2)
    with pytest.raises(ValueError, match="positive"):
        SoftmaxLoss(3, weight=0.0)
    with pytest.raises(ValueError, match="scales must be positive"):
        SoftmaxLoss(3, scale=0.0)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_has_a_gradient_where_it_is_certain(gamma: float) -> None:
    logits = torch.tensor([[60.0, 0.0, 0.0], [0.0, 1.0, 0.0]], requires_grad=True)
    weighted.Focal(gamma)(logits, torch.tensor([0, 0])).backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all()) and logits.grad.abs().max() > 0.01
