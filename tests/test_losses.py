import math

import pytest
import torch

from losses import LOSSES, SoftmaxLoss, auto_label_smooth, balances, class_balanced_weights, make_loss, reweighted


def longhand(logits: torch.Tensor, labels: torch.Tensor, d: float) -> float:
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist()):
        normaliser = math.log(sum(math.exp(z) for z in row))
        for j, z in enumerate(row):
            y = 1 - d + d / len(row) if j == label else d / len(row)
            total -= y * (z - normaliser)
    return total / len(labels)


@pytest.mark.parametrize("d", [0.0, 0.1, 0.5, 0.9, 0.98, 1.0])
def test_label_smoothing_equals_its_equation(d: float) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 12, dtype=torch.float64), torch.randint(12, (7,))
    assert SoftmaxLoss(12, smooth=d)(logits, labels).item() == pytest.approx(longhand(logits, labels, d), abs=1e-12)


def targets_of(num_classes: int, d: float) -> torch.Tensor:
    """The label distribution behind the loss, read off its gradient at equal logits, which is 1/C - y."""
    logits = torch.zeros(1, num_classes, dtype=torch.float64, requires_grad=True)
    SoftmaxLoss(num_classes, smooth=d)(logits, torch.tensor([3])).backward()
    return 1 / num_classes - logits.grad[0]


def test_over_smoothed_targets_are_the_published_ones() -> None:
    targets = targets_of(100, 0.98)
    assert targets.sum().item() == pytest.approx(1)
    assert targets[3].item() == pytest.approx(0.0298) and targets[4].item() == pytest.approx(0.0098)


@pytest.mark.parametrize("classes, d", [(10, 0.831), (100, 0.980), (365, 0.99444), (1000, 0.998), (8142, 0.99975)])
def test_auto_keeps_the_published_ratio(classes: int, d: float) -> None:
    auto = auto_label_smooth(classes)
    assert auto == pytest.approx(d, abs=5e-4 if d < 0.99 else 5e-5)
    target = targets_of(classes, auto)
    assert (target[3] / target[0]).item() == pytest.approx(3.04, rel=1e-6)


@pytest.mark.parametrize("d", [-0.1, 1.1, math.nan])
def test_label_smoothing_refuses_values_outside_its_range(d: float) -> None:
    with pytest.raises(ValueError, match="not in"):
        SoftmaxLoss(4, smooth=d)


@pytest.mark.parametrize("name", LOSSES)
def test_table_of_losses(name: str) -> None:
    """Balanced classes and equal logits: every loss is a multiple of what an undecided network pays."""
    undecided = torch.zeros(2, 4), torch.tensor([0, 1])
    loss = make_loss(name, [5, 5, 5, 5], {"focal_gamma": 0, "lade_alpha": 0, "ldam_margin": 0})(*undecided).item()
    bce = (math.log(4) + 3 * math.log(4 / 3)) / 4
    others = {"class-balanced-bce": bce, "class-balanced-sigmoid": 4 * math.log(2)}
    assert loss == pytest.approx(others.get(name, math.log(4)), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_every_option_of_a_loss_makes_a_difference(name: str) -> None:
    torch.manual_seed(0)
    counts, logits, labels = [50, 9, 4, 2], torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 0])
    plain = make_loss(name, counts, {})(logits, labels).item()
    for option in LOSSES[name][1]:
        changed = make_loss(name, counts, {option: 0.7})(logits, labels).item()
        assert abs(changed - plain) > 1e-4, option
    assert make_loss(name, counts, {"la_tau": None, "smooth": 0.5})(logits, labels).item() == plain


def test_which_losses_balance_classes() -> None:
    plain = {"ce", "ldam", "label-aware-smoothing", "focal"}
    assert {name for name in LOSSES if not balances(make_loss(name, [50, 9, 4, 2], {}))} == plain
    assert not any(balances(make_loss(name, [5, 5, 5, 5], {})) for name in LOSSES)


def test_reweighted_changes_the_weights_alone() -> None:
    torch.manual_seed(0)
    counts, logits, labels = [50, 9, 4, 2], torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 0])
    weights = class_balanced_weights(counts, 0.99)
    for name, values in ("ce", {"label_smooth": 0.3}), ("ldam", {}), ("logit-adjustment", {}), ("vs", {}):
        loss = make_loss(name, counts, values)
        rows = torch.stack([loss(logits[i : i + 1], labels[i : i + 1]) for i in range(6)])
        expected = (rows * weights[labels]).sum() / weights[labels].sum()
        assert reweighted(loss, weights)(logits, labels).item() == pytest.approx(expected.item(), rel=1e-5)
