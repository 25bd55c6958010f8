"""The samplers against their laws: histograms within three standard deviations, published cycling, both ends."""

import pytest
import torch

from datasets.samplers import SAMPLERS

LABELS = torch.repeat_interleave(torch.arange(5), torch.tensor([4000, 800, 160, 30, 10]))[
    torch.randperm(5000, generator=torch.Generator().manual_seed(0))
]
COUNTS = torch.bincount(LABELS).double()


def draw(name: str, epoch: int = 0, epochs: int = 10, seed: int = 0) -> torch.Tensor:
    order = SAMPLERS[name](LABELS, epoch, epochs, torch.Generator().manual_seed(seed))
    assert order.shape == LABELS.shape and order.dtype == torch.int64
    assert torch.equal(order, SAMPLERS[name](LABELS, epoch, epochs, torch.Generator().manual_seed(seed)))
    return order


def check_law(order: torch.Tensor, law: torch.Tensor) -> None:
    law = law / law.sum()
    drawn = torch.bincount(LABELS[order], minlength=5).double()
    assert ((drawn - 5000 * law).abs() <= 3 * (5000 * law * (1 - law)).sqrt() + 4).all(), (drawn, 5000 * law)


def test_instance_balanced_is_a_permutation() -> None:
    assert torch.equal(draw("instance").sort().values, torch.arange(5000))


def test_class_balanced_cycles_through_classes_and_images() -> None:
    order = draw("class")
    assert torch.bincount(LABELS[order]).tolist() == [1000] * 5
    runs = LABELS[order].reshape(-1, 4)
    assert (runs == runs[:, :1]).all()  # four of a class in a row
    assert (runs[:, 0].reshape(-1, 5).sort(dim=1).values == torch.arange(5)).all()  # every round has every class
    for label, count in enumerate(COUNTS.int().tolist()):
        times = torch.bincount(order[LABELS[order] == label], minlength=5000)[LABELS.eq(label)]
        assert times.max() - times.min() <= 1 and times.sum() == 1000, (label, count)


def test_square_root() -> None:
    order = draw("sqrt")
    check_law(order, COUNTS.sqrt())
    assert len(order.unique()) < 5000  # with replacement


@pytest.mark.parametrize("epoch", [0, 4, 9])
def test_progressively_balanced(epoch: int) -> None:
    t = epoch / 9
    check_law(draw("progressive", epoch), (1 - t) * COUNTS / 5000 + t / 5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_seeds_matter_and_an_absent_class_is_never_drawn(name: str) -> None:
    assert not torch.equal(draw(name, seed=0), draw(name, seed=1))
    labels = torch.tensor([0, 0, 0, 2, 2, 5])
    for epoch in range(3):
        order = SAMPLERS[name](labels, epoch, 3, torch.Generator().manual_seed(epoch))
        assert set(order.tolist()) <= set(range(6)) and len(order) == 6
